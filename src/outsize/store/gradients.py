"""The gradients of blocks: summed in fp32 where blocks compute, rounded once, and moved to their home."""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import torch

from outsize.block import CHUNK, NORM_ELEMENTS, Plane, Record, entry_parts
from outsize.config import Home
from outsize.errors import StateLostError
from outsize.plan import GRADIENT_SUM_BYTES, sums_in_place
from outsize.store.path import Path
from outsize.store.planes import BlockPlanes, Planes, weight_dtype
from outsize.store.recovery import failed
from outsize.store.state import BlockState, EntryGradient
from outsize.tier import Tier, Transfer, follow_all, wait_all

_CHUNKS_ROUNDED = 16
"""Chunks that a device rounds at once, beside the slot."""


class Gradients:
    """The operations of a plan on gradients, and their norms."""

    def __init__(self, planes: Planes, path: Path, disk: Tier | None) -> None:
        self._planes = planes
        self._path = path
        self._disk = disk
        self._norms: list[tuple[EntryGradient, int, torch.Tensor]] = []

    # -- sums ----------------------------------------------------------------------------------------------------

    def add(self, state: BlockState, index: int, gradient: torch.Tensor) -> None:
        """Add `gradient`, in the shape of the piece of entry `index`, to the sum."""
        total = _changing_sum(state, index)
        if index in state.gradient.summed:
            total.add_(gradient)
        else:
            total.copy_(gradient)
            state.gradient.summed.add(index)

    def open_sum(self, state: BlockState, index: int) -> torch.Tensor:
        """The sum of entry `index`, in the shape of its piece, for the caller to add to; zero at first."""
        total = _changing_sum(state, index)
        if index not in state.gradient.summed:
            total.zero_()
            state.gradient.summed.add(index)
        return total

    # -- stored gradients ----------------------------------------------------------------------------------------

    def check(self, state: BlockState) -> None:
        """Raise StateLostError where the gradient of any entry is only partly summed."""
        for index in state.gradient.summing:
            _check(state, index)

    def value(self, state: BlockState, index: int) -> torch.Tensor:
        """A copy of entry `index` of the stored gradient, in the shape of its piece."""
        piece = state.record.entries[index].piece
        dtype, device = state.planes.dtypes[Plane.GRADIENT], self._planes.device.torch_device
        value = torch.empty(piece.num_elements, dtype=dtype, device=device)
        filled = 0
        for values in self.parts(state, index):
            value[filled : filled + values.numel()] = values
            filled += values.numel()
        return value.view(piece.shape)

    def parts(self, state: BlockState, index: int) -> Iterator[torch.Tensor]:
        """Entry `index` of the stored gradient, 1-D and cut at chunks; valid until the next part is asked for."""
        planes, entry = state.planes, state.record.entries[index]
        _check(state, index)
        self.finish(state)
        stored = planes.at_home(Plane.GRADIENT)
        dtype = planes.dtypes[Plane.GRADIENT]
        if stored is not None:
            base = planes.record.shard.start
            for first, last in entry_parts(planes.record, entry, CHUNK):
                yield stored[first - base : last - base]
            return
        scratch = memoryview(mmap.mmap(-1, planes.record.chunk_bytes[1] or 1))
        for first, last in entry_parts(planes.record, entry, CHUNK):
            start = first // CHUNK * CHUNK
            stop = min(start + CHUNK, planes.record.plane_range(Plane.GRADIENT).stop)
            planes.chunk(Plane.GRADIENT, start, stop).start_read(self._disk, scratch).wait()
            inside = scratch[(first - start) * dtype.itemsize : (last - start) * dtype.itemsize]
            yield torch.frombuffer(bytearray(inside), dtype=dtype)

    def drop(self, state: BlockState, index: int) -> None:
        """Forget the gradient of entry `index`."""
        entry = state.gradient.entries[index]
        entry.present, entry.scale = False, 1.0
        state.gradient.summing.discard(index)

    # -- the operations of a plan --------------------------------------------------------------------------------

    def claim(self, state: BlockState) -> None:
        """Take a slot to sum the block's gradient in."""
        slot = self._planes.take_slot(state.planes, Plane.GRADIENT)
        for transfer in slot.after:
            transfer.follow()
        slot.after = (self._planes.device.mark(),)  # which comes after all of them: they would add up

    def read(self, state: BlockState) -> None:
        """Take a slot and start bringing what was summed so far into it."""
        self.claim(state)
        if state.planes.home(Plane.GRADIENT) is not Home.DEVICE:
            route = state.planes.route(Plane.GRADIENT, _narrow_offset(state.planes))
            state.gradient.transfers = self._path.fill(route, tuple(state.gradient.transfers))

    def wait(self, state: BlockState) -> None:
        """Wait for `read`, and widen what was read to the fp32 sum."""
        self._follow(state)
        planes = state.planes
        if _sums_as_stored(planes.record):
            return
        slot = planes.gradient_slot
        assert slot is not None
        stored = planes.at_home(Plane.GRADIENT, Home.DEVICE)
        if stored is None:
            # The narrow plane lies at the end of the slot; widening it front to back never overtakes it.
            dtype, num_elements = weight_dtype(planes.record), planes.record.plane_elements(Plane.GRADIENT)
            stored = slot.tensor(dtype, num_elements, _narrow_offset(planes))
        total = _own_sum(planes)
        for start in range(0, total.numel(), CHUNK):
            total[start : start + CHUNK] = stored[start : start + CHUNK].float()

    def begin(self, state: BlockState) -> None:
        """Prepare the sum for a backward visit: apply the factor that clipping left on what is there already."""
        self.check(state)
        self._follow(state)
        gradient = state.gradient
        gradient.summed = {index for index, entry in enumerate(gradient.entries) if entry.present}
        for index in gradient.summed:
            entry = gradient.entries[index]
            if entry.scale != 1.0:
                _changing_sum(state, index).mul_(entry.scale)
                if (
                    state.planes.gradient_slot is None
                ):  # else what is stored is as it was until the sum is written
                    entry.scale = 1.0

    def write(self, state: BlockState) -> None:
        """Round the sum to the gradient type, take its norm, and start moving it home."""
        planes, gradient = state.planes, state.gradient
        gradient.summing |= gradient.summed
        rounded, base = self._rounded(planes), planes.record.shard.start
        for index in gradient.summed:
            entry = gradient.entries[index]
            entry.present, entry.scale = True, 1.0
            for start, stop in entry_parts(planes.record, planes.record.entries[index], NORM_ELEMENTS):
                values = rounded[start - base : stop - base].to(weight_dtype(planes.record))
                norm = torch.linalg.vector_norm(values, dtype=torch.float32)
                self._norms.append((entry, start, norm))
        if planes.home(Plane.GRADIENT) is not Home.DEVICE and planes.gradient_slot is not None:
            gradient.transfers = self._path.drain(planes.route(Plane.GRADIENT, _own_offset(planes)))
            gradient.is_draining = True
        gradient.summing.clear()

    def _rounded(self, planes: BlockPlanes) -> torch.Tensor:
        """The shard's part of the sum, rounded into its home or the front of its slot unless fp32 is stored."""
        total = _own_sum(planes)
        if _sums_as_stored(planes.record):
            return total
        dtype = weight_dtype(planes.record)
        rounded = planes.at_home(Plane.GRADIENT, Home.DEVICE)
        if rounded is None:
            assert planes.gradient_slot is not None
            rounded = planes.gradient_slot.tensor(dtype, total.numel())
        stride = _CHUNKS_ROUNDED * CHUNK if self._planes.link else CHUNK
        for start in range(0, total.numel(), stride):
            rounded[start : start + stride] = total[start : start + stride].to(dtype)
        return rounded

    def settle_norms(self) -> None:
        """Compute the sums of squares of gradients written since the last call: on a device, one wait for all."""
        if self._norms:
            norms = torch.stack([norm for _, _, norm in self._norms]).tolist()
            for (entry, start, _), norm in zip(self._norms, norms, strict=True):
                entry.squares[start] = norm**2
            self._norms = []

    def free(self, state: BlockState) -> None:
        """Give the slot back; its next owner comes after what is written from it and what was computed with it."""
        slot = state.planes.gradient_slot
        assert slot is not None, f"{state.name} holds no gradient slot"
        after: tuple[Transfer, ...] = ()
        if self._planes.link:
            after = slot.after
        else:
            self.finish(state)
        self._planes.free_slot(state.planes, Plane.GRADIENT, after)

    # -- transfers -----------------------------------------------------------------------------------------------

    def finish(self, state: BlockState) -> None:
        """Wait for the gradient's transfers."""
        wait_all(state.gradient.transfers)
        self.hand_over(state)

    def _follow(self, state: BlockState) -> None:
        """Let computing come after the gradient's transfers."""
        follow_all(state.gradient.transfers)
        self.hand_over(state)

    def hand_over(self, state: BlockState) -> None:
        """Forget the gradient's transfers, which are over or which an update waits for."""
        state.gradient.transfers, state.gradient.is_draining = (), False

    def recover(self, state: BlockState) -> None:
        """Take a gradient that did not arrive at its home for partly summed; see [Note: interruption]."""
        gradient = state.gradient
        if gradient.is_draining and any(failed(transfer) for transfer in gradient.transfers):
            gradient.summing |= {index for index, entry in enumerate(gradient.entries) if entry.present}
        self.hand_over(state)


