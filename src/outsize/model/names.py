"""Which tensors a module has, and under which names: parameters with their aliases, and buffers that are
saved."""

from __future__ import annotations

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


def persistent_buffers(module: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that a checkpoint holds, under every name."""
    found: dict[str, torch.Tensor] = {}
    for path, inner in module.named_modules(remove_duplicate=False):
        for name, buffer in inner._buffers.items():
            if buffer is not None and name not in inner._non_persistent_buffers_set:
                found[f"{path}.{name}" if path else name] = buffer
    return found
