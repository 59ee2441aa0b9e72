"""Chat templates in the formats of well-known model families, and each format once more by hand.

`by_hand(messages, tools)` gives the text in segments, each with whether it is learned: what the assistant writes, to
the end of its turn.
"""

from __future__ import annotations

import json
import re

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = """{% if messages[0].role != 'system' %}<|im_start|>system
You are helpful.<|im_end|>
{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def chatml(messages, tools=None):
    if messages[0]["role"] != "system":
        yield "<|im_start|>system\nYou are helpful.<|im_end|>\n", False
    for message in messages:
        yield f"<|im_start|>{message['role']}\n", False
        yield f"{message['content']}<|im_end|>\n", message["role"] == "assistant"


LLAMA3 = """{{ '<|begin_of_text|>' }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"""


def llama3(messages, tools=None):
    yield "<|begin_of_text|>", False
    for message in messages:
        yield f"<|start_header_id|>{message['role']}<|end_header_id|>\n\n", False
        yield message["content"].strip() + "<|eot_id|>", message["role"] == "assistant"


GEMMA = """{{ '<bos>' }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""


def gemma(messages, tools=None):
    yield "<bos>", False
    for message in messages:
        is_model = message["role"] == "assistant"
        yield f"<start_of_turn>{'model' if is_model else 'user'}\n", False
        yield message["content"].strip() + "<end_of_turn>\n", is_model


MISTRAL = """{{ '<s>' }}{% if messages[0].role == 'system' %}{% set system = messages[0].content + '\n\n' %}{% set rest = messages[1:] %}{% else %}{% set system = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}{% if m.role == 'user' %}{{ '[INST] ' + (system if loop.last else '') + m.content + ' [/INST]' }}{% else %}{{ ' ' + m.content | trim + '</s>' }}{% endif %}{% endfor %}"""


def mistral(messages, tools=None):
    """The system prompt stands before the last message, if that is the user's, so it moves as turns are added."""
    system = messages[0]["content"] + "\n\n" if messages[0]["role"] == "system" else ""
    rest = messages[1:] if system else messages
    yield "<s>", False
    for number, message in enumerate(rest, 1):
        if message["role"] == "user":
            yield f"[INST] {system if number == len(rest) else ''}{message['content']} [/INST]", False
        elif system:  # where the prompt is not what the text begins with, the turn begins with its content
            yield " ", False
            yield message["content"].strip() + "</s>", True
        else:
            yield " " + message["content"].strip() + "</s>", True


PHI3 = """{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ '<|endoftext|>' }}{% endif %}"""


def phi3(messages, tools=None):
    for message in messages:
        yield f"<|{message['role']}|>\n", False
        yield message["content"] + "<|end|>\n", message["role"] == "assistant"
    yield "<|endoftext|>", messages[-1]["role"] == "assistant"


QWEN3 = """{% if tools %}{{ '<|im_start|>system\n# Tools\n' }}{% for t in tools %}{{ t | tojson + '\n' }}{% endfor %}{{ '<|im_end|>\n' }}{% endif %}{% set last = namespace(user=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set last.user = loop.index0 %}{% endif %}{% endfor %}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% set parts = (m.content or '').split('</think>') %}{% set said = parts[-1].lstrip('\n') %}{% if loop.index0 > last.user %}{{ '<think>\n' + (parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '') + '\n</think>\n\n' + said }}{% else %}{{ said }}{% endif %}{% for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function.name + '</tool_call>' }}{% endfor %}{% else %}{{ m.content }}{% endif %}{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def qwen3(messages, tools=None):
    """Reasoning stays only in turns after the last user message."""
    if tools:
        yield "<|im_start|>system\n# Tools\n", False
        for tool in tools:
            yield json.dumps(tool) + "\n", False
        yield "<|im_end|>\n", False
    last_user = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
    for index, message in enumerate(messages):
        yield f"<|im_start|>{message['role']}\n", False
        if message["role"] != "assistant":
            yield message["content"] + "<|im_end|>\n", False
            continue
        parts = (message.get("content") or "").split("</think>")
        text = parts[-1].lstrip("\n")
        if index > last_user:
            thought = parts[0].split("<think>")[-1].strip("\n") if len(parts) > 1 else ""
            text = f"<think>\n{thought}\n</think>\n\n{text}"
        for call in message.get("tool_calls") or []:
            text += f"<tool_call>{call['function']['name']}</tool_call>"
        yield text + "<|im_end|>\n", True


DEEPSEEK = """{{ '<begin>' }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}{% elif m.role == 'user' %}{{ '<User>' + m.content }}{% else %}{{ '<Assistant>' + m.content.split('</think>')[-1] + '<end>' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<Assistant><think>\n' }}{% endif %}"""


def deepseek(messages, tools=None):
    """The prompt begins a thought that no earlier turn keeps."""
    yield "<begin>", False
    for message in messages:
        if message["role"] == "system":
            yield message["content"], False
        elif message["role"] == "user":
            yield "<User>" + message["content"], False
        else:
            yield "<Assistant>", False
            yield message["content"].split("</think>")[-1] + "<end>", True


FAMILIES = {
    "chatml": (CHATML, chatml, True),
    "llama3": (LLAMA3, llama3, True),
    "gemma": (GEMMA, gemma, False),
    "mistral": (MISTRAL, mistral, True),
    "phi3": (PHI3, phi3, True),
    "qwen3": (QWEN3, qwen3, True),
    "deepseek": (DEEPSEEK, deepseek, True),
}
"""Template, the same by hand, and whether a system message is allowed."""


_NAMED = {f"<|{name}|>" for name in ("user", "assistant", "system", "end", "endoftext")}
MARKERS = sorted(
    _NAMED
    | {marker for template, _, _ in FAMILIES.values() for marker in re.findall(r"<[^ <>%']+>", template)}
)
"""What begins and ends turns: one token each, as in the families' own tokenizers."""


def chat_tokenizer(template: str | None) -> PreTrainedTokenizerFast:
    """A small byte-level BPE, so that tokens straddle the borders of turns now and then."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=460,
        special_tokens=["<eos>", *MARKERS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [
        "hello there, what is it?",
        "<|im_start|>assistant\nhello<|im_end|>\n",
        "[/INST] hello</s>",
        "one two three",
    ]
    tokenizer.train_from_iterator(texts * 3, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")
    fast.chat_template = template
    return fast
