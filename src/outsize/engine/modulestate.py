"""What a module changes in its own forward: buffers (running statistics, balancing biases, codebooks) and attributes.

Such state moves once per call in plain PyTorch. Here a forward runs in the dry run and again in the backward as well, so
state is noted before those and restored: the dry run leaves nothing behind, and a recomputation starts from the state
that its forward started from. This does not hold for state outside of the module: globals, and objects that hide what
they hold.
"""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from outsize.engine.effects import is_stateful

_OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes that every module has."""

_MOST_ENTRIES = 10_000
"""Entries of a container that is looked into: a vocabulary is larger, and nothing that a forward changes."""

_DEPTH = 4
"""Objects inside objects that are looked into."""


_HOOKS = frozenset(name for name in _OF_TORCH if "hooks" in name)
"""Of these, those that hold hooks: transformers registers its own in a first call, and notes that it did."""


class ModuleState:
    """The buffers and attributes of `module` and its children when this was made, `with_hooks` their hooks too."""

    def __init__(self, module: nn.Module, *, with_hooks: bool = False) -> None:
        self._held: list[_Held] = []
        self._seen: set[int] = set()
        for path, child in module.named_modules():
            prefix = f"{path}." if path else ""
            self._hold_names(prefix, child._buffers, frozenset())
            attributes = self._hold_names(prefix, vars(child), _OF_TORCH)
            attributes.are_computed = bool(child._forward_pre_hooks)  # a weight norm's
            for name in _HOOKS if with_hooks else ():
                if isinstance(hooks := vars(child)[name], dict):
                    self._held.append(_Names(f"{prefix}{name}.", hooks, frozenset()))

    def changes(self) -> list[str]:
        """Names of what was changed since."""
        return [held.name for held in self._held if held.is_changed()]

    def has_moved(self) -> bool:
        """Whether a tensor holds other values than before, of the same shape: not one that was made, or made longer."""
        return any(held.has_moved() for held in self._held)

    def graph_tensors(self) -> list[str]:
        """Names of attributes that hold another tensor than before, with a graph; not what a pre-hook puts there."""
        return [
            f"{held.name}{name}"
            for held in self._held
            if isinstance(held, _Names) and not held.are_computed
            for name, value in held.now().items()
            if isinstance(value, torch.Tensor)
            and value.grad_fn is not None
            and value is not held.before.get(name)
        ]

    def restore(self) -> None:
        """Put everything back. Versions of tensors, which autograd looks at, stay as they are."""
        for held in self._held:
            held.restore()

    @contextmanager
    def apart(self, module: nn.Module) -> Iterator[None]:
        """Inside, `module` may be in this state; afterwards it is again in that of now."""
        now = ModuleState(module)
        try:
            yield
        finally:
            now.restore()

    def _hold_names(
        self, prefix: str, owner: dict[str, Any], excluded: frozenset[str], depth: int = 0
    ) -> _Names:
        names = _Names(prefix, owner, excluded)
        self._held.append(names)
        for name, value in names.before.items():
            self._hold(f"{prefix}{name}", value, depth)
        return names

    def _hold(self, name: str, value: Any, depth: int) -> None:
        if id(value) in self._seen or depth > _DEPTH:
            return
        if isinstance(value, torch.Tensor):
            if type(value) is torch.Tensor and not value.is_meta:
                self._seen.add(id(value))
                self._held.append(_Bytes(name, value))
            return
        if not is_stateful(value) or isinstance(value, types.FunctionType | types.MethodType):
            return
        self._seen.add(id(value))
        if isinstance(value, torch.Generator):
            self._held.append(_Random(name, value))
        elif isinstance(value, dict):
            if len(value) <= _MOST_ENTRIES:
                self._hold_names(f"{name}.", value, frozenset(), depth + 1)
        elif isinstance(value, list | deque | set | bytearray):
            if len(value) <= _MOST_ENTRIES:
                self._held.append(_Entries(name, value))
                for index, each in enumerate(value):
                    self._hold(f"{name}[{index}]", each, depth + 1)
        elif isinstance(value, tuple):
            for index, each in enumerate(value):
                self._hold(f"{name}[{index}]", each, depth + 1)
        elif hasattr(value, "__dict__"):
            self._hold_names(f"{name}.", vars(value), frozenset(), depth + 1)


class _Names:
    """The entries of a dict, such as the attributes of an object."""

    def __init__(self, name: str, owner: dict[str, Any], excluded: frozenset[str]) -> None:
        self.name, self._owner, self._excluded = name, owner, excluded
        self.before = self.now()
        self.are_computed = False

    def now(self) -> dict[str, Any]:
        return {name: value for name, value in self._owner.items() if name not in self._excluded}

    def is_changed(self) -> bool:
        now = self.now()
        return now.keys() != self.before.keys() or not all(
            _is_same(value, now[name]) for name, value in self.before.items()
        )

    def has_moved(self) -> bool:
        now = self.now()
        return any(_has_moved(value, now.get(name)) for name, value in self.before.items())

    def restore(self) -> None:
        for name in self.now().keys() - self.before.keys():
            del self._owner[name]
        for name, value in self.before.items():
            if self._owner.get(name, self) is not value:
                self._owner[name] = value


class _Entries:
    """The entries of a list, a deque, a set or a bytearray."""

    def __init__(self, name: str, owner: Any) -> None:
        self.name, self._owner, self._before = name, owner, owner.copy()

    def is_changed(self) -> bool:
        return len(self._owner) != len(self._before) or not all(map(_is_same, self._before, self._owner))

    def has_moved(self) -> bool:
        return any(map(_has_moved, self._before, self._owner))

    def restore(self) -> None:
        if self.is_changed():
            self._owner.clear()
            (self._owner.update if isinstance(self._owner, set) else self._owner.extend)(self._before)


class _Bytes:
    """What a tensor holds."""

    def __init__(self, name: str, tensor: torch.Tensor) -> None:
        self.name, self._tensor, self._before = name, tensor, tensor.detach().clone()

    def is_changed(self) -> bool:
        return not _is_same(self._before, self._tensor)

    def has_moved(self) -> bool:
        return _has_moved(self._before, self._tensor)

    def restore(self) -> None:
        # `data` has a version of its own: a graph that saved the tensor before it was changed stays valid.
        if self._tensor.shape != self._before.shape:
            self._tensor.data = self._before.clone()
        else:
            self._tensor.data.copy_(self._before)


class _Random:
    """The state of a generator."""

    def __init__(self, name: str, generator: torch.Generator) -> None:
        self.name, self._generator, self._before = name, generator, generator.get_state()

    def is_changed(self) -> bool:
        return not torch.equal(self._before, self._generator.get_state())

    def has_moved(self) -> bool:
        return self.is_changed()

    def restore(self) -> None:
        self._generator.set_state(self._before)


_Held = _Names | _Entries | _Bytes | _Random


def _is_same(before: Any, now: Any) -> bool:
    if before is now:
        return True
    if isinstance(before, torch.Tensor) and isinstance(now, torch.Tensor):
        is_alike = before.shape == now.shape and before.dtype == now.dtype and before.device == now.device
        return is_alike and (before.is_meta or torch.equal(_bytes(before), _bytes(now)))
    return (
        type(before) is type(now)
        and isinstance(before, int | float | complex | str | bytes)
        and before == now
    )


def _has_moved(before: Any, now: Any) -> bool:
    are_tensors = isinstance(before, torch.Tensor) and isinstance(now, torch.Tensor)
    return are_tensors and before.shape == now.shape and not _is_same(before, now)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
