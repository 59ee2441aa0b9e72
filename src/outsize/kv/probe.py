"""Whether a model can run over pages, found by looking at a call of it: never by its name.

A model must declare that its attention can be replaced, and is then called once while every layer's attention is seen. It
is refused, with a reason, where a layer does not come by (GPT-J, Falcon and BLOOM compute their own, without an error),
gives an argument that we do not know, or asks for a mask that its layers' arguments do not tell of (the chunks of
Llama 4). What is refused is served by transformers' own `generate`, a request at a time.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import torch
from transformers import PreTrainedModel

from outsize.errors import OutsizeError
from outsize.kv.attention import Mask, masks_watched, switched
from outsize.kv.store import LayerShape

MOST_POSITIONS = 1 << 20
"""A request is never longer than this, whatever a model says of itself."""

_NEEDED = ("input_ids", "position_ids", "logits_to_keep")
"""What the model's forward must take by name: a packed row needs its positions, and few of its logits."""

_USED = {"scaling", "softcap", "sliding_window", "s_aux"}
_HARMLESS = {"dropout", "position_ids", "use_cache", "is_causal"}
"""And what says which outputs are wanted."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
"""What keys and values may be: attention over pages is computed in fp32 or wider."""

_NUM_TOKENS = 3


class NotPageableError(Exception):
    """The model cannot run over pages; the text says why."""


@dataclass(frozen=True, slots=True)
class Pageable:
    """What a pass needs to know of a model. Positions are below `most_positions`.

    In sequences of more than `long_after` tokens all positions are rotated in another way (`longrope`), and a pass must not
    hold both kinds; None where there is but one way.
    """

    layers: dict[int, LayerShape]
    dtype: torch.dtype
    """Of keys and values, as the layers compute them; the widest, where they differ."""
    most_positions: int
    long_after: int | None


@dataclass
class _Watcher:
    """Looks on in the place of a pass, and answers with zeros."""

    layers: dict[int, LayerShape] = field(default_factory=dict)
    dtypes: list[torch.dtype] = field(default_factory=list)
    devices: set[torch.device] = field(default_factory=set)
    faults: list[str] = field(default_factory=list)

    def __repr__(self) -> str:
        return "<watcher>"

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: Mapping[str, Any],
    ) -> torch.Tensor:
        """Note the layer, and what it gives that we would not honour."""
        given = {name for name, value in options.items() if value is not None}
        unknown = {name for name in given - _USED - _HARMLESS if not name.startswith("output_")}
        self.faults += [f"layer {layer} passes {name} to its attention" for name in sorted(unknown)]
        if mask is not None:
            self.faults.append(f"layer {layer} makes a mask of its own")
        if options.get("is_causal") is False:
            self.faults.append(f"layer {layer} looks ahead")
        for part in (key, value):
            self.dtypes.append(part.dtype)
            self.devices.add(part.device)
            if part.dtype not in _DTYPES:
                self.faults.append(f"layer {layer} has keys or values of type {part.dtype}")
        if (
            query.shape[1] % key.shape[1]
            or query.shape[3] != key.shape[3]
            or key.shape[1:3] != value.shape[1:3]
        ):
            shapes = [tuple(part.shape) for part in (query, key, value)]
            self.faults.append(f"layer {layer} has queries, keys and values of shapes {shapes}")
        shape = LayerShape(
            query.shape[1], key.shape[1], key.shape[3], value.shape[3], options.get("sliding_window")
        )
        if layer in self.layers or query.shape[2] != key.shape[2]:
            self.faults.append(f"layer {layer} attends more than once")
        self.layers[layer] = shape
        return query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])


def probe(model: torch.nn.Module, call: Callable[[dict[str, Any]], object]) -> Pageable:
    """Call the model once, by `call(arguments)`, and look on. Raises NotPageableError."""
    if not isinstance(model, PreTrainedModel) or model.config.is_encoder_decoder:
        raise NotPageableError("it is no decoder of transformers")
    if not getattr(model, "_supports_attention_backend", False):
        raise NotPageableError("it does not declare that its attention can be replaced")
    parameters = inspect.signature(model.forward).parameters
    if missing := [name for name in _NEEDED if name not in parameters]:
        raise NotPageableError(f"its forward takes no {missing[0]}")
    config = model.config.get_text_config(decoder=True)
    most_positions = min(getattr(config, "max_position_embeddings", None) or MOST_POSITIONS, MOST_POSITIONS)
    long_after = _long_after(config)
    watcher = _Watcher()
    ids = torch.zeros(1, _NUM_TOKENS, dtype=torch.long, device="cpu")
    arguments = {
        "input_ids": ids,
        "position_ids": torch.arange(_NUM_TOKENS, device="cpu").unsqueeze(0),
        "logits_to_keep": torch.tensor([_NUM_TOKENS - 1], device="cpu"),
        "use_cache": False,
        "paged": watcher,
    }
    with switched(model), masks_watched() as masks, torch.no_grad():
        try:
            call(arguments)
        except OutsizeError:
            raise
        except Exception as error:  # whatever a model makes of a call it was not written for
            raise NotPageableError(f"a packed row fails: {error}") from error
    if watcher.faults:
        raise NotPageableError(watcher.faults[0])
    if len(watcher.devices) > 1:
        raise NotPageableError(f"its layers are on {len(watcher.devices)} devices")
    expected = set(range(config.num_hidden_layers))
    if watcher.layers.keys() != expected:
        raise NotPageableError(
            f"{len(watcher.layers)} of {len(expected)} layers call an attention that can be replaced"
        )
    windows = {layer.window for layer in watcher.layers.values()}
    for mask in masks:
        window = _window_of(mask, most_positions)
        if window == 0:
            continue  # made for a kind of layer that the model has none of
        if window not in windows and not (window is None and _reach(windows) >= most_positions):
            raise NotPageableError(f"it masks with a window of {window}, and its layers say {windows}")
    dtype = reduce(torch.promote_types, watcher.dtypes)
    return Pageable(watcher.layers, dtype, most_positions, long_after)


def _reach(windows: set[int | None]) -> int:
    return max((window for window in windows if window is not None), default=0)


def _long_after(config: Any) -> int | None:
    """Raises NotPageableError for rotations that depend on the lengths of all requests of a pass."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    types = {kind.get("rope_type") for kind in kinds}
    if "dynamic" in types or ("longrope" in types and len(types - {None}) > 1):
        raise NotPageableError("the rotation of its positions depends on the longest request of a pass")
    longs = [kind for kind in kinds if kind.get("rope_type") == "longrope"]
    return int(longs[0]["original_max_position_embeddings"]) if longs else None


def _window_of(mask: Mask, most_positions: int) -> int | None:
    """The positions that a mask lets be seen: a window's size, or None for all before. Raises NotPageableError for others.

    Asked at the two last positions: what sees a number of positions that changes otherwise than by one is no window.
    """
    keys, zero = torch.arange(most_positions, device="cpu"), torch.tensor(0, device="cpu")
    seen = []
    for position in (most_positions - 2, most_positions - 1):
        allowed = mask(zero, zero, torch.tensor(position, device="cpu"), keys).flatten()
        count = int(allowed.sum())
        if not bool(allowed[position - count + 1 : position + 1].all()):
            raise NotPageableError("it masks in a way that is no window")
        seen.append(count)
    if seen[1] == most_positions:
        return None
    if seen[0] != seen[1]:
        raise NotPageableError("it masks in chunks")
    return seen[1]
