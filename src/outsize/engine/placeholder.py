"""What stands in for parameters and gradients between visits: tensors with a shape and a type, and no storage.

Reading one fetches the value; writing, converting, copying or pickling one raises an error that names it, because the
change would be lost. (Plain empty tensors let `save_pretrained` write a file of nothing without an error.)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from outsize.engine.arguments import Args, Kwargs
from outsize.engine.rng_autocast import outside_inference_mode
from outsize.errors import UsageError

_WRITTEN_HINT = (
    "train it with outsize.AdamW(model, ...); to change weights yourself, do it before outsize.wrap"
)
_MEMORY_HINT = "read it with .detach().clone(), or write the whole model with outsize.save(model, path)"

_VIEW = "a view of"

_aten = torch.ops.aten
_NORMS = (_aten._foreach_norm, _aten.linalg_vector_norm, _aten.norm)
_ZEROS = (_aten._foreach_zero_, _aten.zero_)
_PRODUCTS = (_aten._foreach_mul_, _aten.mul_)
_QUOTIENTS = (_aten._foreach_div_, _aten.div_)


def _refused(what: str, hint: str) -> Any:
    """A method that refuses to have its placeholder treated so: there is no storage."""

    def refuse(self: _Placeholder, *args: Any, **kwargs: Any) -> NoReturn:
        self._refuse(what, hint)

    return refuse


class _Placeholder(Tensor):
    """A storage-free tensor; `_fetch` gives its value when something reads it."""

    _label: str
    _fetch: Callable[[], Tensor]

    @staticmethod
    def __new__(
        cls: type[_Placeholder],
        like: Tensor,
        label: str,
        fetch: Callable[[], Tensor],
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
    ) -> _Placeholder:
        self: _Placeholder = Tensor._make_wrapper_subclass(
            cls,
            like.shape,
            dtype=dtype or like.dtype,
            device=device or like.device,
        )
        self._label = label
        self._fetch = fetch
        # What reaches for the bytes from C++, past the methods below, raises instead of reading address 0.
        torch._C._set_throw_on_mutable_data_ptr(self)
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    @outside_inference_mode()
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        kwargs = kwargs or {}
        overload = func.overloadpacket
        if overload in (torch.ops.aten.detach, torch.ops.aten.alias):
            source = args[0]
            return Reading(source, source._label, source._fetch)
        if overload is torch.ops.aten._to_copy and isinstance(args[0], OffloadedParameter):
            # `module.to(...)` would put the result in its place.
            args[0]._refuse(
                "converted",
                "its home and type are chosen by outsize.load(..., dtype=); to read it, "
                f"write .detach().to({kwargs.get('dtype') or 'dtype'})",
            )
        for position, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[position] if position < len(args) else kwargs.get(argument.name)
                values = value if isinstance(value, list | tuple) else [value]
                for target in values:
                    if isinstance(target, _Placeholder):
                        target._refuse("written", _WRITTEN_HINT)
        if _is_view(func) and isinstance(args[0], _Placeholder):
            return args[0]._viewed(partial(func, **kwargs), args[1:])
        fetched: dict[int, Tensor] = {}

        def value_of(tensor: _Placeholder) -> Tensor:
            if id(tensor) not in fetched:
                fetched[id(tensor)] = tensor._fetch()
            return fetched[id(tensor)]

        args, kwargs = tree_map_only(_Placeholder, value_of, (args, kwargs))
        return func(*args, **kwargs)

    def _viewed(self, view: Callable[..., Any], options: tuple[Any, ...]) -> Any:
        """What a view of this tensor is: readings of its parts, so that a write through them is refused too."""
        label = self._label if self._label.startswith(_VIEW) else f"{_VIEW} {self._label}"
        shapes = view(torch.empty_like(self, device="meta"), *options)
        read = cache(lambda: view(self._fetch(), *options))
        if isinstance(shapes, Tensor):
            return Reading(shapes, label, read, device=self.device)
        parts = (
            Reading(shape, label, partial(lambda index: read()[index], index), device=self.device)
            for index, shape in enumerate(shapes)
        )
        return type(shapes)(parts)

    def _refuse(self, what: str, hint: str) -> NoReturn:
        raise UsageError(f"{self._label} lives in Outsize's store and cannot be {what} here", hint=hint)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"<{self._label}: {tuple(self.shape)} {self.dtype}, in Outsize's store>"

    __setitem__ = _refused("written", _WRITTEN_HINT)
    __deepcopy__ = _refused("copied", "save the model with outsize.save and load it again")
    __reduce_ex__ = _refused("pickled", "use outsize.save(model, path)")
    share_memory_ = _refused("shared between processes", "save the model and load it in each process")
    data_ptr = untyped_storage = storage = _typed_storage = _refused("accessed as raw memory", _MEMORY_HINT)

    def is_shared(self) -> bool:
        """False: what is in the store belongs to this process."""
        return False

    def __dlpack__(self, **options: Any) -> Any:
        """A capsule that owns a copy of the value."""
        return self._fetch().detach().__dlpack__(**options)

    def numpy(self, *, force: bool = False) -> Any:
        """The value as an array of its own."""
        return self._fetch().detach().numpy(force=force)

    def tolist(self) -> Any:
        """The value as nested lists."""
        return self._fetch().tolist()


class Reading(_Placeholder):
    """A detached placeholder, such as `parameter.data` or an entry of `state_dict()`: it can be read only."""


class GradientPlaceholder(_Placeholder):
    """Stands in for `parameter.grad`; knows its norm without being read, and takes a factor instead of a write."""

    _norm: Callable[[], float]
    _scale_by: Callable[[float], None]
    _zero: Callable[[], None]

    @classmethod
    def of(
        cls,
        parameter: Tensor,
        label: str,
        fetch: Callable[[], Tensor],
        norm: Callable[[], float],
        scale_by: Callable[[float], None],
        zero: Callable[[], None],
    ) -> GradientPlaceholder:
        """The gradient of `parameter`; `norm` is its 2-norm, `scale_by` records a factor, `zero` the factor 0."""
        self = cls(parameter, label, fetch)
        assert isinstance(self, GradientPlaceholder)
        self._norm, self._scale_by, self._zero = norm, scale_by, zero
        return self

    @classmethod
    @outside_inference_mode()
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None
    ) -> Any:
        kwargs = kwargs or {}
        overload, first = func.overloadpacket, args[0]
        gradients = first if isinstance(first, list | tuple) else [first]
        if all(isinstance(gradient, GradientPlaceholder) for gradient in gradients):
            if overload in _NORMS and _is_whole_2_norm(overload, args, kwargs):
                norms = [
                    torch.tensor(gradient._norm(), dtype=torch.float32, device="cpu")
                    for gradient in gradients
                ]
                return norms if gradients is first else norms[0]
            if overload in _ZEROS:
                for gradient in gradients:
                    gradient._zero()
                return first
            if overload in (*_PRODUCTS, *_QUOTIENTS):
                factors = args[1] if isinstance(args[1], list | tuple) else [args[1]] * len(gradients)
                for gradient, factor in zip(gradients, map(float, factors), strict=True):
                    gradient._scale_by(factor if overload in _PRODUCTS else 1.0 / factor)
                return first
        return super().__torch_dispatch__(func, types, args, kwargs)


class OffloadedParameter(_Placeholder):
    """A parameter between visits. Its gradient is a `GradientPlaceholder`, or None.

    Reading it inside a computation that is differentiated is refused at `backward()`: the gradient would not reach the
    store.
    """

    _is_param = True
    _get_gradient: Callable[[], Tensor | None]
    _drop_gradient: Callable[[], None]

    @classmethod
    def of(
        cls,
        parameter: Tensor,
        label: str,
        dtype: torch.dtype,
        device: torch.device,
        fetch: Callable[[], Tensor],
        get_gradient: Callable[[], Tensor | None],
        drop_gradient: Callable[[], None],
    ) -> OffloadedParameter:
        """Stands in for `parameter`."""
        self = cls(parameter, label, fetch, dtype=dtype, device=device)
        assert isinstance(self, OffloadedParameter)
        self._get_gradient, self._drop_gradient = get_gradient, drop_gradient
        # A hook can only be given to what requires grad; it stays when that changes.
        self.requires_grad_()
        Tensor.register_hook(self, partial(_refuse_backward, label))  # type: ignore[no-untyped-call]
        self.requires_grad_(parameter.requires_grad)
        return self

    register_hook = register_post_accumulate_grad_hook = _refused(
        "given a hook", "read parameter.grad after backward()"
    )

    @property
    def data(self) -> Tensor:
        """The value, to be read."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        if isinstance(value, _Placeholder) and value._label == self._label:
            return  # `module.to(...)` that changes nothing
        self._refuse("written", _WRITTEN_HINT)

    @property
    def grad(self) -> Tensor | None:
        """The gradient that the next `step()` would use, or None."""
        return self._get_gradient()

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if isinstance(value, GradientPlaceholder) and value._label == f"{self._label}.grad":
            return  # `parameter.grad *= factor` assigns what it changed in place
        if value is not None:
            self._refuse("given a gradient", "gradients come from backward(); set None to drop one")
        self._drop_gradient()


def _is_view(func: Any) -> bool:
    """Whether the operator gives its first argument's own bytes, in another shape."""
    return any(each.alias_info is not None and not each.alias_info.is_write for each in func._schema.returns)


def _is_whole_2_norm(overload: Any, args: Args, kwargs: Kwargs) -> bool:
    """Whether a norm is the 2-norm of all elements."""
    order = args[1] if len(args) > 1 else kwargs.get("ord", 2)
    is_whole = overload is _aten._foreach_norm or (len(args) <= 2 and not kwargs.get("dim"))
    return bool(order == 2 and is_whole)


def stands_for_same(one: Tensor, other: Tensor) -> bool:
    """Whether both are placeholders of one parameter, such as the parameter and its entry in a state_dict."""
    return isinstance(one, _Placeholder) and isinstance(other, _Placeholder) and one._label == other._label


def _refuse_backward(label: str, gradient: Tensor) -> NoReturn:
    # Holds no placeholder: autograd's hooks are not seen by the garbage collector.
    raise UsageError(
        f"{label} lives in Outsize's store and cannot be differentiated outside the model's forward here",
        hint="read it under torch.no_grad(), or through .detach()",
    )
