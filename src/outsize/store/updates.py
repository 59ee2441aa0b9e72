"""The update lane: applies pending updates chunk by chunk, beside computing.

One thread feeds: it takes a chunk buffer, starts reading state and gradient into it, and goes on to the next chunk, and
to the next block, as far as buffers reach. One thread applies: it waits for a chunk's reads and for its part of the
weights, runs the rule in place, and starts writing back. A buffer is fed again once its write is done. So an update
never holds a whole record, and the disk reads, computes and writes at once.

Source: the idea of streaming optimizer state through fixed buffers is ZeRO-Infinity's (Rajbhandari et al., 2021);
updating on the next visit follows GreedySnake's delayed step, without its staleness.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch

from outsize.block import CHUNK, Plane, Record, align
from outsize.config import ComputeType
from outsize.optim import Hyper, Kernel, Rule, limit_threads, part
from outsize.store.recorder import Recorder
from outsize.tier import Region, Tier, Transfer, wait_all, wait_over

CHUNKS_IN_MEMORY = 8
"""Chunks that are updated at once where no plane streams: the interpreter's part is spread over more."""


@dataclass(frozen=True, slots=True)
class Pending:
    """An update that `step()` froze: one set of hyperparameters per entry of the record, None where it has none."""

    hypers: tuple[Hyper | None, ...]


@dataclass(eq=False)
class UpdateJob:
    """One block's pending update on its way through the lane.

    `weight` is the whole weight plane in the host's memory, and `weight_buffer` those of its bytes that go to disk;
    `state_planes` and `gradient` are planes in memory. What is None streams; so do weights where `streams_weight` says
    so. With `is_first` nothing of the record is on disk yet: state starts as zero, the remainder as
    `fill_remainder(record, start, stop, target)` gives it, and the frozen part of the weights is stored too.

    For a device with memory of its own, `send_up(start, stop, values)` copies weights to where the block computes, and
    planes are left alone until `before` is over.
    """

    record: Record
    pending: Pending
    disk_offset: int
    weight: torch.Tensor | None
    weight_buffer: memoryview | None
    weight_reads: Sequence[Transfer]
    state_planes: Sequence[torch.Tensor] | None
    gradient: torch.Tensor | None
    is_first: bool
    fill_remainder: Callable[[Record, int, int, torch.Tensor], None]
    after: UpdateJob | None
    before: Sequence[Transfer] = ()
    send_up: Callable[[int, int, torch.Tensor], Transfer] | None = None
    streams_weight: bool = False
    chunks_at_once: int = 1
    done: Callable[[Sequence[Transfer]], None] | None = None
    """Told, when the job is applied, what still reads `weight`."""
    state_writes: list[Transfer] = field(default_factory=list)
    weight_writes: list[Transfer] = field(default_factory=list)
    sent: list[Transfer] = field(default_factory=list)
    error: BaseException | None = None
    has_begun: bool = False
    """Whether planes were changed, or what the update starts from was lost: after an error it cannot be applied again."""
    _is_applied: threading.Event = field(default_factory=threading.Event)

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
        """Let waiters go on."""
        self.error = self.error or error
        if self.done is not None:
            self.done((*self.weight_writes, *self.sent))
            self.done = None
        self._is_applied.set()
        self.after = None  # a chain of jobs would keep every tensor of the past alive

    def chunks(self) -> Iterator[tuple[int, int, int]]:
        """`(start, trainable stop, weight stop)` of each chunk the job visits, in elements."""
        record = self.record
        is_whole = self.is_first or self.send_up is not None
        total = record.num_elements if is_whole else record.num_trainable
        stride = self.chunks_at_once * CHUNK
        for start in range(0, total, stride):
            stop = min(start + stride, record.num_elements)
            yield start, max(start, min(stop, record.num_trainable)), stop


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


@dataclass(slots=True)
class _Chunk:
    job: UpdateJob
    start: int
    trainable_stop: int
    stop: int
    is_last: bool
    buffer: Region | None = None
    weight_offset: int = 0
    """Where in the buffer the weights are, where they stream: at its end."""
    reads: list[Transfer] = field(default_factory=list)
    error: BaseException | None = None


