"""The optimizer worker: applies pending updates chunk by chunk, beside computing.

One thread feeds: it takes a chunk buffer, starts reading state and gradient into it, and goes on to the next chunk, and
to the next block, as far as buffers reach. One thread applies: it waits for a chunk's reads and for its part of the
weights, runs the rule in place, and starts writing back. A buffer is fed again once its write is over. So an update
never holds a whole record, and reading, computing and writing overlap.

Source: streaming optimizer state through fixed buffers is an idea of ZeRO-Infinity (Rajbhandari et al., 2021); updating at
the next visit follows the delayed step of GreedySnake, without its staleness.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from queue import SimpleQueue

import torch

from outsize.block import CHUNK, Plane, align
from outsize.config import ComputeType
from outsize.optim import Kernel, limit_threads, part
from outsize.store.planes import weight_dtype
from outsize.store.recorder import Recorder
from outsize.store.update_job import UpdateJob, runs
from outsize.tier import Region, Tier, Transfer, wait_all, wait_over


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
    """Two threads and `buffers`; applies jobs in the order in which they are submitted."""

    def __init__(
        self,
        buffers: Sequence[Region],
        disk: Tier | None,
        kernel: Callable[[ComputeType], Kernel],
        num_threads: int | None = None,
    ) -> None:
        """`kernel` gives the kernel for a compute type; `num_threads` are its threads, None: as many as compute."""
        self.recorder: Recorder | None = None
        self._disk = disk
        self._kernel = kernel
        self._num_threads = num_threads
        self._jobs: SimpleQueue[UpdateJob | threading.Event] = SimpleQueue()
        self._fed: SimpleQueue[_Chunk | threading.Event] = SimpleQueue()
        self._end = threading.Event()
        """Ends the threads where it comes; other events are set there."""
        self._feeding: UpdateJob | threading.Event | None = None
        self._applying: _Chunk | threading.Event | None = None
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
        self._jobs.put(self._end)
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
        while True:
            # Into the attribute in one line: what is taken from the queue is never lost.
            self._feeding = self._jobs.get()
            if isinstance(self._feeding, UpdateJob):
                self._feed_job(self._feeding)
            else:
                self._fed.put(self._feeding)
                if self._feeding is self._end:
                    return
            self._feeding = None  # a thread that waits keeps no model alive

    def _lose_job(self, error: BaseException) -> None:
        job, self._feeding = self._feeding, None
        if isinstance(job, UpdateJob):
            job.has_begun = True
            job.finish(error)
        elif job is not None:
            self._jobs.put(job)

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
        job, planes = chunk.job, chunk.job.planes
        num_elements = chunk.trainable_stop - chunk.start
        streams_state = bool(planes.record.state) and job.state_planes is None and num_elements > 0
        streams_gradient = job.gradient is None and num_elements > 0
        if not (streams_state or streams_gradient or job.streams_weight):
            return
        chunk.buffer, writes = self._idle.get()
        wait_over(writes)  # the job that they belong to raises what went wrong
        offset = 0
        if streams_state:
            state = planes.state_chunk(chunk.start, chunk.trainable_stop)
            offset = state.extent.num_bytes
            if job.is_first:
                chunk.buffer.tensor(torch.uint8, offset).zero_()
            else:
                chunk.reads.append(state.start_read(self._disk, chunk.buffer.buffer))
        if streams_gradient and runs(planes.record, job.pending, chunk.start, chunk.trainable_stop):
            gradient = planes.chunk(Plane.GRADIENT, chunk.start, chunk.trainable_stop)
            chunk.reads.append(gradient.start_read(self._disk, chunk.buffer.buffer[offset:]))
        if job.streams_weight:
            weight = planes.chunk(Plane.WEIGHT, chunk.start, chunk.stop)
            chunk.weight_offset = chunk.buffer.num_bytes - weight.extent.num_bytes
            chunk.reads.append(weight.start_read(self._disk, chunk.buffer.buffer[chunk.weight_offset :]))

    # -- applying ------------------------------------------------------------------------------------------------

    def _apply(self) -> None:
        if self._num_threads is not None:
            limit_threads(self._num_threads)
        self._go_on(self._apply_chunks, self._lose_chunk)

    def _apply_chunks(self) -> None:
        while True:
            self._applying = self._fed.get()
            if isinstance(self._applying, _Chunk):
                self._apply_or_fail(self._applying)
            else:
                self._applying.set()
                if self._applying is self._end:
                    return
            self._applying = None

    def _lose_chunk(self, error: BaseException) -> None:
        chunk, self._applying = self._applying, None
        if isinstance(chunk, _Chunk):
            job = chunk.job
            job.error, job.has_begun = job.error or error, True
            self._give_back(chunk, [])
            if chunk.is_last:
                job.finish()
        elif chunk is not None:
            self._fed.put(chunk)

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
        job, record = chunk.job, chunk.job.planes.record
        reads = job.weight_reads
        index = (chunk.start - record.shard.start) // CHUNK
        for read in reads if len(reads) == 1 else reads[index : index + 1]:
            read.wait()
        weight = self._weight(chunk)
        state, gradient = self._state_and_gradient(chunk)
        if job.fill_remainder and chunk.trainable_stop > chunk.start and Plane.REMAINDER in record.state:
            remainder = state[record.state.index(Plane.REMAINDER)]
            job.fill_remainder(record, chunk.start, chunk.trainable_stop, remainder)
        recorder, start_s = self.recorder, time.perf_counter()
        job.has_begun = True
        for first, last, hyper in runs(record, job.pending, chunk.start, chunk.trainable_stop):
            start, stop = first - chunk.start, last - chunk.start
            # A gradient summed over several visits was kept in fp32; this is its one rounding.
            rounded = gradient[start:stop].to(weight_dtype(record))
            planes = [part(plane, start, stop) for plane in state]
            self._kernel(record.compute_type)(weight[start:stop], planes, rounded, hyper)
        if recorder is not None:
            recorder.updated(record.name, start_s)
        if job.send_up is not None:
            job.sent.append(job.send_up(chunk.start, chunk.stop, weight))
            writes.append(job.sent[-1])
        self._start_writes(chunk, weight.itemsize, writes)

    def _start_writes(self, chunk: _Chunk, weight_bytes: int, writes: list[Transfer]) -> None:
        """Start storing an updated chunk; `weight_bytes` is the size of a weight."""
        job, record = chunk.job, chunk.job.planes.record
        stop = min(chunk.stop, record.stored_range(Plane.WEIGHT).stop)
        if stop > chunk.start and (job.weight_buffer is not None or job.streams_weight):
            if job.weight_buffer is not None:
                data = job.weight_buffer[(chunk.start - record.shard.start) * weight_bytes :]
            else:
                assert chunk.buffer is not None
                data = chunk.buffer.buffer[chunk.weight_offset :]
            place = job.planes.chunk(Plane.WEIGHT, chunk.start, stop)
            job.weight_writes.append(place.start_write(self._disk, data))
            writes.append(job.weight_writes[-1])
        has_state = record.state and chunk.trainable_stop > chunk.start
        if has_state and job.state_planes is None and chunk.buffer is not None:
            place = job.planes.state_chunk(chunk.start, chunk.trainable_stop)
            job.state_writes.append(place.start_write(self._disk, chunk.buffer.buffer))
            writes.append(job.state_writes[-1])

    def _weight(self, chunk: _Chunk) -> torch.Tensor:
        """The chunk's weights, in host memory."""
        if chunk.job.weight is not None:
            base = chunk.job.planes.record.shard.start
            return chunk.job.weight[chunk.start - base : chunk.stop - base]
        assert chunk.buffer is not None and chunk.job.streams_weight
        dtype = chunk.job.planes.dtypes[Plane.WEIGHT]
        return chunk.buffer.tensor(dtype, chunk.stop - chunk.start, chunk.weight_offset)

    def _state_and_gradient(self, chunk: _Chunk) -> tuple[list[torch.Tensor], torch.Tensor]:
        """The chunk's part of each state plane and of the gradient, wherever they are."""
        job, record, dtypes = chunk.job, chunk.job.planes.record, chunk.job.planes.dtypes
        first, last = chunk.start - record.shard.start, chunk.trainable_stop - record.shard.start
        num_elements = last - first
        offset = 0
        state: list[torch.Tensor] = []
        if job.state_planes is not None:
            state = [part(plane, first, last) for plane in job.state_planes]
        elif num_elements:
            for plane in record.state:
                assert chunk.buffer is not None
                num_bytes, dtype = num_elements * record.element_bytes[plane], dtypes[plane]
                state.append(chunk.buffer.tensor(dtype, int(num_bytes) // dtype.itemsize, offset))
                offset += align(num_bytes)
        if job.gradient is not None:
            return state, job.gradient[first:last]
        if not num_elements:
            return state, torch.empty(0, dtype=torch.float32, device="cpu")
        assert chunk.buffer is not None
        return state, chunk.buffer.tensor(dtypes[Plane.GRADIENT], num_elements, offset)
