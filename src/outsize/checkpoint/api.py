"""Commits in a loop of one's own.

    model = outsize.load(folder, disk="/nvme/scratch")
    optimizer = outsize.AdamW(model, lr=1e-5)
    start = outsize.checkpoint.resume(model, optimizer, "/nvme/run")     # None at the first start
    for step in range(start.step if start else 0, 1000):
        model(**batch(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        outsize.checkpoint.commit(model, optimizer, "/nvme/run")
    outsize.checkpoint.finish(model)

The state of the model lives in the store from the first step on, so that a commit copies nothing that is on disk.
"""

from __future__ import annotations

import base64
import os
import platform
import random
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from outsize.checkpoint.base import Base
from outsize.checkpoint.files import MODEL, to_jsonable
from outsize.checkpoint.manifest import Manifest
from outsize.checkpoint.module_state import ModuleState
from outsize.checkpoint.reading import CommitReader, CommitSource
from outsize.checkpoint.store import Committed, Store
from outsize.engine.executor import Executor
from outsize.engine.optimizer import Optimizer
from outsize.engine.runtime import Runtime, runtime_of
from outsize.errors import FileChangedError, UsageError
from outsize.hardware.identity import package_version
from outsize.model import SafetensorsSource, attention_of, write_companions
from outsize.model.names import persistent_buffers


@dataclass(frozen=True, slots=True)
class Resumed:
    """Where a run goes on: after `step` updates, with what it gave as `extra`.

    `notes` say what is computed in another way than before, so that the numbers may differ in their last bits.
    """

    step: int
    extra: Mapping[str, Any]
    path: Path
    notes: tuple[str, ...] = ()


def resume(
    model: nn.Module, optimizer: torch.optim.Optimizer, path: str | Path, *, keep: int = 1
) -> Resumed | None:
    """Let `model` live in the store at `path`, and go on from its newest commit; None where it has none yet.

    To be called once, before the first call of the model. Weights, buffers, moments, step counts, learning rates and the
    states of the random number generators of torch, numpy and Python become those of the commit: the run goes on bit by
    bit as if it had never ended, wherever planes live now. What must be the same for that (rows of a tile) is kept unless
    a pin says otherwise; what is not (threads, libraries) is named in `notes`, and warned of. `keep` commits are kept;
    the store takes `1 + keep` times the state.

    Raises StorageError where another process has the store, CorruptionError where it is damaged, FileChangedError where
    the commit takes weights from the model's own files and these hold others now, UsageError where the model was called
    before, or the commit is another optimizer's.
    """
    runtime, own = runtime_of(model), _own(optimizer)
    store = _attach(runtime, Path(path), keep)
    try:
        manifest = store.resume()
        if manifest is None:
            return None
        _check_base(runtime, manifest)
        own.restore_state(manifest.optimizer)
        if manifest.random is not None:
            _restore_random(manifest.random)
        notes = _notes(runtime, manifest)
        reader = store.reader()
        notes += _restore_module(runtime, reader)
        runtime.backing.committed = CommitSource(reader, runtime.backing.own_source)
    except BaseException:
        runtime.setup.live_in(None)
        store.close()
        raise
    for note in notes:
        warnings.warn(note, RuntimeWarning, stacklevel=2)
    return Resumed(manifest.step, manifest.extra, store.folder, tuple(notes))


