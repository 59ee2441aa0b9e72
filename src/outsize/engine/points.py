"""The points of a model: modules whose forward becomes a visit of their blocks."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from outsize.engine.current_call import CurrentCall
from outsize.engine.dry_run import AnyPoint
from outsize.engine.embedding import Embedding
from outsize.engine.head import Head, TiledLoss
from outsize.engine.layer import Layer, Loose
from outsize.engine.model import Model
from outsize.engine.rng_autocast import outside_inference_mode
from outsize.engine.visits import Visits
from outsize.model import Cut, Point, PointKind


def install(visits: Visits) -> Mapping[str, AnyPoint]:
    """Take over the forward of each point's module; the points by module."""
    model = visits.model
    points: dict[str, AnyPoint] = {}
    for point in model.cut.points:
        module = model.module.get_submodule(point.module)
        points[point.module] = made = _made(point, module, visits)
        # An instance attribute shadows the method, as accelerate does; the class stays as it is.
        module.forward = _entry(point.module, made, visits.call, module.forward)
    _move_buffers(model)
    original = getattr(model.module, "loss_function", None)
    if original is ForCausalLMLoss:
        model.module.loss_function = TiledLoss(original, model.arguments)  # type: ignore[assignment]
    return points


def never_streamed(cut: Cut) -> frozenset[str]:
    """Blocks that stay in memory: two that are visited at once would need two slots of every class.

    Of a layer with a block of its own and one of fp32 parameters, the latter stays.
    """
    uses = Counter(name for point in cut.points for name in point.blocks)
    found: set[str] = set()
    for point in cut.points:
        if point.kind in (PointKind.LAYER, PointKind.LOOSE) and len(point.blocks) > 1:
            own = [name for name in point.blocks if name not in cut.full_precision]
            streams = len(own) == 1 and uses[own[0]] == 1
            found |= {name for name in point.blocks if not streams or name != own[0]}
    return frozenset(found)


def _made(point: Point, module: nn.Module, visits: Visits) -> AnyPoint:
    match point.kind:
        case PointKind.LAYER:
            return Layer(visits, point, module, is_repeated=_is_repeated(module, visits.model))
        case PointKind.LOOSE:
            return Loose(visits, point, module)
        case PointKind.EMBEDDING:
            assert isinstance(module, nn.Embedding)
            return Embedding(visits, point, module)
        case PointKind.HEAD:
            assert isinstance(module, nn.Linear)
            return Head(visits, point, module)


def _is_repeated(module: nn.Module, model: Model) -> bool:
    """Whether `module` is a layer with matrices, and others of the model are of its class."""
    if all(parameter.dim() < 2 for parameter in module.parameters()):
        return False
    layers = (point.module for point in model.cut.points if point.kind is PointKind.LAYER)
    return sum(type(model.module.get_submodule(name)) is type(module) for name in layers) > 1


def _entry(name: str, point: AnyPoint, call: CurrentCall, original: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of the module `name`, with the signature of `original`: transformers and Trainer inspect it."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        with outside_inference_mode():
            if call.dry_answer is not None:
                return call.dry_answer(name, args, kwargs)
            return point(*args, **kwargs)

    forward.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    forward.__doc__ = original.__doc__
    return forward


def _move_buffers(model: Model) -> None:
    """Buffers belong to no block: they stay where blocks compute. Those made in inference mode become ordinary ones."""
    for owner in model.module.modules():
        for name, buffer in owner._buffers.items():
            if buffer is None:
                continue
            if buffer.device != model.torch_device or buffer.is_inference():
                owner._buffers[name] = buffer.to(model.torch_device, copy=True)
