"""When each operation of a plan runs: a discrete-event simulation on a profile, in pure Python.

A plan is unrolled into tasks, each of which keeps one resource busy: computing, updating, the disk's two directions, the
link's two ways. A task starts when those it needs are over, and those of its resource that come before it in the plan
[Note: the order of tasks]. Resources that disturb each other slow down while they run together, as the profile measured (a
fluid model: the speed of a task changes whenever another starts or ends). Three steps are simulated; the last is reported.

What the engine does in order (a wait, a block, giving a slot back) holds the next operation up; everything else is begun
and left to itself, as there. Large transfers and updates are cut into a few parts, so that reading, updating and writing
of one block overlap as they do chunk by chunk.

[Note: the order of tasks] Each resource runs its tasks in the order in which the plan begins them, as lanes do, even where
a later one is ready first. Then a shorter task never makes another end later, which does not hold of an order of readiness.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from outsize.block import Group, Plane, Record
from outsize.config import Home
from outsize.plan.build import Direction, Occupancy, Visit, build
from outsize.plan.op import Backward, Claim, Forward, Free, Held, Op, Read, Update, Wait, Write
from outsize.plan.place import IN_MEMORY, Placement, slot_class_of, sums_in_place
from outsize.plan.plan import Plan
from outsize.plan.profile import Profile, Resource

PARTS = 4
"""Into which an update, and a plane that goes through buffers, is cut."""

NUM_STEPS = 3

INPUTS_LEAVING = 2
"""Visits whose inputs may be on their way to where they wait; those of the last are still there when backward begins."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Seconds that computing takes with nothing beside it, per visit of a block; `backward_s` includes recomputation,
    which a block that keeps its activations leaves out (`kept_backward_s`).

    `between_s`: per step, outside of all blocks. `input_bytes`: of the inputs that a visit's backward needs, where these
    may wait in another tier. `spread`: by what part repeated timings of the same computing were longer than the shortest.
    """

    forward_s: Mapping[str, float]
    backward_s: Mapping[str, float]
    between_s: float = 0.0
    kept_backward_s: Mapping[str, float] = field(default_factory=dict)
    input_bytes: Mapping[str, int] = field(default_factory=dict)
    spread: float = 0.0

    def scaled(self, factor: float) -> Costs:
        """The same on a machine that takes `factor` times as long."""
        return replace(
            self,
            forward_s={block: factor * seconds for block, seconds in self.forward_s.items()},
            backward_s={block: factor * seconds for block, seconds in self.backward_s.items()},
            between_s=factor * self.between_s,
            kept_backward_s={block: factor * seconds for block, seconds in self.kept_backward_s.items()},
        )


class Task(NamedTuple):
    """`alone_s` seconds of one resource, once the tasks `after` (indices) are over."""

    resource: Resource
    alone_s: float
    after: tuple[int, ...]
    label: str
    num_bytes: int = 0


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
) -> Simulation:
    """Simulate calls that make `visits`, each after a step of the optimizer where blocks train.

    With `commits` each of these steps is committed: what lives in memory is copied to the disk before its next update.
    """
    unrolled = _Unrolled(records, placement, profile, costs, commits)
    ends: list[int] = []
    for plan in _plans(visits, records, placement):
        unrolled.add(plan)
        ends.append(unrolled.end_step())
    events = run(unrolled.tasks, profile)
    first, last = events[ends[-2]].end_s, events[ends[-1]].end_s
    return _summary(events, first, last)


def least_s(
    visits: Sequence[Visit],
    records: Mapping[str, Record],
    placement: Placement,
    profile: Profile,
    costs: Costs,
) -> float:
    """Seconds that a simulated step takes at least, those of the resource that has most to do: a fraction of the work."""
    unrolled = _Unrolled(records, placement, profile, costs)
    *_, plan = _plans(visits, records, placement)
    unrolled.add(plan)
    unrolled.end_step()
    busy_s = dict.fromkeys(Resource, 0.0)
    for task in unrolled.tasks:
        busy_s[task.resource] += task.alone_s
    return max(busy_s.values())


def _plans(visits: Sequence[Visit], records: Mapping[str, Record], placement: Placement) -> Iterator[Plan]:
    """The plans of the steps that are simulated; each begins with what the one before left in slots."""
    pending: frozenset[str] = frozenset()
    if any(visit.trains for visit in visits):
        pending = frozenset(r.name for r in records.values() if r.num_trainable and r.state)
    held: list[str] = []
    for _ in range(NUM_STEPS):
        plan = build(visits, records, placement, Occupancy(held=tuple(held), pending=pending))
        held = _held_after(plan)
        yield plan


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


def _held_after(plan: Plan) -> list[str]:
    held: list[str] = []
    for op in plan:
        match op:
            case Held(block, Plane.WEIGHT) | Read(block, Plane.WEIGHT):
                held.append(block)
            case Free(block, Plane.WEIGHT):
                held.remove(block)
            case _:
                pass
    return held


@dataclass
class _Block:
    """What is under way of one block: indices of tasks."""

    weights: list[int] = field(default_factory=list)
    """That bring the weights to where it computes."""
    weight_writes: list[int] = field(default_factory=list)
    state_writes: list[int] = field(default_factory=list)
    gradient: list[int] = field(default_factory=list)
    """That bring its gradient home."""
    copies: list[int] = field(default_factory=list)
    """That copy to the disk, for a commit, what lives in memory."""


@dataclass(eq=False)
class _Inputs:
    """Inputs of a visit that wait for its backward: tasks that send them away, and that bring them back once begun."""

    block: str
    down: list[int]
    up: list[int] | None = None


class _Unrolled:
    """Plans as tasks, one after the other; `main` are the tasks that hold up what the engine does next."""

    def __init__(
        self,
        records: Mapping[str, Record],
        placement: Placement,
        profile: Profile,
        costs: Costs,
        commits: bool = False,
    ) -> None:
        self.tasks: list[Task] = []
        self._commits = commits
        self._records = records
        self._placement = placement
        self._profile = profile
        self._costs = costs
        self._main: tuple[int, ...] = ()
        self._blocks: defaultdict[str, _Block] = defaultdict(_Block)
        self._pending: set[str] = set()
        self._is_apart = profile.has_device
        self._slots: defaultdict[int | None, list[tuple[int, ...]]] = defaultdict(list)
        self._rates = {
            Resource.READ: profile.disk_read,
            Resource.WRITE: profile.disk_write,
            Resource.UP: profile.up,
            Resource.DOWN: profile.down,
        }
        self._inputs: list[_Inputs] = []
        self._leaving: deque[_Inputs] = deque()

    def add(self, plan: Plan) -> None:
        """Unroll one call."""
        updated = {op.block for op in plan if isinstance(op, Update)}
        self._inputs = []
        self._let_inputs_go(0)
        for op in plan:
            self._add(op, updated)

    def end_step(self) -> int:
        """The step of the optimizer: it needs all gradients' norms; the task that ends the step."""
        between = self._task(Resource.COMPUTE, self._costs.between_s, self._main, "step")
        self._main = (between,)
        return between

    def _add(self, op: Op, updated: set[str]) -> None:
        state = self._blocks[op.block]
        match op:
            case Read(block, Plane.WEIGHT):
                if not (self._is_apart and block in updated):
                    state.weights = self._bring(block, Plane.WEIGHT, (*self._main, *state.weight_writes))
                else:
                    state.weights = []
                updated.discard(block) if not self._is_apart else None
            case Update(block):
                self._update(block)
                updated.discard(block)
            case Wait(block, Plane.WEIGHT):
                self._wait(state.weights)
            case Read(block, Plane.GRADIENT):
                self._claim(block)
                state.gradient = self._bring(block, Plane.GRADIENT, (*self._main, *state.gradient))
            case Wait(block, Plane.GRADIENT):
                self._wait(state.gradient)
            case Claim(block, Plane.GRADIENT):
                self._claim(block)
            case Forward(block):
                self._send_inputs(block)
                self._compute(self._costs.forward_s.get(block, 0.0), str(op))
            case Backward(block):
                self._bring_inputs(block)
                is_kept = block in self._placement.kept
                seconds = self._costs.kept_backward_s if is_kept else self._costs.backward_s
                self._compute(seconds.get(block, 0.0), str(op))
            case Write(block, Plane.GRADIENT):
                self._send_gradient(block)
            case Free(block, Plane.WEIGHT):
                if not self._is_apart:
                    self._wait([*state.weights, *state.weight_writes])
            case Free(block, Plane.GRADIENT):
                group = slot_class_of(self._placement.gradient_classes, block)
                if self._is_apart:
                    self._slots[group].append(tuple(state.gradient))
                else:
                    self._wait(state.gradient)
            case _:
                pass

    # -- what operations take --------------------------------------------------------------------------------------

    def _update(self, block: str) -> None:
        record, state = self._records[block], self._blocks[block]
        in_place = self._placement.home(block, Group.STATE) is Home.DEVICE
        element_bytes = sum(float(record.element_bytes[plane]) for plane in record.state)
        weight_bytes = float(record.element_bytes[Plane.WEIGHT])
        gradient_bytes = float(record.element_bytes[Plane.GRADIENT])
        touched = record.num_trainable * (2 * element_bytes + 2 * weight_bytes + gradient_bytes)
        if self._is_apart and in_place:
            rate = self._profile.device_update or self._profile.device_memory or self._profile.update
            self._wait(state.copies)
            self._compute(touched / rate, f"update {block}")
            self._copy(block, self._main)
            return
        streams_state = not self._is_here(block, Group.STATE)
        streams_gradient = not self._is_here(block, Group.GRADIENT)
        streams_weight = not self._is_here(block, Group.WEIGHT)
        reads = record.num_trainable * (streams_state * element_bytes + streams_gradient * gradient_bytes)
        if self._is_apart and streams_weight:
            reads += record.num_elements * weight_bytes
        ready = (
            *self._main,
            *state.gradient,
            *state.state_writes,
            *state.copies,
            *(state.weight_writes if self._is_apart else ()),
        )
        arrived: list[int] = []
        state_writes: list[int] = []
        weight_writes: list[int] = []
        for part in range(PARTS):
            needs = list(ready)
            if reads:
                needs.append(self._transfer(Resource.READ, reads / PARTS, ready, f"read {block}.state"))
            if not self._is_apart and state.weights:
                needs.append(state.weights[min(part, len(state.weights) - 1)])
            rule = self._task(
                Resource.UPDATE, touched / PARTS / self._profile.update, tuple(needs), f"update {block}"
            )
            if streams_state:
                num_bytes = record.num_trainable * element_bytes / PARTS
                state_writes.append(
                    self._transfer(Resource.WRITE, num_bytes, (rule,), f"write {block}.state")
                )
            if streams_weight:
                num_bytes = record.num_trainable * weight_bytes / PARTS
                weight_writes.append(
                    self._transfer(Resource.WRITE, num_bytes, (rule,), f"write {block}.weight")
                )
            if self._is_apart:
                num_bytes = record.num_elements * weight_bytes / PARTS
                rule = self._transfer(Resource.UP, num_bytes, (rule,), f"up {block}.weight")
            arrived.append(rule)
        state.weights = arrived
        state.weight_writes, state.state_writes = weight_writes, state_writes
        self._copy(block, arrived)

    def _copy(self, block: str, updated: Sequence[int]) -> None:
        """Copy to the disk what was updated in memory, where that is committed."""
        if not self._commits:
            return
        record, state = self._records[block], self._blocks[block]
        state.copies = []
        for plane in (Plane.WEIGHT, *record.state):
            home = self._placement.home(block, plane.group)
            if home not in IN_MEMORY:
                continue
            label = f"{block}.{plane} for a commit"
            num_bytes = record.plane_elements(plane) * float(record.element_bytes[plane]) / PARTS
            for _ in range(PARTS):
                after = tuple(updated)
                if self._is_apart and home is Home.DEVICE:
                    after = (self._transfer(Resource.DOWN, num_bytes, after, f"down {label}"),)
                state.copies.append(self._transfer(Resource.WRITE, num_bytes, after, f"write {label}"))

    def _bring(self, block: str, plane: Plane, after: Sequence[int]) -> list[int]:
        """Tasks that bring a plane from its home to a slot."""
        record, home = self._records[block], self._placement.home(block, plane.group)
        if home is Home.DEVICE:
            return []
        num_bytes = int(record.plane_elements(plane) * record.element_bytes[plane])
        return self._fetch(num_bytes, home, after, f"{block}.{plane}")

    def _send_gradient(self, block: str) -> None:
        record, state = self._records[block], self._blocks[block]
        size = float(record.element_bytes[Plane.GRADIENT])
        home = self._placement.home(block, Group.GRADIENT)
        if not sums_in_place(record, home is Home.DEVICE):
            rate = self._profile.device_memory if self._is_apart else self._profile.host_copy
            # Read the sum, write it rounded, read that for the norm.
            self._compute(
                record.num_trainable * (4 + 2 * size) / (rate or self._profile.host_copy), f"round {block}"
            )
        state.gradient = []
        if home is not Home.DEVICE:
            state.gradient = self._send(record.num_trainable * size, home, f"{block}.gradient")

    def _claim(self, block: str) -> None:
        """On a device a slot may still be on its way down: computing comes after that."""
        group = slot_class_of(self._placement.gradient_classes, block)
        if self._is_apart and group is not None and self._slots[group]:
            self._wait(self._slots[group].pop(0))

    # -- inputs of blocks ------------------------------------------------------------------------------------------

    def _send_inputs(self, block: str) -> None:
        """What a visit is given goes to where it waits, beside the visit; a few visits later computing waits for that."""
        num_bytes = self._costs.input_bytes.get(block, 0)
        if self._placement.inputs is None or not num_bytes or block in self._placement.kept:
            return
        self._let_inputs_go(INPUTS_LEAVING - 1)
        inputs = _Inputs(block, self._send(num_bytes, self._placement.inputs, f"{block}.input"))
        self._inputs.append(inputs)
        self._leaving.append(inputs)

    def _let_inputs_go(self, num_visits: int) -> None:
        while len(self._leaving) > num_visits:
            self._wait(self._leaving.popleft().down)

    def _bring_inputs(self, block: str) -> None:
        """The inputs of a visit, which were begun to come one visit before, and now those of the one that comes next."""
        index = max((i for i, each in enumerate(self._inputs) if each.block == block), default=None)
        if index is None:
            return
        arriving = self._fetch_inputs(self._inputs.pop(index))
        if index:
            self._fetch_inputs(self._inputs[index - 1])
        self._wait(arriving)

    def _fetch_inputs(self, inputs: _Inputs) -> list[int]:
        if inputs.up is None:
            assert self._placement.inputs is not None
            num_bytes = self._costs.input_bytes[inputs.block]
            after = (*self._main, *inputs.down)
            is_here = inputs in self._leaving
            inputs.up = (
                []
                if is_here
                else self._fetch(num_bytes, self._placement.inputs, after, f"{inputs.block}.input")
            )
        return inputs.up

    # -- tasks -----------------------------------------------------------------------------------------------------

    def _fetch(self, num_bytes: float, home: Home, after: Sequence[int], label: str) -> list[int]:
        """Tasks that bring bytes from the host's memory beside a device, or from the disk, to where blocks compute."""
        if self._is_apart and home is Home.HOST:
            return [self._transfer(Resource.UP, num_bytes, after, f"up {label}")]
        parts = []
        for _ in range(PARTS):
            part = self._transfer(Resource.READ, num_bytes / PARTS, after, f"read {label}")
            if self._is_apart:
                part = self._transfer(Resource.UP, num_bytes / PARTS, (part,), f"up {label}")
            parts.append(part)
        return parts

    def _send(self, num_bytes: float, home: Home, label: str) -> list[int]:
        """The way back, of what was computed."""
        if self._is_apart and home is Home.HOST:
            return [self._transfer(Resource.DOWN, num_bytes, self._main, f"down {label}")]
        parts = []
        for _ in range(PARTS):
            after = self._main
            if self._is_apart:
                after = (self._transfer(Resource.DOWN, num_bytes / PARTS, after, f"down {label}"),)
            parts.append(self._transfer(Resource.WRITE, num_bytes / PARTS, after, f"write {label}"))
        return parts

    def _is_here(self, block: str, group: Group) -> bool:
        """Whether planes are at home in the memory in which the host updates them."""
        return self._placement.home(block, group) is (Home.HOST if self._is_apart else Home.DEVICE)

    def _compute(self, alone_s: float, label: str) -> None:
        self._main = (self._task(Resource.COMPUTE, alone_s, self._main, label),)

    def _wait(self, tasks: Iterable[int]) -> None:
        self._main = (*self._main, *tasks)

    def _transfer(self, resource: Resource, num_bytes: float, after: Sequence[int], label: str) -> int:
        rate = self._rates[resource]
        assert rate is not None, f"{label}: the profile has no {resource}"
        return self._task(resource, num_bytes / rate, after, label, int(num_bytes))

    def _task(
        self, resource: Resource, alone_s: float, after: Sequence[int], label: str, num_bytes: int = 0
    ) -> int:
        self.tasks.append(Task(resource, alone_s, tuple(after), label, num_bytes))
        return len(self.tasks) - 1


def training_visits(blocks: Sequence[str], trains: Mapping[str, bool]) -> Iterator[Visit]:
    """The visits of a training call that passes `blocks` in order, and back."""
    for block in blocks:
        yield Visit(block, Direction.FORWARD)
    for block in reversed(blocks):
        yield Visit(block, Direction.BACKWARD, trains=trains.get(block, True))
