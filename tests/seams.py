"""The one place where tests of whole models look below the public API.

Each function is named by what stays whatever the engine is made of: the plan of a call, where planes live, slots, memory,
visits that no plan foresaw. Where the engine keeps it is written here and nowhere else, so that a redesign of the engine
changes this file and leaves the tests as they are. Tests of one part of the engine (an arena, a budget, a queue) make that
part themselves and do not come here.

`tests.tools.differential` loads this file once from each of the two checkouts that it compares.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn

from outsize.block import Record
from outsize.config import Home, Pins
from outsize.engine import api, budget, head, signature
from outsize.engine import executor as executor_module
from outsize.engine.compiled import Compiler
from outsize.engine.dry_run import DryRun
from outsize.engine.dry_runner import DryRunner, batch_shape
from outsize.engine.executor import Executor
from outsize.engine.layer import Layer, LayerCall
from outsize.engine.oom_retry import OomRetry
from outsize.engine.runtime import Runtime, _runtimes, runtime_of
from outsize.engine.setup import Setup
from outsize.plan import (
    Backward,
    Direction,
    Forward,
    Op,
    Pass,
    Placement,
    Plan,
    Visit,
    check,
    limits,
    memory_estimate,
    place,
    planner,
)
from outsize.plan.ledger import ACTIVATIONS, WAITING, Ledger
from outsize.plan.place import GROUPS, Room
from outsize.plan.workload import Call
from outsize.serve.speculate import Guesser
from outsize.store import memory, offload, scratch
from outsize.store.gradients import Gradients
from outsize.tier import Device, DiskTier
from tests.doubles import TwinDevice

# -- models ------------------------------------------------------------------------------------------------------


def is_open(model: nn.Module) -> bool:
    """Whether `model` was loaded or wrapped."""
    return model in _runtimes


def has_memory(model: nn.Module) -> bool:
    """Whether memory was allocated for `model`, which its first call does."""
    return runtime_of(model).backing.executor is not None


def close(model: nn.Module) -> None:
    """Close a model, and check that every region of its memory was given back."""
    _close(runtime_of(model))


def close_unchecked(model: nn.Module) -> None:
    """Close a model whose memory may not be in order."""
    runtime_of(model).setup.close()


def close_all() -> None:
    """Close every model that is open."""
    for runtime in [reference() for reference in list(_runtimes.values())]:
        if runtime is not None:
            _close(runtime)


def abandon(model: nn.Module) -> None:
    """Let go of a model that cannot be closed any more, as far as that is possible."""
    runtime = _runtimes.pop(model)()
    assert runtime is not None
    executor = runtime.backing.executor
    for close_it in (runtime.setup.close, *([executor.store.close] if executor is not None else [])):
        with suppress(BaseException):
            close_it()


def compute_dtype(model: nn.Module) -> torch.dtype:
    """What the blocks of `model` compute in."""
    return runtime_of(model).model.dtype


def computes_on_host(model: nn.Module) -> bool:
    """Whether blocks compute in the host's memory."""
    return runtime_of(model).model.device.is_host


def device_of(model: nn.Module) -> Device:
    """Where blocks compute."""
    return runtime_of(model).model.device


def source_of(model: nn.Module) -> Any:
    """Where weights come from that were never updated; None where none do any more."""
    backing = runtime_of(model).backing
    return backing.source if backing.executor is None else backing.store.weight_reader.source


def set_pins(model: nn.Module, pins: Pins) -> None:
    """Let what is decided from now on be decided by `pins`."""
    runtime = runtime_of(model)
    runtime.budget.settings = replace(runtime.budget.settings, pins=pins)


def num_commits_kept(model: nn.Module) -> int:
    """How many commits the store of `model` keeps."""
    return runtime_of(model).budget.settings.commits


def model_of(point: Any) -> nn.Module:
    """The model that a layer, an embedding or a head under Outsize belongs to."""
    module: nn.Module = point.visits.model.module
    return module


