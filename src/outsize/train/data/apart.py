"""Whether a model keeps packed documents apart.

transformers builds an attention mask that is block-diagonal where positions begin anew, in every model that hands
`position_ids` to its mask function. Models without positions (ALiBi), with masks of their own, or with layers that
carry a state along the sequence do not.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Mapping

from torch import nn

_MASK_FUNCTION = re.compile(r"create_(causal|sliding_window_causal|chunked_causal)_mask")

_LOOK_BACK = frozenset({"blt"})
"""Model types whose embeddings are made of several tokens, whatever their positions: no mask keeps those apart."""

_ATTENTION = frozenset({"full_attention", "sliding_attention", "chunked_attention"})


def keeps_apart(model: nn.Module) -> bool:
    """Whether `model`, given positions that begin anew, attends within pieces only.

    Decided from the source of its classes: positions are an argument, and a mask is made from them.
    """
    config = getattr(model, "config", None)
    layer_types = getattr(config.get_text_config(), "layer_types", None) if config is not None else None
    if not set(layer_types or ()) <= _ATTENTION or getattr(config, "model_type", None) in _LOOK_BACK:
        return False
    if "position_ids" not in inspect.signature(model.forward).parameters:
        return False
    return any(_masks_by_position(kind) for kind in {type(module) for module in model.modules()})


def _masks_by_position(kind: type[nn.Module]) -> bool:
    """Whether the class's forward calls a mask function of transformers with `position_ids`."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind.forward)))
    except (OSError, TypeError, SyntaxError):
        return False
    assigned = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            function = ast.unparse(assigned[name]) if name in assigned else name
            if _MASK_FUNCTION.search(function) and _gives_positions(node, assigned):
                return True
    return False


def _gives_positions(call: ast.Call, assigned: Mapping[str, ast.expr]) -> bool:
    """Whether `position_ids` are among the arguments, by name or in a dictionary that is unpacked."""
    for keyword in call.keywords:
        value = keyword.value
        if keyword.arg == "position_ids":
            return not isinstance(value, ast.Constant)
        unpacked = assigned.get(value.id) if keyword.arg is None and isinstance(value, ast.Name) else None
        if isinstance(unpacked, ast.Dict):
            return any(isinstance(key, ast.Constant) and key.value == "position_ids" for key in unpacked.keys)
    return False
