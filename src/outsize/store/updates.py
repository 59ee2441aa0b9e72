"""Starts pending updates: hands them to the optimizer worker, or applies them where the whole block is on a device."""

from __future__ import annotations

from collections.abc import Callable

import torch

from outsize.block import Plane
from outsize.config import ComputeType
from outsize.errors import StateLostError, in_short
from outsize.optim import Kernel, part
from outsize.store.optimizer_worker import OptimizerWorker
from outsize.store.planes import Planes, weight_dtype
from outsize.store.state import BlockState
from outsize.store.update_job import Pending, UpdateJob, runs
from outsize.store.weight_reader import WeightReader
from outsize.tier import Transfer, Way

CHUNKS_IN_MEMORY = 8
"""Chunks that are updated at once where no plane streams: this spreads the interpreter's cost over more elements."""


class Updates:
    """The pending updates of blocks; `worker` applies them on the host, what `device_kernel` gives on a device.

    Both are None where the model has no optimizer.
    """

    def __init__(
        self,
        planes: Planes,
        reader: WeightReader,
        worker: OptimizerWorker | None,
        device_kernel: Callable[[ComputeType], Kernel] | None,
    ) -> None:
        self.worker = worker
        self._planes = planes
        self._reader = reader
        self._device_kernel = device_kernel
        self._lost: tuple[str, BaseException | None] | None = None

    def start(self, state: BlockState) -> None:
        """Hand the pending update to the optimizer worker, or apply it where the whole block is on a device."""
        assert self.worker is not None and state.update.pending is not None, state.name
        if self._planes.updates_in_place(state.planes):
            self._apply_on_device(state, state.update.pending)
            return
        job = self._job(state, state.update.pending)
        # Before this line the update is pending, after it handed over; `recover` settles an exception in between.
        self.worker.submit(job)
        state.update.pending = None
        state.update.is_stored = True

    def _job(self, state: BlockState, pending: Pending) -> UpdateJob:
        planes, weights = state.planes, state.weights
        found = [plane for name in planes.record.state if (plane := planes.at_home(name)) is not None]
        state.update.job = job = UpdateJob(
            planes=planes,
            pending=pending,
            fill_remainder=None if state.update.is_stored else self._reader.fill_remainder,
            state_planes=found if len(found) == len(planes.record.state) else None,
            gradient=planes.at_home(Plane.GRADIENT),
            after=state.update.job,
            before=() if state.snapshot.copy is None else (state.snapshot.copy,),
        )
        if self._planes.link:
            self._bring_weights(job, state)
            return job
        first = planes.record.shard.start
        job.weight, job.weight_reads = planes.weights()[first:], weights.reads
        if planes.weight_slot is not None:
            job.weight_buffer = planes.weight_slot.buffer[first * job.weight.itemsize :]
        return job

    def _bring_weights(self, job: UpdateJob, state: BlockState) -> None:
        """Set where `job` finds the weights on a host that does not compute, and how it sends them to the device."""
        job.send_up = self._sender(state)
        job.before = (*job.before, *state.gradient.transfers, *state.weights.home_reads)
        job.weight = state.planes.at_home(Plane.WEIGHT)
        if job.weight is not None:
            job.weight_reads = [state.weights.loading] if state.weights.loading is not None else []
            if job.state_planes is not None and job.gradient is not None:
                job.chunks_at_once = CHUNKS_IN_MEMORY
        elif state.update.is_stored:
            job.streams_weight = True
        else:
            job.weight_reads = [self._reader.start_stage(job)]

    def _sender(self, state: BlockState) -> Callable[[int, int, torch.Tensor], Transfer]:
        """What copies updated elements `[start, stop)` of the weights to where the block computes."""
        place, slot = state.planes.weights(), state.planes.weight_slot
        # A slot that was held since an earlier visit was computed with after it was taken.
        after = (*(slot.after if slot is not None else ()), self._planes.device.mark())
        device, label = self._planes.device, f"{state.name}.weight"

        def send_up(start: int, stop: int, source: torch.Tensor) -> Transfer:
            return device.start_copy(Way.UP, place[start:stop], source, after=after, label=label)

        return send_up

    def _apply_on_device(self, state: BlockState, pending: Pending) -> None:
        """Apply an update where all planes are, in the order of computing."""
        assert self._device_kernel is not None, state.name
        planes, record = state.planes, state.record
        if state.snapshot.copy is not None:
            state.snapshot.copy.wait()
        state.update.is_changing = True
        found = [plane for name in record.state if (plane := planes.at_home(name)) is not None]
        if record.num_trainable and not state.update.is_stored and Plane.REMAINDER in record.state:
            self._fill_remainder(state, found[record.state.index(Plane.REMAINDER)])
        weights, gradient = planes.at_home(Plane.WEIGHT), planes.at_home(Plane.GRADIENT)
        trained = record.plane_range(Plane.GRADIENT)
        for start, stop, hyper in runs(record, pending, trained.start, trained.stop):
            assert weights is not None and gradient is not None, state.name
            assert len(found) == len(record.state), state.name
            first, last = start - trained.start, stop - trained.start
            own = [part(plane, first, last) for plane in found]
            rounded = gradient[first:last].to(weight_dtype(record))
            self._device_kernel(record.compute_type)(weights[first:last], own, rounded, hyper)
        state.update.pending = None
        state.update.is_stored = True
        state.update.is_changing = False

    def _fill_remainder(self, state: BlockState, target: torch.Tensor) -> None:
        """Fill the remainder plane on a device, chunk by chunk, for the first update."""
        for start, stop in state.record.chunks():
            values = torch.empty(stop - start, dtype=target.dtype, device="cpu")
            self._reader.fill_remainder(state.record, start, stop, values)
            base = state.record.shard.start
            target[start - base : stop - base].copy_(values)

    def import_block(self, state: BlockState) -> None:
        """Make an update pending that changes nothing: it stores weights that were never stored."""
        state.update.pending = Pending((None,) * len(state.record.entries))

    def restored(self, state: BlockState) -> None:
        """Note that the disk has weights and state, from an earlier process."""
        state.update.is_stored = True

    def drop_job(self, state: BlockState) -> None:
        """Forget the last update of a block, which is over, and the memory it refers to."""
        state.update.job = None

    # -- after an exception --------------------------------------------------------------------------------------

    def recover(self, state: BlockState) -> BaseException | None:
        """Make an update pending again that was not handed over or changed nothing; see [Note: interruption].

        Returns what went wrong with one that stopped half-way: the block is lost then, and `check` says so.
        """
        update = state.update
        error: BaseException | None = None
        if update.is_changing:
            error = self._lose(state, None)
        while update.job is not None and not update.job.is_applied():
            update.job = update.job.after  # it was not handed over; it is pending still
        job = update.job
        if job is None:
            return error
        failure = job.failure()
        if failure is None:
            update.is_stored = True
            if update.pending is job.pending:
                update.pending = None
        elif job.has_begun:
            error = self._lose(state, failure)
        else:
            update.pending, update.is_stored, update.job = job.pending, not job.is_first, None
        return error

    def _lose(self, state: BlockState, cause: BaseException | None) -> BaseException:
        if self._lost is None:
            self._lost = state.name, cause
        return cause or StateLostError(f"the update of {state.name} stopped half-way")

    @property
    def is_lost(self) -> bool:
        """Whether an update stopped half-way."""
        return self._lost is not None

    def check(self) -> None:
        """Raise StateLostError where an update stopped half-way."""
        if self._lost is not None:
            block, cause = self._lost
            why = "" if cause is None else f" ({in_short(cause)})"
            raise StateLostError(
                f"the update of block {block} stopped half-way{why}: its weights and optimizer state are partly changed",
                hint="close the model, load it again, and resume from the last commit (outsize.checkpoint.resume)",
            ) from cause
