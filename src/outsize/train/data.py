"""Text into batches: tokenise once, pack without padding, shuffle as a pure function of seed and epoch.

Documents are laid end to end, an end-of-text token after each, and the row of tokens is cut into sequences of
equal length; a sequence may begin in the middle of a document, and attention runs across documents (as in
GPT-3, https://arxiv.org/abs/2005.14165, section 2.3). The tail that fills no sequence is left out. Not for
data in which only a part of each document should be learned (prompt and completion): that needs labels of its
own.

A large text file is tokenised in parts of a mebibyte that end at a line break, so a token never spans two
parts. Memory stays bounded whatever the size of the file: beyond `TOKENS_IN_RAM` tokens they go to a file,
from which each batch reads its own sequences.

Shape suffixes: B sequences of a batch, T tokens of a sequence.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from transformers import AutoConfig, AutoTokenizer

from outsize.errors import ConfigError, DataError, ModelError

TOKENS_IN_RAM = 1 << 24
"""Tokens; more of them than this go to a file."""

PART_BYTES = 1 << 20
"""Bytes of plain text that are tokenised at once."""

DOCUMENTS_AT_ONCE = 64
"""Documents handed to the tokenizer in one call."""

JSON_LINES = frozenset({".jsonl", ".ndjson", ".json"})

Ids = npt.NDArray[np.uint32]
Batch = dict[str, torch.Tensor]

_ID_BYTES = 4


class Tokenizer(Protocol):
    """What is needed of a tokenizer: ids of texts, text of ids, and the token that ends a document."""

    eos_token_id: int | None

    def __call__(self, text: list[str], *, add_special_tokens: bool) -> dict[str, list[list[int]]]:
        """`{"input_ids": one list of ids per text}`."""

    def __len__(self) -> int:
        """Number of tokens, added ones included."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str:
        """The text of `token_ids`."""


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the data: `index` sequences of epoch `epoch` have been used."""

    epoch: int = 0
    index: int = 0


@dataclass(frozen=True)
class Dataset:
    """Packed sequences in an order that depends on nothing but seed and epoch.

    `tokens` is an array, or the file that `tokenise` left, of `num_tokens` elements.
    """

    tokens: Ids | Path
    num_tokens: int
    seq_len: int
    seed: int
    _orders: dict[int, npt.NDArray[np.int64]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def num_sequences(self) -> int:
        """Sequences of an epoch."""
        return self.num_tokens // self.seq_len

    def batch(self, position: Position, batch_size: int) -> Batch:
        """The `batch_size` sequences from `position` on, as int64 `input_ids` and `labels` [B, T].

        Runs on into the next epoch where this one ends: no sequence is dropped. Labels equal the inputs; the
        model shifts them.
        """
        rows_BT = np.empty((batch_size, self.seq_len), dtype=np.int64)
        for row in range(batch_size):
            place = self.advance(position, row)
            rows_BT[row] = self._sequence(int(self._order(place.epoch)[place.index]))
        input_ids_BT = torch.from_numpy(rows_BT)
        return {"input_ids": input_ids_BT, "labels": input_ids_BT.clone()}

    def advance(self, position: Position, num_sequences: int) -> Position:
        """The position `num_sequences` after `position`."""
        epochs, index = divmod(position.index + num_sequences, self.num_sequences)
        return Position(position.epoch + epochs, index)

    def num_steps(self, epochs: float, batch_size: int) -> int:
        """Whole batches in `epochs`, at least one."""
        return max(1, int(epochs * self.num_sequences) // batch_size)

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch not in self._orders:
            for old in [known for known in self._orders if known < epoch - 1]:
                del self._orders[old]
            self._orders[epoch] = shuffled(self.num_sequences, self.seed, epoch)
        return self._orders[epoch]

    def _sequence(self, index: int) -> Ids:
        start = index * self.seq_len
        if isinstance(self.tokens, Path):
            # Read, not mapped: pages of a mapping would count as this process's memory for the whole run.
            offset = start * _ID_BYTES
            return np.fromfile(self.tokens, dtype=np.uint32, count=self.seq_len, offset=offset)
        return self.tokens[start : start + self.seq_len]


def shuffled(num_sequences: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """A permutation of `range(num_sequences)`: the same for the same seed and epoch, on every machine."""
    return np.random.default_rng([seed, epoch]).permutation(num_sequences)


def open_dataset(model: Path, data: Path, *, seq_len: int, seed: int, spill: Path) -> Dataset:
    """Tokenise `data` with the tokenizer in folder `model` and pack it into sequences of `seq_len`.

    Leaves the file `spill` behind where the tokens are too many for memory. Raises DataError for a
    file that is missing, empty, malformed (naming the line) or too short, ConfigError for a `seq_len` the
    model cannot take.
    """
    check_data_file(data)
    vocab_size = check_seq_len(model, seq_len)
    tokenizer = load_tokenizer(model)
    if tokenizer.eos_token_id is None:
        raise DataError(
            f"{model}: the tokenizer has no end-of-text token, which separates documents",
            hint='set "eos_token" in tokenizer_config.json',
        )
    tokens, num_tokens = tokenise(data, tokenizer, spill, vocab_size=vocab_size)
    if num_tokens < seq_len:
        raise DataError(
            f"{data}: {num_tokens} tokens do not fill one sequence of {seq_len}",
            hint="pass more text" if num_tokens < 2 else f"pass more text, or --seq-len {num_tokens}",
        )
    return Dataset(tokens, num_tokens, seq_len, seed)


def check_data_file(data: Path) -> None:
    """Raise DataError unless `data` is a file that is not empty."""
    if not data.exists():
        raise DataError(f"no such file: {data}", hint="pass a text file, or JSON lines with a text field")
    if not data.is_file():
        raise DataError(f"{data} is not a file", hint="pass one text file, or one file of JSON lines")
    if data.stat().st_size == 0:
        raise DataError(f"{data} is empty", hint="pass a text file, or JSON lines with a text field")


def check_seq_len(model: Path, seq_len: int) -> int:
    """The model's vocabulary size; ConfigError where it cannot take sequences of `seq_len` tokens."""
    if seq_len < 2:
        raise ConfigError(f"seq_len: {seq_len} leaves nothing to predict", hint="pass --seq-len 2 or more")
    if not (model / "config.json").is_file():
        raise ModelError(f"no config.json in {model}", hint="pass the folder of a Hugging Face model")
    try:
        config = AutoConfig.from_pretrained(str(model), local_files_only=True).get_text_config()
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{model / 'config.json'}: {_first_line(error)}") from error
    longest = getattr(config, "max_position_embeddings", None)
    if isinstance(longest, int) and 0 < longest < seq_len:
        raise ConfigError(
            f"seq_len: the model's positions end at {longest}, got {seq_len}",
            hint=f"pass --seq-len {longest} or less",
        )
    return int(config.vocab_size)


