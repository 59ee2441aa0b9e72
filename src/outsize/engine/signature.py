"""The arguments of the root module: by name, with or without a cache, and what decides the kind of a call."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import nn
from transformers import PreTrainedModel

from outsize.engine.arguments import Args, Kwargs
from outsize.engine.effects import flatten, is_cache, without_empty_caches
from outsize.engine.hooks import has_user_hooks, inside
from outsize.engine.model import Model
from outsize.errors import UsageError
from outsize.model import PointKind, merges_rows


@final
class Signature:
    """The signature of a model's forward."""

    def __init__(self, model: Model) -> None:
        module = model.module
        layers = (point.module for point in model.cut.points if point.kind is PointKind.LAYER)
        self._parameters = model.parameters
        self._modules = tuple(module.modules())
        self._inner = tuple(child for name in layers for child in inside(module.get_submodule(name)))
        self._positional = _positional(module)
        self._has_cache_switch = _has_cache_switch(module)
        self._merges_rows = merges_rows(module)

    def value(self, name: str, args: Args, kwargs: Mapping[str, Any]) -> Any:
        """The argument `name`, by keyword or by position; None if it is not given."""
        return dict(zip(self._positional, args, strict=False)).get(name, kwargs.get(name))

    def is_row_by_row(self, args: Args, kwargs: Kwargs) -> bool:
        """Whether a visit of several rows at once would be wrong: packed documents, for kernels that merge rows."""
        positions = self.value("position_ids", args, kwargs)
        is_packed = (
            isinstance(positions, torch.Tensor)
            and positions.dim() == 2
            and bool((positions.diff() != 1).any())
        )
        return self._merges_rows and is_packed

    def switched(self, args: Args, kwargs: Kwargs, *, has_labels: bool) -> tuple[Args, Kwargs, bool]:
        """The arguments, which fill a cache only if the call may have one, and whether they do. Raises UsageError."""
        has_own = has_cache(args, kwargs)
        if torch.is_grad_enabled() and has_own:
            raise UsageError(
                "past_key_values with gradients on: recomputation would append to the cache a second time",
                hint="call the model under torch.no_grad(), or without a cache",
            )
        if torch.is_grad_enabled() or (has_labels and not has_own):
            args, kwargs = self.without_cache(args, kwargs)
        is_off = not self._has_cache_switch or self.value("use_cache", args, kwargs) is False
        return args, kwargs, has_own or not is_off

    def without_cache(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The arguments of a call that fills no cache of its own."""
        return (
            self._with_argument("use_cache", False, args, kwargs)
            if self._has_cache_switch
            else (args, kwargs)
        )

    def without_new_cache(self, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The same, and without caches that hold no tokens yet; one that holds some stays."""
        args, kwargs = without_empty_caches((args, kwargs))
        return (args, kwargs) if has_cache(args, kwargs) else self.without_cache(args, kwargs)

    def of(self, args: Args, kwargs: Kwargs) -> tuple[Any, ...]:
        """The kind of a call: all that decides the order of visits and the batch dimensions, but no sizes.

        Of tensors, two are looked into, because models branch on their values: a mask that masks nothing is left out, and
        positions that begin again within a row stand for packed documents, which need a mask.
        """
        extra = {str(place): value for place, value in enumerate(args[len(self._positional) :])}
        named = {**dict(zip(self._positional, args, strict=False)), **extra, **kwargs}
        leaves = sorted(
            (name, [self._describe(leaf, name) for leaf in flatten(value)[0]])
            for name, value in named.items()
            if value is not None
        )
        trains = tuple(parameter.requires_grad for parameter in self._parameters.values())
        training = tuple(child.training for child in self._modules)
        hooked = has_user_hooks(self._inner)
        return torch.is_grad_enabled(), hash(training), hash(trains), hooked, repr(leaves)

    def _describe(self, value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            masks = False
            if value.dim() == 2 and not value.is_floating_point():
                if name == "position_ids":
                    masks = bool((value.diff() != 1).any())
                elif name.endswith("mask"):
                    masks = bool((value == 0).any())
            return value.dim(), value.dtype, masks
        is_flag = isinstance(value, bool | str) or (isinstance(value, int) and name in self._positional)
        return value if is_flag else type(value).__name__

    def _with_argument(self, name: str, value: Any, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The same arguments with another `value` for `name`."""
        if name in self._positional[: len(args)]:
            place = self._positional.index(name)
            return (*args[:place], value, *args[place + 1 :]), kwargs
        return args, {**kwargs, name: value}


def has_cache(args: Args, kwargs: Mapping[str, Any]) -> bool:
    """Whether a cache of transformers is among the arguments."""
    return any(map(is_cache, flatten((args, kwargs))[0]))


def encoder_of(module: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder of transformers, which `generate` calls by itself."""
    if not isinstance(module, PreTrainedModel) or not module.config.is_encoder_decoder:
        return None
    encoder: nn.Module = module.get_encoder()
    return None if encoder is module else encoder


def _positional(module: nn.Module) -> list[str]:
    """The parameters of the module's forward that can be given by position, in order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind in kinds]


def _has_cache_switch(module: nn.Module) -> bool:
    """Whether `use_cache=False` reaches the part of the model that would make a cache."""
    names = inspect.signature(module.forward).parameters
    if "use_cache" in names:
        return True
    passes_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in names.values())
    inner = (child for child in module.modules() if isinstance(child, PreTrainedModel))
    return passes_on and any("use_cache" in inspect.signature(child.forward).parameters for child in inner)
