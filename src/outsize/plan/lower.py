"""What each operation of a plan takes: tasks, each of which keeps one resource busy, and what each waits for.

What the engine does in order (a wait, a block, giving a slot back) holds the next operation up; everything else is begun
and left to itself, as there. Large transfers and updates are cut into a few parts, so that reading, updating and writing
of one block overlap as they do chunk by chunk.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from outsize.block import Group, Plane, Record
from outsize.config import Home
from outsize.plan.context import Direction, Visit
from outsize.plan.op import (
    Backward,
    Claim,
    Copy,
    Fetch,
    Forward,
    Free,
    Held,
    Op,
    Read,
    Send,
    Update,
    Wait,
    Write,
)
from outsize.plan.passes.commits import copied_bytes
from outsize.plan.path import DRIVE
from outsize.plan.place import GROUPS, Placement, sums_in_place
from outsize.plan.plan import Plan
from outsize.plan.profile import Profile, Resource

PARTS = 4
"""Into which an update, and a plane that goes through buffers, is cut."""


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

    def backward_of(self, block: str, kept: Collection[str]) -> float:
        """Seconds of a backward of `block`, where blocks in `kept` keep their activations."""
        return (self.kept_backward_s if block in kept else self.backward_s).get(block, 0.0)

    def computing_s(self, visits: Iterable[Visit], kept: Collection[str]) -> float:
        """Seconds that a step with these visits computes at least."""
        forward = Direction.FORWARD
        return self.between_s + sum(
            self.forward_s.get(v.block, 0.0) if v.direction is forward else self.backward_of(v.block, kept)
            for v in visits
            if v.direction is not Direction.TOUCH
        )

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


@dataclass(eq=False)
class _Input:
    """The input of a visit: the tasks that send it away and those that bring it back, once begun."""

    down: list[int]
    is_away: bool = False
    up: list[int] | None = None


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
    inputs: list[_Input] = field(default_factory=list)
    """Of its visits, the oldest first, until they are back."""


class Lowering:
    """Plans as `tasks`, one plan after the other."""

    def __init__(
        self, records: Mapping[str, Record], placement: Placement, profile: Profile, costs: Costs
    ) -> None:
        self.tasks: list[Task] = []
        self._records = records
        self._placement = placement
        self._profile = profile
        self._costs = costs
        self._main: tuple[int, ...] = ()
        """The tasks that hold up what the engine does next."""
        self._blocks: defaultdict[str, _Block] = defaultdict(_Block)
        self._updating: set[str] = set()
        """Blocks that the plan has yet to update."""
        self._link = placement.legs(placement.host)
        """What is between the host's memory and where blocks compute, if these are two."""
        self._slots: defaultdict[int | None, list[tuple[int, ...]]] = defaultdict(list)
        self._rates = {
            Resource.READ: profile.disk_read,
            Resource.WRITE: profile.disk_write,
            Resource.UP: profile.up,
            Resource.DOWN: profile.down,
        }

    def add(self, plan: Plan) -> None:
        """Lower one call."""
        self._updating = {op.block for op in plan if isinstance(op, Update)}
        for state in self._blocks.values():
            state.inputs.clear()
        for op in plan:
            self._add(op)

    def end_step(self) -> int:
        """The step of the optimizer: it needs all gradients' norms; the task that ends the step."""
        self._compute(self._costs.between_s, "step")
        return len(self.tasks) - 1

    def _add(self, op: Op) -> None:
        state = self._blocks[op.block]
        match op:
            case Read(block, Plane.WEIGHT):
                state.weights = []
                if not (self._link and block in self._updating):  # else the update sends them up
                    state.weights = self._bring(block, Plane.WEIGHT, (*self._main, *state.weight_writes))
            case Update(block):
                self._updating.discard(block)
                self._update(block)
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
                self._compute(self._costs.forward_s.get(block, 0.0), str(op))
            case Backward(block):
                self._compute(self._costs.backward_of(block, self._placement.kept), str(op))
            case Write(block, Plane.GRADIENT):
                self._send_gradient(block)
            case Free(block, Plane.WEIGHT):
                if not self._link:
                    self._wait([*state.weights, *state.weight_writes])
            case Free(block, Plane.GRADIENT):
                group = self._placement.slot_class(block, Group.GRADIENT)
                if self._link:
                    self._slots[group].append(tuple(state.gradient))
                else:
                    self._wait(state.gradient)
            case Held(_, Plane.INPUT):
                state.inputs.append(_Input([], is_away=True))
            case Send(block, _, num_bytes):
                home = self._placement.home(block, Group.INPUT)
                state.inputs.append(_Input(self._send(home, num_bytes, f"{block}.input")))
            case Free(_, Plane.INPUT):
                leaving = next((each for each in state.inputs if not each.is_away), None)
                if leaving is not None:
                    leaving.is_away = True
                    self._wait(leaving.down)
            case Fetch(block, _, num_bytes):
                away = next(each for each in reversed(state.inputs) if each.is_away and each.up is None)
                after = (*self._main, *away.down)
                away.up = self._fetch(
                    self._placement.home(block, Group.INPUT), num_bytes, after, f"{block}.input"
                )
            case Wait(_, Plane.INPUT):
                index = max(i for i, each in enumerate(state.inputs) if each.up is not None)
                self._wait(state.inputs.pop(index).up or ())
            case Copy(block):
                self._copy(block)
            case _:
                if op.resource in self._rates:
                    label = f"{op.resource} {op.block}.{op.verb}"
                    self._transfer(op.resource, op.num_bytes, self._main, label)

    # -- what operations take --------------------------------------------------------------------------------------

    def _update(self, block: str) -> None:
        record, state = self._records[block], self._blocks[block]
        element_bytes = sum(float(record.element_bytes[plane]) for plane in record.state)
        weight_bytes = float(record.element_bytes[Plane.WEIGHT])
        gradient_bytes = float(record.element_bytes[Plane.GRADIENT])
        touched = record.num_trainable * (2 * element_bytes + 2 * weight_bytes + gradient_bytes)
        if self._link and self._placement.home(block, Group.STATE) is Home.DEVICE:
            rate = self._profile.device_update or self._profile.device_memory or self._profile.update
            self._wait(state.copies)
            self._compute(touched / rate, f"update {block}")
            return
        streams_weight, streams_gradient, streams_state = (
            self._placement.home(block, group) is not self._placement.host for group in GROUPS
        )
        reads = record.num_trainable * (streams_state * element_bytes + streams_gradient * gradient_bytes)
        if self._link and streams_weight:
            reads += record.num_stored * weight_bytes
        ready = (
            *self._main,
            *state.gradient,
            *state.state_writes,
            *state.copies,
            *(state.weight_writes if self._link else ()),
        )
        arrived: list[int] = []
        state_writes: list[int] = []
        weight_writes: list[int] = []
        for part in range(PARTS):
            needs = list(ready)
            if reads:
                needs.append(self._transfer(Resource.READ, reads / PARTS, ready, f"read {block}.state"))
            if not self._link and state.weights:
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
            for leg in self._link:
                num_bytes = record.num_elements * weight_bytes / PARTS
                rule = self._transfer(leg.inward, num_bytes, (rule,), f"{leg.inward} {block}.weight")
            arrived.append(rule)
        state.weights = arrived
        state.weight_writes, state.state_writes = weight_writes, state_writes

    def _copy(self, block: str) -> None:
        """Copy to the disk, for a commit, what was updated in memory."""
        state, label = self._blocks[block], "for a commit"
        state.copies = []
        for plane, num_bytes in copied_bytes(self._records[block], self._placement).items():
            home = self._placement.home(block, plane.group)
            state.copies += self._send(Home.DISK, num_bytes, f"{block}.{plane} {label}", start=home)

    def _bring(self, block: str, plane: Plane, after: Sequence[int]) -> list[int]:
        """Tasks that bring a plane from its home to a slot."""
        record = self._records[block]
        num_bytes = int(record.plane_elements(plane) * record.element_bytes[plane])
        home = self._placement.home(block, plane.group)
        return self._fetch(home, num_bytes, after, f"{block}.{plane}")

    def _send_gradient(self, block: str) -> None:
        record, state = self._records[block], self._blocks[block]
        size = float(record.element_bytes[Plane.GRADIENT])
        home = self._placement.home(block, Group.GRADIENT)
        if not sums_in_place(record, home is Home.DEVICE):
            rate = self._profile.device_memory if self._link else self._profile.host_copy
            # Read the sum, write it rounded, read that for the norm.
            self._compute(
                record.num_trainable * (4 + 2 * size) / (rate or self._profile.host_copy), f"round {block}"
            )
        state.gradient = self._send(home, record.num_trainable * size, f"{block}.gradient")

    def _claim(self, block: str) -> None:
        """On a device a slot may still be on its way down: computing comes after that."""
        group = self._placement.slot_class(block, Group.GRADIENT)
        if group is not None and self._slots[group]:
            self._wait(self._slots[group].pop(0))

    # -- tasks -----------------------------------------------------------------------------------------------------

    def _fetch(self, home: Home, num_bytes: float, after: Sequence[int], label: str) -> list[int]:
        """Tasks that move bytes from their home to where blocks compute; the last of each part."""
        return self._along([leg.inward for leg in self._placement.legs(home)], num_bytes, after, label)

    def _send(self, home: Home, num_bytes: float, label: str, start: Home = Home.DEVICE) -> list[int]:
        """Tasks that move to its home what was computed, or what is in `start`; the last of each part."""
        legs = reversed(self._placement.legs(home, start))
        return self._along([leg.outward for leg in legs], num_bytes, self._main, label)

    def _along(
        self, way: Sequence[Resource], num_bytes: float, after: Sequence[int], label: str
    ) -> list[int]:
        """Tasks that move bytes leg by leg, in parts where they pass through buffers; the last task of each part."""
        num_parts = PARTS if set(way) & set(DRIVE) else len(way)
        ends: list[int] = []
        for _ in range(num_parts):
            needed = after
            for resource in way:
                needed = (self._transfer(resource, num_bytes / num_parts, needed, f"{resource} {label}"),)
            ends += needed
        return ends

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


def held_after(plan: Plan) -> list[str]:
    """The blocks whose weights are in a slot when `plan` is over, in the order in which they came."""
    held: dict[str, None] = {}
    for op in plan:
        if op.plane is Plane.WEIGHT and op.claims:
            held[op.block] = None
        elif op.plane is Plane.WEIGHT and op.frees:
            del held[op.block]
    return list(held)