class OptimizerWorker:
    """Two threads and `buffers`; jobs are applied in the order in which they are submitted."""

    def __init__(
        self,
        buffers: Sequence[Region],
        disk: Tier | None,
        kernel: Callable[[ComputeType], Kernel],
        rule: Rule,
        num_threads: int | None = None,
    ) -> None:
        """`kernel` runs `rule` on records of a compute type; `num_threads` are its threads, None: as many as compute."""
        self._num_threads = num_threads
        self.recorder: Recorder | None = None
        self._disk = disk
        self._kernel = kernel
        self._dtypes = {kind: rule.dtypes(kind) for kind in ComputeType}
        self._jobs: SimpleQueue[UpdateJob | threading.Event | None] = SimpleQueue()
        self._fed: SimpleQueue[_Chunk | threading.Event | None] = SimpleQueue()
        self._feeding: UpdateJob | None = None
        self._applying: _Chunk | None = None
        self._idle: SimpleQueue[tuple[Region, list[Transfer]]] = SimpleQueue()
        for buffer in buffers:
            self._idle.put((buffer, []))
        self._threads = [
            threading.Thread(target=target, name=f"outsize-{target.__name__.strip('_')}", daemon=True)
            for target in (self._feed, self._apply)
        ]
        for thread in self._threads:
            thread.start()

    def submit(self, job: UpdateJob) -> None:
        """Queue a job; wait for it with `job.wait_applied()`."""
        self._jobs.put(job)

    def finish(self) -> None:
        """Wait until everything that was submitted is applied, or failed; what is still written is the disk's."""
        over = threading.Event()
        self._jobs.put(over)
        over.wait()

    def close(self) -> None:
        """Finish what was submitted and stop the threads."""
        self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    # -- feeding -------------------------------------------------------------------------------------------------

    def _feed(self) -> None:
        self._go_on(self._feed_jobs, self._lose_job)

    @staticmethod
    def _go_on(work: Callable[[], None], lose: Callable[[BaseException], None]) -> None:
        """Run `work` to its end; what fails in it fails the job in hand, and never the thread that others wait for."""
        while True:
            try:
                work()
                return
            except BaseException as error:
                lose(error)

    def _feed_jobs(self) -> None:
        while (job := self._jobs.get()) is not None:
            if isinstance(job, threading.Event):
                self._fed.put(job)
                continue
            self._feeding = job
            self._feed_job(job)
            self._feeding = None
            del job  # a thread that waits keeps no model alive
        self._fed.put(None)

    def _lose_job(self, error: BaseException) -> None:
        job, self._feeding = self._feeding, None
        if job is not None:
            job.has_begun = True
            job.finish(error)

    def _feed_job(self, job: UpdateJob) -> None:
        error: BaseException | None = None
        try:
            if job.after is not None:
                job.after.wait()
            wait_all(job.before)
        except BaseException as failure:
            error, job.has_begun = failure, True
        ranges = list(job.chunks())
        if not ranges:
            job.finish(error)
        for index, (start, trainable_stop, stop) in enumerate(ranges):
            chunk = _Chunk(job, start, trainable_stop, stop, index == len(ranges) - 1, error=error)
            if chunk.error is None and job.error is None:
                try:
                    self._start_reads(chunk)
                except BaseException as failure:
                    chunk.error = failure
            self._fed.put(chunk)

    def _start_reads(self, chunk: _Chunk) -> None:
        job, record = chunk.job, chunk.job.record
        num_elements = chunk.trainable_stop - chunk.start
        streams_state = bool(record.state) and job.state_planes is None and num_elements > 0
        streams_gradient = job.gradient is None and num_elements > 0
        if not (streams_state or streams_gradient or job.streams_weight):
            return
        chunk.buffer, writes = self._idle.get()
        wait_over(writes)  # the job that they belong to raises what went wrong
        assert self._disk is not None
        if streams_state:
            extent = record.state_extent(chunk.start, chunk.trainable_stop)
            if job.is_first:
                chunk.buffer.tensor(torch.uint8, extent.num_bytes).zero_()
            else:
                label = f"{record.name}.state[{chunk.start // CHUNK}]"
                place = job.disk_offset + extent.offset
                chunk.reads.append(
                    self._disk.start_read(place, chunk.buffer.buffer[: extent.num_bytes], label)
                )
        offset = record.state_bytes(num_elements) if streams_state else 0
        if streams_gradient and runs(record, job.pending, chunk.start, chunk.trainable_stop):
            extent = record.chunk_extent(Plane.GRADIENT, chunk.start, chunk.trainable_stop)
            label = f"{record.name}.gradient[{chunk.start // CHUNK}]"
            buffer = chunk.buffer.buffer[offset : offset + extent.num_bytes]
            chunk.reads.append(self._disk.start_read(job.disk_offset + extent.offset, buffer, label))
        if job.streams_weight:
            extent = record.chunk_extent(Plane.WEIGHT, chunk.start, chunk.stop)
            label = f"{record.name}.weight[{chunk.start // CHUNK}]"
            chunk.weight_offset = chunk.buffer.num_bytes - extent.num_bytes
            buffer = chunk.buffer.buffer[chunk.weight_offset :]
            chunk.reads.append(self._disk.start_read(job.disk_offset + extent.offset, buffer, label))

    # -- applying ------------------------------------------------------------------------------------------------

    def _apply(self) -> None:
        if self._num_threads is not None:
            limit_threads(self._num_threads)
        self._go_on(self._apply_chunks, self._lose_chunk)

    def _apply_chunks(self) -> None:
        while (chunk := self._fed.get()) is not None:
            if isinstance(chunk, threading.Event):
                chunk.set()
                continue
            self._applying = chunk
            self._apply_or_fail(chunk)
            self._applying = None
            del chunk

    def _lose_chunk(self, error: BaseException) -> None:
        chunk, self._applying = self._applying, None
        if chunk is not None:
            job = chunk.job
            job.error, job.has_begun = job.error or error, True
            self._give_back(chunk, [])
            if chunk.is_last:
                job.finish()

    def _apply_or_fail(self, chunk: _Chunk) -> None:
        job = chunk.job
        writes: list[Transfer] = []
        try:
            wait_all(chunk.reads)
            if chunk.error is not None:
                raise chunk.error
            if job.error is None:
                self._apply_chunk(chunk, writes)
        except BaseException as error:
            job.error = job.error or error
        self._give_back(chunk, writes)
        if chunk.is_last:
            wait_over(job.weight_reads)  # after an error: what fills the weights is over before the job is
            job.finish()

    def _give_back(self, chunk: _Chunk, writes: list[Transfer]) -> None:
        buffer, chunk.buffer = chunk.buffer, None  # once: a buffer that is given back twice is fed twice
        if buffer is not None:
            self._idle.put((buffer, writes))

    def _apply_chunk(self, chunk: _Chunk, writes: list[Transfer]) -> None:
        job, record = chunk.job, chunk.job.record
        reads = job.weight_reads
        for read in reads if len(reads) == 1 else reads[chunk.start // CHUNK : chunk.start // CHUNK + 1]:
            read.wait()
        weight = self._weight(chunk)
        state, gradient = self._planes(chunk)
        if job.is_first and chunk.trainable_stop > chunk.start and Plane.REMAINDER in record.state:
            remainder = state[record.state.index(Plane.REMAINDER)]
            job.fill_remainder(record, chunk.start, chunk.trainable_stop, remainder)
        recorder, start_s = self.recorder, time.perf_counter()
        job.has_begun = True
        for first, last, hyper in runs(record, job.pending, chunk.start, chunk.trainable_stop):
            start, stop = first - chunk.start, last - chunk.start
            # A gradient summed over several visits was kept in fp32; this is its one rounding.
            rounded = gradient[start:stop].to(self._dtypes[record.compute_type][Plane.GRADIENT])
            planes = [part(plane, start, stop) for plane in state]
            self._kernel(record.compute_type)(weight[start:stop], planes, rounded, hyper)
        if recorder is not None:
            recorder.updated(record.name, start_s)
        if job.send_up is not None:
            job.sent.append(job.send_up(chunk.start, chunk.stop, weight))
            writes.append(job.sent[-1])
        if job.weight_buffer is not None or job.streams_weight:
            assert self._disk is not None
            extent = record.chunk_extent(Plane.WEIGHT, chunk.start, chunk.stop)
            label = f"{record.name}.weight[{chunk.start // CHUNK}]"
            if job.weight_buffer is not None:
                data = job.weight_buffer[extent.offset : extent.offset + extent.num_bytes]
            else:
                assert chunk.buffer is not None
                data = chunk.buffer.buffer[chunk.weight_offset :]
            job.weight_writes.append(self._disk.start_write(job.disk_offset + extent.offset, data, label))
            writes.append(job.weight_writes[-1])
        has_state = record.state and chunk.trainable_stop > chunk.start
        if has_state and job.state_planes is None and chunk.buffer is not None:
            assert self._disk is not None
            extent = record.state_extent(chunk.start, chunk.trainable_stop)
            label = f"{record.name}.state[{chunk.start // CHUNK}]"
            data = chunk.buffer.buffer[: extent.num_bytes]
            job.state_writes.append(self._disk.start_write(job.disk_offset + extent.offset, data, label))
            writes.append(job.state_writes[-1])

    def _weight(self, chunk: _Chunk) -> torch.Tensor:
        """The chunk's weights, in the host's memory."""
        if chunk.job.weight is not None:
            return chunk.job.weight[chunk.start : chunk.stop]
        assert chunk.buffer is not None and chunk.job.streams_weight
        dtype = self._dtypes[chunk.job.record.compute_type][Plane.WEIGHT]
        return chunk.buffer.tensor(dtype, chunk.stop - chunk.start, chunk.weight_offset)

    def _planes(self, chunk: _Chunk) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The chunk's part of each state plane and of the gradient, wherever they are."""
        job, record = chunk.job, chunk.job.record
        dtypes = self._dtypes[record.compute_type]
        num_elements = chunk.trainable_stop - chunk.start
        offset = 0
        state: list[torch.Tensor] = []
        if job.state_planes is not None:
            state = [part(plane, chunk.start, chunk.trainable_stop) for plane in job.state_planes]
        elif num_elements:
            for plane in record.state:
                assert chunk.buffer is not None
                num_bytes, dtype = num_elements * record.element_bytes[plane], dtypes[plane]
                state.append(chunk.buffer.tensor(dtype, int(num_bytes) // dtype.itemsize, offset))
                offset += align(num_bytes)
        if job.gradient is not None:
            return state, job.gradient[chunk.start : chunk.trainable_stop]
        if not num_elements:
            return state, torch.empty(0, dtype=torch.float32, device="cpu")
        assert chunk.buffer is not None
        stored = torch.float32 if record.element_bytes[Plane.GRADIENT] == 4 else dtypes[Plane.GRADIENT]
        return state, chunk.buffer.tensor(stored, num_elements, offset)
