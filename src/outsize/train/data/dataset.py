"""Batches from files: mixed by weight, shuffled as a pure function of seed and epoch.

A place in the data is `(epoch, index)`: what comes there depends on nothing but the settings, so a run can go on
from any place without replaying. A batch that reaches the end of an epoch runs on into the next.

Shape suffixes: B sequences of a batch, T tokens of a sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch

from outsize.errors import ConfigError, DataError
from outsize.train.data.pack import Packed, Packing
from outsize.train.data.tokens import Tokens

IGNORED = -100
"""The label of a position from which nothing is learned, as in transformers."""

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the data: `index` sequences of epoch `epoch` have been used."""

    epoch: int = 0
    index: int = 0


@dataclass(frozen=True)
class Source:
    """One file as sequences, and its share of the mixture (None: by its size).

    As text, what the file holds, and how much of it lies in the sequences where that is not all: after a split, or
    where examples are too long.
    """

    tokens: Tokens
    packed: Packed
    weight: float | None = None

    def __str__(self) -> str:
        share = f", weight {self.weight:g}" if self.weight is not None else ""
        kind = "documents" if self.tokens.may_be_cut else "examples"
        part = (
            f" with {used:,} of the tokens"
            if (used := self.packed.num_tokens) < self.tokens.num_tokens
            else ""
        )
        return (
            f"{self.tokens.source.name}: {self.tokens.num_examples:,} {kind}, {self.tokens.num_tokens:,} tokens "
            f"({self.tokens.num_learned:,} learned), {self.packed.num_sequences:,} sequences{part}{share}"
        )


