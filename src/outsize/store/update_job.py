"""One block's pending update, from the optimizer step that froze it until it is applied and stored."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from outsize.block import CHUNK, Plane, Record
from outsize.optim import Hyper
from outsize.store.planes import BlockPlanes
from outsize.tier import Transfer, wait_all


@dataclass(frozen=True, slots=True)
class Pending:
    """An update that `step()` froze: the hyperparameters of each entry of the record, None where it is not updated."""

    hypers: tuple[Hyper | None, ...]


@dataclass(eq=False)
class UpdateJob:
    """One block's pending update on its way through the optimizer worker.

    `weight` is the weight plane in host memory, and `weight_buffer` those of its bytes that are written to disk;
    `state_planes` and `gradient` are planes in host memory; all begin with the record's shard. What is None streams; so do
    weights with `streams_weight`.

    The first update of a block has `fill_remainder(record, start, stop, target)`. Nothing of the record is on disk yet:
    state starts as zero, the remainder is filled, and what is frozen without a home in the model's files is stored too.

    For a device with memory of its own, `send_up(start, stop, values)` copies weights to where the block computes. Nothing
    is touched until `before` is over and `after`, the block's previous update, is done.
    """

    planes: BlockPlanes
    pending: Pending
    fill_remainder: Callable[[Record, int, int, torch.Tensor], None] | None = None
    weight: torch.Tensor | None = None
    weight_buffer: memoryview | None = None
    weight_reads: Sequence[Transfer] = ()
    state_planes: Sequence[torch.Tensor] | None = None
    gradient: torch.Tensor | None = None
    after: UpdateJob | None = None
    before: Sequence[Transfer] = ()
    send_up: Callable[[int, int, torch.Tensor], Transfer] | None = None
    streams_weight: bool = False
    chunks_at_once: int = 1
    done: Callable[[Sequence[Transfer]], None] | None = None
    """Called when the job is applied with the transfers that still read `weight`."""
    state_writes: list[Transfer] = field(default_factory=list)
    weight_writes: list[Transfer] = field(default_factory=list)
    sent: list[Transfer] = field(default_factory=list)
    error: BaseException | None = None
    has_begun: bool = False
    """Whether planes were changed, or what the update starts from was lost: after an error it cannot be applied again."""
    _is_applied: threading.Event = field(default_factory=threading.Event)

    @property
    def is_first(self) -> bool:
        """Whether nothing of the record is on disk yet."""
        return self.fill_remainder is not None

    def is_applied(self) -> bool:
        """Whether `wait_applied` would not block."""
        return self._is_applied.is_set()

    def wait_applied(self) -> None:
        """Wait until the weights in memory are the updated ones; raise what went wrong."""
        self._is_applied.wait()
        if self.error is not None:
            raise self.error

    def follow_applied(self) -> None:
        """Let computing come after the update; raise what went wrong. Blocks until it is applied, not until it is sent."""
        self.wait_applied()
        for transfer in self.sent:
            transfer.follow()

    def wait(self) -> None:
        """Wait until the update is on disk, and on the device."""
        self.wait_applied()
        wait_all((*self.weight_writes, *self.state_writes, *self.sent))

    def failure(self) -> BaseException | None:
        """What went wrong with an update that is applied; waits until all of it is where it belongs."""
        if self.error is None:
            try:
                self.wait()
            except Exception as error:
                return error
        return self.error

    def wait_slot_free(self) -> None:
        """Wait until nothing is being written from, or sent to, where the block computes."""
        self.wait_applied()
        wait_all(self.weight_writes if self.send_up is None else self.sent)

    def is_done(self) -> bool:
        """Whether `wait` would not block."""
        moving = (*self.weight_writes, *self.state_writes, *self.sent)
        return self.is_applied() and all(transfer.is_done() for transfer in moving)

    def follow(self) -> None:
        """As `wait`."""
        self.wait()

    def finish(self, error: BaseException | None = None) -> None:
        """The job is applied, or failed with `error`: let those go on who wait for it."""
        self.error = self.error or error
        if self.done is not None:
            self.done((*self.weight_writes, *self.sent))
            self.done = None
        self._is_applied.set()
        self.after = None  # a chain of jobs would keep every tensor of the past alive

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """`(start, trainable stop, weight stop)` of each chunk of the update, in elements of the block.

        Entries in the model's own files are left out, unless they are sent to the device with the others.
        """
        record, is_sent = self.planes.record, self.send_up is not None
        is_whole = is_sent and not self.streams_weight
        weights = record.plane_range(Plane.WEIGHT) if is_whole else record.stored_range(Plane.WEIGHT)
        trained = record.plane_range(Plane.GRADIENT)
        stride = self.chunks_at_once * CHUNK
        for start in (weights if self.is_first or is_sent else trained)[::stride]:
            stop = min(start + stride, weights.stop)
            yield start, max(start, min(stop, trained.stop)), stop


def runs(record: Record, pending: Pending, start: int, stop: int) -> list[tuple[int, int, Hyper]]:
    """Maximal element ranges of `[start, stop)` that are updated with the same hyperparameters."""
    found: list[tuple[int, int, Hyper]] = []
    for entry, hyper in zip(record.entries, pending.hypers, strict=True):
        first, last = max(entry.start, start), min(entry.stop, stop)
        if hyper is None or first >= last:
            continue
        if found and found[-1][1] == first and found[-1][2] == hyper:
            found[-1] = (found[-1][0], last, hyper)
        else:
            found.append((first, last, hyper))
    return found
