"""Runs plans as the model's forward and backward ask for blocks.

The model drives: when it reaches a block, the executor runs the plan up to that block's operation; when the block is
done, it starts everything that can be started before the next wait. A call that leaves its plan (another order, a
block skipped or visited twice) is planned again from where it stands, counted, and reported: never an assert.

An exception may come between any two lines: an interrupt, missing memory, an error of the model. What has to hold after it
does not depend on code that cleans up, which may be interrupted too: see [Note: interruption] in `recovery.py`.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress

from outsize.block import Plane
from outsize.errors import UsageError
from outsize.plan import (
    PASSES,
    Context,
    Direction,
    Free,
    Occupancy,
    Op,
    Pass,
    Plan,
    Read,
    Visit,
    Wait,
    Write,
    check,
    evicted,
    make_plan,
)
from outsize.plan.profile import Resource
from outsize.store.blocks import BlockStore
from outsize.store.recorder import Recorder
from outsize.store.recovery import undone_by
from outsize.store.snapshots import Snapshot
from outsize.store.state import BlockState

Runner = Callable[[Op], None]


class Executor:
    """One model's plan in progress, made by `passes`.

    `executed` lists the operations of the current call as they were carried out.
    """

    def __init__(self, store: BlockStore) -> None:
        self.store = store
        self.passes: Sequence[Pass] = PASSES
        self.plan = Plan(())
        self.executed: list[Op] = []
        self.off_plan: Counter[str] = Counter()
        self.wait_s: defaultdict[str, float] = defaultdict(float)
        self.recorder: Recorder | None = None
        self._index = 0
        self._expected: list[Visit] = []
        self._held: list[str] = []
        self._input_bytes: Mapping[str, int] = {}
        self._visiting: frozenset[str] = frozenset()
        self._is_stale = False
        self._is_disturbed = False
        """Whether an operation has begun and has not ended: nothing else is known of the books then."""
        self._unfinished: Callable[[], object] | None = None
        """A change of several parts that has begun; doing it again ends it."""

    def begin(self, visits: Sequence[Visit], input_bytes: Mapping[str, int] | None = None) -> None:
        """Start a call that is expected to make `visits`; `input_bytes` are those that their backwards need, by block.

        Raises StateLostError where the model cannot go on.
        """
        self.enter()
        self._is_disturbed = True
        self._release_gradients()
        if self.store.offload is not None:
            self.store.offload.begin()
        self._input_bytes = input_bytes or {}
        self.executed = []
        self._make_plan(list(visits))
        self._is_disturbed = False

    def enter(self) -> bool:
        """Bring order into what an exception left behind; every use of the blocks begins here.

        Whether it ended a change that was interrupted (`complete`). Raises StateLostError, from now on at every call, where
        weights or state were only partly changed.
        """
        self._visiting = frozenset()
        unfinished = self._unfinished
        if self._is_disturbed:
            self._recover()
        if unfinished is not None:
            unfinished()
            self._unfinished = None
        self.store.updates.check()
        return unfinished is not None

    def _recover(self) -> None:
        self._expected, self.plan, self._index = [], Plan(()), 0
        self._held, self._is_stale = [], False
        self.store.recover()
        self._is_disturbed = False

    def complete(self, change: Callable[[], object]) -> None:
        """Make a change of several parts, which may be made twice: where it is interrupted, the next `enter` ends it."""
        self._unfinished = change
        change()
        self._unfinished = None

    @contextmanager
    def visit(
        self, visits: Sequence[Visit], before: Callable[[], None] = lambda: None
    ) -> Iterator[list[BlockState]]:
        """The blocks' weights are in memory (and, where they train, their gradient sums ready) inside the context.

        `visits` are those of one point: one, or several that are joined. `before` is called when they are reached.
        """
        assert not self._visiting, f"{visits[0].block} is visited inside another visit"
        self.enter()
        self._is_disturbed = True
        for visit in visits:
            self._reach(visit)
        recorder = self.recorder
        began = recorder.moment() if recorder is not None else None
        states = [self.store[visit.block] for visit in visits]
        for visit, state in zip(visits, states, strict=True):
            if visit.trains and visit.direction is Direction.BACKWARD:
                self.store.gradients.begin(state)
        try:
            with undone_by(self._leave):
                self._visiting = frozenset(visit.block for visit in visits)
                before()
                yield states
        except Exception:
            with suppress(Exception):  # what is not done here is done by the next `enter`
                self._recover()
            raise
        if recorder is not None and began is not None:
            recorder.visited(visits, began)
        if self._is_stale:
            self._is_stale = False
            self._release_gradients()
            self._make_plan(self._expected)
        else:
            self._proceed()
        self._is_disturbed = False

    def _leave(self) -> None:
        self._visiting = frozenset()

    @contextmanager
    def touch(self, block: str) -> Iterator[BlockState]:
        """The block's weights are current and in memory inside the context; a plan in progress is resumed after."""
        if self._visiting:
            raise UsageError(
                f"a parameter of block {block} is read inside the forward of another block",
                hint="read it before or after calling the model",
            )
        self.enter()
        self._is_disturbed = True
        self._release_gradients()
        rest = self._expected
        self._make_plan([Visit(block, Direction.TOUCH)])
        while self._index < len(self.plan):
            self._run_next()
        yield self.store[block]
        self._make_plan(rest)
        self._is_disturbed = False

    def evict(self, may_leave: Callable[[BlockState], bool]) -> BlockState | None:
        """Move the block whose visit is furthest away from the device, where it stays, to the host's memory.

        One that `may_leave`, and that is not being visited; None where there is none. What is left of the call is planned
        again when the visit under way is over.
        """
        order = [visit.block for visit in self._expected]
        staying = [
            state
            for state in self.store
            if self.store.planes.updates_in_place(state.planes)
            and state.name not in self._visiting
            and may_leave(state)
        ]
        if not staying:
            return None

        def distance(state: BlockState) -> int:
            return order.index(state.name) if state.name in order else len(order)

        chosen = max(staying, key=distance)
        if chosen.planes.gradient_slot is not None:
            self.store.gradients.free(chosen)
        self.store.evict(chosen, evicted(self.store.placement, chosen.record))
        self._is_stale = True
        return chosen

    def begin_commit(self, complete: Callable[[Snapshot], None]) -> None:
        """Let a commit begin, as `Snapshots.begin` does; what is left of a call adds the blocks that it waits for."""
        assert self.store.snapshots is not None
        self.store.snapshots.begin(complete)
        if self._index < len(self.plan):
            self._is_disturbed = True
            self._release_gradients()
            self._make_plan(self._expected)
            self._is_disturbed = False

    def settle_updates(self) -> None:
        """Apply what is pending now instead of at the next visit."""
        self.enter()
        for state in self.store:
            if state.update.pending is not None:
                with self.touch(state.name):
                    pass

    def close(self) -> None:
        """Finish what is under way and give everything back, then raise what went wrong, if anything did."""
        with ExitStack() as stack:
            stack.callback(self.store.close)
            if self._is_disturbed or self.store.updates.is_lost:
                stack.callback(self.store.recover)
                return
            for block in self._held:
                stack.callback(self.store.weights.free, self.store[block])
            stack.callback(self.store.flush)
            stack.callback(self._release_gradients)
            self._held = []

    # -- reaching a visit ----------------------------------------------------------------------------------------

    def _reach(self, visit: Visit) -> None:
        if not self._expected or self._expected[0].key != visit.key:
            self._leave_plan(visit)
        self._expected.pop(0)
        while self.plan.ops[self._index].resource is not Resource.COMPUTE:
            self._run_next()
        op = self.plan.ops[self._index]
        assert op.block == visit.block, f"plan and visits disagree: {op}, {visit}"
        self.executed.append(op)
        self._index += 1

    def _leave_plan(self, visit: Visit) -> None:
        """Plan again from here: skip ahead where the visit comes later, else insert it."""
        self.off_plan[f"{visit.direction} {visit.block}"] += 1
        self._release_gradients()
        keys = [expected.key for expected in self._expected]
        rest = self._expected[keys.index(visit.key) :] if visit.key in keys else [visit, *self._expected]
        self._make_plan(rest)

    def _make_plan(self, visits: list[Visit]) -> None:
        offload, snapshots = self.store.offload, self.store.snapshots
        inputs, num_leaving = offload.waiting() if offload is not None else ((), 0)
        occupancy = Occupancy(
            held=tuple(self._held),
            pending=frozenset(state.name for state in self.store if state.update.pending is not None),
            accumulated=frozenset(state.name for state in self.store if state.gradient.exists),
            committing=snapshots.waiting if snapshots is not None else (),
            inputs=inputs,
            num_leaving=num_leaving,
        )
        records, placement = self.store.records, self.store.placement
        self.plan = make_plan(Context(visits, records, placement, occupancy, self._input_bytes), self.passes)
        check(self.plan, records, placement)
        self._expected = visits
        self._index = 0
        self._proceed()

    # -- running -------------------------------------------------------------------------------------------------

    def _proceed(self) -> None:
        """Start everything up to the next operation that would wait for bytes, or compute."""
        while self._index < len(self.plan):
            op = self.plan.ops[self._index]
            if isinstance(op, Wait) or op.resource is Resource.COMPUTE:
                return
            self._run_next()

    def _run_next(self) -> None:
        op = self.plan.ops[self._index]
        plane: Plane | None = getattr(op, "plane", None)
        recorder, state = self.recorder, self.store[op.block]
        began = recorder.moment() if recorder is not None else None
        start = time.perf_counter()
        try:
            self.store.runners[type(op), plane](state)
        finally:
            if op.is_waiting:
                self.wait_s[f"{op.verb} {plane}"] += time.perf_counter() - start
        if recorder is not None and began is not None:
            recorder.ran(op, began, in_place=self.store.planes.updates_in_place(state.planes))
        match op:
            case Read(block, Plane.WEIGHT):
                self._held.append(block)
            case Free(block, Plane.WEIGHT):
                self._held.remove(block)
            case _:
                pass
        self.executed.append(op)
        self._index += 1

    def _release_gradients(self) -> None:
        """Give back gradient slots of a plan that is not carried on, finishing writes that follow a backward."""
        while self._index < len(self.plan) and isinstance(self.plan.ops[self._index], Write):
            self._run_next()
        for state in self.store:
            if state.planes.gradient_slot is not None:
                self.store.gradients.free(state)
        self._expected, self.plan, self._index = list(self._expected), Plan(()), 0
