"""Conversations into text with the spans that are learned: what the assistant said, and the end of its turn.

A template that marks what the model generates (`{% generation %}`) decides. Most do not mark it, and many change a turn
when others follow it (Qwen3 drops earlier reasoning, Gemma has no system turn). There the spans are found by rendering:
a turn begins where the prompt that asks for it ends, its content lies where rendering with other content differs, and it
ends as it does when it is the last turn.

A message of the assistant with `"weight": 0` or `"train": false` is shown to the model and not learned.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template

from outsize.errors import DataError
from outsize.model.tokenizer import Message, messages_for_template

_PROBE = "\ue000"
"""Content that no conversation has: a character for private use."""

_MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")

_SWITCHES = ("weight", "train")
"""Fields that say whether a message is learned, and that no template sees."""

Span = tuple[int, int]


class ChatTokenizer(Protocol):
    """The part of a tokenizer that renders conversations."""

    special_tokens_map: dict[str, Any]

    def get_chat_template(self, chat_template: str | None = None, tools: Sequence[Any] | None = None) -> str:
        """The template for conversations with `tools`."""

    def apply_chat_template(
        self,
        conversation: Sequence[Message],
        *,
        tools: Sequence[Any] | None,
        tokenize: bool,
        add_generation_prompt: bool,
    ) -> str:
        """The text of a conversation."""


@dataclass(frozen=True, slots=True)
class Rendered:
    """A conversation as text, and the spans of characters that are learned, in order, apart from each other."""

    text: str
    spans: tuple[Span, ...]


def render(
    tokenizer: ChatTokenizer,
    messages: Sequence[Message],
    *,
    tools: Sequence[Any] | None = None,
    first_learned: int = 0,
    place: str,
) -> Rendered:
    """Render `messages`; learned are the turns of the assistant from message `first_learned` on.

    Raises DataError, naming `place`, where the messages are malformed or the template refuses them.
    """
    check_messages(messages, place)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    learned = [index for index in turns if index >= first_learned and _is_learned(messages[index])]
    messages = _for_template(tokenizer, messages, tools, place)
    template = _Template(tokenizer, tools, place)
    if template.marks:
        text, marked = template.marked(messages)
        others = [_turn(template, messages, index, text) for index in turns if index not in learned]
        return Rendered(text, tuple(span for span in marked if not any(_overlap(span, o) for o in others)))
    text = template(messages)
    spans: list[Span] = []
    for index in learned:
        start, stop = _turn(template, messages, index, text)
        start = max(start, spans[-1][1] if spans else 0)
        if start < stop:
            spans.append((start, stop))
    return Rendered(text, tuple(spans))


def check_messages(messages: Any, place: str) -> None:
    """Raise DataError unless `messages` is a list of objects with a role and a text, or tool calls."""
    hint = '"messages" is a list such as [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
    if not isinstance(messages, Sequence) or isinstance(messages, str):
        raise DataError(f'{place}: "messages" is no list of messages', hint=hint)
    if not messages:
        raise DataError(f"{place}: the list of messages is empty", hint=hint)
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f'{place}: message {number} has no "role"', hint=hint)
        _check_switches(message, f"{place}: message {number}")
        content = message.get("content")
        if content is None and message.get("tool_calls"):
            continue
        if not isinstance(content, str):
            kind = "missing" if content is None else type(content).__name__
            raise DataError(f'{place}: message {number}: "content" is {kind}, expected a string', hint=hint)
        if _PROBE in content:
            raise DataError(
                f"{place}: message {number} holds the character U+E000, which is for private use",
                hint="remove the character",
            )


def _check_switches(message: Message, place: str) -> None:
    """Raise DataError where "weight" or "train" asks for anything but learning a message of the assistant or not."""
    hint = '"weight": 0 or "train": false keeps a message of the assistant from being learned'
    weight, train = message.get("weight"), message.get("train")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise DataError(f'{place}: "weight" is {weight!r}, expected 0 or 1', hint=hint)
    if train is not None and not isinstance(train, bool):
        raise DataError(f'{place}: "train" is {train!r}, expected true or false', hint=hint)
    if message["role"] != "assistant" and (weight or train):
        name = "weight" if weight else "train"
        raise DataError(
            f'{place}: "{name}" asks to learn a message of the {message["role"]}; only those of the assistant are learned',
            hint=f'leave "{name}" out of this message',
        )


def _is_learned(message: Message) -> bool:
    return message.get("weight") != 0 and message.get("train") is not False


def _for_template(
    tokenizer: ChatTokenizer, messages: Sequence[Message], tools: Sequence[Any] | None, place: str
) -> list[Message]:
    """`messages` as the template expects them: no switches, no fields that are null, arguments of tools in its form."""
    plain = [
        {name: value for name, value in message.items() if name not in _SWITCHES and value is not None}
        for message in messages
    ]
    try:
        return messages_for_template(tokenizer, plain, tools)
    except ValueError as error:
        raise DataError(
            f"{place}: {error}",
            hint='arguments are an object such as {"city": "Rome"}, or the JSON text of one',
        ) from error


def _overlap(first: Span, second: Span) -> bool:
    return max(first[0], second[0]) < min(first[1], second[1])


class _Template:
    def __init__(self, tokenizer: ChatTokenizer, tools: Sequence[Any] | None, place: str) -> None:
        self._tokenizer = tokenizer
        self._tools = list(tools) if tools else None
        self._place = place
        self._text = tokenizer.get_chat_template(tools=self._tools)

    @property
    def marks(self) -> bool:
        """Whether the template marks what the model generates."""
        return _MARK.search(self._text) is not None

    def marked(self, messages: Sequence[Message]) -> tuple[str, list[Span]]:
        """The text of `messages`, and the spans that the template marks. Raises DataError where it refuses them."""
        with self._errors():
            texts, spans = render_jinja_template(
                conversations=[list(messages)],
                tools=self._tools,
                chat_template=self._text,
                return_assistant_tokens_mask=True,
                **self._tokenizer.special_tokens_map,
            )
        return texts[0], [(start, stop) for start, stop in spans[0] if start < stop]

    def __call__(self, messages: Sequence[Message], *, asks: bool = False) -> str:
        """The text of `messages`. Raises DataError where the template refuses them."""
        with self._errors():
            return self._tokenizer.apply_chat_template(
                list(messages), tools=self._tools, tokenize=False, add_generation_prompt=asks
            )

    def attempt(self, messages: Sequence[Message], *, asks: bool = False) -> str | None:
        """The text of `messages`, or None where the template refuses them."""
        try:
            return self(messages, asks=asks)
        except DataError:
            return None

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"{self._place}: the chat template refuses the conversation: {reason}",
                hint="roles, their order, and fields such as tool_calls must be those that the model was trained with",
            ) from error


def _turn(template: _Template, messages: Sequence[Message], index: int, text: str) -> Span:
    """The span of the turn of message `index` in `text`: its content, and how it ends."""
    alone = list(messages[: index + 1])
    is_last = index + 1 == len(messages)
    alone_text = text if is_last else template(alone)
    given = _given(template, messages[:index], text)
    content = _content(template, messages, index, text)
    if content is None:  # a turn of tool calls alone, of which the template shows nothing else
        return given if given is not None else len(text), len(text) if is_last else _shared(alone_text, text)
    first, last = content
    start = min(first, given) if given is not None else first
    if is_last:
        return start, len(text)
    alone_content = _content(template, alone, index, alone_text)
    alone_last = alone_content[1] if alone_content else len(alone_text)
    return start, last + _shared(text[last:], alone_text[alone_last:])


def _given(template: _Template, before: Sequence[Message], text: str) -> int | None:
    """How much of `text` a model is given that continues the messages `before`; None where that is not its beginning.

    A prompt may begin more than the turn kept ("<think>"): what both share is what counts. But it holds all messages
    before, up to where asking for an answer makes a difference.
    """
    prompt, shown = template.attempt(before, asks=True), template.attempt(before)
    if prompt is None:
        return None
    given = _shared(prompt, text)
    return given if given >= _shared(prompt, shown or "") else None


def _content(template: _Template, messages: Sequence[Message], index: int, text: str) -> Span | None:
    """Where `text` would differ if message `index` had other content; None where it would not."""
    other = dict(messages[index])
    other["content"] = _PROBE
    probed = template([*messages[:index], other, *messages[index + 1 :]])
    if probed == text:
        return None
    first = _shared(text, probed)
    shared = _shared(text[first:][::-1], probed[first:][::-1])
    return first, len(text) - shared


def _shared(first: str, second: str) -> int:
    """How many characters both begin with."""
    low, high = 0, min(len(first), len(second))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if first[:middle] == second[:middle] else (low, middle - 1)
    return low
