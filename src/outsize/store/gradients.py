"""The gradients of blocks: summed in fp32 where they are computed, rounded once, and kept where their home is."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from outsize.block import CHUNK, Plane
from outsize.plan import sums_in_place
from outsize.store.state import BlockState, GradientState
from outsize.tier import Transfer

if TYPE_CHECKING:
    from outsize.store.blocks import BlockStore

_CHUNKS_ROUNDED = 16
"""Chunks that a device rounds at once, beside the slot."""


class Gradients:
    """Those of all blocks of `store`: the operations of a plan on them, and what is known of their norms."""

    def __init__(self, store: BlockStore) -> None:
        self._store = store
        self._norms: list[tuple[GradientState, torch.Tensor]] = []

    def _sum(self, state: BlockState) -> torch.Tensor:
        """The fp32 sum of the block's gradient, `[num_trainable]`."""
        home = state.gradient_slot or state.resident[Plane.GRADIENT]
        return home.tensor(torch.float32, state.record.num_trainable)

    def add(self, state: BlockState, index: int, gradient: torch.Tensor) -> None:
        """Add `gradient`, in the shape of the piece of entry `index`, to the sum."""
        total = self.sum_of(state, index)
        self.is_changing(state, index)
        if index in state.summed:
            total.add_(gradient)
        else:
            total.copy_(gradient)
            state.summed.add(index)

    def is_changing(self, state: BlockState, index: int) -> None:
        """Note that the sum of entry `index` is about to be changed, where it is the stored gradient itself."""
        if state.gradient_slot is None:
            state.summing.add(index)

    def sum_of(self, state: BlockState, index: int) -> torch.Tensor:
        """The sum of entry `index`, in the shape of its piece; holds anything until something was added."""
        entry = state.record.entries[index]
        return self._sum(state)[entry.start : entry.stop].view(entry.piece.shape)

    def value(self, state: BlockState, index: int) -> torch.Tensor:
        """A copy of entry `index` of the stored gradient, in the shape of its piece."""
        piece = state.record.entries[index].piece
        value = torch.empty(
            piece.num_elements,
            dtype=self._store.gradient_dtype(state),
            device=self._store.device.torch_device,
        )
        filled = 0
        for values in self.parts(state, index):
            value[filled : filled + values.numel()] = values
            filled += values.numel()
        return value.view(piece.shape)

    def parts(self, state: BlockState, index: int) -> Iterator[torch.Tensor]:
        """Entry `index` of the stored gradient, 1-D and cut at chunks; valid until the next part is asked for."""
        record = state.record
        entry, dtype = record.entries[index], self._store.gradient_dtype(state)
        state.check_gradient(index)
        state.finish_gradient()
        stored = self._store.resident_plane(state, Plane.GRADIENT)
        if stored is None:
            stored = self._store.hosted_plane(state, Plane.GRADIENT)
        scratch: memoryview | None = None
        for start, stop in record.chunks():
            first, last = max(entry.start, start), min(entry.stop, stop)
            if first >= last:
                continue
            if stored is not None:
                yield stored[first:last]
                continue
            assert self._store.disk is not None, f"{state.name}.gradient has no home on disk"
            extent = record.chunk_extent(Plane.GRADIENT, start, stop)
            if scratch is None:
                scratch = memoryview(mmap.mmap(-1, record.chunk_extent(Plane.GRADIENT, 0, CHUNK).num_bytes))
            buffer = scratch[: extent.num_bytes]
            label = f"{record.name}.gradient[{start // CHUNK}]"
            self._store.disk.start_read(state.disk_offset + extent.offset, buffer, label).wait()
            size = dtype.itemsize
            inside = bytearray(buffer[(first - start) * size : (last - start) * size])
            yield torch.frombuffer(inside, dtype=dtype)

    def claim(self, state: BlockState) -> None:
        """Claim a slot to sum the block's gradient in."""
        pool = self._store.gradient_pool(state)
        state.gradient_slot = pool.take(state.name)
        for transfer in state.gradient_slot.after:
            transfer.follow()
        state.gradient_slot.after = (
            self._store.device.mark(),
        )  # which comes after all of them: they would add up

    def read(self, state: BlockState) -> None:
        """Claim a slot and start bringing what was summed so far into it."""
        self.claim(state)
        assert state.gradient_slot is not None
        if self._store.resident_plane(state, Plane.GRADIENT) is None:
            offset = self._narrow_offset(state)
            parcel = self._store.parcel(state, Plane.GRADIENT, state.gradient_slot, offset)
            state.gradient_transfers = self._store.carrier.fill(parcel, tuple(state.gradient_transfers))

    def wait(self, state: BlockState) -> None:
        """Wait for `read`, and widen what was read to the fp32 sum."""
        state.follow_gradient()
        if self._sums_as_stored(state):
            return
        slot = state.gradient_slot
        assert slot is not None
        stored = self._store.resident_plane(state, Plane.GRADIENT)
        if stored is None:
            # The narrow plane lies at the end of the slot; widening it front to back never overtakes it.
            dtype = self._store.plane_dtype(state.record, Plane.GRADIENT)
            stored = slot.tensor(dtype, state.record.num_trainable, self._narrow_offset(state))
        total = self._sum(state)
        for start, stop in state.record.chunks():
            total[start:stop] = stored[start:stop].float()

    def begin(self, state: BlockState) -> None:
        """Prepare the sum for a backward visit: apply the factor that clipping left on what is there already."""
        for index in state.summing:
            state.check_gradient(index)
        state.follow_gradient()
        state.summed = {index for index, gradient in enumerate(state.gradients) if gradient.present}
        for index in state.summed:
            if state.gradients[index].scale != 1.0:
                self.is_changing(state, index)
                self.sum_of(state, index).mul_(state.gradients[index].scale)
                if state.gradient_slot is None:  # else what is stored is as it was until the sum is written
                    state.gradients[index].scale = 1.0

    def write(self, state: BlockState) -> None:
        """Round the sum to the gradient type, take its norm, and start moving it home."""
        state.summing |= state.summed
        total = self._sum(state)
        rounded = total
        resident = self._store.resident_plane(state, Plane.GRADIENT)
        if not self._sums_as_stored(state):
            dtype = self._store.plane_dtype(state.record, Plane.GRADIENT)
            rounded = resident if resident is not None else self._narrow_view(state, dtype)
            stride = CHUNK if self._store.device.is_host else _CHUNKS_ROUNDED * CHUNK
            for start in range(0, state.record.num_trainable, stride):
                stop = min(start + stride, state.record.num_trainable)
                rounded[start:stop] = total[start:stop].to(dtype)
        for index in state.summed:
            entry, gradient = state.record.entries[index], state.gradients[index]
            norm = torch.linalg.vector_norm(
                rounded[entry.start : entry.stop].to(self._store.plane_dtype(state.record, Plane.GRADIENT)),
                dtype=torch.float32,
            )
            gradient.present, gradient.scale = True, 1.0
            self._norms.append((gradient, norm))
        if self._store.device.is_host:
            self.settle_norms()
        if resident is None and state.gradient_slot is not None:
            parcel = self._store.parcel(state, Plane.GRADIENT, state.gradient_slot)
            state.gradient_transfers = self._store.carrier.drain(parcel)
            state.is_draining = True
        state.summing.clear()

    def settle_norms(self) -> None:
        """Bring the norms of gradients that were written since into the books: on a device, one wait for all."""
        if self._norms:
            norms = torch.stack([norm for _, norm in self._norms]).tolist()
            for (gradient, _), norm in zip(self._norms, norms, strict=True):
                gradient.sum_of_squares = norm**2
            self._norms = []

    def free(self, state: BlockState) -> None:
        """Give the gradient slot back; whoever claims it next comes after what is written from it and computed before."""
        assert state.gradient_slot is not None, f"{state.name} holds no gradient slot"
        slot = state.gradient_slot
        after: tuple[Transfer, ...] = ()
        if self._store.device.is_host:
            state.finish_gradient()
        else:
            after = slot.after
        state.gradient_slot = None
        self._store.gradient_pool(state).give(slot, after)

    def _sums_as_stored(self, state: BlockState) -> bool:
        return sums_in_place(state.record, gradient_is_resident=True)

    def _narrow_view(self, state: BlockState, dtype: torch.dtype) -> torch.Tensor:
        assert state.gradient_slot is not None
        return state.gradient_slot.tensor(dtype, state.record.num_trainable)

    def _narrow_offset(self, state: BlockState) -> int:
        """Where a stored gradient is put into a gradient slot: at its end, where it has to be widened."""
        if self._sums_as_stored(state):
            return 0
        assert state.gradient_slot is not None
        return state.gradient_slot.num_bytes - state.record.plane_bytes(Plane.GRADIENT)
