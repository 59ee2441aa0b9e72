"""What a run did: where everything lived, how much was moved, what was waited for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from torch import nn

from outsize.block import Plane, Record
from outsize.config import Home, format_bytes
from outsize.engine.hooks import has_user_hooks
from outsize.engine.layer import Layer
from outsize.engine.runtime import Runtime, runtime_of
from outsize.model import attention_of
from outsize.plan import Placement
from outsize.store import memory

_NAMES = {Plane.WEIGHT: "weights", Plane.GRADIENT: "gradients"}
_TIERS = ("device", "host", "disk")


@dataclass(frozen=True, slots=True)
class Row:
    """`num_bytes` of `what` live in `tier`."""

    tier: str
    what: str
    num_bytes: int


@dataclass(frozen=True)
class Report:
    """Figures of a model under Outsize since it was loaded; bytes and seconds."""

    rows: tuple[Row, ...]
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
    """What was changed where the device ran out of memory."""
    compiled: tuple[str, ...] = ()
    """Classes of layers that run compiled."""
    attention: str | None = None
    """What attention is computed with; None where the model has no choice."""
    uncut: tuple[str, ...] = ()
    """Why calls, or the layers that are named, were computed as a whole instead of in tiles."""

    def __str__(self) -> str:
        width = max((len(row.what) for row in self.rows), default=0)
        lines = [f"{row.tier:<5} {row.what:<{width}}  {format_bytes(row.num_bytes):>10}" for row in self.rows]
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
        if self.attention is not None:
            lines.append(f"attention: {self.attention}")
        if self.compiled:
            lines.append(f"compiled: {', '.join(self.compiled)}")
        if self.stepped_down:
            lines.append(f"the device ran out of memory: {'; '.join(self.stepped_down)}")
        lines += [f"layers compute the whole batch at once: {reason}" for reason in self.uncut]
        if self.off_plan:
            lines.append(
                "visits that no plan foresaw (right, but not overlapped): " + ", ".join(self.off_plan[:8])
            )
        return "\n".join(lines)


def report(model: nn.Module) -> Report:
    """The report of `model`; before its first call there are no rows."""
    runtime = runtime_of(model)
    num_parameters = sum(parameter.numel() for parameter in runtime.model.parameters.values())
    executor, placement, budget = runtime.backing.executor, runtime.budget.placement, runtime.budget
    if executor is None or placement is None:
        return Report((), num_parameters, 0, budget.limits.host_bytes, memory.peak_bytes(), 0, 0)
    records = [state.record for state in executor.store]
    rows = placement_rows(runtime, records, placement)
    offload, source = runtime.backing.offload, executor.store.weight_reader.source
    stats = [tier.stats() for tier in (executor.store.disk, offload) if tier is not None]
    return Report(
        rows=rows,
        num_parameters=num_parameters,
        state_bytes=sum(num_bytes for record in records for num_bytes in _planes(record).values()),
        host_budget_bytes=budget.limits.host_bytes,
        host_peak_bytes=memory.peak_bytes(),
        bytes_read=sum(each.bytes_read for each in stats) + (source.bytes_read if source is not None else 0),
        bytes_written=sum(each.bytes_written for each in stats),
        wait_s=executor.wait_s | (offload.wait_s if offload is not None else {}),
        off_plan=tuple(f"{visit} x{count}" for visit, count in executor.off_plan.items()),
        device_budget_bytes=budget.device_limit_bytes,
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


def placement_rows(runtime: Runtime, records: Sequence[Record], placement: Placement) -> tuple[Row, ...]:
    """What lives where: planes by tier, then the buffers they pass through, then the process itself."""
    figures: Counter[tuple[str, str]] = Counter()
    computes_in = "host" if runtime.model.device.is_host else "device"
    tiers = {Home.DEVICE: computes_in, Home.FILE: "disk"}
    for record in records:
        for plane, num_bytes in _planes(record).items():
            home = placement.home(record.name, plane.group)
            what = _NAMES.get(plane, "optimizer state") + (", in their files" if home is Home.FILE else "")
            figures[tiers.get(home, str(home)), what] += num_bytes
    for name, index in placement.pieces:
        record = next(record for record in records if record.name == name)
        num_bytes = int(record.entries[index].piece.num_elements * record.element_bytes[Plane.WEIGHT])
        figures["host", "weights"] += num_bytes
        figures["disk", "weights, in their files"] -= num_bytes
    by_name = sorted(figures.items(), key=lambda item: item[0][1], reverse=True)
    planes = sorted(by_name, key=lambda item: _TIERS.index(item[0][0]))
    rows = [Row(tier, what, num_bytes) for (tier, what), num_bytes in planes]
    if runtime.model.device.is_host:
        rows.append(Row("host", "slots and buffers", placement.slots_bytes + placement.passage_bytes))
    else:
        rows.append(Row("device", "slots", placement.slots_bytes))
        rows.append(Row("host", "buffers", placement.passage_bytes))
    if placement.inputs is not None:
        rows.append(Row(str(placement.inputs), "inputs of blocks", placement.inputs_bytes))
        if placement.inputs is Home.DISK:
            rows.append(Row("host", "buffers of inputs", runtime.budget.inputs_bytes))
    rows.append(Row(computes_in, "activations (most)", runtime.budget.activation_bytes))
    if runtime.budget.reserved_bytes:
        rows.append(Row("host", "KV cache", runtime.budget.reserved_bytes))
    rows.append(Row("host", "Python and libraries", runtime.budget.limits.base_bytes))
    return tuple(rows)


def _planes(record: Record) -> dict[Plane, int]:
    """Bytes of each plane of a record."""
    planes = (Plane.WEIGHT, *((Plane.GRADIENT, *record.state) if record.num_trainable else ()))
    return {plane: record.plane_bytes(plane) for plane in planes}
