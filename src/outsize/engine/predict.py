"""What a run will take, before it runs: its plan simulated on the machine's profile, with blocks timed at the real tile."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outsize.block import Record
from outsize.config import format_bytes
from outsize.engine.probe import BatchShape, Rehearsal
from outsize.engine.timing import measure_costs
from outsize.plan import Placement
from outsize.plan.profile import Profile, Resource
from outsize.plan.simulate import Costs, Simulation, simulate

if TYPE_CHECKING:
    from outsize.engine.session import Session

_WORDS = {
    Resource.COMPUTE: "computing",
    Resource.UPDATE: "updating weights",
    Resource.READ: "reading the disk",
    Resource.WRITE: "writing the disk",
    Resource.UP: "copying to the device",
    Resource.DOWN: "copying from the device",
}


@dataclass(frozen=True)
class Prediction:
    """A step as it is expected; seconds and bytes."""

    step_s: float
    num_tokens: int
    simulation: Simulation
    costs: Costs
    disk_endurance_bytes: float | None

    @property
    def tokens_per_s(self) -> float:
        """Tokens of a step over its time."""
        return self.num_tokens / self.step_s

    @property
    def stalled_s(self) -> float:
        """Seconds of a step in which computing waits."""
        return sum(self.simulation.stall_s.values())

    def __str__(self) -> str:
        busy = self.simulation.busy_s
        parts = sorted(busy, key=lambda resource: -busy[resource])
        lines = [
            f"predicted: {self.step_s:.2f} s per step of {self.num_tokens:,} tokens, {self.tokens_per_s:,.0f} tokens/s",
            "busy: "
            + ", ".join(
                f"{_WORDS[resource]} {busy[resource] / self.step_s:.0%}"
                for resource in parts
                if busy[resource] > 0.005 * self.step_s
            ),
        ]
        stalls = self.simulation.stall_s
        if self.stalled_s > 0.01 * self.step_s:
            most = max(stalls, key=lambda resource: stalls[resource])
            lines.append(f"computing waits {self.stalled_s:.2f} s per step, mostly for {_WORDS[most]}")
        else:
            lines.append("computing waits for nothing: only a faster processor would make a step shorter")
        written = self.simulation.bytes_moved.get(Resource.WRITE, 0)
        if written:
            life = self.disk_endurance_bytes
            worn = f"; the drive's life is {life / written:,.0f} steps" if life else ""
            lines.append(f"written to the disk: {format_bytes(written)} per step{worn}")
        return "\n".join(lines)


def predict(
    session: Session,
    rehearsal: Rehearsal,
    shape: BatchShape,
    tile_rows: int,
    records: Sequence[Record],
    placement: Placement,
    profile: Profile,
) -> Prediction:
    """Time blocks and simulate steps of such calls."""
    costs = measure_costs(session, rehearsal, shape, tile_rows, records, profile)
    by_name: Mapping[str, Record] = {record.name: record for record in records}
    simulation = simulate(rehearsal.visits, by_name, placement, profile, costs)
    num_tokens = (shape.rows or 1) * shape.row_tokens
    return Prediction(simulation.step_s, num_tokens, simulation, costs, profile.disk_endurance_bytes)
