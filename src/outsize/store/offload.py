"""Activation offload: the inputs of blocks wait in a slower tier for their backward.

The backward of a block needs only its inputs from the forward. Where memory cannot hold those of all blocks, they go from a
device to host memory, or from either to the disk, and come back for the backward. The plan says when
(`plan/passes/activation_offload.py`); here is which tensors, where they wait, and how they move. Tensors that many blocks
share (masks, position embeddings) stay: they take no gradient. Autograd asks for an input when its backward begins: one
that no plan has fetched is then brought at once.

A tensor on its way is released only once computing comes after the copy, which bounds memory in whatever order streams
progress.
"""

from __future__ import annotations

import time
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

import torch

from outsize.block import Extent, align
from outsize.config import format_bytes
from outsize.errors import BudgetError, StorageError, UsageError
from outsize.plan import Wait, memory_estimate
from outsize.plan.path import DRIVE, LINK
from outsize.store.finalizers import when_dropped
from outsize.store.path import Chunk, Path, Route
from outsize.store.recorder import Recorder
from outsize.store.workers import Workers
from outsize.tier import Device, DoneTransfer, HostArena, Tier, TierStats, Transfer, wait_over


class ActivationOffload:
    """Keeps inputs in at most `num_bytes` of host memory or, if given, of `disk`; their places are reused."""

    def __init__(self, device: Device, num_bytes: int, disk: Tier | None = None) -> None:
        num_bytes = align(num_bytes)
        self.wait_s: defaultdict[str, float] = defaultdict(float)
        self._recorder: Recorder | None = None
        self._places = Places(num_bytes)
        self._device = device
        self._disk = disk
        self.arena = HostArena(num_bytes if disk is None else memory_estimate.input_buffers_bytes(), device)
        self._home = self.arena.allocate(num_bytes, "inputs") if disk is None else None
        self._buffers = [
            self.arena.allocate(memory_estimate.INPUT_PART_BYTES, f"inputs[{index}]")
            for index in range(memory_estimate.INPUT_BUFFERS if disk is not None else 0)
        ]
        self._path = Path(device, disk, self._buffers)
        self._workers = Workers(self._path, device, disk)
        self._call = _Call()
        """The call under way or, in a backward, the one that it belongs to."""
        self._unpacked: list[torch.Tensor] = []
        """What autograd was given for the present backward: the visit that comes next may need the same tensors."""
        self._offer: _Offer | None = None
        self._known: dict[int, tuple[weakref.ref[torch.Tensor], weakref.ref[_Kept]]] = {}
        self._leaving: deque[tuple[_VisitInputs, list[_Leaving]]] = deque()
        self._dropped: deque[_Input] = deque()
        self._is_closed = False
        self._finalizer = when_dropped(self, self._workers.close)

    @property
    def in_use_bytes(self) -> int:
        """Bytes of the inputs that a graph still needs."""
        self._take_back()
        return self._places.in_use_bytes

    @property
    def high_water_bytes(self) -> int:
        """The most bytes ever in use at once."""
        return self._places.high_water_bytes

    def stats(self) -> TierStats:
        """Traffic to and from the disk."""
        return self._disk.stats() if self._disk is not None else TierStats()

    def tell(self, recorder: Recorder | None) -> None:
        """Report traffic and waits to `recorder`; None: to nobody."""
        self._recorder = recorder
        if self._disk is not None:
            self._disk.listen(recorder.moved if recorder is not None else None)

    def begin(self) -> None:
        """Begin a call; inputs of earlier ones stay for as long as their graphs need them."""
        self.release()
        self._call = _Call()
        self._unpacked.clear()
        self._known.clear()

    @contextmanager
    def keep(self, tensors: Sequence[torch.Tensor], owner: str) -> Iterator[None]:
        """Offer the inputs of a visit to block `owner`, which `send` sends if they are large and take a gradient.

        Inside the context they are what autograd saves in the place of `tensors`, saved in this order; it lets go of them
        as it does of tensors. What no operation of the plan sent is sent when it is saved, and waited for.
        """
        self._take_back()
        call, offer, before = self._call, _Offer(tensors, _VisitInputs(owner)), self._offer

        def pack(tensor: torch.Tensor) -> torch.Tensor | _Saved:
            if not offer.is_sent and self._send(offer):
                self.release()
            each = offer.kept.popleft()
            return tensor if each is None else _Saved(each, call, offer.index)

        self._offer = offer
        try:
            with torch.autograd.graph.saved_tensors_hooks(pack, self._unpack):
                yield
        finally:
            self._offer = before

    # -- operations of the plan --------------------------------------------------------------------------------------

    def waiting(self) -> tuple[Sequence[tuple[str, int]], int]:
        """`(block, num_bytes)` of visits whose inputs are needed, the oldest first; in a backward, up to its own.

        And the number of visits, the last of these, whose inputs are still in memory.
        """
        needed, leaving = list(self._call.needed()), [visit for visit, _ in self._leaving]
        sizes = [(visit.block, visit.num_bytes) for visit in reversed(needed)]
        return sizes, sum(visit in leaving for visit in needed)

    def send(self, block: str) -> None:
        """Start sending what the visit of `block` that comes next was offered.

        Raises BudgetError if it does not fit.
        """
        if self._offer is not None and not self._offer.is_sent and self._offer.visit.block == block:
            self._send(self._offer)

    def free(self, block: str) -> None:
        """Release the memory of the oldest inputs of `block` on their way. Raises StorageError if they were not stored."""
        found = next((each for each in self._leaving if each[0].block == block), None)
        if found is not None:
            self._leaving.remove(found)
            _wait_until_away(found[1])

    def fetch(self, block: str) -> None:
        """Start bringing back the inputs of the visit whose backward comes next, if it is one of `block`."""
        following = next(self._call.needed(with_current=False), None)
        if following is not None and following.block == block:
            for each in following.inputs():
                each.on_way = self._bring(each)

    def settle(self) -> None:
        """Leave the inputs that autograd asked for to it alone: what the next visit shares with this one was fetched."""
        self._unpacked.clear()

    def release(self) -> None:
        """Release the memory of all inputs on their way; raise the first error met."""
        leaving, self._leaving = self._leaving, deque()
        _wait_until_away([each for _, some in leaving for each in some])

    def close(self) -> None:
        """Give all memory back, also of inputs that a graph still needs. Closing twice is allowed."""
        if self._is_closed:
            return
        self._is_closed = True
        self._finalizer.detach()
        with ExitStack() as stack:
            stack.callback(self.arena.check_books)
            for region in ([] if self._home is None else [self._home]) + self._buffers:
                stack.callback(region.free)
            for waiting in (self._leaving, self._dropped, self._call.visits, self._known, self._unpacked):
                stack.callback(waiting.clear)
            stack.callback(self._workers.close)

    # -- down ------------------------------------------------------------------------------------------------------

    def _send(self, offer: _Offer) -> bool:
        """Send what is offered; whether anything was."""
        leaving: list[_Leaving] = []
        self._leaving.append((offer.visit, leaving))
        offer.kept.extend(self._keep(tensor, offer.visit.block, leaving) for tensor in offer.tensors)
        offer.tensors, offer.is_sent, offer.index = (), True, len(self._call.visits)
        offer.visit.kept = [weakref.ref(each) for each in offer.kept if each is not None]
        self._call.visits.append(offer.visit)
        return bool(leaving)

    def _keep(self, tensor: torch.Tensor, owner: str, leaving: list[_Leaving]) -> _Kept | None:
        if not (
            tensor.requires_grad
            and tensor.is_contiguous()
            and tensor.nbytes >= memory_estimate.LEAST_INPUT_BYTES
        ):
            return None
        own, known = self._known.get(id(tensor), (None, None))
        same = known() if own is not None and known is not None and own() is tensor else None
        if same is not None and same.input.version == tensor._version:
            return same  # nor was it changed in place since
        label = f"{owner}.input"
        extent = self._places.take(tensor.nbytes, label)
        sent = tensor.detach()  # without its graph, which may refer to this object
        each = _Input(label, extent, sent.shape, sent.dtype, weakref.ref(sent), sent._version)
        kept = _Kept(each)
        weakref.finalize(
            kept, self._dropped.append, each
        )  # at any time, on any thread: the rest is done later
        (each.last,) = self._path.drain(self._route(each, sent.view(-1)))
        leaving.append((sent, each, each.last))
        self._known[id(tensor)] = weakref.ref(tensor), weakref.ref(kept)
        return kept

    def _take_back(self) -> None:
        """Take back the places of inputs that no graph needs, and release tensors that came back in vain."""
        while self._dropped:
            each = self._dropped.popleft()
            if each.on_way is not None:
                with suppress(Exception):  # nobody needs them
                    each.on_way[1].follow()
                each.on_way = None
            self._places.give(each.extent, each.last)

    # -- up --------------------------------------------------------------------------------------------------------

    def _unpack(self, saved: torch.Tensor | _Saved) -> torch.Tensor:
        """The input where blocks compute, which waits for it; brought now if no operation of the plan fetched it."""
        if isinstance(saved, torch.Tensor):
            return saved
        if self._call.current != saved.index:
            self._unpacked.clear()
        self._call, saved.call.current = saved.call, saved.index
        each = saved.kept.input
        target, up = self._bring(each)
        each.on_way = None
        self._unpacked.append(target)
        recorder, start_s = self._recorder, time.perf_counter()
        began = recorder.moment() if recorder is not None else None
        try:
            up.follow()
        except BaseException:
            each.forget()
            raise
        finally:
            self.wait_s["wait input"] += time.perf_counter() - start_s
        if recorder is not None and began is not None:
            recorder.waited(each.label.partition(".")[0], Wait.ended_by, began)
        return target

    def _bring(self, each: _Input) -> tuple[torch.Tensor, Transfer]:
        """The tensor if it still exists, else a new one, and the transfer that fills it."""
        if self._is_closed:
            raise UsageError(
                "backward() of a call whose model was closed",
                hint="call backward() before the model is closed",
            )
        if each.on_way is not None:
            return each.on_way
        here = each.here()
        if here is not None and (each.arrived is not None or here._version == each.version):
            return here, each.arrived or DoneTransfer()
        if each.was_changed or here is not None:
            raise UsageError(
                f"{each.label}: an input of a block was changed in place after its forward",
                hint="let the model make a new tensor, or let inputs stay where they are: Pins(inputs=...)",
            )
        if each.is_lost:
            raise StorageError(f"{each.label} could not be stored", hint="an earlier error says why")
        target = torch.empty(each.shape, dtype=each.dtype, device=self._device.torch_device)
        # It is where it waits: while it was on its way, it was here.
        (up,) = self._path.fill(self._route(each, target.view(-1)))
        each.last = each.arrived = up
        each.here = weakref.ref(target)
        return target, up

    def _route(self, each: _Input, place: torch.Tensor) -> Route:
        """An input between `place`, `[num_elements]`, and where it waits."""
        offset, size = each.extent.offset, place.element_size()
        home = self._home.tensor(each.dtype, place.numel(), offset) if self._home is not None else None
        step = memory_estimate.INPUT_PART_BYTES // size
        chunks = []
        for index, start in enumerate(range(0, place.numel(), step)):
            stop = min(start + step, place.numel())
            extent = Extent(offset + start * size, align((stop - start) * size))
            chunks.append(Chunk(start, stop, extent, f"{each.label}[{index}]"))
        # Even where the processor computes: the disk cannot read into a tensor of torch's, so it is copied.
        legs = (LINK,) if home is not None else (DRIVE, LINK)
        return Route(each.label, legs, tuple(chunks), place, home)


