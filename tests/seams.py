"""The one place where tests of whole models look below the public API.

Each function is named by what stays whatever the engine is made of: the plan of a call, where planes live, slots, memory,
visits that no plan foresaw. Where the engine keeps it is written here and nowhere else, so that a redesign of the engine
changes this file and leaves the tests as they are. Tests of one part of the engine (an arena, a budget, a queue) make that
part themselves and do not come here.

`tests.tools.differential` loads this file once from each of the two checkouts that it compares.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from torch import nn

from outsize.block import Plane, Record
from outsize.engine import api, budget, keep, memory, needs, scratch
from outsize.engine.executor import Executor
from outsize.engine.session import Session, _sessions, session_of
from outsize.plan import Op, Placement, Plan, is_stored, place_apart
from outsize.tier import DiskTier, TwinDevice

# -- models ------------------------------------------------------------------------------------------------------


def is_open(model: nn.Module) -> bool:
    """Whether `model` was loaded or wrapped."""
    return model in _sessions


def has_memory(model: nn.Module) -> bool:
    """Whether memory was allocated for `model`, which its first call does."""
    return session_of(model).executor is not None


def close(model: nn.Module) -> None:
    """Close a model, and check that every region of its memory was given back."""
    _close(session_of(model))


def close_unchecked(model: nn.Module) -> None:
    """Close a model whose memory may not be in order."""
    session_of(model).close()


def close_all() -> None:
    """Close every model that is open."""
    for session in [reference() for reference in list(_sessions.values())]:
        if session is not None:
            _close(session)


def abandon(model: nn.Module) -> None:
    """Let go of a model that cannot be closed any more, as far as that is possible."""
    session = _sessions.pop(model)()
    assert session is not None
    executor = session.executor
    for close_it in (session.close, *([executor.store.close] if executor is not None else [])):
        with suppress(BaseException):
            close_it()


def _close(session: Session) -> None:
    if session.executor is not None:
        arena = session.executor.store.arena
        session.close()
        arena.check_books()
    elif session.versions is not None:
        session.close()


# -- plans -------------------------------------------------------------------------------------------------------


def plan_ahead(model: nn.Module) -> Plan:
    """The plan of the call under way, or of the last one."""
    return _executor(model).plan


def plan_executed(model: nn.Module) -> list[Op]:
    """The operations of the last call, and since, as they were carried out."""
    return _executor(model).executed


def visits_off_plan(model: nn.Module) -> Mapping[str, int]:
    """How often each visit came that no plan foresaw."""
    return _executor(model).off_plan


# -- where planes live -------------------------------------------------------------------------------------------


def placement_of(model: nn.Module) -> Placement | None:
    """Where every plane lives, as it was decided; None before the first call."""
    return session_of(model).budget.placement


def records_of(model: nn.Module) -> Mapping[str, Record]:
    """The records by the names of their blocks."""
    return _executor(model).store.records


def homes(model: nn.Module) -> dict[tuple[str, str], str]:
    """The home of the weights, the gradient and the state of each block: device, host, disk or file.

    The device is what computes, and so the host where there is none.
    """
    session, placement = session_of(model), placement_of(model)
    assert placement is not None
    computes_in = "host" if session.device.is_host else "device"
    records = list(records_of(model).values())
    away = "disk" if is_stored(records) else "file"
    found = {}
    for record in records:
        groups = {"weight": Plane.WEIGHT}
        if record.num_trainable:
            groups |= {"gradient": Plane.GRADIENT} | ({"state": Plane.MOMENT1} if record.state else {})
        for name, plane in groups.items():
            home = "host" if placement.is_hosted(record.name, plane) else away
            found[record.name, name] = computes_in if placement.is_resident(record.name, plane) else home
    return found


def placement_lines(model: nn.Module) -> list[str]:
    """The placement as lines of text: homes, slots, buffers, activations that wait for their backward."""
    placement = placement_of(model)
    assert placement is not None
    lines = [f"home {block}.{group} {home}" for (block, group), home in homes(model).items()]
    for name, classes in (("weight", placement.weight_classes), ("gradient", placement.gradient_classes)):
        for each in classes:
            lines.append(f"slots {name} {each.count} x {each.slot_bytes}: {' '.join(sorted(each.blocks))}")
    lines += [f"entry {block}[{index}] host" for block, index in sorted(placement.pieces)]
    lines.append(f"buffers chunk {placement.chunk_buffers} x {placement.chunk_bytes}")
    lines.append(f"buffers relay {placement.relay_buffers} x {placement.relay_bytes}")
    lines.append(f"buffers staging {placement.staging_buffers} x {placement.staging_bytes}")
    lines.append(f"no-recompute {' '.join(sorted(placement.kept))}")
    lines.append(f"inputs {placement.inputs} {placement.inputs_bytes}")
    lines.append(f"disk {placement.disk_bytes}")
    return lines


def tile_rows(model: nn.Module) -> int | None:
    """Rows of a tile in the last call with a backward."""
    call = session_of(model).calls.last_training
    return call.tile_rows if call is not None else None


# -- memory and transfers ----------------------------------------------------------------------------------------


def slots_taken(model: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The most weight slots and the most gradient slots that were ever taken at once, by class."""
    return _executor(model).store.slot_high_water


