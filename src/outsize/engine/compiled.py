"""Layers through `torch.compile`: one compilation for all layers of a kind.

What is compiled is the forward of one layer, and with it its backward, not the model: layers are visited one by one, and
between them blocks move. The compiler takes a layer's parameters as inputs, so the same code serves every slot and every
layer that is built alike; sizes of a batch are symbols, so it serves tiles of all sizes but one row, for which torch
compiles anew. Layers that are not alike (other attention, a mask that was not there before) are compiled apart.

The dry run tries it, on weights of zero: where a compiler fails, layers of that class run as they are, and
one warning says so. Code is the same wherever planes live, so placement changes no bit; against layers that are not
compiled the last bits differ.

It does not serve calls with a cache, which grows with every token, nor calls whose hooks record something inside a layer.
Source of the idea: regional compilation, https://docs.pytorch.org/tutorials/recipes/regional_compilation.html.
"""

from __future__ import annotations

import types
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from outsize.errors import in_short


class Compiler:
    """Compiled forwards of layers, by the class of their module; where `is_on` is false, none."""

    def __init__(self, is_on: bool) -> None:
        self.is_on = is_on
        self.failures: dict[str, str] = {}
        """Why layers of a class are not compiled."""
        self._compiled: dict[type[nn.Module], Callable[..., Any]] = {}

    @property
    def compiled(self) -> list[str]:
        """Names of the classes whose layers are compiled."""
        return sorted(kind.__name__ for kind in self._compiled if kind.__name__ not in self.failures)

    def serves(self, module: nn.Module) -> bool:
        """Whether calls of `module` are compiled."""
        return self.is_on and type(module).__name__ not in self.failures

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside, nothing is compiled."""
        self.is_on, before = False, self.is_on
        try:
            yield
        finally:
            self.is_on = before

    def run(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
    ) -> Any:
        """`forward(*args, **kwargs)`, the forward of `module`, compiled. Raises what a compiler does (`is_failure`)."""
        kind = type(module)
        if kind not in self._compiled:
            self._compiled[kind] = torch.compile(_own_code(_run), dynamic=True)
        return self._compiled[kind](forward, args, kwargs)

    def try_out(self, module: nn.Module, run: Callable[[], object]) -> bool:
        """Let `run`, which calls `module` and goes back, show whether layers of its class can be compiled, and say it."""
        try:
            run()
        except Exception as error:
            if not is_failure(error):
                raise
            self.give_up(module, error)
        return self.serves(module)

    def give_up(self, module: nn.Module, error: Exception) -> None:
        """Run layers of this class as they are from now on, and say so."""
        name = type(module).__name__
        if name in self.failures:
            return
        self.failures[name] = in_short(error)
        warnings.warn(
            f"{name} cannot be compiled, and runs as it is: {self.failures[name]}",
            RuntimeWarning,
            stacklevel=2,
        )


def is_failure(error: Exception) -> bool:
    """Whether `error` is a compiler's, and not that of what was to run."""
    from torch._dynamo.exc import TorchDynamoException
    from torch._inductor.exc import InductorError

    return isinstance(error, TorchDynamoException | InductorError)


def _run(forward: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    return forward(*args, **kwargs)


def _own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of `function` with code of its own: torch keeps, and counts, compilations by code."""
    assert isinstance(function, types.FunctionType)
    return types.FunctionType(function.__code__.replace(), function.__globals__, function.__name__)
