"""What a run would need, before it is started: the same cutting, rehearsal and placement, without allocating."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from outsize.config import Disk, Pins, format_bytes
from outsize.engine import api, memory
from outsize.engine.blocks import DTYPES
from outsize.engine.budget import disk_bytes
from outsize.engine.predict import Prediction, predict_call
from outsize.engine.probe import batch_shape
from outsize.engine.report import Row, placement_rows
from outsize.engine.session import Session
from outsize.errors import BudgetError, ConfigError, ModelError
from outsize.model import TensorSource, cut, longest_sequence, open_skeleton, resolve_folder
from outsize.optim import ADAMW
from outsize.plan import Placement, SlotClass
from outsize.plan.profile import Profile


@dataclass(frozen=True)
class PlanSummary:
    """Where everything would live; `reason` says why it does not fit, with the nearest setting that does."""

    fits: bool
    reason: str
    rows: tuple[Row, ...]
    slots: tuple[str, ...]
    num_parameters: int
    num_blocks: int
    host_budget_bytes: int
    host_bytes: int
    disk_bytes: int
    device_budget_bytes: int = 0
    device_bytes: int = 0
    prediction: Prediction | None = None
    """What a step takes; None where no profile was given."""

    def __str__(self) -> str:
        lines = [f"{self.num_parameters / 1e6:.1f} M parameters in {self.num_blocks} blocks"]
        if not self.fits:
            return "\n".join([*lines, f"does not fit: {self.reason}"])
        width = max(len(row.what) for row in self.rows)
        lines += [
            f"{row.tier:<5} {row.what:<{width}}  {format_bytes(row.num_bytes):>10}" for row in self.rows
        ]
        lines += list(self.slots)
        lines.append(
            "fits: "
            + (
                f"{format_bytes(self.device_bytes)} of {format_bytes(self.device_budget_bytes)} of the device, "
                if self.device_bytes
                else ""
            )
            + f"{format_bytes(self.host_bytes)} of {format_bytes(self.host_budget_bytes)} of memory"
            + (f", {format_bytes(self.disk_bytes)} of disk" if self.disk_bytes else "")
        )
        if self.prediction is not None:
            lines.append(str(self.prediction))
        return "\n".join(lines)


def preview(
    path: str | Path,
    *,
    device: str | int | None = None,
    host: str | int | None = None,
    disk: Disk | None = None,
    home: str | None = None,
    dtype: str | torch.dtype | None = None,
    pins: Pins | None = None,
    batch_size: int = 1,
    seq_len: int = 512,
    train: bool = True,
    profile: Profile | None = None,
) -> PlanSummary:
    """Say what lives where, and whether it fits, for batches of `[batch_size, seq_len]` tokens.

    With a `profile` of the machine one block of each kind is timed, and a step is predicted. Reads no weights and stores
    nothing. Raises ModelError or ConfigError for what cannot be opened at all.
    """
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
        if value < 1:
            raise ConfigError(f"{name}: {value} is less than 1", hint=f"pass {name} 1 or more")
    settings = api.resolve_settings(device, host, disk, home, dtype, pins)
    memory.keep_freed_memory()
    memory.bound_kernel_caches()
    module = open_skeleton(resolve_folder(path), DTYPES[settings.compute_type])
    session = Session(module, cut(module), TensorSource({}), settings, api.open_device(settings))
    if getattr(module, "main_input_name", None) != "input_ids":
        raise ModelError(
            f"{type(module).__name__} does not take text",
            hint="outsize.preview covers models that take input_ids",
        )
    longest = longest_sequence(module)
    if longest is not None and longest < seq_len:
        raise ConfigError(
            f"seq_len: the model's positions end at {longest}, got {seq_len}",
            hint=f"pass seq_len {longest} or less",
        )
    module.train(train)
    if train:
        session.rule = ADAMW
    num_parameters = sum(parameter.numel() for parameter in session.parameters.values())
    ids = torch.zeros(batch_size, seq_len, dtype=torch.long)
    kwargs = {"input_ids": ids, "labels": ids, "use_cache": False}
    shape = batch_shape(module, (), kwargs)
    with torch.set_grad_enabled(train):
        rehearsal = session.rehearse_with_labels(kwargs, shape)
    try:
        records, placement = session.decide(rehearsal, shape)
        num_disk_bytes = disk_bytes(placement, records, settings)
    except BudgetError as error:
        return PlanSummary(
            False,
            str(error),
            (),
            (),
            num_parameters,
            len(session.cut.blocks),
            session.budget.limit_bytes,
            0,
            0,
            session.budget.device_limit_bytes,
        )
    prediction = None
    if profile is not None:
        tile_rows = session.budget.begin_call(rehearsal, shape)
        with torch.set_grad_enabled(train):
            prediction = predict_call(session, rehearsal, shape, tile_rows, records, placement, profile)
    return PlanSummary(
        fits=True,
        reason="",
        rows=placement_rows(session, records, placement),
        slots=_slots(placement),
        num_parameters=num_parameters,
        num_blocks=len(records),
        host_budget_bytes=session.budget.limit_bytes,
        host_bytes=session.budget.host_bytes(),
        disk_bytes=num_disk_bytes,
        device_budget_bytes=session.budget.device_limit_bytes,
        device_bytes=session.budget.device_bytes(),
        prediction=prediction,
    )


def _slots(placement: Placement) -> tuple[str, ...]:
    def describe(what: str, group: SlotClass) -> str:
        slots = (
            f"{group.count} {what} slot{'s' if group.count != 1 else ''} of {format_bytes(group.slot_bytes)}"
        )
        return f"{slots} for {len(group.blocks)} block{'s' if len(group.blocks) != 1 else ''}"

    lines = [describe("weight", group) for group in placement.weight_classes]
    lines += [describe("gradient", group) for group in placement.gradient_classes]
    if placement.kept:
        lines.append(f"{len(placement.kept)} blocks keep their activations, and compute them once")
    if placement.chunk_buffers:
        lines.append(f"{placement.chunk_buffers} chunk buffers of {format_bytes(placement.chunk_bytes)}")
    if placement.relay_buffers:
        lines.append(
            f"{placement.relay_buffers} buffers of {format_bytes(placement.relay_bytes)} between disk and device"
        )
    if placement.staging_buffers:
        lines.append(
            f"{placement.staging_buffers} buffers of {format_bytes(placement.staging_bytes)} for the first reading"
        )
    return tuple(lines)
