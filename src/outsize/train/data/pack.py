"""Examples into sequences of equal length, as a list of pieces: which tokens lie in which sequence.

Packed, documents are laid end to end and cut where a sequence ends, and conversations, which are taken whole, are
put into sequences best-fit decreasing (Ding et al., 2024, https://arxiv.org/abs/2404.10830). Attention does not run
from one piece into the next, so a sequence computes what its pieces would compute alone. Padded, each piece has a
sequence to itself.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from outsize.errors import DataError
from outsize.train.data.tokens import Tokens

Places = npt.NDArray[np.int64]


class Packing(StrEnum):
    """How examples fill sequences."""

    PACKED = "packed"
    PADDED = "padded"


class TooLong(StrEnum):
    """What to do with a conversation that is longer than a sequence."""

    ERROR = "error"
    SKIP = "skip"
    CUT = "cut"


@dataclass(frozen=True)
class Packed:
    """Sequence `s` holds pieces `first[s]` to `first[s + 1]`; piece `p` is tokens `[starts[p], stops[p])`."""

    starts: Places
    stops: Places
    first: Places

    @property
    def num_sequences(self) -> int:
        """Sequences."""
        return len(self.first) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens in all sequences."""
        return int((self.stops - self.starts).sum())

    def select(self, sequences: Places) -> Packed:
        """These sequences only, in this order."""
        counts = np.diff(self.first)[sequences]
        pieces = np.repeat(self.first[:-1][sequences], counts) + _count_within(counts)
        return Packed(self.starts[pieces], self.stops[pieces], np.concatenate([[0], np.cumsum(counts)]))

    def pieces(self, sequence: int) -> list[tuple[int, int]]:
        """The token ranges of a sequence, in order."""
        part = slice(int(self.first[sequence]), int(self.first[sequence + 1]))
        return [(int(a), int(b)) for a, b in zip(self.starts[part], self.stops[part], strict=True)]


def pack(tokens: Tokens, seq_len: int, packing: Packing, too_long: TooLong) -> Packed:
    """Divide `tokens` into sequences of at most `seq_len` tokens.

    Raises DataError where nothing is left, or, with `TooLong.ERROR`, where a conversation is too long, naming it.
    """
    if tokens.may_be_cut:
        packed = _cut_documents(tokens.starts, seq_len, packing)
    else:
        packed = _whole_examples(tokens, seq_len, packing, too_long)
    if packed.num_sequences == 0:
        raise DataError(
            f"{tokens.source}: nothing is left to train on", hint="pass more text, or a larger --seq-len"
        )
    return packed


def _cut_documents(bounds: Places, seq_len: int, packing: Packing) -> Packed:
    """Documents, cut wherever a sequence ends. What one token alone would be is left out: nothing follows it."""
    if packing is Packing.PACKED:
        # The last sequence may be short: a text shorter than a sequence still is one.
        cuts = np.union1d(bounds, np.arange(0, bounds[-1], seq_len))
        sequence_of = cuts[:-1] // seq_len
        first = np.searchsorted(sequence_of, np.arange(sequence_of[-1] + 2)) if len(cuts) > 1 else np.zeros(1)
        packed = Packed(cuts[:-1], cuts[1:], first.astype(np.int64))
    else:
        lengths = np.diff(bounds)
        counts = -(-lengths // seq_len)
        starts = np.repeat(bounds[:-1], counts) + seq_len * _count_within(counts)
        stops = np.minimum(starts + seq_len, np.repeat(bounds[1:], counts))
        packed = Packed(starts, stops, np.arange(len(starts) + 1))
    return _without_hopeless(packed)


def _without_hopeless(packed: Packed) -> Packed:
    """Leave out sequences in which no piece has two tokens."""
    lengths = packed.stops - packed.starts
    longest = np.maximum.reduceat(lengths, packed.first[:-1]) if packed.num_sequences else lengths
    if (longest >= 2).all():
        return packed
    keep = np.repeat(longest >= 2, np.diff(packed.first))
    counts = np.diff(packed.first)[longest >= 2]
    return Packed(packed.starts[keep], packed.stops[keep], np.concatenate([[0], np.cumsum(counts)]))


def _whole_examples(tokens: Tokens, seq_len: int, packing: Packing, too_long: TooLong) -> Packed:
    starts, stops = tokens.starts[:-1], tokens.starts[1:]
    long = np.flatnonzero(stops - starts > seq_len)
    if len(long):
        if too_long is TooLong.ERROR:
            longest = int((stops - starts).max())
            raise DataError(
                f"{tokens.place(int(long[0]))}: {stops[long[0]] - starts[long[0]]} tokens do not fit into a sequence "
                f"of {seq_len}; {len(long)} of {tokens.num_examples} are longer, the longest has {longest}",
                hint=f"pass --seq-len {longest}, or --too-long skip (leave them out) or cut (keep their beginning)",
            )
        if too_long is TooLong.SKIP:
            keep = stops - starts <= seq_len
            starts, stops = starts[keep], stops[keep]
        else:
            stops = np.minimum(stops, starts + seq_len)
            learned = np.array(
                [_is_learned(tokens, a, b) for a, b in zip(starts, stops, strict=True)], dtype=np.bool_
            )
            starts, stops = starts[learned], stops[learned]
    if packing is Packing.PADDED:
        return Packed(starts, stops, np.arange(len(starts) + 1))
    order, first = _best_fit(stops - starts, seq_len)
    return Packed(starts[order], stops[order], first)


def _is_learned(tokens: Tokens, start: int, stop: int) -> bool:
    """Whether something is learned in `[start, stop)`; its first token never is."""
    return bool(tokens.read(int(start) + 1, int(stop))[1].any())


def _best_fit(lengths: Places, seq_len: int) -> tuple[Places, Places]:
    """Best-fit decreasing: the examples in the order in which they lie, and the first of each sequence.

    Equal lengths keep their order, so the result depends on nothing but the lengths.
    """
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (what is left, bin), ascending
    for example in np.argsort(-lengths, kind="stable"):
        length = int(lengths[example])
        at = bisect_left(room, (length, -1))
        if at == len(room):
            number, left = len(bins), seq_len
            bins.append([])
        else:
            left, number = room.pop(at)
        bins[number].append(int(example))
        if left - length >= 2:
            insort(room, (left - length, number))
    order = np.array([example for members in bins for example in sorted(members)], dtype=np.int64)
    return order, np.concatenate([[0], np.cumsum([len(members) for members in bins])]).astype(np.int64)


def _count_within(counts: Places) -> Places:
    """`0, 1, ... count - 1` for each of `counts`, end to end."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
