"""From the keys of a checkpoint to the parameters of a model, one group at a time.

transformers 5 renames, merges, splits and transposes tensors while it loads (`core_model_loading.py`):
Mixtral's experts are one parameter in the model and many tensors in the file. Here the same transforms are
applied to key names and shapes only; the result says for each parameter which keys it needs, so that any
block can be read alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
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
