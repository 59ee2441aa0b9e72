"""The shape of a model under Outsize: which modules own its parameters, and whether they still do.

Weights live in the store and are put into the modules that owned them when the model was opened. A part that is replaced,
added or dropped afterwards would compute with weights of its own that neither train nor are saved, so every entry point
compares the model with what was opened, and refuses by name.
"""

from __future__ import annotations

from collections.abc import Iterable
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

    def check(self, root: nn.Module) -> None:
        """Raise UsageError where a part of `root` was replaced, added or dropped, or a parameter assigned."""
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


def _offloaded(module: nn.Module) -> dict[str, OffloadedParameter]:
    parameters: dict[str, Any] = dict(module._parameters)
    return {name: each for name, each in parameters.items() if isinstance(each, OffloadedParameter)}


def _refuse_part(path: str, before: nn.Module, now: nn.Module | None) -> NoReturn:
    what = "is no longer part of the model" if now is None else f"was replaced by a {type(now).__name__}"
    raise UsageError(f"{_named(path, before)} {what} after it was opened", hint=_HINT)


def _named(path: str, module: nn.Module) -> str:
    return f"{path} ({type(module).__name__})" if path else type(module).__name__
