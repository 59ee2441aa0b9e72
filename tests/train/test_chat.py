"""Which tokens of a conversation are learned: against each family's format written out by hand."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors

from outsize.errors import DataError
from outsize.train.data.chat import render
from outsize.train.data.examples import examples_of, learned_tokens
from outsize.train.data.records import Record
from tests.train.families import FAMILIES, chat_tokenizer

TOKENIZERS = {name: chat_tokenizer(template) for name, (template, _, _) in FAMILIES.items()}

words = st.sampled_from(
    ["hello", " ", "there", "\n", "what", "<|im_end|>", "é", "🥊", "one two", ".", "[/INST]", "<think>"]
)
contents = st.lists(words, max_size=6).map("".join)
thoughts = st.tuples(contents, contents).map(lambda both: f"<think>{both[0]}</think>{both[1]}")


@st.composite
def conversations(draw, allows_system):
    messages = []
    if allows_system and draw(st.booleans()):
        messages.append({"role": "system", "content": "s" + draw(contents)})
    for _ in range(draw(st.integers(1, 4))):
        messages.append({"role": "user", "content": draw(contents)})
        messages.append({"role": "assistant", "content": draw(st.one_of(contents, thoughts))})
    return messages


def by_hand(name, messages, tools=None):
    """The text, and whether each character is learned."""
    text, learned = "", []
    for part, is_learned in FAMILIES[name][1](messages, tools):
        text += part
        learned += [is_learned] * len(part)
    return text, learned


@pytest.mark.parametrize("name", FAMILIES)
@given(data=st.data())
@settings(max_examples=80, deadline=None)
def test_the_turns_of_the_assistant_are_learned_and_nothing_else(name, data):
    """Token by token: learned are those of which every byte belongs to a turn of the assistant, written by hand."""
    tokenizer = TOKENIZERS[name]
    messages = data.draw(conversations(FAMILIES[name][2]))
    text, learned = by_hand(name, messages)
    [example] = examples_of([Record({"messages": messages}, Path("f"), 1)], tokenizer, 10_000)
    assert tokenizer.decode(example.ids) == text
    byte_learned = [flag for char, flag in zip(text, learned, strict=True) for _ in char.encode()]
    at, expected = 0, []
    for token in tokenizer.convert_ids_to_tokens(example.ids.tolist()):
        after = at + len(token)  # byte-level: one character of the vocabulary per byte
        expected.append(all(byte_learned[at:after]))
        at = after
    assert at == len(byte_learned)
    assert example.learned.tolist() == expected


def test_only_the_completion_of_conversations_is_learned():
    history = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    record = Record(
        {"prompt": history, "completion": [{"role": "assistant", "content": "there"}]}, Path("f"), 1
    )
    [example] = examples_of([record], TOKENIZERS["chatml"], 10_000)
    assert TOKENIZERS["chatml"].decode(example.ids[example.learned]) == "there<|im_end|>\n"


def test_tool_calls_are_learned_and_tools_are_shown():
    tools = [{"type": "function", "function": {"name": "look"}}]
    messages = [
        {"role": "user", "content": "what"},
        {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "look"}}]},
        {"role": "tool", "content": "a cat"},
        {"role": "assistant", "content": "It is a cat."},
    ]
    text, learned = by_hand("qwen3", messages, tools)
    rendered = render(TOKENIZERS["qwen3"], messages, tools=tools, place="here")
    assert rendered.text == text and '"name": "look"' in text
    got = [any(start <= at < stop for start, stop in rendered.spans) for at in range(len(text))]
    assert got == learned


CALLS = """{% for m in messages %}{{ '<' + m.role + '>' + (m.content or '') }}
{%- for c in m.tool_calls or [] %}{{ c.function.name + (c.function.arguments | tojson) }}{% endfor %}{{ '\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""


@pytest.mark.parametrize("arguments", [{"day": "Sunday"}, '{"day": "Sunday"}'], ids=["object", "text"])
def test_arguments_of_tool_calls_are_learned_encoded_once(arguments):
    call = {"type": "function", "function": {"name": "hours", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "open?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]
    rendered = render(chat_tokenizer(CALLS), messages, place="here")
    assert [rendered.text[start:stop] for start, stop in rendered.spans] == ['hours{"day": "Sunday"}\n']


SWITCHED = [
    {"role": "system", "content": "s", "weight": 0},
    {"role": "user", "content": "one", "train": False},
    {"role": "assistant", "content": "wrong", "weight": 0},
    {"role": "user", "content": "two"},
    {"role": "assistant", "content": "there", "weight": 1},
    {"role": "user", "content": "what"},
    {"role": "assistant", "content": "hello", "train": False, "weight": 1},
    {"role": "user", "content": "what"},
    {"role": "assistant", "content": "there", "train": True},
]


@pytest.mark.parametrize("name", [name for name, family in FAMILIES.items() if family[2]])
def test_messages_that_are_not_to_be_learned_are_shown_alone(name):
    """The text is that of the conversation without switches; what is learned is what the other turns teach."""
    tokenizer = TOKENIZERS[name]
    plain = [{key: message[key] for key in ("role", "content")} for message in SWITCHED]
    everything = render(tokenizer, plain, place="here")
    rendered = render(tokenizer, SWITCHED, place="here")
    assert rendered.text == everything.text
    assert len(everything.spans) == 4
    assert rendered.spans == (everything.spans[1], everything.spans[3])


MARKED = """{% for m in messages %}{{ '<' + m.role + '>' }}
{%- if m.role == 'assistant' %}{{ ' ' }}{% generation %}{{ m.content + eos_token }}{% endgeneration %}{{ '\n' }}
{%- else %}{{ m.content + '\n' }}{% endif %}
{%- endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}{% endif %}"""


def test_a_template_that_marks_what_is_generated_decides_what_is_learned():
    """Rendering alone would learn the space before and the line break after, which the marks leave out."""
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "there"},
    ]
    tokenizer = chat_tokenizer(MARKED)
    rendered = render(tokenizer, messages, place="here")
    assert rendered.text == tokenizer.apply_chat_template(messages, tokenize=False)
    assert [rendered.text[start:stop] for start, stop in rendered.spans] == ["two<eos>", "there<eos>"]
    first_hidden = [messages[0], messages[1] | {"weight": 0}, *messages[2:]]
    for shown, first in ((first_hidden, 0), (messages, 2)):
        rendered = render(tokenizer, shown, first_learned=first, place="here")
        assert [rendered.text[start:stop] for start, stop in rendered.spans] == ["there<eos>"]


def test_tokens_across_a_border_are_not_learned():
    offsets = np.array([[0, 2], [2, 5], [5, 6], [6, 6], [6, 7], [6, 8]])
    assert learned_tokens(offsets, [(3, 7)]).tolist() == [False, False, True, False, True, False]


@pytest.fixture
def trimming():
    """A tokenizer whose post-processor leaves spaces out of the offsets, and puts a token in front: as Llama 3's does."""
    tokenizer = chat_tokenizer(FAMILIES["llama3"][0])
    first = "<|begin_of_text|>"
    tokenizer.backend_tokenizer.add_tokens([" there", "    "])
    tokenizer.backend_tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single=f"{first} $A", special_tokens=[(first, tokenizer.convert_tokens_to_ids(first))]
            ),
        ]
    )
    return tokenizer


