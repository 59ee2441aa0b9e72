"""Conversations into text with the spans that are learned: what the assistant said, and the end of its turn.

Most chat templates do not mark which part of their output the model generates, and many change a turn when others
follow it (Qwen3 drops earlier reasoning, Gemma has no system turn). So the spans are found by rendering: a turn
begins where the prompt that asks for it ends, its content lies where rendering with other content differs, and it
ends as it does when it is the last turn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from jinja2 import TemplateError

from outsize.errors import DataError

_PROBE = "\ue000"
"""Content that no conversation has: a character for private use."""

Message = Mapping[str, Any]
Span = tuple[int, int]


class ChatTokenizer(Protocol):
    """The part of a tokenizer that renders conversations."""

    chat_template: str | None

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
    template = _Template(tokenizer, tools, place)
    text = template(messages)
    spans: list[Span] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant" or index < first_learned:
            continue
        start, stop = _turn(template, messages, index, text)
        start = max(start, spans[-1][1] if spans else 0)
        if start < stop:
            spans.append((start, stop))
    return Rendered(text, tuple(spans))


def check_messages(messages: Any, place: str) -> None:
    """Raise DataError unless `messages` is a list of objects with a role and a text, or tool calls."""
    hint = '"messages" is a list such as [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise DataError(f'{place}: "messages" is no list of messages', hint=hint)
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f'{place}: message {number} has no "role"', hint=hint)
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


class _Template:
    def __init__(self, tokenizer: ChatTokenizer, tools: Sequence[Any] | None, place: str) -> None:
        self._tokenizer = tokenizer
        self._tools = list(tools) if tools else None
        self._place = place

    def __call__(self, messages: Sequence[Message], *, asks: bool = False) -> str:
        try:
            return self._tokenizer.apply_chat_template(
                list(messages), tools=self._tools, tokenize=False, add_generation_prompt=asks
            )
        except (TemplateError, TypeError, ValueError, KeyError, AttributeError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise DataError(
                f"{self._place}: the chat template refuses the conversation: {reason}",
                hint="roles and their order must be those that the model was trained with",
            ) from error

    def attempt(self, messages: Sequence[Message], *, asks: bool = False) -> str | None:
        """The text of `messages`, or None where the template refuses them."""
        try:
            return self(messages, asks=asks)
        except DataError:
            return None


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
