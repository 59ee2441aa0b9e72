"""The weights of blocks: read into slots, waited for, and freed again."""

from __future__ import annotations

import torch

from outsize.block import Plane
from outsize.config import Home
from outsize.plan import Placement
from outsize.store.path import Path
from outsize.store.planes import Planes, weight_dtype
from outsize.store.recovery import failed
from outsize.store.state import BlockState
from outsize.store.weight_reader import WeightReader
from outsize.tier import DoneTransfer, Transfer, follow_all, sent, wait_all


class Weights:
    """The operations of a plan on weights, which come from their home or, before the first update, from `reader`."""

    def __init__(self, planes: Planes, path: Path, reader: WeightReader) -> None:
        self._planes = planes
        self._path = path
        self._reader = reader

    def load(self, state: BlockState) -> None:
        """Start reading what the source has of weights whose home is memory, once."""
        if state.weights.is_loaded:
            return
        if state.planes.home(Plane.WEIGHT) is Home.DEVICE:
            state.weights.reads = state.weights.home_reads = self._read_source(state)
            state.weights.is_loaded = True
        else:
            self._load_hosted(state)

    def read(self, state: BlockState) -> None:
        """Take a slot and start filling it.

        On a device, a pending update fills it: it sends the weights on as it updates them in host memory. Those that it
        streams from the disk are not all, if others live in the model's files.
        """
        self._planes.take_slot(state.planes, Plane.WEIGHT)
        if state.update.pending is None or not self._planes.link:
            self._fill(state)
        elif state.update.is_stored and state.planes.home(Plane.WEIGHT) is Home.DISK:
            state.weights.reads = self._read_source(state)

    def _fill(self, state: BlockState) -> None:
        if not state.update.is_stored:
            state.weights.reads = state.weights.home_reads = self._read_source(state)
            return
        self._load_hosted(state)
        ready: tuple[Transfer, ...] = ()
        job = state.update.job
        if job is not None and self._planes.link:
            if state.planes.home(Plane.WEIGHT) is Home.HOST:
                job.wait_applied()
            else:
                ready = (job,)
        if state.weights.loading is not None:
            ready = (*ready, state.weights.loading)
        offset = state.record.shard.start * weight_dtype(state.record).itemsize
        state.weights.home_reads = self._path.fill(state.planes.route(Plane.WEIGHT, offset), ready)
        in_files = [] if state.planes.home(Plane.WEIGHT) is Home.HOST else self._read_source(state)
        state.weights.reads = [*state.weights.home_reads, *in_files]

    def _read_source(self, state: BlockState) -> list[Transfer]:
        """Start filling the place where the block computes with what the source has of its weights."""
        planes, first = state.planes, _first_in_source(state)
        if first >= state.record.num_elements:
            return []
        if not self._planes.link:
            return [self._reader.start_read(planes, planes.weights(), first)]
        self._load_hosted(state)
        return [self._reader.start_send(planes, state.weights.loading, first)]

    def _load_hosted(self, state: BlockState) -> None:
        plane, first = state.planes.at_home(Plane.WEIGHT, Home.HOST), _first_in_source(state)
        if plane is not None and not state.weights.is_loaded:
            if first < state.record.num_elements:
                state.weights.loading = self._reader.start_read(state.planes, plane, first)
            state.weights.is_loaded = True

    def follow(self, state: BlockState) -> None:
        """Let computing come after what fills the weights; raise what went wrong."""
        follow_all(state.weights.reads)
        state.weights.reads = ()

    def wait(self, state: BlockState) -> None:
        """Let computing wait until the weights in memory are current; raise what went wrong."""
        self.load(state)
        self.follow(state)
        if state.update.job is not None:
            state.update.job.follow_applied()

    def free(self, state: BlockState) -> None:
        """Give the slot back once nothing is read into or written from it."""
        assert state.planes.weight_slot is not None, f"{state.name} holds no slot"
        wait_all(state.weights.reads)
        if state.update.job is not None:
            state.update.job.wait_slot_free()
        state.weights.reads = ()
        self._planes.free_slot(state.planes, Plane.WEIGHT, [self._planes.device.mark()])

    def take_rows(self, state: BlockState, index: int, rows: torch.Tensor, target: torch.Tensor) -> None:
        """Fill `target` with sorted `rows` of entry `index` of a block that was never stored. Raises StorageError.

        They come from memory, if that is the home of the weights, else from the source.
        """
        if not rows.numel():
            return
        plane = state.planes.at_home(Plane.WEIGHT)
        if state.planes.home(Plane.WEIGHT) is Home.DEVICE:
            follow_all(state.weights.reads)
        elif plane is not None and state.weights.loading:
            state.weights.loading.wait()
        if plane is None:
            target.copy_(sent(self._reader.read_rows(state.planes, index, rows), target.device))
            return
        entry = state.record.entries[index]
        table = plane[entry.start : entry.stop].view(entry.piece.shape)
        target.copy_(sent(table.index_select(0, sent(rows, table.device)), target.device))

    def keep_pieces(self, placement: Placement) -> None:
        """Keep the single entries of streamed blocks in memory that `placement` has, and no others."""
        dropped = sorted(self._planes.pieces.keys() - placement.pieces)
        if dropped:
            self._reader.free_pieces(dropped)
        self._planes.keep_pieces(placement)

    def restored(self, state: BlockState) -> None:
        """Note that the disk has the weights, from an earlier process, but for those in the model's files."""
        state.weights.is_loaded = state.record.num_stored == state.record.num_elements

    def evicted(self, state: BlockState) -> None:
        """Note that weights moved from the device to host memory."""
        state.weights.reads = ()
        state.weights.loading = DoneTransfer() if state.weights.is_loaded else None

    def recover(self, state: BlockState) -> None:
        """Read weights again that did not arrive at their home in memory; see [Note: interruption]."""
        weights = state.weights
        reads = [*weights.reads, *([] if weights.loading is None else [weights.loading])]
        is_at_home = Plane.WEIGHT in state.planes.regions
        if is_at_home and any(failed(read) for read in reads):
            weights.is_loaded, weights.loading = False, None
        weights.reads = weights.home_reads = ()


def _first_in_source(state: BlockState) -> int:
    """From which element on the source has the weights: all at first, after an update those that live in its files."""
    return state.record.num_stored if state.update.is_stored else 0
