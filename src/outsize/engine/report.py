"""The report of a run: where everything lives, how much was moved, how long computing waited."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from outsize.config import format_bytes
from outsize.engine.hooks import has_user_hooks
from outsize.engine.layer import Layer
from outsize.engine.runtime import Runtime, runtime_of
from outsize.model import attention_of
from outsize.plan.ledger import Ledger, Row
from outsize.store import memory


@dataclass(frozen=True)
class Report:
    """Figures of a model since it was loaded, in bytes and seconds."""

    ledger: Ledger
    num_parameters: int
    state_bytes: int
    host_budget_bytes: int
    host_peak_bytes: int
    bytes_read: int
    bytes_written: int
    wait_s: dict[str, float] = field(default_factory=dict)
    off_plan: tuple[str, ...] = ()
    device_budget_bytes: int = 0
    device_peak_bytes: int = 0
    bytes_up: int = 0
    """Copied from the host to a device with memory of its own."""
    bytes_down: int = 0
    stepped_down: tuple[str, ...] = ()
    """What was changed each time the device ran out of memory."""
    compiled: tuple[str, ...] = ()
    """Classes of layers that run compiled."""
    attention: str | None = None
    """The attention implementation; None if the model has only one."""
    uncut: tuple[str, ...] = ()
    """Why calls, or the layers named, computed whole batches instead of tiles."""

    @property
    def rows(self) -> tuple[Row, ...]:
        """The ledger as the rows of a table."""
        return self.ledger.rows()

    def __str__(self) -> str:
        lines = [str(self.ledger)] if self.rows else []
        lines.append(
            f"{self.num_parameters / 1e6:.1f} M parameters, training state {format_bytes(self.state_bytes)}; "
            f"process peak {format_bytes(self.host_peak_bytes)} of {format_bytes(self.host_budget_bytes)}"
        )
        if self.device_budget_bytes:
            lines.append(
                f"device peak {format_bytes(self.device_peak_bytes)} of {format_bytes(self.device_budget_bytes)}; "
                f"{format_bytes(self.bytes_up)} up, {format_bytes(self.bytes_down)} down"
            )
        lines.append(
            f"read {format_bytes(self.bytes_read)}, wrote {format_bytes(self.bytes_written)}; "
            f"waited {sum(self.wait_s.values()):.1f} s"
        )
        lines += how_it_computes(self.attention, self.compiled)
        if self.stepped_down:
            lines.append(f"the device ran out of memory: {'; '.join(self.stepped_down)}")
        lines += [f"layers compute the whole batch at once: {reason}" for reason in self.uncut]
        if self.off_plan:
            lines.append(
                "visits that no plan foresaw (right, but not overlapped): " + ", ".join(self.off_plan[:8])
            )
        return "\n".join(lines)


def how_it_computes(attention: str | None, compiled: Sequence[str]) -> list[str]:
    """Lines that say what attention is computed with, and which classes of layers run compiled."""
    values = {"attention": attention, "compiled": ", ".join(compiled)}
    return [f"{name}: {value}" for name, value in values.items() if value]


def report(model: nn.Module) -> Report:
    """The report of `model`; before its first call there are no rows."""
    runtime = runtime_of(model)
    num_parameters = sum(parameter.numel() for parameter in runtime.model.parameters.values())
    executor, placement, budget = runtime.backing.executor, runtime.budget.placement, runtime.budget
    if executor is None or placement is None:
        return Report(Ledger(), num_parameters, 0, budget.limits.host_bytes, memory.peak_bytes(), 0, 0)
    offload, source = runtime.backing.offload, executor.store.weight_reader.source
    stats = [tier.stats() for tier in (executor.store.disk, offload) if tier is not None]
    return Report(
        ledger=budget.ledger,
        num_parameters=num_parameters,
        state_bytes=sum(sum(state.record.group_bytes.values()) for state in executor.store),
        host_budget_bytes=budget.limits.host_bytes,
        host_peak_bytes=memory.peak_bytes(),
        bytes_read=sum(each.bytes_read for each in stats) + (source.bytes_read if source is not None else 0),
        bytes_written=sum(each.bytes_written for each in stats),
        wait_s=executor.wait_s | (offload.wait_s if offload is not None else {}),
        off_plan=tuple(f"{visit} x{count}" for visit, count in executor.off_plan.items()),
        device_budget_bytes=budget.limits.device_bytes or 0,
        device_peak_bytes=memory.device_peak_bytes(runtime.model.torch_device),
        bytes_up=runtime.model.device.links().bytes_up,
        bytes_down=runtime.model.device.links().bytes_down,
        stepped_down=tuple(runtime.visits.oom_retry.notes),
        compiled=tuple(runtime.visits.compiler.compiled),
        attention=attention_of(runtime.model.module),
        uncut=(*runtime.calls.uncut, *_uncut_layers(runtime)),
    )


def _uncut_layers(runtime: Runtime) -> Iterator[str]:
    """Why some layers compute the whole batch at once whatever the tiles of a call are, and which."""
    layers = {module: point for module, point in runtime.points.items() if isinstance(point, Layer)}
    reasons = (
        ("changes its own state in its forward", runtime.visits.call.changing),
        ("has hooks inside", {module for module, layer in layers.items() if has_user_hooks(layer.inner)}),
    )
    for reason, found in reasons:
        named = [module for module in layers if module in found]
        if named:
            more = f" (and {len(named) - 1} more)" if len(named) > 1 else ""
            yield f"{named[0]}{more} {reason}"
