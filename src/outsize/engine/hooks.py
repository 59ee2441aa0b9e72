"""Hooks that users register on modules see calls of the model, each once: not the dry run, tiles or recomputations.

Hooks of libraries (weight norm, recorders of outputs) are a part of the computation and run whenever it does. So do, in a
recomputation, all hooks inside a layer where one of them changed something in the forward: what one computes may depend
on what another noted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils._pytree import tree_leaves

from outsize.engine.rng_autocast import versions

_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "outsize")

_FORWARD = ("_forward_pre_hooks", "_forward_hooks")
_BACKWARD = ("_backward_pre_hooks", "_backward_hooks")

Hooks = dict[int, Callable[..., Any]]


def has_user_hooks(modules: Iterable[nn.Module]) -> bool:
    """Whether users registered hooks on one of `modules`, or on all modules. Takes part in every visit: it is fast."""
    kinds = (*_FORWARD, *_BACKWARD)
    everywhere = any(_has_users(getattr(torch_module, f"_global{kind}")) for kind in kinds)
    return everywhere or any(
        _has_users(attributes[kind])
        for attributes in map(vars, modules)
        for kind in kinds
        if attributes[kind]
    )


def inside(module: nn.Module) -> tuple[nn.Module, ...]:
    """The modules inside `module`, without itself."""
    return tuple(child for child in module.modules() if child is not module)


class HookWatch:
    """Notes whether hooks inside a layer changed anything in its forward."""

    def __init__(self) -> None:
        self.has_changed = False

    @contextmanager
    def watching(self, module: nn.Module) -> Iterator[None]:
        """Inside, what hooks of users on modules inside `module` do is noted."""
        with _replaced(_users(inside(module), _FORWARD), lambda hook: partial(self._call, hook)):
            yield

    def _call(self, hook: Callable[..., Any], module: nn.Module, *args: Any) -> Any:
        before = _traces(module, args)
        result = hook(module, *args)
        self.has_changed |= result is not None or _traces(module, args) != before
        return result


@contextmanager
def without_user_hooks(module: nn.Module, *, with_own: bool = True) -> Iterator[None]:
    """Inside, no hook of a user is called, forward or backward: on modules inside `module` and, `with_own`, on itself."""
    modules = module.modules() if with_own else inside(module)
    kinds = (*_FORWARD, *_BACKWARD) if with_own else _FORWARD
    with _replaced(_users(modules, kinds), lambda hook: _nothing):
        yield


def _users(modules: Iterable[nn.Module], kinds: Iterable[str]) -> Iterator[tuple[Hooks, int]]:
    """The places of hooks that were not registered by libraries: on `modules`, and on all modules."""
    kinds = tuple(kinds)
    for kind in kinds:
        everywhere: Hooks = getattr(torch_module, f"_global{kind}")
        yield from ((everywhere, key) for key, hook in everywhere.items() if not _is_of_library(hook))
    for module in modules:
        for kind in kinds:
            hooks: Hooks = getattr(module, kind)
            yield from ((hooks, key) for key, hook in hooks.items() if not _is_of_library(hook))


def _has_users(hooks: Hooks) -> bool:
    return not all(map(_is_of_library, hooks.values()))


def _is_of_library(hook: Any) -> bool:
    while isinstance(hook, partial):
        hook = hook.func
    name = getattr(hook, "__module__", None) or type(hook).__module__
    return name.partition(".")[0] in _LIBRARIES


@contextmanager
def _replaced(
    places: Iterable[tuple[Hooks, int]], replacement: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    before = [(hooks, key, hooks[key]) for hooks, key in places]
    try:
        for hooks, key, hook in before:
            hooks[key] = replacement(hook)
        yield
    finally:
        for hooks, key, hook in before:
            if key in hooks:  # a hook may remove itself
                hooks[key] = hook


def _nothing(*args: Any, **kwargs: Any) -> None:
    return None


def _traces(module: nn.Module, args: Any) -> list[Any]:
    """What a hook can change that a computation depends on: tensors it is given, and what the module holds."""
    tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
    held = [*vars(module).items(), *module._buffers.items(), *module._parameters.items()]
    return [
        *versions(tensors),
        *((tensor.requires_grad, tensor.retains_grad, bool(tensor._backward_hooks)) for tensor in tensors),
        *((name, id(value)) for name, value in held),
    ]
