"""Inputs of blocks that wait in the host's memory for their backward.

A block's backward needs nothing of its forward but its inputs. Where a device has no room for those of all blocks, each
is copied down as soon as its block is through, and up again one block ahead of its backward; copies run beside
computing. The device then holds a few blocks' inputs, whatever the depth of the model, and the length of a sequence is
bounded by the host's memory. What many blocks share (masks, position embeddings) stays: it takes no gradient.

Source: activation offloading as in ZeRO-Infinity (Rajbhandari et al., 2021), https://arxiv.org/abs/2104.07857.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from outsize.block import align
from outsize.errors import UsageError
from outsize.tier import Device, DoneTransfer, HostArena, Region, Transfer, Way

LEAST_BYTES = 1 << 20
"""Smaller tensors stay beside the device."""

COPIES_ON_DEVICE = 4
"""Inputs beside the device at once: in use, on their way down, on their way up, and just made."""


class Keeper:
    """Keeps inputs in at most `limit_bytes` of pinned host memory; regions are used again from step to step."""

    def __init__(self, device: Device, limit_bytes: int) -> None:
        self.arena = HostArena(limit_bytes, pinner=device)
        self._device = device
        self._idle: dict[int, list[tuple[Region, Transfer]]] = {}
        self._in_use: set[Region] = set()
        self._visits: list[list[weakref.ref[_Kept]]] = []
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], weakref.ref[_Kept]]] = {}

    def begin(self) -> None:
        """A call begins: what earlier ones kept belongs to their graphs."""
        self._visits = []
        self._known.clear()

    def keep(self, tensors: Sequence[torch.Tensor]) -> AbstractContextManager[object]:
        """Start the inputs of a visit on their way down, if they are large and take a gradient.

        Inside the context they are what autograd saves in the place of `tensors`, saved in this order; it lets go of them
        as it does of tensors.
        """
        kept = [self._keep(tensor) for tensor in tensors]
        self._visits.append([weakref.ref(each) for each in kept if each is not None])
        order = iter(kept)

        def pack(tensor: torch.Tensor) -> torch.Tensor | _Kept:
            each = next(order)
            return tensor if each is None else each

        return torch.autograd.graph.saved_tensors_hooks(pack, self._unpack)

    def _keep(self, tensor: torch.Tensor) -> _Kept | None:
        if not (tensor.requires_grad and tensor.is_contiguous() and tensor.nbytes >= LEAST_BYTES):
            return None
        own, known = self._known.get(id(tensor), (None, None))
        if own is not None and known is not None and own() is tensor and (same := known()) is not None:
            return same
        region, before = self._take(tensor.nbytes)
        plane = region.tensor(tensor.dtype, tensor.numel())
        after = (before, self._device.mark())
        down = self._device.start_copy(Way.DOWN, plane, tensor.detach().view(-1), after=after, label="input")
        kept = _Kept(region, tensor.shape, tensor.dtype, len(self._visits), [down])
        weakref.finalize(kept, self._give, region, kept.last)
        self._known[id(tensor)] = weakref.ref(tensor), weakref.ref(kept)
        return kept

    def _unpack(self, each: torch.Tensor | _Kept) -> torch.Tensor:
        """The input on the device; those of the visit whose backward comes next are started on their way."""
        if isinstance(each, torch.Tensor):
            return each
        target, up = each.on_way or self._bring_up(each)
        each.on_way = None
        for visit in reversed(self._visits[: each.visit]):
            ahead = [kept for reference in visit if (kept := reference()) is not None]
            for kept in ahead:
                kept.on_way = kept.on_way or self._bring_up(kept)
            if ahead:
                break
        up.follow()
        return target

    def _bring_up(self, kept: _Kept) -> tuple[torch.Tensor, Transfer]:
        """A new tensor on the device, and the copy into it. Raises UsageError where the session was closed meanwhile."""
        if kept.region.is_free:
            raise UsageError(
                "backward() of a call whose model was closed",
                hint="call backward() before the model is closed",
            )
        target = torch.empty(kept.shape, dtype=kept.dtype, device=self._device.torch_device)
        plane = kept.region.tensor(kept.dtype, target.numel())
        after = (kept.last[0], self._device.mark())
        up = self._device.start_copy(Way.UP, target.view(-1), plane, after=after, label="input")
        kept.last[0] = up
        return target, up

    def _take(self, num_bytes: int) -> tuple[Region, Transfer]:
        """A region, and what last used it."""
        idle = self._idle.get(align(num_bytes))
        if idle:
            region, before = idle.pop()
        else:
            self._make_room(align(num_bytes))
            region, before = self.arena.allocate(num_bytes, "input"), DoneTransfer()
        self._in_use.add(region)
        return region, before

    def _make_room(self, num_bytes: int) -> None:
        """Give idle regions of other lengths back, where the arena would be too small."""
        for regions in self._idle.values():
            while regions and self.arena.in_use_bytes + num_bytes > self.arena.limit_bytes:
                region, before = regions.pop()
                before.wait()
                region.free()

    def _give(self, region: Region, last: list[Transfer]) -> None:
        if region in self._in_use:
            self._in_use.remove(region)
            self._idle.setdefault(region.num_bytes, []).append((region, last[0]))

    def close(self) -> None:
        """Give all memory back, that of graphs which are still alive too."""
        self._device.finish()
        self.begin()
        for region in (*self._in_use, *(region for idle in self._idle.values() for region, _ in idle)):
            region.free()
        self._in_use.clear()
        self._idle.clear()
        self.arena.check_books()


@dataclass(eq=False)
class _Kept:
    """One tensor in the host's memory, an input of the `visit`-th visit.

    `last[0]` is what last used its region, which goes back with it; `on_way` is where it is being brought up to.
    """

    region: Region
    shape: torch.Size
    dtype: torch.dtype
    visit: int
    last: list[Transfer]
    on_way: tuple[torch.Tensor, Transfer] | None = None
