"""What every optimizer over a model in the store does; the optimizers themselves are in `optimizers.py`.

`step()` changes no weight: it freezes what the update needs (learning rate, betas, step counts, clipping factor) and
returns; each block applies it at its next visit of any kind, at the latest at the next `step()`. So the state is read
along with the weights, once, and nothing is updated before all gradients and their norm are known: clipping is exact.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from copy import deepcopy
from functools import cache, partial, wraps
from typing import (
    Annotated,
    Any,
    ClassVar,
    ParamSpec,
    TypeAlias,
    get_args,
    get_origin,
    get_type_hints,
    overload,
)

import torch
from torch import nn

from outsize.engine.runtime import Runtime, runtime_of
from outsize.errors import ConfigError, UsageError
from outsize.optim import ALGORITHMS, Hyper, gpu_kernel, start_compile
from outsize.store.blocks import BlockStore
from outsize.store.state import BlockState
from outsize.store.update_job import Pending

Params: TypeAlias = Iterable[torch.Tensor] | Iterable[dict[str, Any]] | None
"""Parameters, groups of them, or None for all that require grad."""

Settings: TypeAlias = Mapping[str, Any]
"""The settings of a group, defaults filled in."""


def _are_decay_rates(count: int) -> Callable[[Any, Settings], bool]:
    return lambda values, _: len(values) == count and all(0 <= value < 1 for value in values)


# Types of settings: each carries a test of a value, given all settings of its group, for being in range.
NonNegative = Annotated[float, lambda value, _: value >= 0]
Positive = Annotated[float, lambda value, _: value > 0]
DecayRate = Annotated[float, lambda value, _: 0 <= value < 1]
TwoDecayRates = Annotated[tuple[float, float], _are_decay_rates(2)]
ThreeDecayRates = Annotated[tuple[float, float, float], _are_decay_rates(3)]
Nesterov = Annotated[bool, lambda value, settings: settings["momentum"] > 0 or not value]
MaxNorm = Annotated[float | None, lambda value, _: value is None or value > 0]

P = ParamSpec("P")


def declares_settings(init: Callable[P, None]) -> Callable[P, None]:
    """Make the keyword-only parameters of `init`, whose body is empty, the settings of an optimizer.

    Defaults and types come from the signature, too; `Optimizer.__init__` receives all arguments.
    """
    signature = inspect.signature(init)

    @wraps(init)
    def set_up(*args: P.args, **kwargs: P.kwargs) -> None:
        init(*args, **kwargs)  # raises TypeError for wrong arguments
        arguments = signature.bind(*args, **kwargs)
        arguments.apply_defaults()
        Optimizer.__init__(*arguments.args, **arguments.kwargs)

    return set_up


class Optimizer(torch.optim.Optimizer, ABC):
    """The settings of groups of parameters, and the steps that hand them to the rule of the optimizer's algorithm.

    `max_grad_norm` clips the 2-norm of all gradients together, exactly; `grad_norm` is that norm at the last step
    (before clipping), or None. `_books` holds numbers per parameter, by kind, that state_dicts keep.
    """

    _book_names: ClassVar[tuple[str, ...]] = ("num_steps",)

    def __init__(
        self, model: nn.Module, params: Params, *, max_grad_norm: float | None, **settings: Any
    ) -> None:
        own = type(self).__name__
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"{own} was given a {type(model).__name__}, expected the model",
                hint=f"outsize.{own}(model, lr=...), or outsize.{own}(model, groups, lr=...) for parameter groups",
            )
        self._runtime: Runtime = runtime_of(model)
        self._runtime.check()
        self._names = {id(placeholder): name for name, placeholder in self._runtime.model.parameters.items()}
        self.max_grad_norm = max_grad_norm
        self.grad_norm: float | None = None
        self.num_updates = 0
        """Calls of `step` that changed something."""
        self._books: dict[str, dict[str, Any]] = {name: {} for name in self._book_names}
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not trainable:
            raise UsageError(
                "nothing in the model trains",
                hint="let parameters require gradients: model.requires_grad_(), but not with weights in few bits",
            )
        self._check({**settings, "max_grad_norm": max_grad_norm})
        super().__init__(trainable if params is None else params, settings)
        self._algorithm = ALGORITHMS[own]
        rule = self._algorithm.rule
        begin = cache(partial(start_compile, rule))
        for compute_type in self._runtime.model.trained_types():
            begin(compute_type)

        device = self._runtime.model.torch_device
        on_device = None if device.type == "cpu" else cache(partial(gpu_kernel, rule, device=device))
        self._runtime.setup.set_rule(rule, lambda compute_type: begin(compute_type).wait(), on_device)

    def _measure(self, name: str, settings: Settings) -> Mapping[str, float]:
        """What the algorithm takes for parameter `name` beside the settings of its group; most take nothing."""
        return {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in torch; raises ConfigError for settings out of range and UsageError for another model's parameters."""
        self._check({**self.defaults, **param_group})
        super().add_param_group(param_group)
        if any(id(parameter) not in self._names for parameter in self.param_groups[-1]["params"]):
            self.param_groups.pop()
            raise UsageError(
                f"{type(self).__name__} was given parameters of another model",
                hint="pass model.parameters() of this one",
            )

    def _check(self, settings: Settings) -> None:
        for name, kind in get_type_hints(type(self).__init__, include_extras=True).items():
            tests = get_args(kind)[1:] if get_origin(kind) is Annotated else ()
            if name in settings and not all(test(settings[name], settings) for test in tests):
                raise ConfigError(f"{type(self).__name__}({name}={settings[name]!r}) is out of range")

    def _members(self) -> Iterator[tuple[dict[str, Any], str]]:
        """Each parameter's group and name."""
        for group in self.param_groups:
            for parameter in group["params"]:
                yield group, self._names[id(parameter)]

    @property
    def _store(self) -> BlockStore:
        assert self._runtime.backing.executor is not None
        return self._runtime.backing.executor.store

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
        executor.complete(self._freeze())
        executor.store.planes.free_pages()  # keys and values of the weights before
        return loss

    def _freeze(self) -> Callable[[], None]:
        """Freeze updates; the function returned hands them to their blocks and counts them, and may be called twice."""
        scale = self._clip_factor()
        hypers: dict[BlockState, dict[int, Hyper]] = defaultdict(dict)
        num_steps: dict[str, int] = {}
        for group, name in self._members():
            gradients = self._runtime.model.parameters.gradients(name)
            if any(gradient.present for _, _, gradient in gradients):
                step = num_steps[name] = self._books["num_steps"].get(name, 0) + 1
                settings = {**group, **self._measure(name, group)}
                for state, index, gradient in gradients:
                    hypers[state][index] = self._algorithm.hyper(settings, step, gradient.scale * scale)
        frozen = [
            (
                state,
                Pending(tuple(map(own.get, range(len(state.record.entries))))),
                state.update.num_steps + 1,
            )
            for state, own in hypers.items()
        ]
        num_updates = self.num_updates + 1

        def take_step() -> None:
            self.num_updates = num_updates
            self._books["num_steps"].update(num_steps)
            for state, pending, count in frozen:
                state.update.freeze(pending, count)

        return take_step

    def _gradient_parts(self, name: str) -> Iterator[torch.Tensor]:
        """The gradient of a parameter before clipping, in double precision, in parts of at most a chunk."""
        for state, index, gradient in self._runtime.model.parameters.gradients(name):
            if gradient.present:
                for part in self._store.gradients.parts(state, index):
                    yield part.double() * gradient.scale

    def gradient_norm(self) -> float:
        """The 2-norm of all gradients together, as the next `step()` would see it; 0.0 where there are none."""
        if self._runtime.backing.executor is None:
            return 0.0
        self._store.gradients.settle_norms()
        ours = {
            id(gradient)
            for _, name in self._members()
            for _, _, gradient in self._runtime.model.parameters.gradients(name)
        }
        # Summed in the order of blocks, whatever the groups.
        return math.sqrt(
            sum(
                gradient.sum_of_squares * gradient.scale**2
                for state in self._store
                for gradient in state.gradient.entries
                if gradient.present and id(gradient) in ours
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
        values = self._runtime.model.parameters
        change = values.drop_gradient if set_to_none else values.zero_gradient
        for _, name in self._members():
            change(name)

    def state_dict(self) -> dict[str, Any]:
        """Groups, step counts and other numbers per parameter, and where the moments are; never tensors."""
        state = super().state_dict()
        state["outsize"] = {"store": self._runtime.setup.identity, **deepcopy(self._books)}
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
            "books": deepcopy(self._books),
            "num_updates": self.num_updates,
        }

    def restore_state(self, state: Mapping[str, Any]) -> None:
        """Take over what `commit_state` gave, in another process.

        Parameters may be frozen now, or train now, that were not. Raises UsageError where the optimizer is another, or a
        parameter is in another group than before.
        """
        now = self.commit_state()
        groups = state["groups"] or [{} for _ in now["groups"]]  # what was imported has none
        if state["kind"] != now["kind"] or len(groups) != len(now["groups"]):
            raise UsageError(
                f"the commit was made with {state['kind']} of {len(groups)} parameter groups, "
                f"and this is {now['kind']} of {len(now['groups'])}",
                hint=f"resume with outsize.{state['kind']} and the same groups",
            )
        before = {name: index for index, group in enumerate(groups) for name in group.get("params", ())}
        for index, group in enumerate(now["groups"]):
            for name in group["params"]:
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
        self._books = {kind: dict(state["books"][kind]) for kind in self._book_names}
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
        self._books = {kind: dict(own[kind]) for kind in self._book_names}
