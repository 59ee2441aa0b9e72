"""Records into examples: the tokens of a document or a conversation, and which of them are learned.

{"text": "..."}                            all is learned
{"prompt": "...", "completion": "..."}     the completion, and the end-of-text token after it
{"messages": [...], "tools": [...]}        what the assistant says; "prompt" and "completion" may be lists
                                           of messages as well
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import islice
from typing import Any

import numpy as np
import numpy.typing as npt

from outsize.errors import DataError
from outsize.train.data.chat import Span, check_messages, render
from outsize.train.data.records import FORMATS_HINT, Record

RECORDS_AT_ONCE = 256
"""Records handed to the tokenizer in one call; its threads share them."""

Ids = npt.NDArray[np.uint32]
Mask = npt.NDArray[np.bool_]


class Layout(StrEnum):
    """The fields that a record has."""

    TEXT = "text"
    COMPLETION = "prompt and completion"
    CHAT = "messages"


@dataclass(frozen=True, slots=True)
class Example:
    """Tokens `[T]` of a record, and which are learned `[T]` (None: all). `record` tells where it stands.

    `may_be_cut`: a document, of which any part can be learned; a conversation is taken whole.
    """

    ids: Ids
    learned: Mask | None
    record: Record
    may_be_cut: bool


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A record as text: `spans` of characters are learned (None: all); whether a document starts and ends with it.

    A rendered conversation does neither: its template writes what the model expects at both ends.
    """

    record: Record
    text: str
    spans: tuple[Span, ...] | None
    starts: bool
    ends: bool


def layout_of(record: Record) -> Layout:
    """Which fields `record` has. Raises DataError naming it where they are none that can be learned from."""
    fields = record.fields
    if "messages" in fields:
        return Layout.CHAT
    if "prompt" in fields and "completion" in fields:
        return Layout.COMPLETION
    if "text" in fields:
        return Layout.TEXT
    names = ", ".join(sorted(map(str, fields))) or "none"
    raise DataError(
        f"{record.place}: none of the fields that are needed; there are: {names}", hint=FORMATS_HINT
    )


def examples_of(records: Iterable[Record], tokenizer: Any, vocab_size: int) -> Iterator[Example]:
    """The examples of `records` in order; a record of empty text gives none.

    Raises DataError naming the record that is malformed, that has another layout than the first, of which no token is
    learned, or whose tokens the model does not know (`vocab_size`).
    """
    encode = _Encoder(tokenizer, vocab_size)
    layout: Layout | None = None
    records, starts = iter(records), True
    while chunk := list(islice(records, RECORDS_AT_ONCE)):
        prepared: list[_Prepared] = []
        for record in chunk:
            own = layout_of(record)
            layout = layout or own
            if own is not layout:
                raise DataError(
                    f"{record.place}: has {own}, the lines before it {layout}",
                    hint="put each kind of data into a file of its own, and pass all files",
                )
            prepared.append(_prepare(record, layout, tokenizer, starts))
            starts = not record.continues
        yield from encode(prepared)


def _prepare(record: Record, layout: Layout, tokenizer: Any, starts: bool) -> _Prepared:
    fields, place = record.fields, record.place
    if layout is Layout.TEXT:
        text = _string(fields["text"], "text", place)
        return _Prepared(record, text, None, starts, ends=not record.continues)
    if layout is Layout.COMPLETION and isinstance(fields["prompt"], str):
        prompt = fields["prompt"]
        completion = _string(fields["completion"], "completion", place)
        text = _string(prompt + completion, "prompt", place)
        if not completion:
            raise DataError(
                f'{place}: the "completion" is empty: nothing to learn',
                hint="remove the record, or write one",
            )
        return _Prepared(record, text, ((len(prompt), len(text)),), starts=True, ends=True)
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(
            f"{place}: the record is a conversation, and the tokenizer has no chat template",
            hint='put a chat_template.jinja beside the tokenizer, or write "prompt" and "completion" as text',
        )
    tools = fields.get("tools")
    if tools is not None and not isinstance(tools, list):
        raise DataError(
            f'{place}: "tools" is {type(tools).__name__}, expected a list',
            hint='such as [{"type": "function", "function": {"name": "..."}}]',
        )
    if layout is Layout.COMPLETION:
        check_messages(fields["prompt"], place)
        check_messages(fields["completion"], place)
        messages, first = [*fields["prompt"], *fields["completion"]], len(fields["prompt"])
    else:
        messages, first = fields["messages"], 0
    rendered = render(tokenizer, messages, tools=tools, first_learned=first, place=place)
    if not rendered.spans:
        has_any = any(message["role"] == "assistant" for message in messages[first:])
        reason = "no message of the assistant is to be learned" if has_any else "no message of the assistant"
        raise DataError(
            f"{place}: {reason}: nothing to learn",
            hint='remove the record, or add {"role": "assistant", "content": "..."}',
        )
    text = _string(rendered.text, "messages", place)
    return _Prepared(record, text, rendered.spans, starts=False, ends=False)