@dataclass(eq=False)
class _Input:
    """A tensor that was sent away: where it waits, and the last use of that place.

    `here` is the tensor where blocks compute, as long as anything refers to it: the one that was sent, at `version`, or the
    one that came back, which `arrived` fills. `on_way` is the one that is being filled ahead of its use.
    """

    label: str
    extent: Extent
    shape: torch.Size
    dtype: torch.dtype
    here: Callable[[], torch.Tensor | None]
    version: int
    last: Transfer = field(default_factory=DoneTransfer)
    arrived: Transfer | None = None
    on_way: tuple[torch.Tensor, Transfer] | None = None
    was_changed: bool = False
    """In place, after it was sent: the values that arrived are undefined."""
    is_lost: bool = False
    """Whether storing it failed."""

    def forget(self) -> None:
        """Forget a transfer that failed: the frames of its error refer to what holds this."""
        self.last = self.arrived = DoneTransfer()
        self.here = _nowhere


def _nowhere() -> None:
    return None


@dataclass(eq=False)
class _Kept:
    """What autograd saves: the place of its input is taken back when the last graph has released it."""

    input: _Input


_Leaving = tuple[torch.Tensor, _Input, Transfer]
"""A tensor on its way, which is held until it is away."""


def _wait_until_away(leaving: Sequence[_Leaving]) -> None:
    """Let computing wait until inputs are away, and release them; raise the first error met."""
    error: Exception | None = None
    for tensor, each, down in leaving:
        try:
            down.follow()
        except Exception as failure:
            error = error or failure
            each.is_lost = True
            each.forget()
        each.was_changed = tensor._version != each.version
    if error is not None:
        raise error


