"""From the keys of a checkpoint to the parameters of a model, one group at a time.

transformers 5 renames, merges, splits and transposes tensors while it loads (`core_model_loading.py`):
Mixtral's experts are one parameter in the model and many tensors in the file. Here the same transforms are
applied to key names and shapes only; the result says for each parameter which keys it needs, so that any
block can be read alone.

Most transforms only put tensors one after the other: the stack of experts, the fused projections of attention. Such a
parameter is a list of runs of stored tensors, and any part of it is read straight into place. What else there is
(permuted or transposed values) is converted as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import transformers
from torch import nn
from transformers import core_model_loading as loading
from transformers.conversion_mapping import get_model_conversion_mapping

from outsize.errors import WeightsError
from outsize.model.quantized import is_quantized


@dataclass(frozen=True)
class Group:
    """Checkpoint keys that are turned into parameters together.

    `keys` are `(pattern, key)` pairs in the order in which the converter wants them. Without a converter
    there is one key, and the parameter is that tensor.
    """

    target: str
    keys: tuple[tuple[str, str], ...]
    converter: Any = None

    @property
    def moves_only(self) -> bool:
        """Whether the converter only moves values, so that casting afterwards gives the same bits."""
        return self.converter is None or all(
            type(operation).__module__ == loading.__name__ for operation in self.converter.operations
        )

    def convert(self, module: nn.Module, fetch: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
        """The parameters of this group by name, from `fetch(key)` for each of its keys."""
        if self.converter is None:
            return {self.target: fetch(self.keys[0][1])}
        converter = deepcopy(self.converter)
        for pattern, key in self.keys:
            converter.add_tensor(self.target, key, pattern, fetch(key))
        converted = converter.convert(self.target, model=module, config=module.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in converted.items()}


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive elements of the stored tensor `key`, from the flat index `start` on."""

    key: str
    start: int
    num_elements: int


