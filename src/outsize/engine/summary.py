"""A plan as text and as JSON: what lives where, how long a step takes, and what would make it faster."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from outsize.config import format_bytes
from outsize.engine.predict import Prediction
from outsize.engine.report import how_it_computes
from outsize.plan.ledger import Row

WIDTH = 40
"""Characters of a bar."""

SHADES = "█▓▒░▚▞▙▟▌▀"
"""Of the parts of a bar, in order; what is free is blank."""


@dataclass(frozen=True, slots=True)
class Alternative:
    """Another plan that fits, the seconds that its step takes, and the pins that select it."""

    step_s: float
    pins: str


@dataclass(frozen=True)
class PlanSummary:
    """Where everything would live; if it does not fit, `reason` says why and names the nearest settings that do."""

    fits: bool
    reason: str
    rows: tuple[Row, ...] = ()
    slots: tuple[str, ...] = ()
    num_parameters: int = 0
    num_blocks: int = 0
    host_budget_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0
    device_budget_bytes: int = 0
    device_bytes: int = 0
    disk_budget_bytes: int = 0
    """0 where the disk was given no size."""
    prediction: Prediction | None = None
    """The expected step; None without a profile."""
    alternatives: tuple[Alternative, ...] = ()
    """The next best plans, the fastest first."""
    compiled: tuple[str, ...] = ()
    """Classes of layers that run compiled."""
    attention: str | None = None
    """The attention implementation; None if the model has only one."""
    pins: str = ""
    """Pins that select this plan on any profile."""
    has_weights: bool = True
    """False if the folder holds only a config."""

    def __str__(self) -> str:
        lines = [f"{self.num_parameters / 1e6:,.1f} M parameters in {self.num_blocks} blocks"]
        if not self.has_weights:
            lines.append("the folder has no weights: this plan is made from config.json alone")
        if not self.fits:
            return "\n".join([*lines, f"does not fit: {self.reason}"])
        lines += ["", *self._drawn(), "", *self.slots, *how_it_computes(self.attention, self.compiled)]
        used = [
            format_bytes(used) + (f" of {format_bytes(budget)}" if budget else "") + f" of {name}"
            for _, name, used, budget in self._tiers()
            if used
        ]
        lines.append(f"fits: {', '.join(used)}")
        if self.prediction is not None:
            lines += ["", str(self.prediction)]
        lines += [f"next best: {each.step_s:.2f} s with {each.pins}" for each in self.alternatives]
        return "\n".join(lines)

    def _tiers(self) -> list[tuple[str, str, int, int]]:
        """Each tier, its name in a sentence, and what is used and may be used of it."""
        return [
            ("device", "the device", self.device_bytes, self.device_budget_bytes),
            ("host", "memory", self.host_bytes, self.host_budget_bytes),
            ("disk", "disk", self.disk_bytes, self.disk_budget_bytes),
        ]

    def _drawn(self) -> list[str]:
        """A bar for each tier, followed by its parts."""
        lines = []
        for tier, _, _, budget in self._tiers():
            rows = [row for row in self.rows if row.tier == tier]
            if not rows:
                continue
            whole = max(budget, sum(row.num_bytes for row in rows))
            lines.append(f"{tier:<6} {bar([row.num_bytes for row in rows], whole)} {format_bytes(whole)}")
            lines += [
                f"       {shade} {row.what}  {format_bytes(row.num_bytes)}"
                for shade, row in zip(SHADES, rows, strict=False)
            ]
        return lines

    def to_json(self) -> str:
        """All of it; sizes in bytes, times in seconds."""
        values: dict[str, Any] = {
            key: value
            for key, value in vars(self).items()
            if key not in ("rows", "prediction", "alternatives")
        }
        values["rows"] = [asdict(row) for row in self.rows]
        values["alternatives"] = [asdict(each) for each in self.alternatives]
        values["prediction"] = _prediction(self.prediction) if self.prediction is not None else None
        return json.dumps(values, indent=2)


def _prediction(prediction: Prediction) -> Mapping[str, Any]:
    simulation = prediction.simulation
    return {
        **{
            name: getattr(prediction, name) for name in ("step_s", "tokens_per_s", "num_tokens", "host_bytes")
        },
        "step_s_least": prediction.least_s,
        "step_s_most": prediction.most_s,
        "bottleneck": str(simulation.bottleneck),
        **{
            name: {str(resource): value for resource, value in getattr(simulation, name).items()}
            for name in ("busy_s", "stall_s", "bytes_moved")
        },
        "remedies": [asdict(remedy) for remedy in prediction.remedies],
        "disk_endurance_steps": prediction.endurance_steps,
    }


def bar(parts: Sequence[int], whole: int) -> str:
    """A bar of WIDTH characters for `parts` of `whole`; a part that is there at all has a character."""
    assert len(parts) <= len(SHADES), parts
    ends = [round(WIDTH * sum(parts[: index + 1]) / whole) for index in range(len(parts))]
    widths = [max(1, end - start) for start, end in zip([0, *ends], ends, strict=False)]
    while sum(widths) > WIDTH:
        widths[widths.index(max(widths))] -= 1
    text = "".join(shade * width for shade, width in zip(SHADES, widths, strict=False))
    return f"|{text:<{WIDTH}}|"