def points_of(model: nn.Module) -> Iterable[Any]:
    """What computes the layers, the embeddings and the head of `model`."""
    return runtime_of(model).points.values()


def steps_of_closing(model: nn.Module) -> list[tuple[Any, str]]:
    """`(owner, method)` of what closing a model does to its blocks, one after the other."""
    store = _executor(model).store
    return [
        (store.path, "close"),
        (store.weight_reader.thread, "shutdown"),
        (store.updates.worker, "close"),
    ]


def _close(runtime: Runtime) -> None:
    if runtime.backing.executor is not None:
        arena = runtime.backing.store.planes.arena
        runtime.setup.close()
        arena.check_books()
    elif runtime.backing.commit_store is not None:
        runtime.setup.close()


# -- plans -------------------------------------------------------------------------------------------------------


def plan_ahead(model: nn.Module) -> Plan:
    """The plan of the call under way, or of the last one."""
    return _executor(model).plan


def read_ahead(model: nn.Module) -> None:
    """Start reading what a call like the last one needs first."""
    runtime_of(model).calls.read_ahead()


def plan_executed(model: nn.Module) -> list[Op]:
    """The operations of the last call, and since, as they were carried out."""
    return _executor(model).executed


def visits_off_plan(model: nn.Module) -> Mapping[str, int]:
    """How often each visit came that no plan foresaw."""
    return _executor(model).off_plan


def watch_plans(monkeypatch: Any) -> list[Any]:
    """What each plan that is made from now on takes at most, as its check found; a list that grows."""
    peaks: list[Any] = []

    def watched(*args: Any) -> Any:
        peaks.append(check(*args))
        return peaks[-1]

    monkeypatch.setattr(executor_module, "check", watched)
    return peaks


def watch_visits(monkeypatch: Any, model: nn.Module, note: Callable[[Visit], object]) -> None:
    """Call `note` with each visit when it comes, planned or not."""
    executor = _executor(model)
    reach = executor._reach
    monkeypatch.setattr(executor, "_reach", lambda visit: (note(visit), reach(visit)))


def watch_slots_of_visits(monkeypatch: Any, note: Callable[[torch.Tensor], object]) -> None:
    """Call `note` at the end of each visit with the weights, and after a backward the gradients, that are in slots."""
    proceed = Executor._proceed

    def watched(executor: Executor) -> None:
        if executor.executed and isinstance(executor.executed[-1], Forward | Backward):
            op = executor.executed[-1]
            state = executor.store[op.block]
            if state.planes.weight_slot is not None:
                note(state.planes.weights())
            if state.planes.gradient_slot is not None and isinstance(op, Backward):
                slot, num_elements = state.planes.gradient_slot, state.record.num_trainable
                note(slot.tensor(torch.float32, num_elements))
        proceed(executor)

    monkeypatch.setattr(Executor, "_proceed", watched)


def add_traffic(model: nn.Module, add: Pass, kind: type[Op], run: Callable[[Any], None]) -> None:
    """Let plans from now on have operations of `kind`, which `add` adds to them and `run` carries out on a block."""
    executor = _executor(model)
    executor.passes = (*executor.passes, add)
    executor.store.runners[kind, None] = run


def bytes_of_weights(model: nn.Module, block: str) -> bytes:
    """The bytes of the weights of `block`, as they are now."""
    with _executor(model).touch(block) as state:
        return bytes(state.planes.weights().view(torch.uint8).numpy())


def visit_block(model: nn.Module, block: str) -> AbstractContextManager[Any]:
    """A visit forward to `block`, which is off plan."""
    return _executor(model).visit([Visit(block, Direction.FORWARD)])


def blocks_expected(model: nn.Module) -> list[str]:
    """The blocks whose visits are still to come, in their order."""
    return [visit.block for visit in _executor(model)._expected]