def load_tokenizer(model: Path) -> Tokenizer:
    """The tokenizer in folder `model`, never from the network; DataError where there is none."""
    hint = f"copy tokenizer.json and tokenizer_config.json of the model's family into {model}"
    if not any((model / name).is_file() for name in _TOKENIZER_FILES):
        raise DataError(f"no tokenizer in {model}", hint=hint)
    try:
        tokenizer: Tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise bare Exceptions for malformed files
        raise DataError(
            f"the tokenizer in {model} cannot be opened: {_first_line(error)}", hint=hint
        ) from error
    return tokenizer


def tokenise(data: Path, tokenizer: Tokenizer, spill: Path, *, vocab_size: int) -> tuple[Ids | Path, int]:
    """All documents of `data` end to end, an end-of-text token after each: the ids and their number.

    The ids are an array, or `spill` where there are more than `TOKENS_IN_RAM`. Raises DataError where an id
    is beyond `vocab_size`.
    """
    assert tokenizer.eos_token_id is not None
    sink = _Sink(spill)
    try:
        for ids in _token_lists(data, tokenizer):
            if ids and max(ids) >= vocab_size:
                raise DataError(
                    f"the tokenizer yields token {max(ids)}, the model knows {vocab_size}",
                    hint="the tokenizer in the model's folder belongs to another model",
                )
            sink.append(ids)
        return sink.finish(), sink.num_tokens
    except BaseException:
        sink.discard()
        raise


def read_documents(data: Path) -> Iterator[tuple[str, bool]]:
    """Pieces of text of `data` in order, each with whether a document ends after it. Raises DataError."""
    yield from _read_json_lines(data) if data.suffix.lower() in JSON_LINES else _read_text(data)