def arena_of(model: nn.Module) -> Any:
    """The memory that blocks compute in: `limit_bytes`, `in_use_bytes`, `high_water_bytes`, `check_books()`."""
    return _executor(model).store.arena


def planned_bytes(model: nn.Module) -> dict[str, int]:
    """What was planned: bytes of the host and of the device, activations, and what the process is expected to have."""
    own = session_of(model).budget
    return {
        "host": own.host_bytes(),
        "device": own.device_bytes(),
        "activations": own.activation_bytes,
        "inputs": own.host_inputs_bytes,
        "expected": own.expected_bytes(),
    }


def flush(model: nn.Module) -> None:
    """Wait until every transfer of blocks that was started is over."""
    _executor(model).store.flush()


def settle_updates(model: nn.Module) -> None:
    """Apply now what `optimizer.step()` left for the next visits."""
    _executor(model).settle_updates()


# -- putting something in the engine's place ---------------------------------------------------------------------


def set_process_memory(monkeypatch: Any, num_bytes: int, available_bytes: int) -> None:
    """Let memory be planned as if the process had `num_bytes`, and `available_bytes` were free beside."""
    monkeypatch.setattr(memory, "resident_bytes", lambda: num_bytes)
    monkeypatch.setattr(memory, "available_bytes", lambda: available_bytes)


def set_chunk(monkeypatch: Any, num_elements: int) -> None:
    """Change the size of a chunk of an update in every module that has it."""
    modules = [module for name, module in sys.modules.items() if name.startswith("outsize.")]
    having = [module for module in modules if "CHUNK" in vars(module)]
    assert len(having) >= 4
    for module in having:
        monkeypatch.setattr(module, "CHUNK", num_elements)


def move_small_inputs(monkeypatch: Any, least_bytes: int = 1, part_bytes: int | None = None) -> None:
    """Let inputs of blocks of `least_bytes` or more wait away from where blocks compute, and move in such parts."""
    monkeypatch.setattr(keep, "LEAST_BYTES", least_bytes)
    if part_bytes is not None:
        monkeypatch.setattr(keep, "PART_BYTES", part_bytes)
        monkeypatch.setattr(keep, "BUFFERS_BYTES", keep.BUFFERS * part_bytes)


def set_activations(monkeypatch: Any, needs_at: Callable[..., Any]) -> None:
    """From now on activations take what `needs_at(rehearsal, shape, tile_rows, inputs, kept)` says."""
    for module in (budget, needs):
        monkeypatch.setattr(module, "needs_at", needs_at)


def compute_on(monkeypatch: Any, make_device: Callable[[], Any], host_bytes: int | None = None) -> None:
    """Let models that are opened compute on `make_device()`; `host_bytes`: all that planes may take of the host."""

    def place(records: Sequence[Record], **options: Any) -> Placement:
        return place_apart(records, **({**options, "host_bytes": host_bytes} if host_bytes else options))

    monkeypatch.setattr(api, "open_device", lambda settings: make_device())
    monkeypatch.setattr(budget, "place_apart", place)


def with_twin(
    monkeypatch: Any,
    delay_s: Callable[[Any, str], float] = lambda way, label: 0.0,
    limit_bytes: int | None = None,
    host_bytes: int | None = None,
) -> list[TwinDevice]:
    """Let models be opened on devices with memory of their own, which the host plays. Returns them as they come."""
    twins: list[TwinDevice] = []

    def make_device() -> TwinDevice:
        twins.append(TwinDevice(limit_bytes, delay_s))
        return twins[-1]

    compute_on(monkeypatch, make_device, host_bytes)
    return twins


@contextmanager
def wrapped_disk(monkeypatch: Any, wrap: Callable[[Any], Any]) -> Iterator[list[Any]]:
    """Inside, models open their disk through `wrap(DiskTier(...))`; yields what was opened."""
    tiers: list[Any] = []

    def open_tier(folder: Path, num_bytes: int, **options: Any) -> Any:
        tiers.append(wrap(DiskTier(folder, num_bytes, **options)))
        return tiers[-1]

    with monkeypatch.context() as patch:
        patch.setattr(scratch, "DiskTier", open_tier)
        yield tiers


def _executor(model: nn.Module) -> Executor:
    executor = session_of(model).executor
    assert executor is not None, "the model was not called yet"
    return executor
