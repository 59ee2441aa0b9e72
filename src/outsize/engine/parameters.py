"""Placeholders in the place of a module's parameters, whose values live in blocks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import torch
from torch import nn

from outsize.engine.backing import Backing
from outsize.engine.locations import Locations
from outsize.engine.placeholder import OffloadedParameter
from outsize.engine.values import Values
from outsize.errors import UsageError


def take_parameters(
    module: nn.Module, values: Values, dtype_of: Callable[[str], torch.dtype], device: torch.device
) -> Mapping[str, OffloadedParameter]:
    """Put placeholders in the place of the parameters of `module`; the placeholders by name."""
    placeholders: dict[str, OffloadedParameter] = {}
    for name, parameter in module.named_parameters():
        placeholders[name] = OffloadedParameter.of(
            parameter,
            name,
            dtype_of(name),
            device,
            fetch=partial(values.value, name),
            get_gradient=partial(_gradient, values, placeholders, name),
            drop_gradient=partial(values.drop_gradient, name),
        )
    by_identity = {id(parameter): placeholders[name] for name, parameter in module.named_parameters()}
    for owner in module.modules():
        for attribute, owned in owner._parameters.items():
            if owned is not None:
                owner._parameters[attribute] = by_identity[id(owned)]  # type: ignore[assignment]
    return placeholders


def _gradient(
    values: Values, placeholders: Mapping[str, OffloadedParameter], name: str
) -> torch.Tensor | None:
    return values.gradient(name, placeholders[name])


def check_trainable(
    parameters: Mapping[str, OffloadedParameter], locations: Locations, backing: Backing
) -> None:
    """Refuse to run with parameters that train without a place for their gradients. Raises UsageError."""
    if backing.executor is None:
        return
    for name, parameter in parameters.items():
        at = locations[name][0]
        if parameter.requires_grad and not backing.store[at.block].record.entries[at.index].trainable:
            raise UsageError(
                f"{name} (in block {at.block}) requires grad now, but had no gradient when memory was laid out",
                hint="set requires_grad before the first call of the model",
            )