@dataclass(eq=False)
class _VisitInputs:
    """The inputs that a visit of `block` sent away."""

    block: str
    kept: Sequence[weakref.ref[_Kept]] = ()

    def inputs(self) -> list[_Input]:
        """Those that a graph still needs."""
        return [kept.input for reference in self.kept if (kept := reference()) is not None]

    @property
    def num_bytes(self) -> int:
        """Of these."""
        return sum(each.shape.numel() * each.dtype.itemsize for each in self.inputs())


@dataclass(eq=False)
class _Call:
    """The visits of one call, in the order of its forward; `current` is the one that its backward has come to."""

    visits: list[_VisitInputs] = field(default_factory=list)
    current: int | None = None

    def needed(self, *, with_current: bool = True) -> Iterator[_VisitInputs]:
        """Visits whose inputs are needed, the last first; in a backward, up to the current one."""
        end = len(self.visits) if self.current is None else self.current + with_current
        return (visit for visit in reversed(self.visits[:end]) if visit.inputs())


@dataclass(eq=False)
class _Offer:
    """What a visit was given; once it is sent, `kept` is what autograd has yet to save in its place."""

    tensors: Sequence[torch.Tensor]
    visit: _VisitInputs
    is_sent: bool = False
    index: int = 0
    """Of the visit in its call."""
    kept: deque[_Kept | None] = field(default_factory=deque)