def commit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    path: str | Path,
    *,
    keep: int = 1,
    extra: Mapping[str, Any] | None = None,
) -> None:
    """Declare a commit of all that `optimizer.step()` led to, and go on at once.

    It becomes durable during the next step, when the last block has applied its update, or with `finish`; a kill before
    that resumes from the commit before. `extra` is what the loop wants back: anything that JSON can hold. Gradients are
    no part of a commit; a second one after the same `step()` changes nothing.

    Raises what went wrong with an earlier commit, FileChangedError where weights that were never updated are not in the
    model's own files any more, UsageError where the model was called before it had a store.
    """
    runtime, own = runtime_of(model), _own(optimizer)
    store = runtime.backing.commit_store
    if store is None:
        store = _attach(runtime, Path(path), keep)
        if store.resume() is not None:
            runtime.setup.live_in(None)
            store.close()
            raise UsageError(
                f"{path} holds commits of an earlier run", hint="call outsize.checkpoint.resume first"
            )
    assert isinstance(store, Store)
    if os.path.realpath(path) != os.path.realpath(store.folder):
        raise UsageError(f"the model lives in {store.folder}", hint=f'commit to "{store.folder}"')
    if runtime.backing.executor is None:
        return  # nothing was done yet
    runtime.backing.executor.enter()
    draft = Manifest(
        step=own.num_updates,
        written=datetime.now(UTC).isoformat(timespec="seconds"),
        compute_type=runtime.budget.settings.compute_type,
        rule=runtime.setup.rule.name if runtime.setup.rule is not None else "",
        optimizer=to_jsonable(own.commit_state(), "the optimizer's settings"),
        random=_random_state(),
        extra=to_jsonable(dict(extra or {}), "extra"),
        run=_run_facts(runtime),
        blocks=(),
        base=_base(runtime),
    )
    if not (store.folder / MODEL).exists():
        write_companions(model, store.folder / MODEL)
    executor = runtime.backing.executor
    assert executor.store.snapshots is not None
    if executor.store.snapshots.waiting:
        _settle(executor)
    store.commit(draft, ModuleState.of(runtime.model.module), executor.begin_commit)


def finish(model: nn.Module) -> Committed | None:
    """Apply what is pending and wait until the last commit is durable; it, or None where none was declared.

    Raises what went wrong with a commit.
    """
    runtime = runtime_of(model)
    if not isinstance(runtime.backing.commit_store, Store) or runtime.backing.executor is None:
        return None
    _settle(runtime.backing.executor)
    return runtime.backing.commit_store.wait()


def _settle(executor: Executor) -> None:
    try:
        executor.settle_updates()
    finally:
        if executor.store.snapshots is not None:
            executor.store.snapshots.settle()


def close(model: nn.Module) -> None:
    """Give everything back that the model holds: memory, the disk, the store. It cannot be called any more.

    A commit that has all its blocks becomes durable first; one that waits for the next step is given up (`finish`).
    """
    runtime_of(model).setup.close()


def _own(optimizer: torch.optim.Optimizer) -> Optimizer:
    # accelerate and Trainer wrap optimizers.
    inner = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, Optimizer):
        raise UsageError(
            f"{type(optimizer).__name__} is no optimizer of Outsize", hint="use outsize.AdamW(model)"
        )
    return inner


def _attach(runtime: Runtime, path: Path, keep: int) -> Store:
    if runtime.backing.commit_store is not None:
        raise UsageError("the model has a store already", hint="call resume once, before the first step")
    if runtime.backing.executor is not None:
        raise UsageError(
            "the model was called before it had a store, and lives in scratch space",
            hint="call outsize.checkpoint.resume(model, optimizer, path) before the first call of the model",
        )
    ModuleState.of(runtime.model.module)  # what cannot be committed is refused before anything is computed
    store = Store.claim(path, keep, [disk.folder for disk in runtime.budget.settings.budgets.disks])
    runtime.setup.live_in(store)
    return store


def _check_base(runtime: Runtime, manifest: Manifest) -> None:
    """Weights that were never updated still come from the model's own files, which must be those of the commit."""
    source = runtime.backing.source
    if manifest.is_whole or manifest.base is None:
        return
    if isinstance(source, SafetensorsSource):
        source.check()
        manifest.base.check(source.folder, source.digests())
    else:
        manifest.base.check(manifest.base.folder, {})


def _base(runtime: Runtime) -> Base | None:
    """The model's own files, as a commit names them. Raises FileChangedError where it needs them and they changed."""
    source = runtime.backing.source
    if not isinstance(source, SafetensorsSource):
        return None
    if all(
        (state.update.is_stored or state.update.pending is not None)
        and state.record.num_stored == state.record.num_elements
        for state in runtime.backing.store
    ):
        return Base(source.folder.resolve())
    try:
        return Base.of(source)
    except FileChangedError as error:
        raise FileChangedError(
            f"{error.message}; a commit takes weights from there that were never updated",
            hint="put the file back as it was; outsize.save(model, folder) writes all weights as they are now",
        ) from error