def interrupt_op(
    monkeypatch: Any, model: nn.Module, text: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> None:
    """Let `wrap(run)` run the operation whose text is `text` from now on."""
    op = Op.parse(text)
    runners, key = _executor(model).store.runners, (type(op), op.plane)
    real = runners[key]
    wrapped = wrap(real)
    monkeypatch.setitem(runners, key, lambda state: (wrapped if state.name == op.block else real)(state))


def call_plan_step(monkeypatch: Any, around: Callable[[Op], AbstractContextManager[Any]]) -> None:
    """Run each operation of a plan but visits inside `around(op)`."""
    run_next = Executor._run_next

    def watched(executor: Executor) -> None:
        with around(executor.plan.ops[executor._index]):
            run_next(executor)

    monkeypatch.setattr(Executor, "_run_next", watched)


# -- where planes live -------------------------------------------------------------------------------------------


def placement_of(model: nn.Module) -> Placement | None:
    """Where every plane lives, as it was decided; None before the first call."""
    return runtime_of(model).budget.placement


def records_of(model: nn.Module) -> Mapping[str, Record]:
    """The records by the names of their blocks."""
    return _executor(model).store.records


def homes(model: nn.Module) -> dict[tuple[str, str], str]:
    """The home of the weights, the gradient and the state of each block: device, host, disk or file.

    The device is what computes, and so the host where there is none.
    """
    placement = placement_of(model)
    assert placement is not None
    computes_in = "host" if computes_on_host(model) else "device"
    found = {}
    for record in records_of(model).values():
        for group in GROUPS:
            if record.group_bytes[group]:
                home = placement.home(record.name, group)
                found[record.name, str(group)] = computes_in if home is Home.DEVICE else str(home)
    return found


def placement_lines(model: nn.Module) -> list[str]:
    """The placement as lines of text: homes, slots, buffers, activations that wait for their backward."""
    placement = placement_of(model)
    assert placement is not None
    lines = [f"home {block}.{group} {home}" for (block, group), home in homes(model).items()]
    for name, classes in placement.slots.items():
        for each in classes:
            lines.append(f"slots {name} {each.count} x {each.slot_bytes}: {' '.join(sorted(each.blocks))}")
    lines += [f"entry {block}[{index}] host" for block, index in sorted(placement.pieces)]
    lines.append(f"buffers chunk {placement.chunks.count} x {placement.chunks.each_bytes}")
    lines.append(f"buffers bounce {placement.bounce.count} x {placement.bounce.each_bytes}")
    lines.append(f"buffers staging {placement.staging.count} x {placement.staging.each_bytes}")
    lines.append(f"no-recompute {' '.join(sorted(placement.kept))}")
    lines.append(f"inputs {placement.inputs} {placement.inputs_bytes}")
    lines.append(f"disk {placement.disk_bytes}")
    return lines


def current_call(model: nn.Module) -> Any:
    """The call under way, or the last one: `workload`, `shape`, `tile_rows`, `visit_bytes`."""
    return runtime_of(model).visits.call.running


def last_training_call(model: nn.Module) -> Any:
    """The last call that had a backward; None before one was made."""
    return runtime_of(model).visits.call.last_training


def call_state(model: nn.Module) -> Any:
    """What points ask about the running call; `tiles(module, tensors)` says how a batch is cut for a layer."""
    return runtime_of(model).visits.call


def settle_for(model: nn.Module, arguments: dict[str, Any]) -> None:
    """Allocate memory for calls with these arguments, without computing."""
    runtime_of(model).calls.settle_for(arguments)


def dry_run(model: nn.Module, arguments: dict[str, Any]) -> Any:
    """What a call with these arguments would visit and take: it is computed on a part of the batch."""
    workload, _ = runtime_of(model).calls.dry_run(arguments, with_labels=True)
    return workload


def count_dry_runs(monkeypatch: Any) -> list[int]:
    """A list that grows with each dry run."""
    counts, run = [], DryRunner.workload
    monkeypatch.setattr(DryRunner, "workload", lambda *args: (counts.append(1), run(*args))[1])
    return counts


def count_dry_passes(monkeypatch: Any) -> list[int]:
    """A list that grows with each pass of a dry run: one for each number of rows that it tries."""
    counts, run = [], DryRunner._run

    def counted(*args: Any, **options: Any) -> Any:
        counts.append(1)
        return run(*args, **options)

    monkeypatch.setattr(DryRunner, "_run", counted)
    return counts


def dry_runs_alive() -> list[Any]:
    """What dry runs left behind."""
    return [each for each in gc.get_objects() if type(each) is DryRun]


def set_merging_of_rows(monkeypatch: Any, merges: Callable[[nn.Module], bool]) -> None:
    """Let models of which `merges(module)` is true count as ones whose attention makes one row of several."""
    monkeypatch.setattr(signature, "merges_rows", merges)


def dry_runs_of(model: nn.Module) -> list[Any]:
    """What dry runs found so far, one for each kind of call."""
    return list(runtime_of(model).calls._workloads.values())


def is_in_dry_run(model: nn.Module) -> bool:
    """Whether a dry run is under way."""
    return runtime_of(model).visits.call.dry_answer is not None


def foresee_costs(model: nn.Module, workload: Any, arguments: dict[str, Any], tile_rows: int) -> Any:
    """What computing is measured to cost in tiles of `tile_rows` rows."""
    shape = batch_shape(model, (), arguments)
    return runtime_of(model).setup.cost_model(cast(Any, None), Call(workload, shape), ()).costs(tile_rows)


def loss_tile(model: nn.Module) -> int | None:
    """Elements of a tile of logits."""
    return runtime_of(model).loss_tile_elements


def set_loss_tile(model: nn.Module, num_elements: int) -> None:
    """Compute the loss in tiles of `num_elements` logits."""
    runtime_of(model).loss_tile_elements = num_elements


def parameter_value(model: nn.Module, name: str) -> torch.Tensor:
    """The value of a parameter, read from wherever it is."""
    return runtime_of(model).model.parameters.value(name)


def row_blocks(model: nn.Module, parameter: str) -> Any:
    """`(block, first row, end)` of the blocks that hold rows of a parameter."""
    return runtime_of(model).model.parameters.row_blocks(parameter)


def parameter_locations(model: nn.Module, parameter: str) -> Any:
    """The entries of blocks that hold a parameter."""
    return runtime_of(model).model.parameters.locations(parameter)


def arguments_of(model: nn.Module) -> Any:
    """What moves arguments of calls to where blocks compute."""
    return runtime_of(model).model.arguments


def tile_rows_of(model: nn.Module) -> int | None:
    """Rows of a tile in the last call with a backward."""
    call = runtime_of(model).visits.call.last_training
    return call.tile_rows if call is not None else None


# -- memory and transfers ----------------------------------------------------------------------------------------


def slots_taken(model: nn.Module) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The most weight slots and the most gradient slots that were ever taken at once, by class."""
    return _executor(model).store.planes.slot_high_water


def arena_of(model: nn.Module) -> Any:
    """The memory that blocks compute in: `limit_bytes`, `in_use_bytes`, `high_water_bytes`, `check_books()`."""
    return _executor(model).store.planes.arena


def slots_of(model: nn.Module) -> list[Any]:
    """All slots of weights and gradients; `after` of each: the transfers that its next owner has to follow."""
    planes = _executor(model).store.planes
    return [slot for pools in planes._pools.values() for pool in pools for slot in pool._slots]


def store_of(model: nn.Module) -> Any:
    """What moves, updates and commits the blocks of `model`."""
    return _executor(model).store


def weights_in_slots(model: nn.Module) -> set[str]:
    """The blocks whose weights are in a slot."""
    return {state.name for state in _executor(model).store if state.planes.weight_slot is not None}


def gradients_in_slots(model: nn.Module) -> set[str]:
    """The blocks whose gradients are in a slot."""
    return {state.name for state in _executor(model).store if state.planes.gradient_slot is not None}


def gradients_on_their_way(model: nn.Module) -> set[str]:
    """The blocks whose gradients are being moved."""
    return {
        state.name
        for state in _executor(model).store
        if any(not transfer.is_done() for transfer in state.gradient.transfers)
    }


def updates_pending(model: nn.Module) -> set[str]:
    """The blocks whose update was frozen by `optimizer.step()` and not applied yet."""
    return {state.name for state in _executor(model).store if state.update.pending is not None}


def blocks_that_move(model: nn.Module) -> list[str]:
    """The blocks of which nothing stays where blocks compute."""
    return [state.name for state in _executor(model).store if not state.planes.num_bytes_in(Home.DEVICE)]


def disk_of(model: nn.Module) -> Any:
    """The tier that holds what is on the disk; None where nothing is."""
    return _executor(model).store.disk


def place_on_disk(model: nn.Module, block: str) -> tuple[Path, int]:
    """A file that can be opened, and the byte of it where the weights of `block` begin."""
    store = _executor(model).store
    return Path(f"/proc/self/fd/{disk_of(model)._file._lock_fd}"), store[block].planes.disk_offset


def file_of_inputs(model: nn.Module) -> Path:
    """A file that can be opened: what holds inputs of blocks that wait on the disk."""
    return Path(f"/proc/self/fd/{activation_offload(model)._disk._file._lock_fd}")


def activation_offload(model: nn.Module) -> Any:
    """What moves inputs of blocks away and back: `in_use_bytes`, `high_water_bytes`, `stats()`; None where nothing does."""
    return runtime_of(model).backing.offload


def snapshots_of(model: nn.Module) -> Any:
    """What takes blocks into commits; None without a store."""
    return _executor(model).store.snapshots


def commit_store_of(model: nn.Module) -> Any:
    """The tier of a model that commits, which never writes over what a commit holds."""
    return _executor(model).store.disk


def recorder_of(model: nn.Module) -> Any:
    """What records the run; None where nothing does."""
    return _executor(model).recorder


def budget_of(model: nn.Module) -> Any:
    """What divides a limit: `limits`, `ledger`, `placement`, `choices`."""
    return runtime_of(model).budget


def set_room(model: nn.Module, num_bytes: int) -> None:
    """Let planes and activations have had `num_bytes` of the host's memory when they were placed."""
    own = runtime_of(model).budget
    more = own.limits.room_bytes(Home.HOST) - num_bytes
    own.limits = replace(own.limits, reading_bytes=own.limits.reading_bytes + more)


def set_limit(model: nn.Module, num_bytes: int) -> None:
    """Let the limit of the process be `num_bytes`, and the room for planes and activations stay."""
    own, room = runtime_of(model).budget, runtime_of(model).budget.limits.room_bytes(Home.HOST)
    own.limits = replace(own.limits, host_bytes=num_bytes)
    set_room(model, room)


def planned_bytes(model: nn.Module) -> dict[str, int]:
    """What was planned: bytes of the host and of the device, activations, and what the process is expected to have."""
    own = runtime_of(model).budget
    return {
        "host": own.ledger.total(Home.HOST),
        "device": own.ledger.total(Home.DEVICE),
        "activations": activation_bytes(model),
        "inputs": own.ledger.total(Home.HOST, *WAITING),
        "expected": own.expected_bytes,
    }


def activation_bytes(model: nn.Module) -> int:
    """What activations take where blocks compute, as placed."""
    own = runtime_of(model).budget
    return own.ledger.total(own.limits.computes_in, *ACTIVATIONS)


def flush(model: nn.Module) -> None:
    """Wait until every transfer of blocks that was started is over."""
    _executor(model).store.flush()


def settle_updates(model: nn.Module) -> None:
    """Apply now what `optimizer.step()` left for the next visits."""
    _executor(model).settle_updates()


# -- putting something in the engine's place ---------------------------------------------------------------------


def set_process_memory(monkeypatch: Any, num_bytes: int, available_bytes: int | None = None) -> None:
    """Let memory be planned as if the process had `num_bytes`, and `available_bytes` were free beside."""
    monkeypatch.setattr(memory, "resident_bytes", lambda: num_bytes)
    if available_bytes is not None:
        monkeypatch.setattr(memory, "available_bytes", lambda: available_bytes)


def set_device_slack(monkeypatch: Any, num_bytes: int) -> None:
    """Leave `num_bytes` of a device for what is not planned."""
    monkeypatch.setattr(limits, "DEVICE_SLACK_BYTES", num_bytes)


def set_fewest_tile_tokens(monkeypatch: Any, num_tokens: int) -> None:
    """Before tiles have fewer tokens than this, inputs of blocks go to the disk."""
    monkeypatch.setattr(planner, "FEWEST_TILE_TOKENS", num_tokens)


def set_loss_tiles(monkeypatch: Any, num_elements: int) -> None:
    """Compute the loss of models that are opened from now on in tiles of `num_elements` logits."""
    monkeypatch.setattr(head, "TILE_ELEMENTS_ON_DEVICE", num_elements)
    monkeypatch.setattr(head, "TILE_ELEMENTS", num_elements)


def use_tiles_as_placed(monkeypatch: Any) -> None:
    """Let calls use the tiles that memory was placed for, whatever is left for them."""
    monkeypatch.setattr(budget.Budget, "begin_call", lambda own, call: own._way.tile_rows)


def tile_rows_placed(model: nn.Module) -> int:
    """Rows of the tiles that memory was placed for."""
    return budget_of(model)._way.tile_rows


def fill_host(monkeypatch: Any) -> None:
    """Let the host's memory have no room for blocks that leave a device."""
    monkeypatch.setattr(budget.Budget, "has_room_for", lambda own, num_bytes: False)


def around_placing(monkeypatch: Any, act: Callable[[Callable[[], Placement], dict[str, Any]], Any]) -> None:
    """Let `act(run, options)` stand for each placing; `options` hold the bytes that it may use."""
    place = planner.place

    def placing(records: Any, room: Any, **options: Any) -> Any:
        return act(partial(place, records, room, **options), {"room": room, **options})

    monkeypatch.setattr(planner, "place", placing)


def around_tiles_of_layers(monkeypatch: Any, act: Callable[[Callable[[], Any], Any, Any], Any]) -> None:
    """Let `act(run, layer, tile)` stand for computing a tile of a layer with its graph."""
    compute = LayerCall.run_with_graph

    def computing(call: Any, tensors: Any, tile: Any) -> Any:
        return act(partial(compute, call, tensors, tile), call.layer, tile)

    monkeypatch.setattr(LayerCall, "run_with_graph", computing)


def around_backwards_of_layers(monkeypatch: Any, act: Callable[[Callable[[], Any], Any], Any]) -> None:
    """Let `act(run, layer)` stand for going back through a layer."""
    backward = Layer.backward
    monkeypatch.setattr(
        Layer, "backward", lambda layer, *arguments: act(partial(backward, layer, *arguments), layer)
    )


def around_compiled_layers(monkeypatch: Any, act: Callable[[Callable[[], Any]], Any]) -> None:
    """Let `act(run)` stand for running a layer that may be compiled."""
    run = Compiler.run
    monkeypatch.setattr(Compiler, "run", lambda compiler, *arguments: act(partial(run, compiler, *arguments)))


def around_parts_of_visits(monkeypatch: Any, act: Callable[[Callable[..., Any], Any, bool], Any]) -> None:
    """Let `act(attempt, part, may_cut)` stand for computing a part of a visit, which may be repeated in smaller ones."""
    compute = OomRetry.compute

    def computing(oom_retry: Any, parts: Any, attempt: Any, **options: Any) -> Any:
        may_cut = options.get("may_cut", True)
        return compute(oom_retry, parts, lambda part: act(attempt, part, may_cut), **options)

    monkeypatch.setattr(OomRetry, "compute", computing)


def watch_inputs_leaving(monkeypatch: Any, note: Callable[[int], object]) -> None:
    """Call `note` at each visit with how many inputs of earlier ones are still on their way out of memory."""
    send = offload.ActivationOffload.send

    def watched(keeper: Any, block: str) -> None:
        send(keeper, block)
        note(sum(len(tensors) for _, tensors in keeper._leaving))

    monkeypatch.setattr(offload.ActivationOffload, "send", watched)


def stop_guessing(monkeypatch: Any) -> None:
    """Let engines that generate draft no tokens: whether that pays is measured, and differs from run to run."""
    monkeypatch.setattr(Guesser, "_pays", lambda guesser, *args, **options: False)


def settle_norms_of_paper(monkeypatch: Any) -> None:
    """Let gradients without values have a norm of 1."""

    def settle(gradients: Gradients) -> None:
        for gradient, start, norm in gradients._norms:
            assert norm.device.type == "meta"
            gradient.squares[start] = 1.0
        gradients._norms = []

    monkeypatch.setattr(Gradients, "settle_norms", settle)


def before_allocating(monkeypatch: Any, act: Callable[[], object]) -> None:
    """Call `act()` when a first call has been planned, before memory is allocated for it."""
    settle = Setup.settle

    def watched(setup: Setup, *args: Any) -> None:
        act()
        settle(setup, *args)

    monkeypatch.setattr(Setup, "settle", watched)


def set_cost_measuring(monkeypatch: Any, measure: Callable[..., Any]) -> None:
    """Let `measure` stand for what times blocks."""
    monkeypatch.setattr("outsize.engine.setup.measure_costs", measure)


def set_chunk(monkeypatch: Any, num_elements: int) -> None:
    """Change the size of a chunk of an update in every module that has it."""
    modules = [module for name, module in sys.modules.items() if name.startswith("outsize.")]
    having = [module for module in modules if "CHUNK" in vars(module)]
    assert len(having) >= 4
    for module in having:
        monkeypatch.setattr(module, "CHUNK", num_elements)


def move_small_inputs(monkeypatch: Any, least_bytes: int = 1, part_bytes: int | None = None) -> None:
    """Let inputs of blocks of `least_bytes` or more wait away from where blocks compute, and move in such parts."""
    monkeypatch.setattr(memory_estimate, "LEAST_INPUT_BYTES", least_bytes)
    if part_bytes is not None:
        monkeypatch.setattr(memory_estimate, "INPUT_PART_BYTES", part_bytes)


def set_activations(monkeypatch: Any, estimate: Callable[..., tuple[int, ...]]) -> None:
    """From now on activations take what `estimate(workload, shape, tile_rows, inputs, kept)` says.

    It gives bytes between visits, of the largest visit, and of inputs that wait elsewhere; without `inputs` they stay.
    """

    def own(
        workload: Any, shape: Any, tile_rows: int, computes_in: Home, inputs: Home, kept: Any = frozenset()
    ) -> Ledger:
        elsewhere = None if inputs is computes_in else inputs
        here, visit, *moved = estimate(workload, shape, tile_rows, elsewhere, kept)
        return memory_estimate.activations(computes_in, here, visit, elsewhere if moved else None, sum(moved))

    monkeypatch.setattr(memory_estimate, "estimate", own)


def compute_on(monkeypatch: Any, make_device: Callable[[], Any], host_bytes: int | None = None) -> None:
    """Let models that are opened compute on `make_device()`; `host_bytes`: all that planes may take of the host."""

    def place_within(records: Sequence[Record], room: Room, **options: Any) -> Placement:
        room = {**room, Home.HOST: host_bytes} if host_bytes and Home.HOST in room else room
        return place(records, room, **options)

    monkeypatch.setattr(api, "open_device", lambda settings: make_device())
    monkeypatch.setattr(planner, "place", place_within)


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
    executor = runtime_of(model).backing.executor
    assert executor is not None, "the model was not called yet"
    return executor
