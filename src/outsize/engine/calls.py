"""Calls of the root module: the running one, and what was learned of those before.

The first call of a kind is rehearsed; the very first settles where everything lives. Points ask here how the running
call's batch is cut, and whether it has labels.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedModel

from outsize.config import format_bytes
from outsize.engine.batch import BatchDims, Tile, tiles
from outsize.engine.effects import flatten, is_cache, without_empty_caches
from outsize.engine.hooks import has_user_hooks, inside
from outsize.engine.probe import SMALL_ROWS, BatchShape, Rehearsal, batch_shape, rehearse
from outsize.engine.surroundings import outside_inference_mode
from outsize.errors import BudgetError, UsageError
from outsize.model import Point, PointKind, attention_of, merges_rows
from outsize.plan import Direction, Visit
from outsize.store import memory

if TYPE_CHECKING:
    from outsize.engine.head import Logits
    from outsize.engine.layer import Layer
    from outsize.engine.session import Session


BESIDE_LOGIT_BYTES = 8
"""Bytes per logit that a caller takes without gradients: a copy in fp32, and its log-probabilities."""
_log = logging.getLogger(__name__)

WHOLE = (Tile(0, 1, 1),)
"""The tiles of a batch that is not cut."""


@dataclass(frozen=True, slots=True)
class Call:
    """A call of the root module, forward and backward; each of its visits takes `visit_bytes` at most."""

    rehearsal: Rehearsal
    shape: BatchShape
    tile_rows: int
    visit_bytes: int
    is_row_by_row: bool = False
    """Whether a visit of several rows at once would be wrong."""


class Calls:
    """What hooks of the root module tell of its calls, and points ask of them."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self.current: Call | None = None
        """The running call, else the last one; None while a cache is filled."""
        self.last_training: Call | None = None
        self.beside_logit_bytes = BESIDE_LOGIT_BYTES
        """What the caller makes of logits without gradients, per logit."""
        self._needed_bytes = 0
        """By the last call without gradients."""
        self._has_read = False
        """Whether a call without gradients was made, from which it is known what such calls leave of memory."""
        self.handles: list[Logits] = []
        """Logits of the running call, which can be read until it is over."""
        self.has_labels = False
        self.uncut: list[str] = []
        """Why calls so far were not cut into tiles."""
        self._kept_whole: set[str] = set()
        self._forward_order: list[Visit] = []
        self._rehearsals: dict[tuple[Any, ...], Rehearsal] = {}
        module = session.module
        self._modules = tuple(module.modules())
        layers = (point.module for point in session.cut.points if point.kind is PointKind.LAYER)
        self._inner = tuple(child for name in layers for child in inside(module.get_submodule(name)))
        self._positional = _positional(module)
        self._has_cache_switch = _has_cache_switch(module)
        self._merges_rows = merges_rows(module)
        module.register_forward_pre_hook(self.before, with_kwargs=True, prepend=True)
        module.register_forward_hook(self.after, with_kwargs=True, always_call=True)
        encoder = _encoder_of(module)
        if encoder is not None:
            encoder.register_forward_pre_hook(self.before_encoder, with_kwargs=True)

    @outside_inference_mode()
    def before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Make ready for a call: rehearse it, settle where nothing is settled yet, and say what will be visited.

        Returns the arguments where blocks compute. Raises UsageError, and BudgetError where the call does not fit.
        """
        session = self._session
        if session.probe is not None:
            return None
        if torch.compiler.is_compiling():
            raise UsageError(
                "torch.compile cannot trace a model that lives in Outsize's store",
                hint="call the model as it is: leave out torch.compile, or torch_compile of TrainingArguments",
            )
        session.check()
        self.has_labels = self._value("labels", args, kwargs) is not None
        args, kwargs, uses_cache = self._switched(args, kwargs)
        shape = batch_shape(module, args, kwargs)
        is_row_by_row = self._merges_rows and _is_packed(self._value("position_ids", args, kwargs))
        if uses_cache and is_row_by_row and shape.rows != 1:
            raise _packed_error(attention_of(module))
        if session.executor is None:
            memory.drop_file_pages()  # before the rehearsal, which touches again what computing needs
        if uses_cache:
            if session.executor is None:
                self._settle_with_cache(args, kwargs, shape)
            # A cache grows with every call; the order of visits is that of a call without.
            self.current = None
            self._use_what_is_left(session.budget.activation_bytes)
            session.running.begin(self._forward_order)
            return session.arguments.moved(args, kwargs)
        rehearsal = self._rehearsed(self._signature(args, kwargs), args, kwargs, shape)
        self._check_pinned_tiles(rehearsal, shape)
        if session.executor is None:
            session.settle(self._with_training(rehearsal, args, kwargs, shape), shape)
        self._begin(rehearsal, shape, is_row_by_row)
        return session.arguments.moved(args, kwargs)

    def _settle_with_cache(self, args: tuple[Any, ...], kwargs: dict[str, Any], shape: BatchShape) -> None:
        """Place and allocate for a first call that fills a cache, whose layers compute all rows at once."""
        session = self._session
        args, kwargs = without_empty_caches((args, kwargs))
        if self._has_cache_switch and not _has_cache(args, kwargs):
            args, kwargs = self._with_argument("use_cache", False, args, kwargs)
        signature = self._signature(args, kwargs)
        rehearsal = replace(self._rehearsed(signature, args, kwargs, shape), dims={})
        needed = self._with_training(rehearsal, args, kwargs, shape)
        session.settle(needed, shape)
        session.budget.begin_call(needed, shape)

    def _with_training(
        self, rehearsal: Rehearsal, args: tuple[Any, ...], kwargs: dict[str, Any], shape: BatchShape
    ) -> Rehearsal:
        """What memory is placed for: this call or, where a model that has an optimizer is first evaluated, its training."""
        if self._session.rule is None or torch.is_grad_enabled() or _has_cache(args, kwargs):
            return rehearsal
        if self._has_cache_switch:
            args, kwargs = self._with_argument("use_cache", False, args, kwargs)
        with torch.enable_grad():
            return _rehearsal(self._session, args, kwargs, shape)

    def _value(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """The argument `name`, by keyword or by position; None where it is not given."""
        return dict(zip(self._positional, args, strict=False)).get(name, kwargs.get(name))

    def _with_argument(
        self, name: str, value: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same arguments with another `value` for `name`."""
        if name in self._positional[: len(args)]:
            place = self._positional.index(name)
            return (*args[:place], value, *args[place + 1 :]), kwargs
        return args, {**kwargs, name: value}

    def _switched(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], bool]:
        """Arguments that fill a cache only where that can be, and whether they do."""
        has_cache = _has_cache(args, kwargs)
        if torch.is_grad_enabled() and has_cache:
            raise UsageError(
                "past_key_values with gradients on: recomputation would append to the cache a second time",
                hint="call the model under torch.no_grad(), or without a cache",
            )
        if self._has_cache_switch and (torch.is_grad_enabled() or (self.has_labels and not has_cache)):
            args, kwargs = self._with_argument("use_cache", False, args, kwargs)
        is_off = not self._has_cache_switch or self._value("use_cache", args, kwargs) is False
        return args, kwargs, has_cache or not is_off

    def _rehearsed(
        self, signature: tuple[Any, ...], args: tuple[Any, ...], kwargs: dict[str, Any], shape: BatchShape
    ) -> Rehearsal:
        """The rehearsal of calls like this one; made where there is none, or none of rows as long."""
        rehearsal = self._rehearsals.get(signature)
        if rehearsal is None or shape.row_elements > rehearsal.row_elements:
            rehearsal = self._rehearsals[signature] = _rehearsal(self._session, args, kwargs, shape)
            if rehearsal.uncut and rehearsal.uncut not in self.uncut:
                self.uncut.append(rehearsal.uncut)
                _log.warning("layers compute the whole batch at once: %s", rehearsal.uncut)
            self._forward_order = [v for v in rehearsal.visits if v.direction is Direction.FORWARD]
        return rehearsal

    def _check_pinned_tiles(self, rehearsal: Rehearsal, shape: BatchShape) -> None:
        """Raise UsageError where smaller tiles are pinned than the batch, of which no part can be computed."""
        pinned = self._session.settings.pins.tile_rows
        if rehearsal.uncut and pinned is not None and pinned < (shape.rows or 1):
            raise UsageError(
                f"tile_rows={pinned} is pinned, and {rehearsal.uncut}",
                hint="leave tile_rows out, or call the model with arguments whose first dimension is the batch",
            )

    def _begin(self, rehearsal: Rehearsal, shape: BatchShape, is_row_by_row: bool) -> None:
        """The call runs from here on: its visits are told to whoever moves blocks."""
        session = self._session
        tile_rows = session.budget.begin_call(rehearsal, shape)
        self.current = Call(
            rehearsal, shape, 1 if is_row_by_row else tile_rows, session.budget.visit_bytes, is_row_by_row
        )
        if torch.is_grad_enabled():
            self.last_training = self.current
        self._use_what_is_left(session.budget.call_bytes)
        session.running.begin(rehearsal.visits)
        if session.keeper is not None:
            session.keeper.begin()

    def _use_what_is_left(self, needed_bytes: int) -> None:
        """Where a call takes less than was planned for, or more than the last one, more or fewer weights stay in memory."""
        if self._has_read and not torch.is_grad_enabled():
            if needed_bytes < self._needed_bytes:
                memory.give_back()  # what the larger call before freed
            self._needed_bytes = needed_bytes
            self._session.use_what_is_left(needed_bytes)

    def rehearsed_for(self, kwargs: dict[str, Any]) -> tuple[Rehearsal, BatchShape]:
        """The rehearsal of a call like this one, which is not made; nothing is placed."""
        memory.drop_file_pages()
        shape = batch_shape(self._session.module, (), kwargs)
        return _rehearsal(self._session, (), kwargs, shape), shape

    @outside_inference_mode()
    def settle_for(self, kwargs: dict[str, Any]) -> None:
        """Place and allocate for calls like this one, which is not made. Raises BudgetError where they do not fit, having
        kept nothing of their arguments."""
        try:
            self.before(self._session.module, (), kwargs)
        except BudgetError:
            self._rehearsals.clear()
            self._session.forget_costs()
            raise
        finally:
            self.after(self._session.module, (), kwargs, None)

    def read_ahead(self) -> None:
        """Start reading what a call like the last one needs first, beside what its caller does meanwhile."""
        if self._session.executor is not None and self.current is not None:
            self._session.executor.begin(self.current.rehearsal.visits)

    def before_encoder(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Settle for the whole model where `generate` runs the encoder alone before the model was ever called.

        What is rehearsed is the call that follows: the encoder's arguments, and one token for the decoder.
        """
        if (
            self._session.executor is not None
            or self._session.probe is not None
            or args
            or torch.is_grad_enabled()
        ):
            return
        rows = next((value.shape[0] for value in kwargs.values() if isinstance(value, torch.Tensor)), 1)
        first = torch.zeros(rows, 1, dtype=torch.long, device=self._session.torch_device)
        self.settle_for({**kwargs, "decoder_input_ids": first, "use_cache": False})

    def after(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """The forward of the call is over, whether it failed or not."""
        if self._session.probe is not None:
            return
        for handle in self.handles:
            handle.seal()
        self.handles.clear()
        self.has_labels = False
        self._session.arguments.forget()
        self._has_read |= output is not None and not torch.is_grad_enabled()

    def _signature(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """What decides the order of visits and the batch dimensions: everything but sizes and what tensors hold.

        Two tensors are looked at, since models branch on what they hold: a mask that masks nothing is left out, and
        positions that begin anew within a row stand for packed documents, which need a mask.
        """

        def describe(value: Any, name: str = "") -> Any:
            if isinstance(value, torch.Tensor):
                masks = False
                if value.dim() == 2 and not value.is_floating_point():
                    if name == "position_ids":
                        masks = bool((value.diff() != 1).any())
                    elif name.endswith("mask"):
                        masks = bool((value == 0).any())
                return value.dim(), value.dtype, masks
            is_flag = isinstance(value, bool | str) or (isinstance(value, int) and name in self._positional)
            return value if is_flag else type(value).__name__

        extra = {str(place): value for place, value in enumerate(args[len(self._positional) :])}
        named = {**dict(zip(self._positional, args, strict=False)), **extra, **kwargs}
        leaves = sorted(
            (name, [describe(leaf, name) for leaf in flatten(value)[0]])
            for name, value in named.items()
            if value is not None
        )
        trains = tuple(parameter.requires_grad for parameter in self._session.parameters.values())
        training = tuple(child.training for child in self._modules)
        hooked = has_user_hooks(self._inner)
        return torch.is_grad_enabled(), hash(training), hash(trains), hooked, repr(leaves)

    def rehearse_with_labels(self, kwargs: dict[str, Any], shape: BatchShape) -> Rehearsal:
        """A rehearsal of a call that was not made, with labels."""
        self.has_labels = True
        if self._has_cache_switch:
            kwargs = {**kwargs, "use_cache": False}
        try:
            return rehearse(self._session, (), kwargs, shape)
        finally:
            self.has_labels = False
            self.handles.clear()

    @property
    def row_tokens(self) -> int:
        """Tokens of a row of the running call's batch."""
        return 1 if self.current is None else self.current.shape.row_tokens

    def keep_whole(self, point: Point) -> tuple[Tile, ...]:
        """Never tile `point` again; the one tile it runs as."""
        self._kept_whole.add(point.module)
        return WHOLE

    def shrink_tiles(self, rows: int, row_tokens: int) -> None:
        """Compute at most `rows` rows at once from now on, of `row_tokens` each; in calls to come, as many tokens."""
        before = 0
        for call in (self.current, self.last_training):
            if call is not None and call.tile_rows > rows:
                before = call.tile_rows
        self.current = _with_tiles(self.current, rows)
        self.last_training = _with_tiles(self.last_training, rows)
        self._session.budget.shrink_tiles(rows * row_tokens)
        if before:
            self._session.stepdown.note(f"blocks compute {rows} rows at once instead of {before}")

    def tiles(
        self, layer: Layer, tensors: Sequence[torch.Tensor]
    ) -> tuple[BatchDims | None, tuple[Tile, ...]]:
        """How the running call's batch is cut for `layer`; one tile where the batch dimension is not known."""
        dims, parts = self._tiles(layer, tensors)
        return dims, self._checked(parts)

    def changes_state(self, layer: Layer) -> bool:
        """Whether `layer` changes buffers or attributes of its own, as far as any call so far has shown."""
        if layer.has_batch_statistics and layer.module.training:
            return True
        name = layer.point.module
        return any(name in rehearsal.changing for rehearsal in self._rehearsals.values())

    def in_one_tile(self) -> tuple[Tile, ...]:
        """The tiles of a layer where something else than its tensors depends on the batch: one."""
        return self._checked(WHOLE)

    def _checked(self, parts: tuple[Tile, ...]) -> tuple[Tile, ...]:
        if self.current is not None and self.current.is_row_by_row and self.current.shape.rows != len(parts):
            raise _packed_error(attention_of(self._session.module))
        return parts

    def _tiles(
        self, layer: Layer, tensors: Sequence[torch.Tensor]
    ) -> tuple[BatchDims | None, tuple[Tile, ...]]:
        current = self.current
        if current is None or current.shape.rows is None:
            return None, WHOLE
        dims, rows = current.rehearsal.dims.get(layer.point.module), current.shape.rows
        if layer.point.module in self._kept_whole:
            return None, WHOLE
        if dims is None or (layer.has_batch_statistics and layer.module.training):
            return None, WHOLE
        if all(dim is None for dim in dims.inputs):
            return None, WHOLE  # nothing of the batch enters
        fits = len(dims.inputs) == len(tensors) and all(
            dim is None or (dim < tensor.dim() and tensor.shape[dim] % rows == 0)
            for dim, tensor in zip(dims.inputs, tensors, strict=True)
        )
        return (dims, tuple(tiles(rows, current.tile_rows))) if fits else (None, WHOLE)


def _has_cache(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    return any(map(is_cache, flatten((args, kwargs))[0]))


def _is_packed(positions: Any) -> bool:
    """Whether position ids begin anew within a row, which stands for several documents."""
    return (
        isinstance(positions, torch.Tensor) and positions.dim() == 2 and bool((positions.diff() != 1).any())
    )


def _packed_error(attention: str | None) -> UsageError:
    return UsageError(
        f"{attention} keeps packed documents apart in calls of one row, and this one cannot be cut into rows",
        hint='load the model with attention="sdpa", or leave packing out',
    )


def _with_tiles(call: Call | None, rows: int) -> Call | None:
    return None if call is None else replace(call, tile_rows=min(call.tile_rows, rows))


def _encoder_of(module: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder of transformers, which `generate` calls by itself."""
    if not isinstance(module, PreTrainedModel) or not module.config.is_encoder_decoder:
        return None
    encoder: nn.Module = module.get_encoder()
    return None if encoder is module else encoder


def _positional(module: nn.Module) -> list[str]:
    """The parameters of the module's forward that can be given by position, in order."""
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(module.forward).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind in kinds]


def _has_cache_switch(module: nn.Module) -> bool:
    """Whether `use_cache=False` reaches the part of the model that would make a cache."""
    names = inspect.signature(module.forward).parameters
    if "use_cache" in names:
        return True
    passes_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in names.values())
    inner = (child for child in module.modules() if isinstance(child, PreTrainedModel))
    return passes_on and any("use_cache" in inspect.signature(child.forward).parameters for child in inner)


def _rehearsal(
    session: Session, args: tuple[Any, ...], kwargs: dict[str, Any], shape: BatchShape
) -> Rehearsal:
    """Raises BudgetError where a device has not even memory for that."""
    try:
        return rehearse(session, args, kwargs, shape)
    except torch.OutOfMemoryError as error:
        what, rows = str(error).partition(". ")[0], min(shape.rows or 1, SMALL_ROWS[-1])
        raise BudgetError(
            f"the device ran out of memory ({what}) where a block was tried with up to {rows} rows of "
            f"{shape.row_tokens} tokens; {format_bytes(session.device.free_bytes())} are free",
            hint="give more with device=, or use shorter sequences"
            + (", or a batch of one row" if rows > 1 else ""),
        ) from error.with_traceback(None)  # whose frames hold what did not fit