@dataclass(frozen=True)
class Dataset:
    """Sequences of several sources, in an order that depends on nothing but seed and epoch."""

    sources: Sequence[Source]
    seq_len: int
    packing: Packing
    pad_id: int
    seed: int = 0
    is_shuffled: bool = True
    _orders: dict[int, npt.NDArray[np.int64]] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        for source, share in zip(self.sources, self.shares, strict=True):
            if share == 0:
                raise ConfigError(
                    f"{source.tokens.source}: weight {source.weight or 1:g} gives it none of the {self.num_sequences} "
                    "sequences of an epoch",
                    hint="pass a larger weight, a smaller --seq-len, or leave the file out",
                )

    @property
    def num_sequences(self) -> int:
        """Sequences of an epoch: as many as the sources hold together."""
        return sum(source.packed.num_sequences for source in self.sources)

    @property
    def shares(self) -> list[int]:
        """Sequences of each source in an epoch; with weights, a small source is repeated and a large one is not used up."""
        sizes = [source.packed.num_sequences for source in self.sources]
        if all(source.weight is None for source in self.sources):
            return sizes
        # Where only some have a weight, the others count as 1.
        weights = np.array([1.0 if source.weight is None else source.weight for source in self.sources])
        bounds = np.round(np.cumsum(weights) / weights.sum() * sum(sizes)).astype(int)
        return [int(count) for count in np.diff(bounds, prepend=0)]

    def batch(self, position: Position, batch_size: int) -> Batch:
        """The `batch_size` sequences from `position` on, as int64 `[B, T]`: `input_ids`, `labels` (which the model
        shifts), and `position_ids` that begin anew in each piece, or where padded `attention_mask`.
        """
        places = [self.advance(position, row) for row in range(batch_size)]
        return self._collate([self._at(place) for place in places])

    def places(self, position: Position, batch_size: int) -> list[str]:
        """Where the first example of each sequence of a batch stands in its file, for messages."""
        places = []
        for row in range(batch_size):
            source, sequence = self._at(self.advance(position, row))
            start = int(source.packed.starts[source.packed.first[sequence]])
            places.append(
                source.tokens.place(int(np.searchsorted(source.tokens.starts, start, side="right")) - 1)
            )
        return places

    def split(self, fraction: float) -> tuple[Dataset, Dataset]:
        """This dataset without a random `fraction` of the sequences of each source, and one of those, in order.

        Raises DataError where a source has too few sequences to be divided.
        """
        kept, held = [], []
        for number, source in enumerate(self.sources):
            count = source.packed.num_sequences
            num_held = max(1, round(count * fraction))
            if num_held >= count:
                raise DataError(
                    f"{source.tokens.source}: too few sequences to be split ({count})",
                    hint="pass a file with --eval instead, a smaller --seq-len, or --packing padded",
                )
            order = np.random.default_rng([self.seed, number, count]).permutation(count)
            held.append(replace(source, packed=source.packed.select(np.sort(order[:num_held])), weight=None))
            kept.append(replace(source, packed=source.packed.select(np.sort(order[num_held:]))))
        return (
            replace(self, sources=kept, _orders={}),
            replace(self, sources=held, is_shuffled=False, _orders={}),
        )

    def advance(self, position: Position, num_sequences: int) -> Position:
        """The position `num_sequences` after `position`."""
        epochs, index = divmod(position.index + num_sequences, self.num_sequences)
        return Position(position.epoch + epochs, index)

    def num_steps(self, epochs: float, batch_size: int) -> int:
        """Whole batches in `epochs`, at least one."""
        return max(1, int(epochs * self.num_sequences) // batch_size)

    def _at(self, position: Position) -> tuple[Source, int]:
        """Source and sequence at a place: the order of an epoch is drawn over all slots of all sources."""
        slot = int(self._order(position.epoch)[position.index])
        for number, (source, share) in enumerate(zip(self.sources, self.shares, strict=True)):
            if slot < share:
                # A source that an epoch does not use up goes on in the next; one that it repeats begins again.
                place = (position.epoch * share + slot) % source.packed.num_sequences
                return source, int(self._turns[number][place])
            slot -= share
        raise AssertionError(position)

    @cached_property
    def _turns(self) -> list[npt.NDArray[np.int64]]:
        """For each source, the order in which its sequences have their turn.

        As they lie where each comes once in an epoch. A part must be drawn: packed conversations lie by length, and
        files often by subject.
        """
        turns = []
        for number, (source, share) in enumerate(zip(self.sources, self.shares, strict=True)):
            count = source.packed.num_sequences
            if self.is_shuffled and share != count:
                turns.append(np.random.default_rng([self.seed, number, count]).permutation(count))
            else:
                turns.append(np.arange(count))
        return turns

    def _order(self, epoch: int) -> npt.NDArray[np.int64]:
        if epoch not in self._orders:
            for old in [known for known in self._orders if known < epoch - 1]:
                del self._orders[old]
            count = self.num_sequences
            self._orders[epoch] = shuffled(count, self.seed, epoch) if self.is_shuffled else np.arange(count)
        return self._orders[epoch]

    def _collate(self, sequences: Sequence[tuple[Source, int]]) -> Batch:
        shape = (len(sequences), self.seq_len)
        ids_BT = np.full(shape, self.pad_id, dtype=np.int64)
        labels_BT = np.full(shape, IGNORED, dtype=np.int64)
        positions_BT = np.zeros(shape, dtype=np.int64)
        mask_BT = np.zeros(shape, dtype=np.int64)
        for row, (source, sequence) in enumerate(sequences):
            at = 0
            for start, stop in source.packed.pieces(sequence):
                ids, learned = source.tokens.read(start, stop)
                here = slice(at, at + len(ids))
                ids_BT[row, here] = ids
                labels_BT[row, here] = np.where(learned, ids.astype(np.int64), IGNORED)
                labels_BT[row, at] = IGNORED  # the token before it is another document's
                positions_BT[row, here] = np.arange(len(ids))
                mask_BT[row, here] = 1
                at += len(ids)
            positions_BT[row, at:] = np.arange(self.seq_len - at)
        batch = {"input_ids": torch.from_numpy(ids_BT), "labels": torch.from_numpy(labels_BT)}
        if self.packing is Packing.PACKED:
            return {**batch, "position_ids": torch.from_numpy(positions_BT)}
        return {**batch, "attention_mask": torch.from_numpy(mask_BT)}


def shuffled(num_sequences: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """A permutation of `range(num_sequences)`: the same for the same seed and epoch, on every machine."""
    return np.random.default_rng([seed, epoch]).permutation(num_sequences)
