"""Writing a model back as an ordinary Hugging Face folder, a block at a time.

The names and shapes in the file come from transformers' reverse conversion, first applied to meta tensors of
the whole model, then to each block's real tensors alone. The folder is written beside its place and renamed
last: it is there completely or not at all.

It does not hold for a conversion that needs more than a few blocks at once; such a model is refused by name.
"""

from __future__ import annotations

import copy
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers.core_model_loading import revert_weight_conversion

from outsize.block import Block
from outsize.errors import ModelError, UsageError
from outsize.model.folder import Existing, check_free, flush, written_folder
from outsize.model.names import (
    full_precision_names,
    main_dtype,
    parameter_aliases,
    parameter_shapes,
    persistent_buffers,
)
from outsize.model.writer import Planned, SafetensorsWriter, check_room, storage_errors

MAX_SHARD_BYTES = 5 * 10**9
"""Bytes of a file before the next one begins, by default."""

_MAX_JOINT_BLOCKS = 4
_COMPANIONS = (
    "*token*",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "*chat_template*",
    "*processor_config.json",
    "*.jinja",
)
_NOT_COMPANIONS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".index.json")

Fetch = Callable[[Block], list[torch.Tensor]]


def write_folder(
    module: nn.Module,
    blocks: Sequence[Block],
    fetch: Fetch,
    path: str | Path,
    *,
    tokenizer_from: str | Path | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    dtype: torch.dtype | None = None,
    existing: Existing = Existing.REFUSE,
) -> Path:
    """Write `module` with the values that `fetch` gives to the folder `path`, and return it.

    `fetch(block)` returns one CPU tensor per piece, valid until the next call. Parameters are written as `dtype`
    (default: the type of the first that does not stay in fp32), those that stay in fp32 as fp32.
    Tied weights are written once, under the name that
    `from_pretrained` expects; tokenizer files are copied from the folder `tokenizer_from`. A module that is
    no Hugging Face model gives `model.safetensors` only. Memory use is about two blocks.

    Raises UsageError where `path` is taken and `existing` refuses that, or a tensor would lose precision;
    ModelError where the conversion cannot be reversed; StorageError and StorageFullError where the disk
    fails.
    """
    path = Path(path).expanduser()
    check_free(path, existing)
    given = dtype
    full_precision = full_precision_names(module)
    if dtype is None:
        own = (block for block in blocks if block.pieces[0].parameter not in full_precision)
        dtype = fetch(next(own, blocks[0]))[0].dtype
    plan = _plan(module, blocks, dtype)
    with written_folder(path, existing) as temporary:
        check_room(path, sum(planned.num_bytes for planned in plan.files.values()))
        if tokenizer_from is not None:
            _copy_companions(module, Path(tokenizer_from).expanduser(), temporary)
        if isinstance(module, transformers.PreTrainedModel):
            _write_configs(module, temporary, dtype)
        writer = SafetensorsWriter(temporary, plan.files, max_shard_bytes)
        _write_weights(module, blocks, fetch, plan, writer, given)
    return path