class Layouts:
    """Finds of which runs parameters are made; groups of one form (the same layer again) are looked at once."""

    def __init__(self, module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._module = module
        self._shapes = shapes
        self._known: dict[Any, list[list[tuple[int, int, int]] | None]] = {}

    def runs(self, group: Group, targets: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[Run, ...]]:
        """The runs of those of `targets`, the parameters of `group` with their shapes, that are made of a few."""
        keys = [key for _, key in group.keys]
        if group.converter is None:
            return {name: (Run(keys[0], 0, prod(shape)),) for name, shape in targets.items()}
        patterns = tuple((pattern, self._shapes[key]) for pattern, key in group.keys)
        form = id(group.converter), patterns, tuple(targets.values())
        if form not in self._known:
            self._known[form] = self._look(group, targets)
        return {
            name: tuple(Run(keys[index], start, count) for index, start, count in found)
            for name, found in zip(targets, self._known[form], strict=True)
            if found is not None
        }

    def _look(
        self, group: Group, targets: Mapping[str, tuple[int, ...]]
    ) -> list[list[tuple[int, int, int]] | None]:
        """Per target its runs as (index of the key, start, elements), found by converting the numbers of rows."""
        shapes = [self._shapes[key] for _, key in group.keys]
        widths = {shape[-1] if len(shape) > 1 else 1 for shape in shapes}
        if not group.moves_only or len(widths) > 1 or not all(prod(shape) for shape in shapes):
            return [None] * len(targets)
        width = widths.pop()
        numbers: dict[str, torch.Tensor] = {}
        firsts: list[int] = []
        total = 0
        for (_, key), shape in zip(group.keys, shapes, strict=True):
            count = prod(shape) // width
            numbers[key] = torch.arange(total, total + count, device="cpu").view(_narrow(shape))
            firsts.append(total)
            total += count
        try:
            converted = group.convert(self._module, numbers.__getitem__)
        except Exception:  # it looks at the values, or at the last dimension
            return [None] * len(targets)
        found: list[list[tuple[int, int, int]] | None] = []
        for name, shape in targets.items():
            value = converted[name]
            is_alike = tuple(value.shape) == _narrow(shape) and (len(shape) < 2 or shape[-1] == width)
            runs = _runs(value.reshape(-1), torch.tensor(firsts, device="cpu")) if is_alike else []
            found.append(
                [(index, width * row, width * count) for index, row, count in runs]
                if 0 < len(runs) <= len(firsts)
                else None
            )
        return found


def _narrow(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A shape with one number for each of the last dimension's rows."""
    return (*shape[:-1], 1) if len(shape) > 1 else shape


def _runs(numbers: torch.Tensor, firsts: torch.Tensor) -> list[tuple[int, int, int]]:
    """Runs of consecutive `numbers` as (index of the tensor, first row in it, rows), where `firsts` begin the tensors."""
    owners = torch.searchsorted(firsts, numbers, right=True) - 1
    begins = torch.ones(len(numbers), dtype=torch.bool, device="cpu")
    begins[1:] = (numbers.diff() != 1) | (owners.diff() != 0)
    at = begins.nonzero()[:, 0]
    counts = torch.diff(at, append=torch.tensor([len(numbers)], device="cpu"))
    rows = numbers[at] - firsts[owners[at]]
    return list(zip(owners[at].tolist(), rows.tolist(), counts.tolist(), strict=True))


def group_keys(
    module: nn.Module, names: Iterable[str], shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Group], dict[str, tuple[int, ...]], list[str]]:
    """Groups by parameter or buffer, the shapes they yield, and the keys that belong to none.

    `names` are the module's tensors, `shapes` those of the checkpoint by key. Sets
    `module._weight_conversions` to the transforms that were used, as `from_pretrained` does, so that saving
    reverses them. A folder with weights in few bits holds tensors under the model's own names. Raises WeightsError where a
    transform does not fit the shapes in the file.
    """
    if not isinstance(module, transformers.PreTrainedModel) or is_quantized(module):
        found = {name: Group(name, ((name, name),)) for name in names if name in shapes}
        return found, {name: shapes[name] for name in found}, [key for key in shapes if key not in found]
    transforms = get_model_conversion_mapping(module)
    collected, unexpected = _rename_keys(module, dict.fromkeys(names, True), list(shapes), transforms)
    module._weight_conversions = [transform for transform in transforms if transform.was_used()]
    groups: dict[str, Group] = {}
    results: dict[str, tuple[int, ...]] = {}
    for group in collected:
        try:
            converted = group.convert(
                module, lambda key: torch.empty(shapes[key], device="meta", dtype=torch.float32)
            )
        except Exception as error:
            keys = ", ".join(key for _, key in group.keys[:5])
            raise WeightsError(f"cannot convert {keys} to {group.target}: {error}") from error
        for target, value in converted.items():
            groups[target] = group
            results[target] = tuple(value.shape)
    return groups, results, unexpected


def _rename_keys(
    module: Any, known: dict[str, bool], keys: list[str], transforms: list[Any]
) -> tuple[list[Group], list[str]]:
    """The loop of transformers' `convert_and_load_state_dict_in_model`, without the tensors."""
    renamings = [entry for entry in transforms if isinstance(entry, loading.WeightRenaming)]
    converters = [entry for entry in transforms if isinstance(entry, loading.WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    prefix = module.base_model_prefix
    collected: dict[str, tuple[Any, list[tuple[str, str]]]] = {}
    unexpected: list[str] = []
    for key in sorted(keys, key=loading.dot_natural_key):
        renamed, pattern = loading.rename_source_key(key, renamings, converters, prefix, known)
        if renamed not in known and key in known:
            renamed, pattern = loading.rename_source_key(key, [], [], prefix, known)
        if renamed not in known:
            unexpected.append(key)
            continue
        converter = None if pattern is None else by_pattern[pattern]
        _, members = collected.setdefault(renamed, (converter, []))
        members.append((key if pattern is None else pattern, key))
    return [
        Group(target, tuple(members) if converter is not None else tuple(members[:1]), converter)
        for target, (converter, members) in collected.items()
    ], unexpected
