"""Arguments of tool calls reach every kind of chat template in the form that it expects."""

import pytest

from outsize.model.tokenizer import messages_for_template
from tests.train.families import chat_tokenizer


def template(shown):
    """A chat template that shows the arguments `a` of each tool call by `shown`."""
    calls = (
        "{% for c in m.tool_calls or [] %}{% set a = (c.function or c).arguments %}" + shown + "{% endfor %}"
    )
    return "{% for m in messages %}{{ m.content or '' }}" + calls + "{% endfor %}"


ENCODES = template("{{ a | tojson }}")
ITERATES = template("{% for key, value in a.items() %}{{ key }}={{ value }};{% endfor %}")
PRINTS = template("{{ a }}")
ADDS = template("{{ '' + a + '' }}")
LOOKS = template("{{ a if a is string else a | tojson }}")

JSON = '{"day": "Zoë", "at": null}'
OBJECT = {"day": "Zoë", "at": None}


def conversation(arguments, *, flat=False):
    function = {"name": "hours", "arguments": arguments}
    call = function if flat else {"type": "function", "function": function}
    return [
        {"role": "user", "content": "open?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
    ]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("arguments", [JSON, OBJECT], ids=["text", "object"])
@pytest.mark.parametrize(
    ("chat_template", "expected"),
    [(ENCODES, JSON), (ITERATES, "day=Zoë;at=None;"), (PRINTS, JSON), (ADDS, JSON), (LOOKS, JSON)],
    ids=["encodes", "iterates", "prints", "adds", "looks"],
)
def test_arguments_are_encoded_once(chat_template, expected, arguments, flat):
    tokenizer = chat_tokenizer(chat_template)
    given = conversation(arguments, flat=flat)
    messages = messages_for_template(tokenizer, given)
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "open?" + expected
    assert given == conversation(arguments, flat=flat), "the caller's messages were changed"


def test_messages_without_tool_calls_are_returned_as_they_are():
    given = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "tool_calls": None}]
    assert all(
        got is message
        for got, message in zip(messages_for_template(chat_tokenizer(PRINTS), given), given, strict=True)
    )


@pytest.mark.parametrize(("arguments", "expected"), [("", "{}"), (" ", "{}"), ("{}", "{}"), ({}, "{}")])
def test_no_arguments(arguments, expected):
    tokenizer = chat_tokenizer(ENCODES)
    messages = messages_for_template(tokenizer, conversation(arguments))
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "open?" + expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ('{"day": ', "are not JSON"),
        ("Sunday", "are not JSON"),
        ("[" * 100_000, "are not JSON"),
        ("5", "are int, expected an object"),
        ('"{}"', "are str, expected an object"),
        ([1], "are list, expected an object"),
    ],
)
def test_arguments_that_are_not_an_object_are_named(arguments, message):
    with pytest.raises(ValueError, match=f"message 2: the arguments of tool call 1 {message}"):
        messages_for_template(chat_tokenizer(ENCODES), conversation(arguments))
