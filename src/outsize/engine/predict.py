"""Predictions of a step: the plan is simulated on the profile of the machine, with blocks timed at the real tile size."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from outsize.config import Home, format_bytes
from outsize.engine.runtime import Runtime, runtime_of
from outsize.errors import UsageError
from outsize.plan.lower import Costs
from outsize.plan.profile import WORDS, Profile, Resource
from outsize.plan.search import Choice
from outsize.plan.simulate import Simulation, simulate
from outsize.plan.timeline import Timeline
from outsize.plan.workload import Call
from outsize.store import memory

MODEL_SPREAD = 0.1
"""The typical relative error of a prediction whose inputs are exact (benchmarks/results)."""

WORTH_A_RESTART = 1.1
"""Advise another plan only if it makes a step faster by at least this factor."""

SLOWEST = 16.0
"""The most that a disk is assumed to be slower than it was measured."""

WORTH_SAYING = 1.05
"""Name a remedy only if it makes a step faster by at least this factor."""


_PINS = ("tile_rows", "kept_blocks", "inputs", "weight_slots", "gradient_slots", "resident", "resident_bytes")
"""Of a plan, in the order in which they are printed."""


@dataclass(frozen=True, slots=True)
class Remedy:
    """A change of the machine or its budget, and the factor by which it would make a step faster."""

    what: str
    speedup: float

    def __str__(self) -> str:
        return f"{self.what}: {self.speedup:.1f}x"


@dataclass(frozen=True)
class Prediction:
    """The expected figures of a step, in seconds and bytes."""

    step_s: float
    num_tokens: int
    host_bytes: int
    """The peak of the process."""
    simulation: Simulation
    costs: Costs
    disk_endurance_bytes: float | None
    remedies: tuple[Remedy, ...] = ()
    """The largest speedup first."""
    device_bytes: int = 0
    """The peak on a device with memory of its own; 0 where the host computes."""
    commit_every: int = 0
    """Steps between commits; 0 for none. A commit after each step is part of the step."""
    commit_s: float = 0.0
    """Seconds that a commit adds to a step, without the time that the disk takes to make it durable."""
    commit_bytes: int = 0
    """Bytes that a commit copies from memory to the disk; planes that live on the disk are not copied."""
    least_s: float = 0.0
    """The shortest step, with every rate at the fast end of its measurements."""
    most_s: float = 0.0
    """The longest step; on a busy machine measurements vary widely, and so do these two."""

    @property
    def tokens_per_s(self) -> float:
        """Tokens per second."""
        return self.num_tokens / self.step_s

    @property
    def endurance_steps(self) -> float | None:
        """Steps until the disk is worn out; None if nothing is written, or its endurance is unknown."""
        life = self.disk_endurance_bytes
        return life / self.bytes_written if life and self.bytes_written else None

    @property
    def stalled_s(self) -> float:
        """Seconds of a step in which computing waits."""
        return sum(self.simulation.stall_s.values())

    @property
    def bytes_read(self) -> int:
        """From the disk, per step."""
        return self.simulation.bytes_moved.get(Resource.READ, 0)

    @property
    def bytes_written(self) -> int:
        """To the disk, per step."""
        return _written(self.simulation)

    def timeline(self) -> Timeline:
        """The timeline of the step, with the peak of each tier."""
        memory_bytes = {"host": self.host_bytes} | (
            {"device": self.device_bytes} if self.device_bytes else {}
        )
        return Timeline.simulated(self.simulation, memory_bytes)

    def __str__(self) -> str:
        busy = self.simulation.busy_s
        parts = sorted(busy, key=lambda resource: -busy[resource])
        lines = [
            f"predicted: {self.step_s:.2f} s per step of {self.num_tokens:,} tokens "
            f"({self.least_s:.2f} to {self.most_s:.2f}), {self.tokens_per_s:,.4g} tokens/s",
            "busy: "
            + ", ".join(
                f"{WORDS[resource]} {busy[resource] / self.step_s:.0%}"
                for resource in parts
                if busy[resource] > 0.005 * self.step_s
            ),
        ]
        stalls = self.simulation.stall_s
        if self.stalled_s > 0.01 * self.step_s:
            cause = max(stalls, key=lambda resource: stalls[resource])
            lines.append(f"computing waits {self.stalled_s:.2f} s per step, mostly for {WORDS[cause]}")
        else:
            lines.append("computing waits for nothing: only a faster processor would make a step shorter")
        if self.remedies:
            lines.append("what would help: " + "; ".join(map(str, self.remedies)))
        if self.bytes_written:
            worn = self.endurance_steps
            lines.append(
                f"written to the disk: {format_bytes(self.bytes_written)} per step, "
                f"{format_bytes(1000 * self.bytes_written)} in 1,000 steps"
                + (f"; the drive's life is {worn:,.0f} steps" if worn else "")
            )
        if self.commit_every:
            copied = f"{format_bytes(self.commit_bytes)} from memory" if self.commit_bytes else "nothing"
            every = "each step" if self.commit_every == 1 else f"every {self.commit_every:,} steps"
            lines.append(f"a commit, {every}, copies {copied}: {self.commit_s:.2f} s of the step")
        return "\n".join(lines)


def predict(model: nn.Module, profile: Profile, *, commit_every: int = 0) -> Prediction:
    """Predict the steps of a model from its last training call. Takes a few visits of one block of each kind.

    `commit_every`: steps between commits; 0 for none. Raises UsageError if the model was never called with gradients on.
    """
    runtime = runtime_of(model)
    call = runtime.visits.call.last_training
    if call is None or runtime.backing.executor is None:
        raise UsageError(
            "a prediction needs the shape of a batch",
            hint="call the model once with gradients on, then predict",
        )
    memory.give_back()  # what is timed takes a visit's memory, and leaves none behind
    try:
        with torch.enable_grad():
            return predict_call(
                runtime, Call(call.workload, call.shape), call.tile_rows, commit_every, profile
            )
    finally:
        memory.give_back()


def predict_call(
    runtime: Runtime,
    call: Call,
    tile_rows: int,
    commit_every: int = 0,
    profile: Profile | None = None,
) -> Prediction:
    """Simulate steps that make `call` with everything where it is placed, and time the blocks that were not timed yet.

    Without gradients all rows of a call are computed at once, as with a cache. `profile` defaults to the one that the model
    was opened with.
    """
    (workload, shape), budget, setup = call, runtime.budget, runtime.setup
    profile, placement = profile or setup.profile, budget.placement
    assert profile is not None and placement is not None
    cost_model = setup.cost_model(profile, call, budget.records)
    if not torch.is_grad_enabled():
        cost_model = cost_model.uncut(shape.rows or 1)
    costs = cost_model.costs(tile_rows)
    by_name = {record.name: record for record in budget.records}
    is_each = commit_every == 1

    def step(profile: Profile, costs: Costs = costs, commits: bool = is_each) -> Simulation:
        return simulate(workload.visits, by_name, placement, profile, costs, commits=commits)

    plain = step(profile, commits=False)
    committed = step(profile, commits=True) if commit_every else plain
    simulation = committed if is_each else plain
    remedies = {what: step(*changed).step_s for what, changed in _remedies(profile, costs).items()}
    if placement.disk_bytes and budget.settings.home is None:
        more = max(1 << 30, budget.limits.host_bytes // 4)
        remedies[f"{format_bytes(more)} more memory"] = budget.choices_with(more, cost_model)[0].step_s
    found = [Remedy(what, simulation.step_s / step_s) for what, step_s in remedies.items()]
    fast = step(profile.at_the_end(fast=True), costs.scaled(1 / (1 + costs.spread)))
    slow = step(profile.at_the_end(fast=False), costs.scaled(1 + costs.spread))
    return Prediction(
        step_s=simulation.step_s,
        num_tokens=(shape.rows or 1) * shape.row_tokens,
        host_bytes=budget.expected_bytes,
        simulation=simulation,
        costs=costs,
        disk_endurance_bytes=profile.disk_endurance_bytes,
        remedies=tuple(sorted((r for r in found if r.speedup >= WORTH_SAYING), key=lambda r: -r.speedup)),
        device_bytes=budget.ledger.total(Home.DEVICE),
        commit_every=commit_every,
        commit_s=committed.step_s - plain.step_s,
        commit_bytes=_written(committed) - _written(plain),
        least_s=fast.step_s * (1 - MODEL_SPREAD),
        most_s=slow.step_s * (1 + MODEL_SPREAD),
    )


@dataclass(frozen=True, slots=True)
class Advice:
    """Another plan that would be faster than the one that runs, judging by measured steps; seconds per step."""

    step_s: float
    other_step_s: float
    pins: str

    def __str__(self) -> str:
        return f"a step takes {self.step_s:.2f} s; with {self.pins} it would take about {self.other_step_s:.2f} s"


def advise(model: nn.Module, profile: Profile, step_s: float, stalled_s: float) -> Advice | None:
    """Return a plan that is faster by more than a tenth once costs are corrected by a measured step; None if there is none.

    Computing waited for `stalled_s` of the step's `step_s` seconds. The cost of computing is corrected first; if that does
    not explain the step, so are the rates of the disk. The plans are those that were compared when memory was laid out;
    without a profile none were.
    """
    runtime = runtime_of(model)
    call, choices = runtime.visits.call.last_training, runtime.budget.choices
    if call is None or len(choices) < 2 or runtime.backing.executor is None:
        return None
    records = runtime.backing.executor.store.records
    taken = choices[0]
    busy_s = taken.simulation.busy_s.get(Resource.COMPUTE, 0.0)
    factor = (step_s - stalled_s) / busy_s if busy_s else 1.0

    def simulated_s(choice: Choice, slower: float) -> float:
        own = replace(
            profile,
            disk_read=profile.disk_read / slower,
            disk_write=profile.disk_write / slower,
        )
        costs = choice.costs.scaled(factor)
        return simulate(call.workload.visits, records, choice.placement, own, costs).step_s

    slower = 1.0
    while simulated_s(taken, slower) < step_s * 0.95 and slower < SLOWEST:
        slower *= 1.1
    now_s = simulated_s(taken, slower)
    best_s, best = min(((simulated_s(each, slower), each) for each in choices[1:]), key=lambda pair: pair[0])
    if best_s * WORTH_A_RESTART > now_s:
        return None
    return Advice(step_s, step_s * best_s / now_s, pins_text(best))


def pins_text(choice: Choice) -> str:
    """The command-line options that select a plan."""
    values = {name: getattr(choice.pins, name) for name in _PINS}
    if choice.pins.resident is not None:
        values["resident"] = ",".join(map(str, choice.pins.resident))
    return " ".join(f"--pin {name}={value}" for name, value in values.items() if value is not None)


def _remedies(profile: Profile, costs: Costs) -> dict[str, tuple[Profile, Costs]]:
    """The machine and the costs of computing, with twice of each thing that could be bought."""
    halved = costs.scaled(0.5)
    disks = replace(profile, disk_read=2 * profile.disk_read, disk_write=2 * profile.disk_write)
    found = {"a second disk": (disks, costs)}
    if profile.up is None or profile.down is None:
        faster = replace(profile, update=2 * profile.update, host_copy=2 * profile.host_copy)
        return found | {"a processor twice as fast": (faster, halved)}
    link = replace(profile, up=2 * profile.up, down=2 * profile.down)
    return found | {"a device twice as fast": (profile, halved), "a link twice as fast": (link, costs)}


def _written(simulation: Simulation) -> int:
    return simulation.bytes_moved.get(Resource.WRITE, 0)
