"""What a module changes in its own forward: buffers (running statistics, balancing biases, codebooks) and attributes.

Such state moves once per call in plain PyTorch. Here a forward runs in the dry run and again in the backward as well, so
state is noted before those and restored: the dry run leaves nothing behind, and a recomputation starts from the state
that its forward started from. Random numbers of `random` and numpy count as such state, since a recomputation has to draw
what its forward drew; those of torch are treated apart (`rng_autocast`). This does not hold for other state outside of the
module: globals, and objects that hide what they hold.
"""

from __future__ import annotations

import random
import types
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

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
            self._hold_names(prefix, child._buffers)
            attributes = self._hold_names(prefix, vars(child), _OF_TORCH)
            attributes.are_computed = bool(child._forward_pre_hooks)  # a weight norm's
            for name in _HOOKS if with_hooks else ():
                if isinstance(hooks := vars(child)[name], dict):
                    self._held.append(_Names(f"{prefix}{name}.", hooks))
        self._held.append(_Random("random", random.getstate, random.setstate))
        self._held.append(_Random("numpy.random", _numpy_state, np.random.set_state))

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
            if isinstance(value, Tensor) and value.grad_fn is not None and value is not held.before.get(name)
        ]

    def restore(self) -> None:
        """Put everything back. Versions of tensors, which autograd looks at, stay as they are."""
        for held in self._held:
            held.restore()

    def forget_undrawn(self) -> None:
        """Leave generators alone that drew nothing since: another thread may draw from them."""
        self._held = [held for held in self._held if not isinstance(held, _Random) or held.is_changed()]

    @contextmanager
    def apart(self, module: nn.Module) -> Iterator[None]:
        """Inside, `module` may be in this state; afterwards it is again in that of now."""
        now, names = ModuleState(module), {held.name for held in self._held}
        now._held = [held for held in now._held if not isinstance(held, _Random) or held.name in names]
        try:
            yield
        finally:
            now.restore()

    def _hold_names(
        self, prefix: str, owner: dict[str, Any], excluded: frozenset[str] = frozenset(), depth: int = 0
    ) -> _Names:
        names = _Names(prefix, owner, excluded)
        self._held.append(names)
        for name, value in names.before.items():
            self._hold(f"{prefix}{name}", value, depth)
        return names

    def _hold(self, name: str, value: Any, depth: int) -> None:
        if id(value) in self._seen or depth > _DEPTH:
            return
        if isinstance(value, Tensor):
            if type(value) is Tensor and not value.is_meta:
                self._seen.add(id(value))
                self._held.append(_Bytes(name, value))
            return
        if not is_stateful(value) or isinstance(value, types.FunctionType | types.MethodType):
            return
        self._seen.add(id(value))
        if isinstance(value, torch.Generator):
            self._held.append(_Random(name, value.get_state, value.set_state))
        elif isinstance(value, random.Random):
            self._held.append(_Random(name, value.getstate, value.setstate))
        elif isinstance(value, np.random.Generator):
            self._held.append(_Random(name, *_of_numpy(value)))
        elif isinstance(value, dict):
            if len(value) <= _MOST_ENTRIES:
                self._hold_names(f"{name}.", value, depth=depth + 1)
        elif isinstance(value, list | deque | set | bytearray):
            if len(value) <= _MOST_ENTRIES:
                self._held.append(_Entries(name, value))
                for index, each in enumerate(value):
                    self._hold(f"{name}[{index}]", each, depth + 1)
        elif isinstance(value, tuple):
            for index, each in enumerate(value):
                self._hold(f"{name}[{index}]", each, depth + 1)
        elif hasattr(value, "__dict__"):
            self._hold_names(f"{name}.", vars(value), depth=depth + 1)


class _Names:
    """The entries of a dict, such as the attributes of an object."""

    def __init__(self, name: str, owner: dict[str, Any], excluded: frozenset[str] = frozenset()) -> None:
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

    def __init__(self, name: str, tensor: Tensor) -> None:
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
    """The state of a generator of random numbers."""

    def __init__(self, name: str, get: Callable[[], Any], put: Callable[[Any], object]) -> None:
        self.name, self._get, self._put, self._before = name, get, put, get()

    def is_changed(self) -> bool:
        return not _is_same_state(self._before, self._get())

    def has_moved(self) -> bool:
        return self.is_changed()

    def restore(self) -> None:
        self._put(self._before)


def _numpy_state() -> dict[str, Any]:
    return np.random.get_state(legacy=False)


def _of_numpy(generator: np.random.Generator) -> tuple[Callable[[], Any], Callable[[Any], None]]:
    """Reads and sets the state of a generator."""
    bits = generator.bit_generator

    def put(state: Any) -> None:
        bits.state = state

    return lambda: bits.state, put


def _is_same_state(before: Any, now: Any) -> bool:
    if isinstance(before, dict):
        return before.keys() == now.keys() and all(_is_same_state(before[key], now[key]) for key in before)
    if isinstance(before, Tensor):
        return torch.equal(before, now)
    return bool(np.array_equal(before, now)) if isinstance(before, np.ndarray) else bool(before == now)


_Held = _Names | _Entries | _Bytes | _Random


def _is_same(before: Any, now: Any) -> bool:
    if before is now:
        return True
    if isinstance(before, Tensor) and isinstance(now, Tensor):
        is_alike = before.shape == now.shape and before.dtype == now.dtype and before.device == now.device
        return is_alike and (before.is_meta or torch.equal(_bytes(before), _bytes(now)))
    return (
        type(before) is type(now)
        and isinstance(before, int | float | complex | str | bytes)
        and before == now
    )


def _has_moved(before: Any, now: Any) -> bool:
    are_tensors = isinstance(before, Tensor) and isinstance(now, Tensor)
    return are_tensors and before.shape == now.shape and not _is_same(before, now)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)