def _sum(planes: BlockPlanes) -> torch.Tensor:
    """The fp32 sum of the block's gradient, `[num_trainable]`."""
    home = planes.gradient_slot or planes.regions[Plane.GRADIENT]
    return home.tensor(torch.float32, planes.record.num_trainable)


def _own_sum(planes: BlockPlanes) -> torch.Tensor:
    """The shard's part of the sum."""
    own = planes.record.plane_range(Plane.GRADIENT)
    return _sum(planes)[own.start : own.stop]


def _changing_sum(state: BlockState, index: int) -> torch.Tensor:
    """The sum of entry `index`, in the shape of its piece, which is about to change; undefined until something was added.

    Where it is the stored gradient itself, that is only partly summed until it is written.
    """
    entry = state.record.entries[index]
    total = _sum(state.planes)[entry.start : entry.stop].view(entry.piece.shape)
    if state.planes.gradient_slot is None:
        state.gradient.summing.add(index)
    return total


def _check(state: BlockState, index: int) -> None:
    """Raise StateLostError where the gradient of entry `index` is only partly summed."""
    if index in state.gradient.summing:
        raise StateLostError(
            f"the gradient of {state.record.entries[index].piece.parameter} is only partly summed: "
            "a backward() was interrupted while it added to it",
            hint="drop the gradients with optimizer.zero_grad() and repeat the step",
        )


def _sums_as_stored(record: Record) -> bool:
    return sums_in_place(record, gradient_is_resident=True)


def _own_offset(planes: BlockPlanes) -> int:
    """Where the shard's gradient is in the slot as it will be stored: in its place, or rounded at the front."""
    if _sums_as_stored(planes.record):
        return planes.record.plane_range(Plane.GRADIENT).start * GRADIENT_SUM_BYTES
    return 0


def _narrow_offset(planes: BlockPlanes) -> int:
    """Where a stored gradient is put into its slot: at the end, where it has to be widened."""
    if _sums_as_stored(planes.record):
        return _own_offset(planes)
    assert planes.gradient_slot is not None
    return planes.gradient_slot.num_bytes - planes.record.plane_bytes(Plane.GRADIENT)
