"""What is done after an operation on blocks that did not run to its end.

[Note: interruption] An exception may come between any two lines, also inside the code that cleans up after another one. So
nothing relies on cleaning up. An operation marks the books as disturbed before its first change, and takes the mark back
after its last. Whoever finds the mark recovers first:

1. Every worker becomes idle, so that no byte moves any more and no handle of a transfer is needed.
2. Slots and buffers are all given back: their contents are unknown. Weights are read again from their homes.
3. An update that was not handed over, or failed before it changed anything, is pending again. One that failed later left
   weights and state partly changed: they are lost, and every call says so from then on.
4. Gradients that were being summed where they live are partly summed: they are refused until they are dropped.

Recovering may be interrupted as well; the mark is still there then.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from outsize.block import Plane
from outsize.tier import Transfer

if TYPE_CHECKING:
    from outsize.store.blocks import BlockStore
    from outsize.store.state import BlockState


@contextmanager
def undone_by(undo: Callable[[], object]) -> Iterator[None]:
    """Run `undo` when the context ends, and once more where that was interrupted."""
    is_undone = False
    try:
        try:
            yield
        finally:
            undo()
            is_undone = True
    finally:
        if not is_undone:
            undo()


def recover(store: BlockStore) -> None:
    """Bring the books of `store` in line with what its homes hold; see [Note: interruption]."""
    if store.snapshots is not None:
        store.snapshots.recover()  # first: an update may wait for a commit that waits for a block
    store.finish()
    for state in store:
        _settle_gradient(state)
        _settle_weights(state)
        _settle_update(store, state)
    store.give_slots_back()
    if store.snapshots is not None:
        store.snapshots.settle()


def _settle_gradient(state: BlockState) -> None:
    """A gradient that did not arrive at its home is as lost as one that was only partly summed."""
    if state.is_draining and any(_failed(transfer) for transfer in state.gradient_transfers):
        state.summing |= {index for index, gradient in enumerate(state.gradients) if gradient.present}
    state.gradient_transfers = []
    state.is_draining = False


def _settle_weights(state: BlockState) -> None:
    """Weights that stay in memory and did not arrive from the source are read again."""
    reads = [*state.weight_reads, *([] if state.loading is None else [state.loading])]
    is_at_home = Plane.WEIGHT in state.resident or Plane.WEIGHT in state.hosted
    if not state.is_stored and is_at_home and any(_failed(read) for read in reads):
        state.is_loaded, state.loading = False, None
    state.weight_reads, state.home_reads = [], ()


def _settle_update(store: BlockStore, state: BlockState) -> None:
    if state.is_changing:
        store.lose(state, None)
    while state.update is not None and not state.update.is_applied():
        state.update = state.update.after  # it was not handed over; it is pending still
    job = state.update
    if job is None:
        return
    failure = job.failure()
    if failure is None:
        state.is_stored = True
        if state.pending is job.pending:
            state.pending = None
    elif job.has_begun:
        store.lose(state, failure)
    else:
        state.pending, state.is_stored, state.update = job.pending, not job.is_first, None


def _failed(transfer: Transfer) -> bool:
    """Whether a transfer that is over failed."""
    try:
        transfer.wait()
    except Exception:
        return True
    return False