def _token_lists(data: Path, tokenizer: Tokenizer) -> Iterator[list[int]]:
    assert tokenizer.eos_token_id is not None
    waiting: list[tuple[str, bool]] = []
    num_chars = 0
    for piece in read_documents(data):
        waiting.append(piece)
        num_chars += len(piece[0])
        if len(waiting) == DOCUMENTS_AT_ONCE or num_chars >= PART_BYTES:
            yield from _encode(waiting, tokenizer)
            waiting, num_chars = [], 0
    if waiting:
        yield from _encode(waiting, tokenizer)


def _encode(pieces: list[tuple[str, bool]], tokenizer: Tokenizer) -> Iterator[list[int]]:
    assert tokenizer.eos_token_id is not None
    encoded = tokenizer([text for text, _ in pieces], add_special_tokens=False)["input_ids"]
    for ids, (_, ends) in zip(encoded, pieces, strict=True):
        yield [*ids, tokenizer.eos_token_id] if ends else ids


def _read_json_lines(data: Path) -> Iterator[tuple[str, bool]]:
    found = False
    with data.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                text = _text_of(line, f"{data}:{number}")
                found = found or bool(text)
                if text:
                    yield text, True
    if not found:
        raise DataError(f"{data} holds no text", hint='each line is a JSON object such as {"text": "..."}')


def _text_of(line: bytes, place: str) -> str:
    hint = 'each line is a JSON object such as {"text": "..."}'
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: not UTF-8 text ({error.reason})", hint=hint) from error
    except json.JSONDecodeError as error:
        raise DataError(f"{place}: not JSON ({error.msg}, column {error.colno})", hint=hint) from error
    except RecursionError as error:
        raise DataError(f"{place}: not JSON that can be read (nested too deep)", hint=hint) from error
    if not isinstance(record, dict):
        raise DataError(f"{place}: expected a JSON object, found {type(record).__name__}", hint=hint)
    if "text" not in record:
        fields = ", ".join(sorted(record)) or "none"
        raise DataError(f'{place}: no field "text"; fields: {fields}', hint=hint)
    text = record["text"]
    if not isinstance(text, str):
        raise DataError(f'{place}: "text" is {type(text).__name__}, expected a string', hint=hint)
    try:
        text.encode()
    except UnicodeEncodeError as error:  # "\ud800" is JSON, and no character
        raise DataError(f'{place}: "text" holds half a surrogate pair at character {error.start}') from error
    return text


def _read_text(data: Path) -> Iterator[tuple[str, bool]]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    lines_before = 0
    with data.open("rb") as file:
        found = False
        while part := file.read(PART_BYTES):
            part += file.readline(PART_BYTES)
            try:
                text = decoder.decode(part)
            except UnicodeDecodeError as error:
                line = lines_before + error.object[: error.start].count(b"\n") + 1
                raise _not_text(data, line, error) from error
            lines_before += part.count(b"\n")
            found = found or bool(text.strip())
            yield text, False
        try:
            rest = decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise _not_text(data, lines_before + 1, error) from error
    if not found:
        raise DataError(f"{data} holds no text", hint="pass a text file, or JSON lines with a text field")
    yield rest, True


def _not_text(data: Path, line: int, error: UnicodeDecodeError) -> DataError:
    return DataError(
        f"{data}:{line}: not UTF-8 text ({error.reason})", hint="pass a text file, or JSON lines (.jsonl)"
    )


class _Sink:
    """Collects ids in memory, or in a file once there are many."""

    def __init__(self, spill: Path) -> None:
        self.num_tokens = 0
        self._spill = spill
        self._parts: list[Ids] = []
        self._num_in_ram = 0
        self._spilled = False

    def append(self, ids: list[int]) -> None:
        self._parts.append(np.array(ids, dtype=np.uint32))
        self.num_tokens += len(ids)
        self._num_in_ram += len(ids)
        if self._num_in_ram > TOKENS_IN_RAM:
            self._write()

    def finish(self) -> Ids | Path:
        if self._spilled:
            self._write()
            return self._spill
        return np.concatenate(self._parts) if self._parts else np.empty(0, dtype=np.uint32)

    def discard(self) -> None:
        if self._spilled:
            self._spill.unlink(missing_ok=True)

    def _write(self) -> None:
        with self._spill.open("ab" if self._spilled else "wb") as file:
            self._spilled = True
            for part in self._parts:
                part.tofile(file)
        self._parts.clear()
        self._num_in_ram = 0


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)