def write_companions(module: nn.Module, folder: Path) -> None:
    """What an ordinary Hugging Face folder holds beside weights: config, generation settings, tokenizer.

    The tokenizer is that of the folder that `module` was opened from. `folder` is there completely or not at all.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with storage_errors(partial):
        partial.mkdir()
    if isinstance(module, transformers.PreTrainedModel):
        opened_from = Path(getattr(module.config, "name_or_path", "") or "/nonexistent")
        if opened_from.is_dir():
            _copy_companions(module, opened_from, partial)
        _write_configs(module, partial, main_dtype(module))
    with storage_errors(folder):
        flush(partial)
        os.rename(partial, folder)


@dataclass
class _Unit:
    """Parameters that are converted back together; `keys` are what they become in the file."""

    names: list[str]
    keys: list[str] = field(default_factory=list)
    with_context: bool = False


@dataclass
class _Plan:
    """What the files will hold. `saved_name` maps a parameter's first name to the one that is saved (or to
    None).

    `direct` maps names whose rows go straight to a key; all others belong to the unit in `unit_of`.
    """

    files: dict[str, Planned]
    saved_name: dict[str, str | None]
    direct: dict[str, str]
    unit_of: dict[str, _Unit]
    context: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]


def _plan(module: nn.Module, blocks: Sequence[Block], dtype: torch.dtype) -> _Plan:
    saved_name, ignored = _saved_names(module)
    shapes = parameter_shapes(module)
    full_precision = full_precision_names(module)
    buffers = {name: buffer for name, buffer in persistent_buffers(module).items() if name not in ignored}
    whole = {
        saved: torch.empty(
            shapes[first], dtype=torch.float32 if first in full_precision else dtype, device="meta"
        )
        for first, saved in saved_name.items()
        if saved is not None
    }
    whole |= {name: torch.empty_like(buffer, device="meta") for name, buffer in buffers.items()}
    reversed_whole = _reverse(module, whole)
    expected = {key: Planned(tuple(value.shape), value.dtype) for key, value in reversed_whole.items()}

    direct: dict[str, str] = {}
    units: list[_Unit] = [_Unit(sorted(buffers))] if buffers else []
    for block in blocks:
        names = []
        for piece in block.pieces:
            saved = saved_name[piece.parameter]
            if saved is None or saved in direct:
                continue
            if piece.is_whole:
                names.append(saved)
                continue
            key = next((key for key, value in reversed_whole.items() if value is whole[saved]), None)
            if key is not None:
                direct[saved] = key
            elif not any(saved in unit.names for unit in units):
                units.append(_Unit([saved]))
        if names:
            units.append(_Unit(names))
    units = _settle(module, units, whole, expected, set(direct.values()))
    unit_of = {name: unit for unit in units for name in unit.names}
    order = [direct[name] for name in direct] + [key for unit in units for key in unit.keys]
    return _Plan({key: expected[key] for key in order}, saved_name, direct, unit_of, whole, buffers)


def _settle(
    module: nn.Module,
    units: list[_Unit],
    whole: Mapping[str, torch.Tensor],
    expected: Mapping[str, Planned],
    done: set[str],
) -> list[_Unit]:
    """Find each unit's keys; units that become one key together are joined.

    Most units convert alone as they do within the whole model. A rename may depend on other names being
    there: such a unit is converted with the rest of the model as meta tensors around it.
    """
    owner: dict[str, _Unit] = {}
    for unit in units:
        alone = _reverse_or_none(module, {name: whole[name] for name in unit.names})
        fits = alone is not None and all(
            key in expected and expected[key].shape == tuple(value.shape) for key, value in alone.items()
        )
        if alone is not None and fits:
            unit.keys = list(alone)
        else:
            unit.with_context = True
            unit.keys = _marked_keys(module, unit.names, whole)
    joined: list[_Unit] = []
    for unit in units:
        others = list({id(owner[key]): owner[key] for key in unit.keys if key in owner}.values())
        for other in others:
            unit.names += other.names
            unit.keys = list(dict.fromkeys(unit.keys + other.keys))
            unit.with_context = True
            joined.remove(other)
        owner |= {key: unit for key in unit.keys}
        joined.append(unit)
    missing = set(expected) - done - {key for unit in joined for key in unit.keys}
    if missing:
        raise ModelError(
            f"{type(module).__name__}: {sorted(missing)[0]} cannot be written from single blocks",
            hint="this model's weight conversion needs the whole model in memory",
        )
    return joined


def _marked_keys(module: nn.Module, names: Iterable[str], whole: Mapping[str, torch.Tensor]) -> list[str]:
    """The keys that `names` end up in, found by giving them a type that no other tensor has."""
    marked = {
        name: torch.empty(value.shape, dtype=torch.float16, device="meta") for name, value in whole.items()
    }
    marked |= {name: torch.empty(whole[name].shape, dtype=torch.float64, device="meta") for name in names}
    return [key for key, value in _reverse(module, marked).items() if value.dtype == torch.float64]


def _reverse(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    if not isinstance(module, transformers.PreTrainedModel):
        return dict(tensors)
    try:
        return dict(revert_weight_conversion(module, dict(tensors)))
    except Exception as error:
        names = ", ".join(list(tensors)[:3])
        raise ModelError(f"{type(module).__name__}: cannot convert {names} back: {error}") from error


def _reverse_or_none(
    module: nn.Module, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor] | None:
    try:
        return _reverse(module, tensors)
    except ModelError:
        return None


def _saved_names(module: nn.Module) -> tuple[dict[str, str | None], set[str]]:
    """The name under which each parameter is saved: of tied names, the one that transformers does not
    derive."""
    ignored = set(getattr(module, "_keys_to_ignore_on_save", None) or ())
    patterns = [
        f"{path}.{key}" if path else key
        for path, inner in module.named_modules()
        for key in (getattr(inner, "_tied_weights_keys", None) or {})
    ]
    saved: dict[str, str | None] = {}
    for first, aliases in parameter_aliases(module).items():
        names = [name for name in aliases if name not in ignored]
        derived = [name for name in sorted(names) if any(re.search(pattern, name) for pattern in patterns)]
        if len(derived) == len(names):
            derived = derived[:-1]
        saved[first] = next((name for name in names if name not in derived), None)
    return saved, ignored


def _write_weights(
    module: nn.Module,
    blocks: Sequence[Block],
    fetch: Fetch,
    plan: _Plan,
    writer: SafetensorsWriter,
    given: torch.dtype | None,
) -> None:
    try:
        pending: dict[int, dict[str, torch.Tensor]] = {}
        left = _pieces_left(blocks, plan)
        spread = _blocks_per_unit(blocks, plan)
        if plan.buffers:
            unit = plan.unit_of[next(iter(plan.buffers))]
            pending[id(unit)] = dict(plan.buffers)
            if not left.get(id(unit)):
                _write_unit(module, unit, pending.pop(id(unit)), plan, writer)
        for block in blocks:
            for piece, value in zip(block.pieces, fetch(block), strict=True):
                name = plan.saved_name[piece.parameter]
                if name is None:
                    continue
                _check_type(name, value, plan, given)
                if name in plan.direct:
                    width = value[:1].numel()
                    writer.write(plan.direct[name], value, (piece.row_start or 0) * width)
                    continue
                unit = plan.unit_of[name]
                collected = pending.setdefault(id(unit), {})
                if not piece.is_whole:
                    if name not in collected:
                        collected[name] = torch.empty(
                            plan.context[name].shape, dtype=value.dtype, device="cpu"
                        )
                    collected[name][piece.row_start : piece.row_stop].copy_(value)
                else:
                    collected[name] = value.clone() if spread[id(unit)] > 1 else value
                left[id(unit)] -= 1
                if left[id(unit)] == 0:
                    _write_unit(module, unit, pending.pop(id(unit)), plan, writer)
        writer.finish()
    finally:
        writer.close()


def _write_unit(
    module: nn.Module, unit: _Unit, tensors: dict[str, torch.Tensor], plan: _Plan, writer: SafetensorsWriter
) -> None:
    around = plan.context if unit.with_context else {}
    for key, value in _reverse(module, {**around, **tensors}).items():
        if not value.is_meta:
            writer.write(key, value)


def _pieces_left(blocks: Sequence[Block], plan: _Plan) -> dict[int, int]:
    left: dict[int, int] = {}
    for block in blocks:
        for piece in block.pieces:
            name = plan.saved_name[piece.parameter]
            if name is not None and name not in plan.direct:
                left[id(plan.unit_of[name])] = left.get(id(plan.unit_of[name]), 0) + 1
    return left


def _blocks_per_unit(blocks: Sequence[Block], plan: _Plan) -> dict[int, int]:
    spread: dict[int, set[str]] = {}
    for block in blocks:
        for piece in block.pieces:
            name = plan.saved_name[piece.parameter]
            if name is None or name in plan.direct:
                continue
            unit = plan.unit_of[name]
            spread.setdefault(id(unit), set()).add(block.name if piece.is_whole else name)
            if len(spread[id(unit)]) > _MAX_JOINT_BLOCKS:
                raise ModelError(
                    f"{unit.keys[0]} is made of more than {_MAX_JOINT_BLOCKS} blocks: "
                    f"{', '.join(unit.names[:5])}",
                    hint="this model's weight conversion needs the whole model in memory",
                )
    return {unit: len(names) for unit, names in spread.items()}


def _check_type(name: str, value: torch.Tensor, plan: _Plan, given: torch.dtype | None) -> None:
    dtype = plan.context[name].dtype
    if given is None and torch.promote_types(dtype, value.dtype) != dtype:
        raise UsageError(
            f"{name} is {value.dtype}, but the first block is {dtype}: precision would be lost",
            hint="pass dtype=torch.float32, or the type you want",
        )


# The folder


def _write_configs(module: Any, folder: Path, dtype: torch.dtype) -> None:
    config = copy.deepcopy(module.config)
    config.architectures = [type(module).__name__]
    config.dtype = str(dtype).removeprefix("torch.")
    for name in config.sub_configs:
        if (inner := getattr(config, name, None)) is not None:
            inner.dtype = config.dtype
    with storage_errors(folder):
        config.save_pretrained(folder)
        if module.can_generate() and getattr(module, "generation_config", None) is not None:
            try:
                module.generation_config.save_pretrained(folder)
            except ValueError:
                # transformers refuses to save settings that it calls inconsistent; the user wants them kept.
                module.generation_config.to_json_file(folder / "generation_config.json")


def _copy_companions(module: nn.Module, source: Path, folder: Path) -> None:
    """Copy tokenizer and processor files, and the code of a model that brings its own."""
    patterns = list(_COMPANIONS)
    if isinstance(module, transformers.PreTrainedModel) and getattr(module.config, "auto_map", None):
        patterns.append("*.py")
    with storage_errors(folder):
        for pattern in patterns:
            for file in sorted(source.glob(pattern)):
                if file.is_dir() and "chat_template" in file.name:
                    shutil.copytree(file, folder / file.name, dirs_exist_ok=True)
                elif file.is_file() and not file.name.endswith(_NOT_COMPANIONS):
                    shutil.copyfile(file, folder / file.name)
