"""Which tensors a module has, and under which names: parameters with their aliases, and buffers that are
saved."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import nn


def parameter_aliases(module: nn.Module) -> dict[str, tuple[str, ...]]:
    """All names of every parameter, by its first name: tied parameters, and parameters of repeated
    modules."""
    first: dict[int, str] = {}
    aliases: dict[str, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        aliases.setdefault(first.setdefault(id(parameter), name), []).append(name)
    return {name: tuple(names) for name, names in aliases.items()}


def parameter_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """The shape of every parameter, by its first name."""
    return {name: tuple(parameter.shape) for name, parameter in module.named_parameters()}


def full_precision_names(module: nn.Module) -> frozenset[str]:
    """First names of the parameters, and all names of the buffers, that stay in fp32 whatever the rest computes in.

    Those that a model of transformers declares (`_keep_in_fp32_modules_strict`, such as the biases of routers), and, in a
    module with parameters in bf16, the parameters in fp32 beside them.
    """
    declared = getattr(module, "_keep_in_fp32_modules_strict", None) or ()
    patterns = [re.compile(each.replace("*", ".*")) for each in declared]

    def is_declared(names: Iterable[str]) -> bool:
        return any(pattern.search(name) for pattern in patterns for name in names)

    aliases = parameter_aliases(module)
    parameters = dict(module.named_parameters())
    is_mixed = any(parameter.dtype is torch.bfloat16 for parameter in parameters.values())
    found = {
        name
        for name, parameter in parameters.items()
        if is_declared(aliases[name]) or (is_mixed and parameter.dtype is torch.float32)
    }
    found |= {name for name, _ in module.named_buffers(remove_duplicate=False) if is_declared((name,))}
    return frozenset(found)


def main_dtype(module: nn.Module) -> torch.dtype:
    """What most of `module` computes in: bf16 where a parameter has it, else the type of the first parameter."""
    dtypes = [parameter.dtype for parameter in module.parameters()]
    return torch.bfloat16 if torch.bfloat16 in dtypes else dtypes[0]


def persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that a checkpoint holds, under every name."""
    found: dict[str, torch.Tensor] = {}
    for path, inner in module.named_modules(remove_duplicate=False):
        for name, buffer in inner._buffers.items():
            if buffer is not None and name not in inner._non_persistent_buffers_set:
                found[f"{path}.{name}" if path else name] = buffer
    return found
