"""AdamW over a model whose state lives in the store.

`step()` changes no weight: it freezes what the update needs (learning rate, betas, step counts, clipping factor) and
returns; each block applies it at its next visit of any kind, at the latest at the next `step()`. So the state is read
along with the weights, once, and nothing is updated before all gradients and their norm are known: clipping is exact.
Source: Loshchilov and Hutter, "Decoupled weight decay regularization" (2019).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import nn

from outsize.config import ComputeType
from outsize.engine.session import Session, session_of
from outsize.engine.update import Pending
from outsize.errors import ConfigError, UsageError
from outsize.optim import ADAMW, Hyper, start_compile


class AdamW(torch.optim.Optimizer):
    """As `torch.optim.AdamW`, for a model of `outsize.load` or `outsize.wrap`.

    `params`: parameters or groups of them, as in torch; by default all that require grad. `max_grad_norm` clips the
    2-norm of all gradients together, exactly; `grad_norm` is that norm at the last step (before clipping), or None.
    Create it after freezing and before the first `backward()`.
    """

    def __init__(
        self,
        model: nn.Module,
        params: Iterable[torch.Tensor] | Iterable[dict[str, Any]] | None = None,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        max_grad_norm: float | None = None,
    ) -> None:
        for name, value, is_right in (
            ("lr", lr, lr >= 0),
            ("betas", betas, len(betas) == 2 and all(0 <= beta < 1 for beta in betas)),
            ("eps", eps, eps > 0),
            ("weight_decay", weight_decay, weight_decay >= 0),
            ("max_grad_norm", max_grad_norm, max_grad_norm is None or max_grad_norm > 0),
        ):
            if not is_right:
                raise ConfigError(f"AdamW({name}={value!r}) is out of range")
        if not isinstance(model, nn.Module):
            raise UsageError(
                f"AdamW was given a {type(model).__name__}, expected the model",
                hint="outsize.AdamW(model, lr=...), or outsize.AdamW(model, groups, lr=...) for parameter groups",
            )
        self._session: Session = session_of(model)
        self._names = {id(placeholder): name for name, placeholder in self._session.parameters.items()}
        self.max_grad_norm = max_grad_norm
        self.grad_norm: float | None = None
        self._num_steps: dict[str, int] = {}
        if params is None:
            params = [parameter for parameter in model.parameters() if parameter.requires_grad]
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        if any(
            id(parameter) not in self._names for group in self.param_groups for parameter in group["params"]
        ):
            raise UsageError(
                "AdamW was given parameters of another model", hint="pass model.parameters() of this one"
            )
        compute_type = self._session.settings.compute_type
        self._session.set_rule(ADAMW, start_compile(ADAMW, ComputeType(compute_type)).wait)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Freeze the update of every parameter that has a gradient; without one nothing happens, as in torch.

        What an earlier step froze and no visit applied since is applied now.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        executor = self._session.executor
        if executor is None or not any(state.has_gradient for state in executor.store):
            return loss
        executor.settle_updates()
        scale = self._clip_factor()
        hypers: dict[tuple[str, int], Hyper] = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                self._freeze(group, self._names[id(parameter)], scale, hypers)
        for state in executor.store:
            entries = range(len(state.record.entries))
            pending = Pending(tuple(hypers.get((state.name, index)) for index in entries))
            if any(hyper is not None for hyper in pending.hypers):
                state.pending = pending
                state.num_steps += 1
        return loss

    def _freeze(
        self, group: dict[str, Any], name: str, scale: float, hypers: dict[tuple[str, int], Hyper]
    ) -> None:
        assert self._session.executor is not None
        store = self._session.executor.store
        places = self._session.locations(name)
        gradients = [store[place.block].gradients[place.index] for place in places]
        if not any(gradient.present for gradient in gradients):
            return
        self._num_steps[name] = self._num_steps.get(name, 0) + 1
        for place, gradient in zip(places, gradients, strict=True):
            hypers[place.block, place.index] = Hyper(
                lr=float(group["lr"]),
                beta1=float(group["betas"][0]),
                beta2=float(group["betas"][1]),
                eps=float(group["eps"]),
                weight_decay=float(group["weight_decay"]),
                step=self._num_steps[name],
                gradient_scale=gradient.scale * scale,
            )

    def gradient_norm(self) -> float:
        """The 2-norm of all gradients together, as the next `step()` would see it; 0.0 where there are none."""
        if self._session.executor is None:
            return 0.0
        store = self._session.executor.store
        ours = {
            (at.block, at.index)
            for group in self.param_groups
            for parameter in group["params"]
            for at in self._session.locations(self._names[id(parameter)])
        }
        return math.sqrt(
            sum(
                gradient.sum_of_squares * gradient.scale**2
                for state in store
                for index, gradient in enumerate(state.gradients)
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
        """Forget the gradients of all groups; an update that `step()` froze still uses them."""
        for group in self.param_groups:
            for parameter in group["params"]:
                self._session.drop_gradient(self._names[id(parameter)])

    def state_dict(self) -> dict[str, Any]:
        """Groups, step counts, and where the moments are; never tensors."""
        state = super().state_dict()
        state["outsize"] = {
            "num_steps": dict(self._num_steps),
            "store": self._session.identity,
        }
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore groups and step counts; the moments stay where they are."""
        state = dict(state_dict)
        own = state.pop("outsize", None)
        if own is None:
            raise UsageError(
                "this state_dict holds no reference to Outsize's store", hint="pass one from outsize.AdamW"
            )
        if own["store"] != self._session.identity:
            raise UsageError(
                "this state_dict belongs to another run, whose moments are gone",
                hint="start with a new optimizer: its moments begin at zero, and so must its step counts",
            )
        super().load_state_dict(state)
        self._num_steps = dict(own["num_steps"])
