"""What stands where layers had their matrices: an `nn.Linear`, and experts, with codes and scales instead.

Experts keep their module; transformers calls ours among its implementations of them, as it does with attention.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from outsize.config import Weights
from outsize.errors import UsageError
from outsize.quant.formats import FORMATS
from outsize.quant.product import product

EXPERTS = "outsize_few_bits"
_CHOOSERS = ("gate", "router")
"""Matrices that choose experts: small, and a wrong choice is worse than a rounded weight."""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A weight in few bits: the parameter's name in the model, the shape that it had, and how it is encoded.

    `[N, K]`, or `[E, N, K]` of experts, `[E, K, N]` where it is transposed.
    """

    name: str
    shape: tuple[int, ...]
    weights: Weights
    is_transposed: bool = False

    @property
    def scale_name(self) -> str:
        """The name of the parameter that holds its scales."""
        return scale_of(self.name)


def scale_of(parameter: str) -> str:
    """The name of what holds the scales of `parameter`."""
    return f"{parameter}_scale"


class QuantizedLinear(nn.Module):
    """`x @ W.T + bias` with W in few bits, parameters on meta, without gradients. The product is in bfloat16, the result
    in the type of `x`."""

    def __init__(self, linear: nn.Linear, weights: Weights) -> None:
        super().__init__()
        self.in_features = linear.in_features
        self.out_features = linear.out_features
        self.weights = weights
        codes, scales = FORMATS[weights].shapes(linear.out_features, linear.in_features)
        self.weight = _on_meta(codes)
        self.weight_scale = _on_meta(scales)
        self.bias: nn.Parameter | None
        self.register_parameter("bias", linear.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., out_features]` of `x [..., in_features]`. Raises UsageError where a gradient is asked for."""
        _check_no_gradient(x, self.weights)
        rows = x.reshape(-1, self.in_features).bfloat16()
        output = product(rows, self.weight, self.weight_scale, self.weights).to(x.dtype)
        if self.bias is not None:
            output += self.bias
        return output.view(*x.shape[:-1], self.out_features)

    def extra_repr(self) -> str:
        """As of `nn.Linear`."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, weights={self.weights}"
        )


def quantize(
    module: nn.Module, layers: Iterable[str], weights: Weights, kept: frozenset[str]
) -> tuple[Mapping[str, Matrix], list[str]]:
    """Put the matrices of linear layers and of experts inside the submodules `layers` in few bits, all parameters on meta.

    What cannot be encoded, chooses experts, shares its weight or is named in `kept` stays. Returns the matrices by the
    names of the parameters that hold them, and the names of what stayed.
    """
    num_owners: dict[int, int] = {}
    for inner in module.modules():
        for parameter in inner._parameters.values():
            num_owners[id(parameter)] = num_owners.get(id(parameter), 0) + 1
    inside = {
        path: inner
        for layer in layers
        for path, inner in module.get_submodule(layer).named_modules(prefix=layer)
    }
    experts = {path: inner for path, inner in inside.items() if _is_experts(inner)}
    if not all(path not in kept and _fits(inner, weights) for path, inner in experts.items()):
        experts = {}  # one implementation serves all of them
    found: list[Matrix] = []
    for path, inner in experts.items():
        found += _quantize_experts(path, inner, weights)
    stayed = []
    for path, inner in module.named_modules():
        if path in experts or not (type(inner) is nn.Linear or _is_experts(inner)):
            continue
        parent, _, attribute = path.rpartition(".")
        if (
            path not in inside
            or path in kept
            or type(inner) is not nn.Linear
            or attribute in _CHOOSERS
            or num_owners[id(inner.weight)] > 1
            or not FORMATS[weights].fits(inner.out_features, inner.in_features)
        ):
            stayed.append(path)
            continue
        setattr(module.get_submodule(parent), attribute, QuantizedLinear(inner, weights))
        found.append(Matrix(f"{path}.weight", (inner.out_features, inner.in_features), weights))
    return {matrix.name: matrix for matrix in found}, stayed


def _is_experts(module: nn.Module) -> bool:
    """Whether transformers computes `module` by one of its implementations of experts, from two stacks of matrices."""
    return hasattr(module, "has_gate") and all(
        isinstance(stack := module._parameters.get(name), nn.Parameter) and stack.dim() == 3
        for name in _stacks(module)
    )


def _stacks(module: Any) -> tuple[str, str]:
    return ("gate_up_proj" if module.has_gate else "up_proj"), "down_proj"


def _fits(module: Any, weights: Weights) -> bool:
    shapes = [module._parameters[name].shape[1:] for name in _stacks(module)]
    return not getattr(module, "has_post_expert_norm", False) and all(  # which not every version has
        FORMATS[weights].fits(*(reversed(shape) if module.is_transposed else shape)) for shape in shapes
    )


def _quantize_experts(path: str, module: Any, weights: Weights) -> list[Matrix]:
    matrices = []
    for name in _stacks(module):
        num_experts, *shape = module._parameters[name].shape
        codes, scales = FORMATS[weights].shapes(*(reversed(shape) if module.is_transposed else shape))
        matrices.append(Matrix(f"{path}.{name}", (num_experts, *shape), weights, module.is_transposed))
        module.register_parameter(name, _on_meta((num_experts, *codes)))
        module.register_parameter(scale_of(name), _on_meta((num_experts, *scales)))
    module.outsize_weights = weights
    module.config._experts_implementation = EXPERTS
    return matrices


def _experts(
    module: Any, rows_TK: torch.Tensor, experts_TC: torch.Tensor, shares_TC: torch.Tensor
) -> torch.Tensor:
    """`[T, K]`: for each token what its C experts make of it, weighted. One expert after the other."""
    _check_no_gradient(rows_TK, module.outsize_weights)
    output_TK = torch.zeros_like(rows_TK)
    if rows_TK.is_meta:
        return output_TK
    first, second = _stacks(module)

    def multiply(rows: torch.Tensor, name: str, expert: int) -> torch.Tensor:
        codes, scales = getattr(module, name)[expert], getattr(module, scale_of(name))[expert]
        made = product(rows.bfloat16(), codes, scales, module.outsize_weights).to(rows_TK.dtype)
        return made + getattr(module, f"{name}_bias")[expert] if module.has_bias else made

    for expert in experts_TC.unique().tolist():
        if expert >= module.num_experts:
            continue  # of tokens that are masked
        tokens, choices = (experts_TC == expert).nonzero(as_tuple=True)
        inner = multiply(rows_TK[tokens], first, expert)
        inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
        made = multiply(inner, second, expert) * shares_TC[tokens, choices, None]
        output_TK.index_add_(0, tokens, made.to(output_TK.dtype))
    return output_TK


ALL_EXPERTS_FUNCTIONS.register(EXPERTS, _experts)


def _check_no_gradient(x: torch.Tensor, weights: Weights) -> None:
    if torch.is_grad_enabled() and x.requires_grad:
        raise UsageError(
            f"weights in {weights} cannot be trained, nor gone back through",
            hint="call the model under torch.no_grad(), or open the original weights",
        )


def _on_meta(shape: tuple[int, ...]) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=torch.bfloat16, device="meta"), requires_grad=False)
