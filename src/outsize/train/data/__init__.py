"""Files into batches: read, tokenise once, pack, mix, shuffle.

    dataset = open_dataset(model, [DataFile(Path("chat.jsonl"))], DataOptions(seq_len=512))
    batch = dataset.batch(Position(), batch_size=8)

records: files as records with places. chat, examples: records as tokens, and which are learned. tokens: kept in a cache.
pack: examples into sequences. dataset: sequences in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from outsize.errors import ConfigError, DataError
from outsize.model import load_tokenizer, longest_sequence, open_skeleton
from outsize.train.data.apart import keeps_apart
from outsize.train.data.dataset import IGNORED, Batch, Dataset, Position, Source, shuffled
from outsize.train.data.examples import examples_of
from outsize.train.data.pack import Packed, Packing, TooLong, pack
from outsize.train.data.records import file_kind, read_records
from outsize.train.data.tokens import Tokens, cache_key, cached_tokens

__all__ = [
    "IGNORED",
    "Batch",
    "DataFile",
    "DataOptions",
    "Dataset",
    "Packed",
    "Packing",
    "Position",
    "Source",
    "Tokens",
    "TooLong",
    "check_files",
    "check_seq_len",
    "open_dataset",
    "shuffled",
]


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file to train on, and its weight in the mixture (None: by its size).

    DataFile.parse("chat.jsonl@0.7")
    """

    path: Path
    weight: float | None = None

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ConfigError(
                f"{self.path}: weight {self.weight} is not positive", hint="pass FILE@0.5, or FILE alone"
            )

    @classmethod
    def parse(cls, text: str) -> DataFile:
        """A path, or `PATH@WEIGHT`; a path that exists as it stands is never divided."""
        path, at, weight = text.rpartition("@")
        if not at or Path(text).exists():
            return cls(Path(text))
        try:
            number = float(weight)
        except ValueError:
            return cls(Path(text))
        return cls(Path(path), number)

    def __str__(self) -> str:
        return str(self.path) if self.weight is None else f"{self.path}@{self.weight:g}"


@dataclass(frozen=True, slots=True)
class DataOptions:
    """How files become sequences. `packing=None`: packed where the model keeps documents apart, else padded."""

    seq_len: int = 512
    packing: Packing | None = None
    too_long: TooLong = TooLong.ERROR
    seed: int = 0


def open_dataset(
    model: Path, files: Sequence[DataFile], options: DataOptions, *, is_shuffled: bool = True
) -> Dataset:
    """The sequences of `files` for the model in folder `model`; tokens come from the cache where they can.

    Raises DataError for a file that is missing, empty or malformed (naming the line), ConfigError for a `seq_len` the
    model cannot take, or for packing where it does not keep documents apart.
    """
    check_files(files)
    skeleton: Any = open_skeleton(model, torch.float32)
    vocab_size = check_seq_len(skeleton, options.seq_len)
    packing = _packing(skeleton, options.packing)
    tokenizer = load_tokenizer(model)
    sources = []
    for file in files:
        tokens = cached_tokens(
            file.path,
            cache_key(file.path, model, vocab_size),
            lambda path=file.path: examples_of(read_records(path), tokenizer, vocab_size),  # type: ignore[misc]
        )
        sources.append(Source(tokens, pack(tokens, options.seq_len, packing, options.too_long), file.weight))
    pad_id = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    return Dataset(sources, options.seq_len, packing, pad_id, options.seed, is_shuffled)


def check_files(files: Sequence[DataFile]) -> None:
    """Raise DataError unless every file is there and of a kind that can be read."""
    if not files:
        raise DataError("no data", hint="pass a text file, JSON lines, Parquet, or a datasets folder")
    for file in files:
        file_kind(file.path)


def check_seq_len(model: nn.Module, seq_len: int) -> int:
    """The model's vocabulary size; ConfigError where it cannot take sequences of `seq_len` tokens."""
    if seq_len < 2:
        raise ConfigError(f"seq_len: {seq_len} leaves nothing to predict", hint="pass --seq-len 2 or more")
    config: Any = model.config
    config = config.get_text_config()
    longest = longest_sequence(model)
    if longest is not None and longest < seq_len:
        raise ConfigError(
            f"seq_len: the model's positions end at {longest}, got {seq_len}",
            hint=f"pass --seq-len {longest} or less",
        )
    return int(config.vocab_size)


def _packing(model: nn.Module, wanted: Packing | None) -> Packing:
    apart = keeps_apart(model)
    if wanted is Packing.PACKED and not apart:
        raise ConfigError(
            f"packing: {type(model).__name__} does not keep packed documents apart",
            hint="pass --packing padded: every document gets a sequence of its own",
        )
    return wanted or (Packing.PACKED if apart else Packing.PADDED)