def _restore_module(runtime: Runtime, reader: CommitReader) -> list[str]:
    """Buffers and extra state become those of the commit; what to note where it has none."""
    state = reader.module_state()
    if state is None:
        if not persistent_buffers(runtime.model.module):
            return []
        return [
            "the commit has no buffers, as an earlier release made it: they begin as in the model's folder"
        ]
    state.check(runtime.model.module, f"the commit of step {reader.manifest.step}")
    state.restore(runtime.model.module)
    return []


def _updated_on_device(runtime: Runtime) -> list[str]:
    """Blocks that a device with memory of its own updates; the host's kernel rounds some operations differently."""
    if runtime.backing.executor is None:
        return []
    store = runtime.backing.executor.store
    return [state.name for state in store if store.planes.updates_in_place(state.planes)]


def _random_state() -> dict[str, Any]:
    state: dict[str, Any] = {"torch": _encode(torch.get_rng_state())}
    if torch.cuda.is_available():
        state["cuda"] = [_encode(each) for each in torch.cuda.get_rng_state_all()]
    kind, numbers, gauss = random.getstate()
    state["python"] = [kind, list(numbers), gauss]
    mersenne: dict[str, Any] = dict(np.random.get_state(legacy=False))
    mersenne["state"] = {"key": mersenne["state"]["key"].tolist(), "pos": mersenne["state"]["pos"]}
    state["numpy"] = mersenne
    return state


def _restore_random(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(_decode(state["torch"]))
    if torch.cuda.is_available() and len(state.get("cuda", ())) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all([_decode(each) for each in state["cuda"]])
    kind, numbers, gauss = state["python"]
    random.setstate((kind, tuple(numbers), gauss))
    mersenne = dict(state["numpy"])
    mersenne["state"] = {
        "key": np.array(mersenne["state"]["key"], np.uint32),
        "pos": mersenne["state"]["pos"],
    }
    np.random.set_state(mersenne)


def _encode(tensor: torch.Tensor) -> str:
    return base64.b64encode(tensor.numpy().tobytes()).decode()


def _decode(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)


def _run_facts(runtime: Runtime) -> dict[str, Any]:
    call = runtime.visits.call.last_training
    kernel = (
        runtime.setup.kernel(runtime.budget.settings.compute_type)
        if runtime.setup.kernel is not None
        else None
    )
    return {
        "tile_rows": call.tile_rows if call is not None else None,
        "loss_tile_elements": runtime.loss_tile_elements,
        "threads": torch.get_num_threads(),
        "compiled": runtime.visits.compiler.compiled,
        "attention": attention_of(runtime.model.module),
        "backend": str(kernel.backend) if kernel is not None else None,
        "device": str(runtime.model.torch_device),
        "updated_on_device": _updated_on_device(runtime),
        "libraries": {
            "outsize": package_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
    }


def _notes(runtime: Runtime, manifest: Manifest) -> list[str]:
    """Keep what the commit was computed with, and name what is different now."""
    notes = []
    before = manifest.run
    if before["tile_rows"] is not None and not runtime.setup.keep_tiles(int(before["tile_rows"])):
        notes.append(f"blocks computed {before['tile_rows']} rows at once, and are pinned to other tiles now")
    elements = before.get("loss_tile_elements")
    if elements is not None and before["device"] == str(runtime.model.torch_device):
        runtime.loss_tile_elements = int(elements)
    was_compiled = bool(before.get("compiled"))
    if runtime.budget.settings.compile is None:
        runtime.visits.compiler.is_on = was_compiled
    elif runtime.visits.compiler.is_on != was_compiled:
        notes.append(f"layers were {'' if was_compiled else 'not '}compiled before")
    now = {"threads": torch.get_num_threads(), "device": str(runtime.model.torch_device)}
    now["attention"] = attention_of(runtime.model.module)
    for name, value in now.items():
        if before.get(name, value) != value:
            notes.append(f"{name}: {before[name]} before, {value} now")
    if manifest.compute_type != runtime.budget.settings.compute_type:
        notes.append(
            f"compute type: {manifest.compute_type} before, {runtime.budget.settings.compute_type} now"
        )
    if before["libraries"].get("torch", torch.__version__) != torch.__version__:
        notes.append(f"torch: {before['libraries']['torch']} before, {torch.__version__} now")
    return [f"{note}: the numbers may differ in their last bits" for note in notes]
