"""What happens after an operation on blocks that did not run to its end.

[Note: interruption] An exception may come between any two lines, also inside code that cleans up after another one. So
nothing relies on cleaning up. An operation marks the store as disturbed before its first change, and removes the mark after
its last. The next operation that finds the mark calls `BlockStore.recover` first:

1. Every worker becomes idle, so that no byte moves and no transfer has to be waited for.
2. All slots and buffers are taken back: their contents are unknown. Weights are read again from their homes.
3. An update that was not handed over, or failed before it changed anything, is pending again. One that failed later left
   weights and state partly changed: they are lost, and every call says so from then on.
4. Gradients that were being summed in their homes are partly summed: they are refused until they are dropped.

Recovering may be interrupted as well; the mark then stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from outsize.tier import Transfer


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


def failed(transfer: Transfer) -> bool:
    """Whether a transfer that is over failed."""
    try:
        transfer.wait()
    except Exception:
        return True
    return False
