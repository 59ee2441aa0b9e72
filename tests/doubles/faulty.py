"""A tier that fails where it is told to: the fixture behind every test of what a broken disk does."""

from __future__ import annotations

import errno
import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from outsize.block import ALIGNMENT
from outsize.errors import CorruptionError, StorageError, StorageFullError
from outsize.tier.base import Tier, Transfer
from outsize.tier.stats import TierStats
from outsize.tier.transfer import Listener, Verb


class FaultKind(StrEnum):
    """What goes wrong.

    EIO         nothing moves; waiting raises StorageError
    ENOSPC      nothing moves; waiting raises StorageFullError
    SHORT       the first half moves; waiting raises StorageError
    BIT_FLIP    one bit arrives flipped and nothing is raised: a disk without checksums, or a fault above them
    CORRUPTION  one bit arrives flipped and waiting raises CorruptionError: a disk with checksums
    """

    EIO = "eio"
    ENOSPC = "enospc"
    SHORT = "short"
    BIT_FLIP = "bit-flip"
    CORRUPTION = "corruption"


@dataclass(frozen=True, slots=True)
class Fault:
    """`kind` befalls the `nth` transfer (from 1) of those that match, or all of them where `nth` is None.

    Fault(FaultKind.EIO, Verb.READ)                            every read
    Fault(FaultKind.SHORT, Verb.WRITE, nth=3)                  the third write
    Fault(FaultKind.BIT_FLIP, Verb.READ, label="L07", nth=1)   the first read with L07 in its label
    """

    kind: FaultKind
    verb: Verb
    label: str = ""
    nth: int | None = None


class FaultyTier:
    """`inner`, with `faults`; of several that befall one transfer the first strikes. `num_faults` counts."""

    def __init__(self, inner: Tier, faults: Sequence[Fault]) -> None:
        self.num_bytes = inner.num_bytes
        self.num_faults = 0
        self._inner = inner
        self._faults = tuple(faults)
        self._seen = [0] * len(self._faults)
        self._lock = threading.Lock()

    def start_read(self, offset: int, buffer: memoryview, label: str) -> Transfer:
        """As the inner tier, unless a fault strikes; its error comes with `wait`."""
        return self._start(Verb.READ, offset, buffer, label)

    def start_write(self, offset: int, buffer: memoryview, label: str) -> Transfer:
        """As the inner tier, unless a fault strikes; its error comes with `wait`."""
        return self._start(Verb.WRITE, offset, buffer, label)

    def stats(self) -> TierStats:
        """The inner tier's figures."""
        return self._inner.stats()

    def listen(self, listener: Listener | None) -> None:
        """Tell `listener` of what the inner tier moves."""
        self._inner.listen(listener)

    def finish(self) -> None:
        """Wait until nothing of the inner tier is under way."""
        self._inner.finish()

    def close(self) -> None:
        """Close the inner tier."""
        self._inner.close()

    def _start(self, verb: Verb, offset: int, buffer: memoryview, label: str) -> Transfer:
        kind = self._strike(verb, label)
        if kind is None:
            return self._pass_on(verb, offset, buffer, label)
        where = f"faulty tier: {verb} of {label} at byte {offset}"
        view = buffer.cast("B")
        match kind:
            case FaultKind.EIO:
                return _FaultyTransfer(None, _error(StorageError, where, errno.EIO))
            case FaultKind.ENOSPC:
                return _FaultyTransfer(None, _error(StorageFullError, where, errno.ENOSPC))
            case FaultKind.SHORT:
                half = view[: len(view) // 2 // ALIGNMENT * ALIGNMENT]
                inner = self._pass_on(verb, offset, half, label) if len(half) else None
                return _FaultyTransfer(
                    inner, StorageError(f"{where}: {len(half)} of {len(view)} bytes were moved")
                )
            case FaultKind.BIT_FLIP | FaultKind.CORRUPTION:
                error = (
                    CorruptionError(f"{where}: a digest differs") if kind is FaultKind.CORRUPTION else None
                )
                if verb is Verb.READ:
                    return _FaultyTransfer(self._pass_on(verb, offset, view, label), error, flip=view)
                # The caller's buffer stays as it is; the flipped copy must be page-aligned too.
                copy = memoryview(mmap.mmap(-1, len(view)))
                copy[:] = view
                _flip_bit(copy)
                return _FaultyTransfer(self._pass_on(verb, offset, copy, label), error)

    def _pass_on(self, verb: Verb, offset: int, buffer: memoryview, label: str) -> Transfer:
        start = self._inner.start_read if verb is Verb.READ else self._inner.start_write
        return start(offset, buffer, label)

    def _strike(self, verb: Verb, label: str) -> FaultKind | None:
        """Count this transfer for every fault that it matches; the kind of the first that strikes."""
        struck: FaultKind | None = None
        with self._lock:
            for index, fault in enumerate(self._faults):
                if fault.verb is verb and fault.label in label:
                    self._seen[index] += 1
                    if struck is None and fault.nth in (None, self._seen[index]):
                        struck = fault.kind
            self.num_faults += struck is not None
        return struck


class _FaultyTransfer:
    """What is left of a transfer after a fault; a bit of `flip` changes once the inner transfer is over."""

    def __init__(
        self, inner: Transfer | None, error: StorageError | None, *, flip: memoryview | None = None
    ) -> None:
        self._inner = inner
        self._error = error
        self._flip = flip

    def wait(self) -> None:
        if self._inner is not None:
            self._inner.wait()
        if self._flip is not None:
            _flip_bit(self._flip)
            self._flip = None
        if self._error is not None:
            raise self._error

    def follow(self) -> None:
        self.wait()

    def is_done(self) -> bool:
        return self._inner is None or self._inner.is_done()


def _flip_bit(view: memoryview) -> None:
    view[len(view) // 2] ^= 1


def _error(kind: type[StorageError], where: str, code: int) -> StorageError:
    error = kind(f"{where}: {os.strerror(code)}")
    error.errno = code
    return error