def test_a_token_whose_space_is_the_prompts_is_not_learned(trimming):
    record = Record({"prompt": "hello ", "completion": "there what"}, Path("f"), 1)
    [example] = examples_of([record], trimming, 10_000)
    assert trimming.decode(example.ids) == "<|begin_of_text|>hello there what<eos>"
    assert trimming.decode(example.ids[example.learned]) == " what<eos>"


def test_a_token_of_spaces_is_learned(trimming):
    messages = [{"role": "user", "content": "what"}, {"role": "assistant", "content": "one\n    two"}]
    [example] = examples_of([Record({"messages": messages}, Path("f"), 1)], trimming, 10_000)
    assert trimming.decode(example.ids[example.learned]) == "one\n    two<|eot_id|>"


BAD = {
    "no list": ({"messages": "hello"}, "is no list of messages"),
    "empty": ({"messages": []}, "the list of messages is empty"),
    "no role": ({"messages": [{"content": "a"}]}, 'message 1 has no "role"'),
    "no content": ({"messages": [{"role": "user"}]}, 'message 1: "content" is missing'),
    "parts": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        'message 1: "content" is list',
    ),
    "a weight between": (
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b", "weight": 0.5},
            ]
        },
        'message 2: "weight" is 0.5, expected 0 or 1',
    ),
    "a weight that is a switch": (
        {"messages": [{"role": "assistant", "content": "b", "weight": True}]},
        'message 1: "weight" is True, expected 0 or 1',
    ),
    "a switch that is text": (
        {"messages": [{"role": "assistant", "content": "b", "train": "no"}]},
        "message 1: \"train\" is 'no', expected true or false",
    ),
    "a user to be learned": (
        {
            "messages": [
                {"role": "user", "content": "a", "train": True},
                {"role": "assistant", "content": "b"},
            ]
        },
        'message 1: "train" asks to learn a message of the user',
    ),
    "nothing to be learned": (
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]},
        "no message of the assistant is to be learned: nothing to learn",
    ),
    "arguments": (
        {
            "messages": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": "{"}}]},
            ]
        },
        "message 2: the arguments of tool call 1 are not JSON",
    ),
    "no assistant": ({"messages": [{"role": "user", "content": "a"}]}, "no message of the assistant"),
    "tools": (
        {"messages": [{"role": "user", "content": "a"}], "tools": 3},
        '"tools" is int, expected a list',
    ),
    "tools as text": (
        {"messages": [{"role": "user", "content": "a"}], "tools": "[]"},
        '"tools" is str, expected a list',
    ),
    "surrogate": (
        {"messages": [{"role": "user", "content": "\ud800"}, {"role": "assistant", "content": "b"}]},
        '"messages" holds half a surrogate pair',
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_conversation_is_named(name):
    fields, message = BAD[name]
    good = Record(
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, Path("f"), 1
    )
    with pytest.raises(DataError) as caught:
        list(examples_of([good, Record(fields, Path("chat.jsonl"), 7)], TOKENIZERS["chatml"], 10_000))
    assert "chat.jsonl:7" in str(caught.value) and message in str(caught.value)


def test_what_a_template_refuses_is_named():
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    with pytest.raises(
        DataError, match=r"chat\.jsonl:3: the chat template refuses .*System role not supported"
    ):
        render(TOKENIZERS["gemma"], messages, place="chat.jsonl:3")


def test_without_a_chat_template():
    record = Record({"messages": [{"role": "assistant", "content": "a"}]}, Path("chat.jsonl"), 1)
    with pytest.raises(DataError, match=r"chat\.jsonl:1: .*no chat template") as caught:
        list(examples_of([record], chat_tokenizer(None), 10_000))
    assert "chat_template" in caught.value.hint
