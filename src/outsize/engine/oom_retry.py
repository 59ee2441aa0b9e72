"""What is done when a device runs out of memory, where that was asked for: what failed is computed again, in less.

Memory runs out inside a visit, which is computed tile by tile, so a tile is what is repeated: first, where other visits
keep their activations, after letting go of those, which their backward then computes again; then in halves, down to one
row; then after moving blocks that stay on the device to the host's memory, one by one. A tile may add to one sum several
times (a layer may use a weight twice), so additions are counted: a repetition skips exactly as many additions to each sum
as the attempts before it completed. So nothing of the step is lost or counted twice, and no number changes but for
rounding: of smaller tiles, and of updates by the host instead of the device.

This does not hold where a tile is no function of its arguments: one that filled a cache, or changed a buffer, before it
failed is not repeated, and one that draws random numbers goes back in the tiles of its forward.
"""

from __future__ import annotations

import warnings
import weakref
from collections import Counter, deque
from collections.abc import Callable, Hashable, Sequence
from dataclasses import replace

import torch

from outsize.engine.batch import Graphs, Tile, tiles
from outsize.engine.rng_autocast import rewinding
from outsize.store.recovery import undone_by
from outsize.tier import Device

ALONE = (Tile(0, 1, 1),)
"""For what is not computed tile by tile."""


class _Additions:
    """How often one attempt added to each sum: `completed` includes the additions of earlier attempts, which it skips."""

    def __init__(self, earlier: Counter[Hashable]) -> None:
        self.completed = earlier.copy()
        self._to_skip = earlier.copy()

    def skips(self, what: Hashable) -> bool:
        """Whether an earlier attempt completed the addition to `what` that comes next; counts it."""
        if not self._to_skip[what]:
            return False
        self._to_skip[what] -= 1
        return True


class OomRetry:
    """Repeats what a device had no memory for if it `is_on`; else it lets every error pass.

    `evict` moves something off the device that stays there; it returns False if nothing can be moved.
    """

    def __init__(self, is_on: bool, device: Device, evict: Callable[[], bool]) -> None:
        self.is_on = is_on
        self.keeps_graphs = True
        """Whether visits may keep their graphs still."""
        self.notes: list[str] = []
        """What was changed, for people."""
        self._device = device
        self._evict = evict
        self._kept: weakref.WeakValueDictionary[int, Graphs] = weakref.WeakValueDictionary()
        self._additions: _Additions | None = None

    def compute(
        self,
        parts: Sequence[Tile],
        attempt: Callable[[Tile], None],
        *,
        may_cut: bool = True,
        may_repeat: Callable[[], bool] = lambda: True,
    ) -> tuple[Tile, ...]:
        """Compute `parts` by `attempt`, in smaller ones where memory runs out and they `may_cut`; those that were computed.

        What an attempt changes it changes by `add`, or in a way that a repetition overwrites. Raises
        torch.OutOfMemoryError where not even the smallest can be computed.
        """
        assert self._additions is None, "a part of a visit is computed inside another"
        todo = deque((part, Counter[Hashable]()) for part in parts)
        computed: list[Tile] = []
        most = max((part.stop - part.start for part in parts), default=1)
        while todo:
            part, added = todo.popleft()
            if part.stop - part.start > most:
                todo.extendleft((each, added) for each in reversed(_cut(part, most)))
                continue
            rewind = rewinding(self._device) if self.is_on else None
            additions = _Additions(added)
            try:
                with undone_by(self._end_attempt):
                    self._additions = additions
                    attempt(part)
                computed.append(part)
                continue
            except torch.OutOfMemoryError:
                if rewind is None or not may_repeat():
                    raise
                added = additions.completed
                if self._let_go_of_graphs():
                    pass
                elif may_cut and most > 1:
                    most = -(-(part.stop - part.start) // 2)
                    while todo and not (added or todo[0][1]):  # cut as it would have been from the start
                        part = replace(part, stop=todo.popleft()[0].stop)
                elif not self._evict():
                    raise
                todo.appendleft((part, added))
            # Only from here on, where the error is forgotten, is the memory of the attempt free again.
            rewind()
        return tuple(computed)

    def _end_attempt(self) -> None:
        self._additions = None

    def add(self, what: Hashable, act: Callable[[], object]) -> None:
        """Do `act`, which adds to the sum named `what`, unless an earlier attempt at this part completed this addition.

        Whatever memory `act` takes it takes before it changes anything.
        """
        if self._additions is None:
            act()
        elif not self._additions.skips(what):
            act()
            self._additions.completed[what] += 1

    def keep(self, graphs: Graphs) -> None:
        """Let go of `graphs` where memory runs out, unless they were taken for their backward."""
        if self.is_on:
            self._kept[id(graphs)] = graphs

    def take(self, graphs: Graphs) -> Graphs:
        """The graphs for the backward that begins; nobody lets go of them any more."""
        self._kept.pop(id(graphs), None)
        taken = Graphs(graphs)
        graphs.clear()
        return taken

    def note(self, text: str) -> None:
        """Say what was changed."""
        self.notes.append(text)
        warnings.warn(f"the device ran out of memory: {text}", RuntimeWarning, stacklevel=2)

    def _let_go_of_graphs(self) -> bool:
        """Let go of all activations that wait for a backward, and keep none from now on; False where there were none."""
        kept = [graphs for graphs in self._kept.values() if graphs]
        self._kept.clear()
        for graphs in kept:
            graphs.clear()
        if kept:
            self.keeps_graphs = False
            self.note("no layer keeps its activations any more, all compute them again in their backward")
        return bool(kept)


def _cut(part: Tile, most: int) -> list[Tile]:
    """`part` in tiles of at most `most` rows."""
    return [
        Tile(part.start + each.start, part.start + each.stop, part.rows)
        for each in tiles(part.stop - part.start, most)
    ]
