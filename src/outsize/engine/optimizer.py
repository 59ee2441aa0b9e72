"""What every optimizer over a model in the store does; the optimizers themselves are in `optimizers.py`.

`step()` changes no weight: it freezes what the update needs (learning rate, betas, step counts, clipping factor) and
returns; each block applies it at its next visit of any kind, at the latest at the next `step()`. So the state is read
along with the weights, once, and nothing is updated before all gradients and their norm are known: clipping is exact.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any, overload

import torch
from torch import nn

from outsize.config import ComputeType
from outsize.engine.runtime import Runtime, runtime_of
from outsize.errors import ConfigError, UsageError
from outsize.optim import Hyper, Kernel, Rule, gpu_kernel, start_compile
from outsize.store.state import BlockState
from outsize.store.update_job import Pending

Params = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | None
"""Parameters, groups of them, or None for all that require grad."""

Settings = Mapping[str, Any]
"""The settings of a group, defaults filled in."""


class Optimizer(torch.optim.Optimizer, ABC):
    """A rule with the settings of its groups; subclasses give defaults, their ranges, and one entry's `Hyper`.

    `max_grad_norm` clips the 2-norm of all gradients together, exactly; `grad_norm` is that norm at the last step
    (before clipping), or None. `_books` holds numbers per parameter, by kind, that state_dicts keep.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Params,
        rule: Rule,
        defaults: dict[str, Any],
        max_grad_norm: float | None,
    ) -> None:
        own = type(self).__name__
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"{own} was given a {type(model).__name__}, expected the model",
                hint=f"outsize.{own}(model, lr=...), or outsize.{own}(model, groups, lr=...) for parameter groups",
            )
        self._check({"max_grad_norm": max_grad_norm}, {"max_grad_norm": _is_norm(max_grad_norm)})
        self._runtime: Runtime = runtime_of(model)
        self._runtime.check()
        self._names = {id(placeholder): name for name, placeholder in self._runtime.model.parameters.items()}
        self.max_grad_norm = max_grad_norm
        self.grad_norm: float | None = None
        self.num_updates = 0
        """Calls of `step` that changed something."""
        self._num_steps: dict[str, int] = {}
        self._books: dict[str, dict[str, Any]] = {"num_steps": self._num_steps}
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise UsageError(
                "nothing in the model trains",
                hint="let parameters require gradients: model.requires_grad_(), but not with weights in few bits",
            )
        if params is None:
            params = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self._check(defaults, self._ranges(defaults))
        super().__init__(params, defaults)
        begin = cache(partial(start_compile, rule))
        for compute_type in self._runtime.model.trained_types():
            begin(compute_type)

        def kernel(compute_type: ComputeType) -> Kernel:
            return begin(compute_type).wait()

        on_device: Callable[[ComputeType], Kernel] = kernel
        device = self._runtime.model.torch_device
        if device.type != "cpu":
            on_device = cache(lambda compute_type: gpu_kernel(rule, compute_type, device))
        self._runtime.setup.set_rule(rule, kernel, on_device)

    # -- what an optimizer adds ----------------------------------------------------------------------------------

    @staticmethod
    @abstractmethod
    def _ranges(settings: Settings) -> dict[str, bool]:
        """Whether each setting is in range, by name."""

    @abstractmethod
    def _hyper(self, settings: Settings, name: str, step: int, gradient_scale: float) -> Hyper:
        """What updates parameter `name` of a group with `settings`, at its `step`-th step, which counts from 1."""

    # -- what all do ---------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; raises ConfigError for settings out of range and UsageError for another model's parameters."""
        settings = {**self.defaults, **param_group}
        self._check(settings, self._ranges(settings))
        super().add_param_group(param_group)
        if any(id(parameter) not in self._names for parameter in self.param_groups[-1]["params"]):
            self.param_groups.pop()
            raise UsageError(
                f"{type(self).__name__} was given parameters of another model",
                hint="pass model.parameters() of this one",
            )

    def _check(self, settings: Settings, ranges: Mapping[str, bool]) -> None:
        for name, is_right in ranges.items():
            if not is_right:
                raise ConfigError(f"{type(self).__name__}({name}={settings[name]!r}) is out of range")

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Freeze the update of every parameter that has a gradient; without one nothing happens, as in torch.

        What an earlier step froze and no visit applied since is applied now. A step freezes all or nothing: one that was
        interrupted on the way is ended by the next call of the model, or by a repetition, which then does nothing else.
        Raises StateLostError where a gradient is only partly summed, or an earlier update stopped half-way.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        executor = self._runtime.backing.executor
        if executor is None or executor.enter():
            return loss
        for state in executor.store:
            executor.store.gradients.check(state)
        if not any(state.gradient.exists for state in executor.store):
            return loss
        executor.settle_updates()
        scale = self._clip_factor()
        hypers: dict[tuple[str, int], Hyper] = {}
        num_steps: dict[str, int] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                self._freeze(group, self._names[id(parameter)], scale, hypers, num_steps)
        frozen: list[tuple[BlockState, Pending, int]] = []
        for state in executor.store:
            entries = range(len(state.record.entries))
            pending = Pending(tuple(hypers.get((state.name, index)) for index in entries))
            if any(hyper is not None for hyper in pending.hypers):
                frozen.append((state, pending, state.update.num_steps + 1))
        executor.complete(partial(self._take_step, frozen, num_steps, self.num_updates + 1))
        return loss

    def _take_step(
        self,
        frozen: Sequence[tuple[BlockState, Pending, int]],
        num_steps: Mapping[str, int],
        num_updates: int,
    ) -> None:
        """Hand frozen updates to their blocks, and count them; doing it again changes nothing."""
        self.num_updates = num_updates
        self._num_steps.update(num_steps)
        for state, pending, count in frozen:
            state.update.freeze(pending, count)

    def _freeze(
        self,
        group: dict[str, Any],
        name: str,
        scale: float,
        hypers: dict[tuple[str, int], Hyper],
        num_steps: dict[str, int],
    ) -> None:
        assert self._runtime.backing.executor is not None
        store = self._runtime.backing.executor.store
        places = self._runtime.model.locations[name]
        gradients = [store[place.block].gradient.entries[place.index] for place in places]
        if not any(gradient.present for gradient in gradients):
            return
        step = num_steps[name] = self._num_steps.get(name, 0) + 1
        for place, gradient in zip(places, gradients, strict=True):
            hyper = self._hyper(group, name, step, gradient.scale * scale)
            hypers[place.block, place.index] = hyper

    def _gradient_parts(self, name: str) -> Iterator[torch.Tensor]:
        """The gradient of a parameter before clipping, in double precision, in parts of at most a chunk."""
        assert self._runtime.backing.executor is not None
        store = self._runtime.backing.executor.store
        for place in self._runtime.model.locations[name]:
            state = store[place.block]
            gradient = state.gradient.entries[place.index]
            if gradient.present:
                for part in store.gradients.parts(state, place.index):
                    yield part.double() * gradient.scale

    def gradient_norm(self) -> float:
        """The 2-norm of all gradients together, as the next `step()` would see it; 0.0 where there are none."""
        if self._runtime.backing.executor is None:
            return 0.0
        store = self._runtime.backing.executor.store
        store.gradients.settle_norms()
        ours = {
            (at.block, at.index)
            for group in self.param_groups
            for parameter in group["params"]
            for at in self._runtime.model.locations[self._names[id(parameter)]]
        }
        return math.sqrt(
            sum(
                gradient.sum_of_squares * gradient.scale**2
                for state in store
                for index, gradient in enumerate(state.gradient.entries)
                if gradient.present and (state.name, index) in ours
            )
        )

    def _clip_factor(self) -> float:
        """The factor that brings the norm of all gradients to at most `max_grad_norm`; sets `grad_norm`."""
        self.grad_norm = self.gradient_norm()
        if self.max_grad_norm is None:
            return 1.0
        # As torch.nn.utils.clip_grad_norm_ computes it; a norm that is not finite makes the weights so, as there.
        return min(self.max_grad_norm / (self.grad_norm + 1e-6), 1.0)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of all groups, or make them zero; an update that `step()` froze still uses them.

        As in torch, a parameter whose gradient is zero moves with its moments and weight decay at the next `step()`, and
        one without a gradient does not. Raises UsageError where a gradient that is to become zero holds inf or nan.
        """
        values = self._runtime.model.values
        for group in self.param_groups:
            for parameter in group["params"]:
                if set_to_none:
                    values.drop_gradient(self._names[id(parameter)])
                else:
                    values.zero_gradient(self._names[id(parameter)])

    def state_dict(self) -> dict[str, Any]:
        """Groups, step counts and other numbers per parameter, and where the moments are; never tensors."""
        state = super().state_dict()
        state["outsize"] = {
            "store": self._runtime.setup.identity,
            **{kind: dict(book) for kind, book in self._books.items()},
        }
        return state

    def commit_state(self) -> dict[str, Any]:
        """What a commit keeps beside the planes: the groups' settings, and numbers per parameter, as JSON can hold them."""
        groups = [
            {**group, "params": [self._names[id(parameter)] for parameter in group["params"]]}
            for group in self.param_groups
        ]
        return {
            "kind": type(self).__name__,
            "groups": groups,
            "books": {kind: dict(book) for kind, book in self._books.items()},
            "num_updates": self.num_updates,
        }

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `commit_state` gave, in another process.

        Parameters may be frozen now, or train now, that were not. Raises UsageError where the optimizer is another, or a
        parameter is in another group than before.
        """
        kind, groups = type(self).__name__, state["groups"]
        if groups is None:  # what was imported has none
            groups = [{} for _ in self.param_groups]
        if state["kind"] != kind or len(groups) != len(self.param_groups):
            raise UsageError(
                f"the commit was made with {state['kind']} of {len(groups)} parameter groups, "
                f"and this is {kind} of {len(self.param_groups)}",
                hint=f"resume with outsize.{state['kind']} and the same groups",
            )
        before = {name: index for index, group in enumerate(groups) for name in group.get("params", ())}
        for index, own in enumerate(self.param_groups):
            for name in (self._names[id(parameter)] for parameter in own["params"]):
                if before.get(name, index) != index:
                    raise UsageError(
                        f"{name} is in parameter group {index}, and was in group {before[name]} when the commit was made",
                        hint="pass the same groups in the same order",
                    )
        for own, stored in zip(self.param_groups, groups, strict=True):
            for key, value in stored.items():
                if key != "params":
                    # JSON knows no tuples.
                    own[key] = tuple(value) if isinstance(own.get(key), tuple) else value
        for name, book in self._books.items():
            book.clear()
            book.update(state["books"][name])
        self.num_updates = state["num_updates"]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore groups and numbers per parameter; the moments stay where they are."""
        state = dict(state_dict)
        own = state.pop("outsize", None)
        if own is None:
            raise UsageError(
                "this state_dict holds no reference to Outsize's store",
                hint=f"pass one from outsize.{type(self).__name__}",
            )
        if own["store"] != self._runtime.setup.identity:
            raise UsageError(
                "this state_dict belongs to another run, whose moments are gone",
                hint="start with a new optimizer: its moments begin at zero, and so must its step counts",
            )
        super().load_state_dict(state)
        for kind, book in self._books.items():
            book.clear()
            book.update(own[kind])


def _is_norm(value: float | None) -> bool:
    return value is None or value > 0
