"""When each operation of a plan runs: a discrete-event simulation on a profile, in pure Python.

A plan is lowered to tasks (`lower.py`), each of which keeps one resource busy: computing, updating, the disk's two
directions, the link's two ways. A task starts when those it needs are over, and those of its resource that come before it
in the plan [Note: the order of tasks]. Resources that disturb each other slow down while they run together, as the profile
measured (a fluid model: the speed of a task changes whenever another starts or ends). Three steps are simulated; the last
is reported.

[Note: the order of tasks] Each resource runs its tasks in the order in which the plan begins them, as lanes do, even where
a later one is ready first. Then a shorter task never makes another end later, which does not hold of an order of readiness.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from outsize.block import Record
from outsize.plan.context import Context, Occupancy, Pass, Visit
from outsize.plan.lower import Costs, Lowering, Task, held_after
from outsize.plan.passes import PASSES, make_plan
from outsize.plan.place import Placement
from outsize.plan.plan import Plan
from outsize.plan.profile import Profile, Resource

NUM_STEPS = 3


class Event(NamedTuple):
    """A task in time, in seconds from the start; it was ready at `ready_s`, when the last of what it needs was over."""

    task: Task
    ready_s: float
    start_s: float
    end_s: float
    held_up_by: int | None = None
    """The index of the last of those."""


@dataclass(frozen=True, slots=True)
class Stall:
    """Computing waits from `start_s` to `end_s`, for `cause`."""

    start_s: float
    end_s: float
    cause: Resource


@dataclass(frozen=True)
class Simulation:
    """A training step, or a forward, in its steady state.

    `start_s`: when it begins, on the clock of `events` and `stalls`. `busy_s`: seconds that each resource works within it.
    `stall_s`: seconds in which computing waits, by what for.
    """

    step_s: float
    start_s: float
    events: tuple[Event, ...]
    stalls: tuple[Stall, ...]
    busy_s: Mapping[Resource, float]
    stall_s: Mapping[Resource, float]
    bytes_moved: Mapping[Resource, int]

    @property
    def bottleneck(self) -> Resource:
        """What keeps the step from being shorter: the resource that is busy longest."""
        return max(self.busy_s, key=lambda resource: self.busy_s[resource])

    def figures(self) -> Simulation:
        """The same without its events and stalls, which take memory where many plans are compared."""
        return replace(self, events=(), stalls=())


def simulate(
    visits: Sequence[Visit],
    records: Mapping[str, Record],
    placement: Placement,
    profile: Profile,
    costs: Costs,
    *,
    commits: bool = False,
    passes: Sequence[Pass] = PASSES,
) -> Simulation:
    """Simulate calls that make `visits`, each after a step of the optimizer where blocks train.

    With `commits` each of these steps is committed: what lives in memory is copied to the disk before its next update.
    """
    context = Context(visits, records, placement, input_bytes=costs.input_bytes)
    return simulate_steps(plan_steps(context, passes, commits=commits), records, placement, profile, costs)


def simulate_steps(
    plans: Sequence[Plan],
    records: Mapping[str, Record],
    placement: Placement,
    profile: Profile,
    costs: Costs,
) -> Simulation:
    """Simulate the plans of steps, the last of which is reported."""
    lowering = Lowering(records, placement, profile, costs)
    ends: list[int] = []
    for plan in plans:
        lowering.add(plan)
        ends.append(lowering.end_step())
    events = run(lowering.tasks, profile)
    first, last = events[ends[-2]].end_s, events[ends[-1]].end_s
    return _summary(events, first, last)


def least_s(
    plan: Plan, records: Mapping[str, Record], placement: Placement, profile: Profile, costs: Costs
) -> float:
    """Seconds that the step of `plan` takes at least, those of the resource that has most to do: a fraction of the work."""
    lowering = Lowering(records, placement, profile, costs)
    lowering.add(plan)
    lowering.end_step()
    busy_s = dict.fromkeys(Resource, 0.0)
    for task in lowering.tasks:
        busy_s[task.resource] += task.alone_s
    return max(busy_s.values())


def plan_steps(context: Context, passes: Sequence[Pass] = PASSES, *, commits: bool = False) -> list[Plan]:
    """The plans of the steps that are simulated; each begins with what the one before left in slots."""
    pending: frozenset[str] = frozenset()
    if any(visit.trains for visit in context.visits):
        pending = frozenset(r.name for r in context.records.values() if r.num_trainable and r.state)
    committing = pending if commits else frozenset()
    made: dict[tuple[str, ...], Plan] = {}
    plans: list[Plan] = []
    for _ in range(NUM_STEPS):
        held = tuple(held_after(plans[-1])) if plans else ()
        if held not in made:
            occupancy = Occupancy(held=held, pending=pending, committing=committing)
            made[held] = make_plan(replace(context, occupancy=occupancy), passes)
        plans.append(made[held])
    return plans


def run(tasks: Sequence[Task], profile: Profile) -> list[Event]:
    """Let tasks run, each resource on one at a time and in the order of `tasks`, which no task may precede what it needs.

    Where nothing disturbs anything, a shorter task never ends another later: the order of each resource is fixed.
    """
    resources = list(Resource)
    lane_of = {resource: lane for lane, resource in enumerate(resources)}
    waits_for = [0] * len(tasks)
    followers: list[list[int]] = [[] for _ in tasks]
    queues: list[deque[int]] = [deque() for _ in resources]
    for index, task in enumerate(tasks):
        queues[lane_of[task.resource]].append(index)
        needed = set(task.after)
        waits_for[index] = len(needed)
        for other in needed:
            followers[other].append(index)
    ready_s = [0.0] * len(tasks)
    blame: list[int | None] = [None] * len(tasks)
    starts = [0.0] * len(tasks)
    ends = [0.0] * len(tasks)
    running = [0] * len(resources)
    left = [0.0] * len(resources)
    idle = set(range(len(resources)))
    known: dict[frozenset[int], list[tuple[int, float]]] = {}
    now = 0.0
    while True:
        for lane in sorted(idle):
            queue = queues[lane]
            if queue and not waits_for[queue[0]]:
                idle.remove(lane)
                running[lane] = index = queue.popleft()
                left[lane], starts[index] = tasks[index].alone_s, now
        still = frozenset(idle)
        speeds = known.get(still)
        if speeds is None:
            busy = {resource for lane, resource in enumerate(resources) if lane not in still}
            speeds = known[still] = [
                (lane_of[each], profile.speed(each, frozenset(busy - {each}))) for each in busy
            ]
        if not speeds:
            break
        step = min([left[lane] / speed for lane, speed in speeds])
        now += step
        for lane, speed in speeds:
            left[lane] -= step * speed
            if left[lane] > 1e-12:
                continue
            index = running[lane]
            idle.add(lane)
            ends[index] = now
            for follower in followers[index]:
                waits_for[follower] -= 1
                if not waits_for[follower]:
                    ready_s[follower], blame[follower] = now, index
    assert not any(queues), "a task comes before one that it needs"
    return [
        Event(task, ready_s[index], starts[index], ends[index], blame[index])
        for index, task in enumerate(tasks)
    ]


def _summary(events: Sequence[Event], first_s: float, last_s: float) -> Simulation:
    busy: Counter[Resource] = Counter()
    stall_s: Counter[Resource] = Counter()
    stalls: list[Stall] = []
    moved: Counter[Resource] = Counter()
    within = [event for event in events if event.end_s > first_s and event.start_s < last_s]
    for event in within:
        part = min(event.end_s, last_s) - max(event.start_s, first_s)
        whole = event.end_s - event.start_s
        busy[event.task.resource] += part  # type: ignore[assignment]
        moved[event.task.resource] += round(event.task.num_bytes * (part / whole if whole else 1.0))
    free_s = first_s
    computing = (event for event in within if event.task.resource is Resource.COMPUTE)
    for event in sorted(computing, key=lambda event: event.start_s):
        stalls += _what_for(events, event, free_s)
        free_s = max(free_s, event.end_s)
    for stall in stalls:
        stall_s[stall.cause] += stall.end_s - stall.start_s  # type: ignore[assignment]
    return Simulation(
        last_s - first_s, first_s, tuple(within), tuple(stalls), dict(busy), dict(stall_s), dict(moved)
    )


def _what_for(events: Sequence[Event], event: Event, since_s: float) -> Iterator[Stall]:
    """What computing waited for from `since_s` to `event`: the chain of what held each other up, backwards in time."""
    until_s, cause = event.start_s, event.held_up_by
    while cause is not None and until_s > since_s:
        held = events[cause]
        begin_s = max(since_s, min(held.ready_s, until_s))
        yield Stall(begin_s, until_s, held.task.resource)
        until_s, cause = begin_s, held.held_up_by