@dataclass(frozen=True, slots=True)
class _Saved:
    """An input as the graph holds it: sent away for visit `index` of `call`, its own."""

    kept: _Kept
    call: _Call
    index: int


class Places:
    """`num_bytes` of a tier, handed out in whole pages; a place of the same length is reused before others."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes
        self.high_water_bytes = 0
        self._in_use: set[Extent] = set()
        self._idle: dict[int, list[tuple[Extent, Transfer]]] = {}
        self._gaps = [Extent(0, num_bytes)]

    @property
    def in_use_bytes(self) -> int:
        """Bytes handed out."""
        return sum(extent.num_bytes for extent in self._in_use)

    def take(self, num_bytes: int, name: str) -> Extent:
        """Allocate a place, and order computing after its last use. Raises BudgetError if no place is large enough."""
        size = align(num_bytes)
        extent = self._again(size) or self._cut(size)
        if extent is None:
            self._merge()
            extent = self._cut(size)
        if extent is None:
            raise BudgetError(
                f"{name} needs {format_bytes(size)}; of the {format_bytes(self.num_bytes)} set aside for inputs of blocks "
                f"{format_bytes(self.in_use_bytes)} are in use",
                hint="call backward() before the next forward, or make the first call with the largest batch",
            )
        self._in_use.add(extent)
        self.high_water_bytes = max(self.high_water_bytes, self.in_use_bytes)
        return extent

    def give(self, extent: Extent, last: Transfer) -> None:
        """Take back a place that is in use until `last` is over."""
        self._in_use.remove(extent)
        self._idle.setdefault(extent.num_bytes, []).append((extent, last))

    def _again(self, size: int) -> Extent | None:
        if not (idle := self._idle.get(size)):
            return None
        extent, last = idle.pop()
        with suppress(Exception):  # what needed those bytes raises what went wrong
            last.follow()
        return extent

    def _cut(self, size: int) -> Extent | None:
        for index, gap in enumerate(self._gaps):
            if gap.num_bytes >= size:
                self._gaps[index] = Extent(gap.offset + size, gap.num_bytes - size)
                return Extent(gap.offset, size)
        return None

    def _merge(self) -> None:
        """Merge all idle places and the gaps beside them."""
        for idle in self._idle.values():
            for _, last in idle:
                wait_over([last])
        self._idle.clear()
        self._gaps, start = [], 0
        for extent in sorted(self._in_use, key=lambda extent: extent.offset):
            self._gaps.append(Extent(start, extent.offset - start))
            start = extent.offset + extent.num_bytes
        self._gaps.append(Extent(start, self.num_bytes - start))
