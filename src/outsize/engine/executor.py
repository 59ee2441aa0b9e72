"""Runs plans as the model's forward and backward ask for blocks.

The model drives: when it reaches a block, the executor runs the plan up to that block's operation; when the block is
done, it starts everything that can be started before the next wait. A call that leaves its plan (another order, a
block skipped or visited twice) is planned again from where it stands, counted, and reported: never an assert.

A block may be visited inside the visit of another, as an expert inside its layer. Such visits are a **detour**: they have a
plan of their own, made from what is in memory, and at its end slots hold again what the plan around it expects, which then
goes on. The cost of a nested visit therefore does not depend on the rest of the call. `hint` plans several visits at once
and reads ahead for them; a visit without a hint is a detour of its own, and is counted.

An exception may come between any two lines: an interrupt, missing memory, an error of the model. What has to hold after it
does not depend on code that cleans up, which may be interrupted too: see [Note: interruption] in `recovery.py`.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial

from outsize.block import Group, Plane
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


@dataclass(frozen=True, slots=True)
class _Around:
    """The plan that a detour interrupts, how far it is, what is in slots, and the visits that are under way."""

    plan: Plan
    index: int
    expected: deque[Visit]
    weights: tuple[str, ...]
    gradients: tuple[str, ...]
    visiting: frozenset[str]


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
        self._slots = store.planes.slots
        """The slots that blocks hold now, by plane, in the order in which they were taken."""
        self._index = 0
        self._expected: deque[Visit] = deque()
        self._left: Counter[str] = Counter()
        """Visits of each block that are left of the call, detours not counted."""
        self._around: list[_Around] = []
        """Plans that detours interrupt, the outermost first."""
        self._is_broken = False
        """Whether a visit inside another failed: the one around it must not go on."""
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
        self._make_plan(visits)
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
        self._expected, self.plan, self._index = deque(), Plan(()), 0
        self._around, self._is_stale, self._is_broken = [], False, False
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

        `visits` are those of one point: one, or several that are joined. `before` is called when they are reached. Raises
        UsageError inside another visit if that leaves no slot for them.
        """
        outer = self._visiting
        if not outer:
            self.enter()
        self._is_disturbed = True
        if outer:
            self._reach_detour(visits)
        self._is_broken = bool(outer)  # as long as this visit is not reached
        depth = len(self._around)
        for visit in visits:
            self._reach(visit)
        recorder = self.recorder
        began = recorder.moment() if recorder is not None else None
        states = [self.store[visit.block] for visit in visits]
        for visit, state in zip(visits, states, strict=True):
            if visit.trains and visit.direction is Direction.BACKWARD:
                self.store.gradients.begin(state)
        self._is_broken = False
        try:
            with undone_by(partial(setattr, self, "_visiting", outer)):
                self._visiting = outer.union(visit.block for visit in visits)
                before()
                yield states
            if self._is_broken:
                raise UsageError(
                    f"block {visits[0].block} caught an error of a visit inside its own",
                    hint="let it reach the caller of the model",
                )
        except Exception:
            self._is_broken = bool(outer)
            if not outer:  # else the visits around still use their slots
                with suppress(Exception):  # what is not done here is done by the next `enter`
                    self._recover()
            raise
        if recorder is not None and began is not None:
            recorder.visited(visits, began)
        while len(self._around) > depth:
            self._end_detour()
        while self._index < len(self.plan) and self.plan.ops[self._index].closes_visit:
            self._run_next()
        if self._is_stale and not outer:
            self._is_stale = False
            self._release_gradients()
            self._make_plan(self._expected)
        else:
            self._proceed()
        if outer and not self._expected:
            self._end_detour()
        self._is_disturbed = bool(outer)

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
        self._make_plan((Visit(block, Direction.TOUCH),))
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
        """Start a commit with `Snapshots.begin`, and plan the rest of a call again, so that it adds the blocks."""
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
            for block in tuple(self._slots[Plane.WEIGHT]):
                stack.callback(self.store.weights.free, self.store[block])
            stack.callback(self.store.flush)
            stack.callback(self._release_gradients)

    # -- reaching a visit ----------------------------------------------------------------------------------------

    def _reach(self, visit: Visit) -> None:
        if not self._expected or self._expected[0].key != visit.key:
            # Plan again from here: skip ahead where the visit comes later, else insert it.
            self.off_plan[f"{visit.direction} {visit.block}"] += 1
            self._release_gradients()
            rest, keys = list(self._expected), [expected.key for expected in self._expected]
            self._make_plan(rest[keys.index(visit.key) :] if visit.key in keys else [visit, *rest])
        self._expected.popleft()
        if not self._around:
            self._left[visit.block] -= 1
        while self.plan.ops[self._index].resource is not Resource.COMPUTE:
            self._run_next()
        op = self.plan.ops[self._index]
        assert op.block == visit.block, f"plan and visits disagree: {op}, {visit}"
        self.executed.append(op)
        self._index += 1

    def _make_plan(self, visits: Sequence[Visit], concerned: Iterable[str] | None = None) -> None:
        """Plan the rest of the call, or visits of a detour, which are `concerned` with a few blocks alone."""
        inputs: Sequence[tuple[str, int]] = ()
        num_leaving, input_bytes = 0, self._input_bytes if concerned is None else {}
        if concerned is None:
            self._left = Counter(visit.block for visit in visits)
            if self.store.offload is not None:
                inputs, num_leaving = self.store.offload.waiting()
        names = self.store.records if concerned is None else concerned
        records = {name: self.store.records[name] for name in names}
        states = [self.store[name] for name in records]
        snapshots, placement = self.store.snapshots, self.store.placement
        occupancy = Occupancy(
            held=tuple(self._slots[Plane.WEIGHT]),
            pending=frozenset(state.name for state in states if state.update.pending is not None),
            accumulated=frozenset(state.name for state in states if state.gradient.exists),
            committing=snapshots.waiting & records.keys() if snapshots is not None else (),
            visiting=self._visiting,
            summing=tuple(self._slots[Plane.GRADIENT]),
            inputs=inputs,
            num_leaving=num_leaving,
        )
        context = Context(tuple(visits), records, placement, occupancy, input_bytes)
        self.plan = make_plan(context, self.passes)
        check(self.plan, records, placement)
        self._index, self._expected = 0, deque(visits)
        self._proceed()

    # -- visits inside others ------------------------------------------------------------------------------------

    def hint(self, visits: Sequence[Visit]) -> None:
        """Plan visits that come next inside the one under way, in this order, and start reading what they need."""
        assert self._visiting, "a hint is given inside a visit"
        self._is_disturbed = self._is_broken = True
        placement, blocks = self.store.placement, {visit.block for visit in visits}
        # If the call visits one of them later, its update and sum have changed by then: plan the rest again.
        self._is_stale |= any(self._left[block] > 0 for block in blocks)
        classes = {placement.slot_class(visit.block, Group.GRADIENT) for visit in visits if visit.trains}
        for block in tuple(self._slots[Plane.GRADIENT]):
            if block not in self._visiting and placement.slot_class(block, Group.GRADIENT) in classes:
                self._run(Free(block, Plane.GRADIENT))
                self._is_stale = True
        weights, gradients = tuple(self._slots[Plane.WEIGHT]), tuple(self._slots[Plane.GRADIENT])
        self._around.append(
            _Around(self.plan, self._index, self._expected, weights, gradients, self._visiting)
        )
        self._make_plan(visits, {*blocks, *weights, *gradients})
        self._is_broken = False

    def _reach_detour(self, visits: Sequence[Visit]) -> None:
        """Plan visits inside others, unless they were hinted at; those that were, and are skipped, are left out."""
        is_hinted = bool(self._around) and self._around[-1].visiting == self._visiting
        rest = list(self._expected) if is_hinted else []
        keys = [visit.key for visit in rest]
        if keys[: len(visits)] == [visit.key for visit in visits]:
            return
        self.off_plan[f"{visits[0].direction} {visits[0].block}"] += 1
        if is_hinted:
            self._end_detour()
        self.hint(rest[keys.index(visits[0].key) :] if visits[0].key in keys else [*visits, *rest])

    def _end_detour(self) -> None:
        """Leave a detour, wherever it is: slots hold again what the plan around it expects."""
        around = self._around.pop()
        for plane, before in ((Plane.GRADIENT, around.gradients), (Plane.WEIGHT, around.weights)):
            for block in tuple(self._slots[plane]):
                if block not in before:
                    self._run(Free(block, plane))
        held = tuple(self._slots[Plane.WEIGHT])
        for block in around.weights:
            if block not in held:
                self._run(Read(block, Plane.WEIGHT, self.store.records[block].plane_bytes(Plane.WEIGHT)))
        self.plan, self._index, self._expected = around.plan, around.index, around.expected

    # -- running -------------------------------------------------------------------------------------------------

    def _proceed(self) -> None:
        """Start everything up to what the next visit waits for."""
        while self._index < len(self.plan) and not self.plan.ops[self._index].opens_visit:
            self._run_next()

    def _run_next(self) -> None:
        self._run(self.plan.ops[self._index])
        self._index += 1

    def _run(self, op: Op) -> None:
        recorder, state = self.recorder, self.store[op.block]
        began = recorder.moment() if recorder is not None else None
        start = time.perf_counter()
        try:
            self.store.runners[type(op), op.plane](state)
        finally:
            if op.ended_by:
                self.wait_s[f"{op.verb} {op.plane}"] += time.perf_counter() - start
        if recorder is not None and began is not None:
            recorder.ran(op, began, in_place=self.store.planes.updates_in_place(state.planes))
        self.executed.append(op)

    def _release_gradients(self) -> None:
        """Give back gradient slots of a plan that is not carried on."""
        for block in tuple(self._slots[Plane.GRADIENT]):
            self.store.gradients.free(self.store[block])
        self._expected, self.plan, self._index = deque(self._expected), Plan(()), 0
