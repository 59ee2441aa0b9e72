"""Models whose matrices are in few bits, and the folders that hold them so.

`outsize.save` of such a model writes a folder of its own kind: `config.json` says so under `quantization_config`, and names
the layers that were left as they are; tensors have the names that the model gives them, without transformers' conversions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from outsize.config import Weights
from outsize.errors import ConfigError, ModelError
from outsize.model.cut import cut
from outsize.model.names import full_precision_names
from outsize.model.points import PointKind
from outsize.quant import Matrix, quantize

METHOD = "outsize"
"""Under `quant_method` in a config."""


def parse_weights(weights: str | None) -> Weights | None:
    """What `weights=` names. Raises ConfigError."""
    if weights is not None and weights not in list(Weights):
        raise ConfigError(f"weights={weights!r}", hint=f"one of {', '.join(Weights)}, or leave it out")
    return None if weights is None else Weights(weights)


def stored_weights(folder: Path) -> Weights | None:
    """How the folder of a model holds the matrices of its layers; None for numbers as ever."""
    try:
        config = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        return None  # opening it says why
    settings = config.get("quantization_config") if isinstance(config, dict) else None
    return weights_of(settings) if settings is not None and is_ours(settings) else None


def is_ours(settings: Any) -> bool:
    """Whether a config's `quantization_config` is one that `restore` understands."""
    return isinstance(settings, Mapping) and settings.get("quant_method") == METHOD


def is_quantized(module: nn.Module) -> bool:
    """Whether `module` has matrices in few bits."""
    return is_ours(getattr(getattr(module, "config", None), "quantization_config", None))


def weights_of(settings: Mapping[str, Any]) -> Weights:
    """Raises ModelError where a later release wrote it."""
    if settings.get("weights") not in list(Weights):
        raise ModelError(
            f"weights of the kind {settings.get('weights')!r} are not known to this release",
            hint="open it with the release that wrote it, or a later one",
        )
    return Weights(settings["weights"])


def restore(module: nn.Module, settings: Mapping[str, Any]) -> None:
    """Make `module` the model whose config has `settings`, before its weights are read."""
    put_in(module, weights_of(settings), frozenset(settings.get("modules_to_not_convert") or ()))


def put_in(module: nn.Module, weights: Weights, kept: frozenset[str]) -> Mapping[str, Matrix]:
    """Put matrices in few bits into `module`, in place, and say so in its config; linear layers in `kept` stay."""
    names = full_precision_names(module)
    kept |= {name.rpartition(".")[0] for name in names}
    layers = [point.module for point in cut(module).points if point.kind is PointKind.LAYER]
    matrices, left = quantize(module, layers, weights, kept)
    settings = {"quant_method": METHOD, "weights": str(weights), "modules_to_not_convert": left}
    config: Any = module.config
    config.quantization_config = settings
    module._weight_conversions = []  # type: ignore[assignment]  # saved as it is
    module.requires_grad_(False)
    return matrices
