"""A model that is open: its parts, found by its module."""

from __future__ import annotations

import weakref
from functools import partial
from typing import Any, NoReturn, final

from torch import nn

from outsize.config import OnDeviceFull, Settings
from outsize.engine.arguments import Args, Kwargs
from outsize.engine.budget import Budget
from outsize.engine.call_tracker import CallTracker
from outsize.engine.compiled import Compiler
from outsize.engine.current_call import CurrentCall
from outsize.engine.dry_runner import DryRunner
from outsize.engine.head import Head
from outsize.engine.model import Model
from outsize.engine.parameters import Backing
from outsize.engine.points import install, never_streamed
from outsize.engine.setup import Setup, source_bytes
from outsize.engine.signature import encoder_of
from outsize.engine.structure import Structure
from outsize.engine.visits import Visits
from outsize.errors import UsageError
from outsize.model import Cut, Source
from outsize.plan.profile import Profile
from outsize.store import memory
from outsize.tier import Device, HostDevice

_runtimes: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Runtime]] = weakref.WeakKeyDictionary()
"""A module's hooks hold its runtime; the registry holds neither, so that both go when the module is dropped."""


@final
class Runtime:
    """The parts of an open model, which know one another by their constructors; hooks of its module hold this."""

    def __init__(
        self,
        module: nn.Module,
        cut: Cut,
        source: Source,
        settings: Settings,
        device: Device | None = None,
        profile: Profile | None = None,
    ) -> None:
        """Take `module` over: placeholders in place of its parameters, visits in place of its points' forwards."""
        self.backing = Backing(source)
        self.model = Model(module, cut, self.backing, settings.compute_type, device or HostDevice())
        free_host_bytes = memory.available_bytes
        if self.model.torch_device.type == "meta" and profile is not None:
            free_host_bytes = partial(int, profile.host_bytes)
        self.budget = Budget(
            settings,
            never_streamed(cut),
            self.model.device,
            source_bytes(self.backing, self.model),
            free_host_bytes,
        )
        self.visits = Visits(
            self.model,
            self.backing,
            self.budget,
            CurrentCall(module),
            Compiler(bool(settings.compile)),
            retries=settings.on_device_full is OnDeviceFull.RETRY,
        )
        self.points = install(self.visits)
        self.setup = Setup(self.model, self.backing, self.budget, self.points, profile)
        self._structure = Structure(module, self.points)
        dry_runner = DryRunner(self.visits, self.points, module.forward)
        self.calls = CallTracker(self.visits, self.setup, self.budget, dry_runner, self.check)
        # Bound methods, not functions: copying or pickling the module copies its hooks, and so asks `__deepcopy__` below.
        module.register_forward_pre_hook(self._before, with_kwargs=True, prepend=True)
        module.register_forward_hook(self._after, always_call=True)
        if (encoder := encoder_of(module)) is not None:
            encoder.register_forward_pre_hook(self._before_encoder, with_kwargs=True)
        _runtimes[module] = weakref.ref(self)

    def _before(self, module: nn.Module, args: Args, kwargs: Kwargs) -> Any:
        return self.calls.before(args, kwargs)

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        self.calls.after(output)

    def _before_encoder(self, encoder: nn.Module, args: Args, kwargs: Kwargs) -> None:
        self.calls.before_encoder(args, kwargs)

    def check(self) -> None:
        """Refuse a model that was closed, or that was changed since it was opened. Raises UsageError."""
        if self.setup.is_closed:
            raise UsageError("the model was closed, and its weights are gone", hint="load it again")
        self._structure.check(self.model.module)
        self.model.parameters.check_trainable()

    @property
    def loss_tile_elements(self) -> int | None:
        """Elements of a tile of logits; None if the model has no head."""
        return min((head.tile_elements for head in self._heads()), default=None)

    @loss_tile_elements.setter
    def loss_tile_elements(self, num_elements: int) -> None:
        for head in self._heads():
            head.tile_elements = num_elements

    def _heads(self) -> list[Head]:
        return [point for point in self.points.values() if isinstance(point, Head)]

    def __deepcopy__(self, memo: dict[int, Any]) -> NoReturn:
        raise UsageError(
            "the weights of this model live in Outsize's store and cannot be copied with it",
            hint="save it with outsize.save and load it again",
        )

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UsageError(
            "the weights of this model live in Outsize's store and cannot be pickled",
            hint="use outsize.save(model, path)",
        )


def runtime_of(module: nn.Module) -> Runtime:
    """The runtime of a model that was loaded or wrapped. Raises UsageError for any other module."""
    runtime = find_runtime(module)
    if runtime is None and isinstance(module, nn.Module):
        inner = next(
            (type(each).__name__ for each in module.modules() if find_runtime(each) is not None), None
        )
        if inner is not None:
            raise UsageError(
                f"{type(module).__name__} was put around a {inner} that is under Outsize already",
                hint="build the whole model first, adapters included, and pass it to outsize.wrap",
            )
    if runtime is None:
        raise UsageError(
            f"{type(module).__name__} is not a model of Outsize",
            hint="open it with outsize.load(path), or wrap it with outsize.wrap(module)",
        )
    return runtime


def find_runtime(module: nn.Module) -> Runtime | None:
    """The runtime of a model that was loaded or wrapped; None for any other module."""
    reference = _runtimes.get(module) if isinstance(module, nn.Module) else None
    return reference() if reference is not None else None
