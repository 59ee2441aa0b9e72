"""Plan a run without starting it: the same cutting, dry run and placement, with nothing allocated."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Unpack

import torch
from torch import nn

from outsize.config import ComputeType, Home, Settings, format_bytes
from outsize.engine.api import (
    Options,
    check_machine,
    open_device,
    settings_for_folder,
    settings_of,
    spells_out,
)
from outsize.engine.counting import on_paper
from outsize.engine.predict import pins_text, predict_call
from outsize.engine.runtime import Runtime
from outsize.engine.summary import Alternative, PlanSummary
from outsize.errors import BudgetError, ConfigError, ModelError
from outsize.model import (
    TensorSource,
    attention_of,
    cut,
    has_weights,
    is_quantized,
    longest_sequence,
    open_skeleton,
    plain_defaults,
    resolve_folder,
    stored_weights,
)
from outsize.optim import ADAMW
from outsize.plan import Placement
from outsize.plan.profile import Profile
from outsize.plan.search import Choice
from outsize.plan.workload import Call
from outsize.store import memory
from outsize.store.planes import DTYPES
from outsize.tier import PaperDevice

Calls = tuple[Call, Call | None]
"""The call that memory is placed for and, for generating, the one that should be fast."""

Passes = Callable[[Runtime, int, int], Iterator[tuple[Call, Call]] | None]
"""Makes dry runs of an engine's passes for some sequences of some tokens: of the largest pass, and of one with a token of
each sequence. None for a model that no engine runs."""

_PREFERRED = (ComputeType.BFLOAT16, ComputeType.FLOAT32)

NUM_ALTERNATIVES = 3

LEAST_LENGTH = 16
"""The shortest sequence length that a hint suggests."""

TELLING = 1.01
"""List an alternative only if it is slower than the one before by at least this factor."""


class PreviewOptions(Options, total=False):
    """Keywords of `preview`."""

    attention: str | None
    batch_size: int
    seq_len: int
    train: bool
    from_scratch: bool
    profile: Profile | None
    hardware: Profile | None


@spells_out(settings_of)
def preview(
    path: str | Path,
    *,
    attention: str | None = None,
    batch_size: int = 1,
    seq_len: int = 512,
    train: bool = True,
    from_scratch: bool = False,
    profile: Profile | None = None,
    hardware: Profile | None = None,
    passes: Passes | None = None,
    **options: Unpack[Options],
) -> PlanSummary:
    """Say what lives where, and whether it fits, for batches of `[batch_size, seq_len]` tokens.

    With a `profile` of this machine one block of each kind is timed, plans are compared, and a step is predicted. With
    `hardware`, the profile of another machine, that one is planned for: its memory is the budget where none is given, and
    operations are counted instead of timed. `compile`, `attention` and `from_scratch` as in `load`.
    `passes`: dry runs of the passes of an engine that generates; else calls of the model are planned for.
    Reads no weights and stores nothing: a `config.json` is enough. Raises ModelError or ConfigError for what cannot be
    opened at all, WeightsError for a folder whose weights `load` would refuse.
    """
    for name, value in (("batch_size", batch_size), ("seq_len", seq_len)):
        if value < 1:
            raise ConfigError(f"{name}: {value} is less than 1", hint=f"pass {name} 1 or more")
    folder = resolve_folder(path)
    weights_are_there = from_scratch or has_weights(folder)
    is_quantized = stored_weights(folder) is not None
    if hardware is None:
        settings = settings_for_folder(options, is_quantized=is_quantized)
        check_machine(settings)
        computes_on = open_device(settings)
    else:
        settings = _settings_elsewhere(hardware, options, is_quantized=is_quantized)
        whole = hardware.device_bytes
        computes_on = PaperDevice(whole and min(whole, settings.budgets.device_bytes or whole))
    memory.keep_freed_memory()
    memory.bound_kernel_caches()
    with plain_defaults():
        module = open_skeleton(folder, DTYPES[settings.compute_type], attention=attention)
    runtime = Runtime(module, cut(module), TensorSource({}), settings, computes_on, hardware or profile)
    _check(module, seq_len, train)
    module.train(train)
    if train:
        runtime.setup.rule = ADAMW
    else:
        module.requires_grad_(False)
    with on_paper() if hardware is not None else nullcontext(), torch.set_grad_enabled(train):
        summary = _summary(runtime, batch_size, seq_len, None if hardware is not None else passes)
        return replace(summary, has_weights=weights_are_there)


def _check(module: nn.Module, seq_len: int, train: bool) -> None:
    """Refuse a model that takes no sequences of this length, or that cannot be trained."""
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
    if train and is_quantized(module):
        raise ModelError(
            "weights in few bits are not trained", hint="plan for generating, or plan the original model"
        )


def _summary(runtime: Runtime, batch_size: int, seq_len: int, passes: Passes | None) -> PlanSummary:
    """The plan for training, or, without gradients, for generating."""
    budget, model, reason = runtime.budget, runtime.model, ""
    calls = partial(_calls, runtime, passes, batch_size)
    try:
        largest, decoding = _decided(runtime, calls(seq_len))
    except BudgetError as error:
        reason = f"{error}{_shorter(runtime, calls, seq_len)}"
    summary = PlanSummary(
        fits=not reason,
        reason=reason,
        num_parameters=sum(parameter.numel() for parameter in model.parameters.values()),
        num_blocks=len(model.cut.blocks),
        host_budget_bytes=budget.limits.host_bytes,
        device_budget_bytes=budget.limits.device_bytes or 0,
    )
    if budget.placement is None:
        return summary
    prediction, ledger = None, budget.ledger
    if runtime.setup.profile is not None:
        prediction = predict_call(runtime, decoding or largest, budget.begin_call(largest))
    return replace(
        summary,
        rows=ledger.rows(),
        slots=_slots(budget.placement),
        compiled=tuple(runtime.visits.compiler.compiled),
        attention=attention_of(model.module),
        host_bytes=ledger.total(Home.HOST),
        disk_bytes=ledger.total(Home.DISK),
        device_bytes=ledger.total(Home.DEVICE),
        disk_budget_bytes=_disk_budget(runtime.budget.settings),
        prediction=prediction,
        alternatives=_alternatives(budget.choices),
        pins=pins_text(budget.choices[0]) if budget.choices else "",
    )


def _decided(runtime: Runtime, calls: Iterator[Calls]) -> Calls:
    """Place memory for the first of `calls` that fit, and return them. Raises BudgetError if none fits."""
    error: BudgetError | None = None
    for largest, decoding in calls:
        try:
            runtime.setup.decide([largest], decoding)
        except BudgetError as failure:
            error = failure.with_traceback(None)
        else:
            return largest, decoding
    assert error is not None
    raise error


def _calls(runtime: Runtime, passes: Passes | None, batch_size: int, seq_len: int) -> Iterator[Calls]:
    """Yield the call to lay memory out for and, for generation, the call to optimize: one token of each sequence.

    Passes of an engine come with fewer and fewer pages, those that serve most sequences at once first.
    """
    largest = partial(_dry_run, runtime, batch_size, seq_len)
    if torch.is_grad_enabled():
        yield largest(), None
    elif passes is None or (found := passes(runtime, batch_size, seq_len)) is None:
        yield largest(), _dry_run(runtime, batch_size, 1)
    else:
        yield from found


def _disk_budget(settings: Settings) -> int:
    """Bytes that all disks together may hold, the same on each; 0 if no disk was given a size."""
    sizes = [disk.num_bytes for disk in settings.budgets.disks if disk.num_bytes is not None]
    return len(settings.budgets.disks) * min(sizes, default=0)


def _shorter(runtime: Runtime, calls_of: Callable[[int], Iterator[Calls]], seq_len: int) -> str:
    """The longest of a few shorter sequence lengths that fits, as part of a hint."""
    for length in (seq_len * 3 // 4, seq_len // 2, seq_len // 4, seq_len // 8):
        calls = calls_of(length) if length >= LEAST_LENGTH else ()
        if any(runtime.setup.fits(largest) for largest, _ in calls):
            return f"; or sequences of {length}"
    return ""


def _dry_run(runtime: Runtime, rows: int, seq_len: int) -> Call:
    ids = torch.zeros(rows, seq_len, dtype=torch.long, device="cpu")
    kwargs = {"input_ids": ids, "labels": ids, "use_cache": False}
    return runtime.calls.dry_run(kwargs, with_labels=True)


def _settings_elsewhere(hardware: Profile, options: Options, *, is_quantized: bool) -> Settings:
    """The options of `load` on another machine, which has a disk, and the folders that are named."""
    default = next((kind for kind in _PREFERRED if kind in hardware.matmul), None)
    disk = options.get("disk")
    settings = settings_for_folder(
        {**options, "disk": "." if disk is None else disk}, is_quantized=is_quantized, default=default
    )
    if settings.compile:
        raise ConfigError(
            "compile: what compiled layers take on another machine is not known", hint="leave it out"
        )
    if settings.budgets.device_bytes is not None and not hardware.has_device:
        raise ConfigError(
            f"device={options['device']!r}: {hardware.name} has no device of its own",
            hint="leave device= out",
        )
    for name, given, there in (
        ("host", settings.budgets.host_bytes, hardware.host_bytes),
        ("device", settings.budgets.device_bytes, hardware.device_bytes),
    ):
        if given is not None and there is not None and given > there:
            raise ConfigError(
                f"{name}={format_bytes(given)}: {hardware.name} has {format_bytes(there)}",
                hint=f'{name}="{int(there) >> 20}MiB" or less, or leave it out',
            )
    return settings


def _alternatives(choices: Sequence[Choice]) -> tuple[Alternative, ...]:
    """The next best plans, each noticeably slower than the one before."""
    found: list[Alternative] = []
    slowest = choices[0].step_s if choices else 0.0
    for choice in choices[1:]:
        if choice.step_s > slowest * TELLING and len(found) < NUM_ALTERNATIVES:
            found.append(Alternative(choice.step_s, pins_text(choice)))
            slowest = choice.step_s
    return tuple(found)


def _slots(placement: Placement) -> tuple[str, ...]:
    """The slots and buffers that planes pass through, each kind as a line."""
    lines = [
        f"{_counted(each.count, f'{group} slot')} of {format_bytes(each.slot_bytes)} for "
        f"{_counted(len(each.blocks), 'block')}"
        for group, classes in placement.slots.items()
        for each in classes
    ]
    if placement.kept:
        lines.append(f"{len(placement.kept)} blocks keep their activations, and compute them once")
    buffers = (
        (placement.chunks, "chunk buffers", ""),
        (placement.bounce, "buffers", " between disk and device"),
        (placement.staging, "buffers", " for the first reading"),
    )
    lines += [
        f"{each.count} {what} of {format_bytes(each.each_bytes)}{where}"
        for each, what, where in buffers
        if each.count
    ]
    return tuple(lines)


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"
