"""The shape of a model under Outsize: which modules own its parameters, and whether they still do.

Weights live in the store and are put into the modules that owned them when the model was opened. A part that is replaced,
added or dropped afterwards would compute with weights of its own that neither train nor are saved, so every entry point
compares the model with what was opened, and refuses by name.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

from torch import nn

from outsize.engine.placeholder import OffloadedParameter
from outsize.errors import UsageError

_HINT = "change the model first and pass it to outsize.wrap, or save it, change it with transformers and load it again"


class Structure:
    """The modules of `root` that own parameters, and those at `points`, as they were when the model was opened."""

    def __init__(self, root: nn.Module, points: Iterable[str]) -> None:
        wanted = frozenset(points)
        self._parts: dict[str, tuple[nn.Module, dict[str, OffloadedParameter]]] = {}
        for path, module in root.named_modules():
            owned = _offloaded(module)
            if owned or path in wanted:
                self._parts[path] = module, owned
        self._last_seen = _look(root)

    def check(self, root: nn.Module) -> None:
        """Raise UsageError where a part of `root` was replaced, added or dropped, or a parameter assigned."""
        if all(look.is_current() for look in self._last_seen):
            return
        self._compare(root)
        self._last_seen = _look(root)

    def _compare(self, root: nn.Module) -> None:
        modules = dict(root.named_modules())
        for path, (module, owned) in self._parts.items():
            if modules.get(path) is not module:
                _refuse_part(path, module, modules.get(path))
            for attribute, placeholder in owned.items():
                if module._parameters.get(attribute) is not placeholder:
                    raise UsageError(
                        f"a parameter was put in the place of {placeholder._label}: it would not be used",
                        hint="change weights before outsize.wrap, or save, change and load again",
                    )
        for path, module in modules.items():
            known = self._parts[path][1] if path in self._parts else {}
            for attribute, parameter in module._parameters.items():
                if parameter is not None and attribute not in known:
                    raise UsageError(
                        f"{f'{path}.{attribute}' if path else attribute} was added after the model was opened: "
                        "it would neither train nor be saved",
                        hint=_HINT,
                    )


@dataclass(frozen=True, slots=True)
class _Look:
    """What one module held: compared without walking the model, which takes as long as a pass of a small one."""

    module: nn.Module
    children: dict[str, nn.Module | None]
    parameters: list[int]

    def is_current(self) -> bool:
        """Whether the module holds the same parts and parameters still."""
        module = self.module
        return module._modules == self.children and [*map(id, module._parameters.values())] == self.parameters


def _look(root: nn.Module) -> list[_Look]:
    return [
        _Look(module, dict(module._modules), [*map(id, module._parameters.values())])
        for module in root.modules()
    ]


def _offloaded(module: nn.Module) -> dict[str, OffloadedParameter]:
    parameters: dict[str, Any] = dict(module._parameters)
    return {name: each for name, each in parameters.items() if isinstance(each, OffloadedParameter)}


def _refuse_part(path: str, before: nn.Module, now: nn.Module | None) -> NoReturn:
    what = "is no longer part of the model" if now is None else f"was replaced by a {type(now).__name__}"
    raise UsageError(f"{_named(path, before)} {what} after it was opened", hint=_HINT)


def _named(path: str, module: nn.Module) -> str:
    return f"{path} ({type(module).__name__})" if path else type(module).__name__