def _string(value: Any, field: str, place: str) -> str:
    if not isinstance(value, str):
        raise DataError(f'{place}: "{field}" is {type(value).__name__}, expected a string', hint=FORMATS_HINT)
    try:
        value.encode()
    except UnicodeEncodeError as error:  # "\ud800" is JSON, and no character
        raise DataError(
            f'{place}: "{field}" holds half a surrogate pair at character {error.start}',
            hint='remove it: "\\ud83d\\ude00" is a character, "\\ud83d" alone is none',
        ) from error
    return value


class _Encoder:
    """Texts to examples, many at once."""

    def __init__(self, tokenizer: Any, vocab_size: int) -> None:
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._bos = _leading_tokens(tokenizer)
        self._eos: int | None = tokenizer.eos_token_id
        self._backend = _plain_backend(tokenizer)

    def __call__(self, prepared: Sequence[_Prepared]) -> Iterator[Example]:
        needs_places = any(item.spans is not None for item in prepared)
        encoded = self._encode([item.text for item in prepared], needs_places)
        for item, (ids, offsets) in zip(prepared, encoded, strict=True):
            if item.text:
                yield self._example(item, ids, offsets)

    def _encode(self, texts: list[str], needs_places: bool) -> list[tuple[Ids, npt.NDArray[np.int64] | None]]:
        if self._backend is None:
            if needs_places:
                raise DataError(
                    "the tokenizer does not tell where its tokens stand in the text, which labels need",
                    hint="use the fast tokenizer of the family (tokenizer.json)",
                )
            lists = self._tokenizer(texts, add_special_tokens=False)["input_ids"]
            return [(np.array(ids, dtype=np.uint32), None) for ids in lists]
        run = self._backend.encode_batch if needs_places else self._backend.encode_batch_fast
        return [
            (
                np.array(encoding.ids, dtype=np.uint32),
                np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2) if needs_places else None,
            )
            for encoding in run(texts, add_special_tokens=False)
        ]

    def _example(self, item: _Prepared, ids: Ids, offsets: npt.NDArray[np.int64] | None) -> Example:
        place = item.record.place
        learned: Mask | None = None
        if item.spans is not None:
            assert offsets is not None
            learned = learned_tokens(offsets, item.spans)
        if item.starts and len(self._bos):
            ids = np.concatenate([self._bos, ids])
            learned = (
                np.concatenate([np.zeros(len(self._bos), np.bool_), learned]) if learned is not None else None
            )
        if item.ends:
            if self._eos is None:
                raise DataError(
                    "the tokenizer has no end-of-text token, which separates documents",
                    hint='set "eos_token" in tokenizer_config.json',
                )
            ids = np.append(ids, np.uint32(self._eos))
            learned = np.append(learned, True) if learned is not None else None
        if len(ids) and (largest := int(ids.max())) >= self._vocab_size:
            raise DataError(
                f"the tokenizer yields token {largest}, the model knows {self._vocab_size}",
                hint="the tokenizer in the model's folder belongs to another model",
            )
        if learned is not None and not learned[1:].any():
            raise DataError(f"{place}: no token of it would be learned", hint="remove the record")
        return Example(ids, learned, item.record, may_be_cut=item.spans is None)


def _leading_tokens(tokenizer: Any) -> Ids:
    """What the tokenizer puts before every text of its own accord: the token that begins a document, or nothing."""
    marked = tokenizer("a", return_special_tokens_mask=True)
    added = marked["special_tokens_mask"]
    return np.array(marked["input_ids"][: added.index(0) if 0 in added else 0], dtype=np.uint32)


def _plain_backend(tokenizer: Any) -> Any:
    """The tokenizer of the `tokenizers` library, or None where there is none; offsets are of all that a token stands for.

    Byte-level post-processors (GPT-2, Llama 3) leave spaces out of the offsets: a token would not seem to begin in the
    prompt, and one of spaces alone to lie nowhere. What else they do, special tokens, is not asked for.
    """
    backend = copy.deepcopy(getattr(tokenizer, "backend_tokenizer", None))
    if backend is not None:
        backend.post_processor = None
        backend.no_truncation()
        backend.no_padding()
    return backend


def learned_tokens(offsets: npt.NDArray[np.int64], spans: Sequence[Span]) -> Mask:
    """Which tokens lie in `spans` with all their characters, of which they have at least one.

    `offsets [T, 2]`: the characters that each token stands for. A token that began in the prompt is not learned, since
    the model is given it; nor is one that ends in the next turn. Tokens for parts of one character share its offsets.
    """
    learned = np.zeros(len(offsets), dtype=np.bool_)
    for start, stop in spans:
        learned |= (offsets[:, 0] >= start) & (offsets[:, 1] <= stop) & (offsets[:, 1] > offsets[:, 0])
    return learned
