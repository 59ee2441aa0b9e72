"""One layer computed on weights of zero, which take no memory: to be counted, or timed, before anything is read."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from outsize.engine.batch import Shape, Tensors
from outsize.engine.layer import Layer, LayerCall, installed
from outsize.engine.model import Model
from outsize.plan.workload import BatchDims, Kind
from outsize.store import memory


@final
@dataclass(frozen=True, slots=True)
class LayerOnZeros:
    """A visit of `layer` with the arguments of `call`, on weights of zero."""

    model: Model
    layer: Layer
    call: LayerCall

    def compute(self, tensors: Tensors, *, trains: bool, differentiates: bool) -> tuple[Tensors, int]:
        """Forward and, if it differentiates, backward.

        Returns the outputs (of a backward: their shapes), and the bytes that the forward saves for the backward beside its
        inputs.
        """
        values = self._weights()
        module, bindings = self.model.module, self.layer.point.bindings
        if not differentiates:
            with installed(module, bindings, values), torch.no_grad():
                return [output.detach().clone() for output in self.call.run(tensors)], 0
        leaves = {name: value.detach().requires_grad_(trains) for name, value in values.items()}
        if trains:
            for leaf in leaves.values():
                leaf.register_post_accumulate_grad_hook(_drop)
        inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
        saved: dict[int, int] = {}

        def save(tensor: Tensor) -> Tensor:
            saved[storage_key(tensor)] = tensor.untyped_storage().nbytes()
            return tensor.detach()

        with (
            installed(module, bindings, leaves),
            self.call.autocast.restore(),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
        ):
            outputs = self.call.run(inputs)
        for output in outputs:
            save(output)
        for tensor in (*inputs, *leaves.values()):
            saved.pop(storage_key(tensor), None)
        saved_bytes = sum(saved.values())
        shapes = [torch.empty(output.shape, dtype=output.dtype, device="meta") for output in outputs]
        roots = [output for output in outputs if output.requires_grad]
        del outputs
        if roots:
            torch.autograd.backward(roots, [torch.zeros_like(root) for root in roots])
        return shapes, saved_bytes

    def gradient_bytes(self) -> int:
        """The gradients of all parameters of the layer together, for code that computes them all at once."""
        num_elements = sum(piece.num_elements for piece in self.model.pieces(self.layer.blocks))
        return int(num_elements * self.model.dtype.itemsize * memory.SPREAD)

    def _weights(self) -> dict[str, Tensor]:
        model, pieces = self.model, self.model.pieces(self.layer.blocks)
        sizes = {p: p.num_elements * model.dtype_of(p.parameter).itemsize for p in pieces}
        most = max(sizes.values())
        if model.torch_device.type == "cpu":
            # Pages that are only read take no memory.
            pages = mmap.mmap(-1, max(most, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            zeros = torch.frombuffer(pages, dtype=torch.uint8)
        else:
            zeros = torch.zeros(most, dtype=torch.uint8, device=model.torch_device)
        return {
            piece.parameter: zeros[: sizes[piece]].view(model.dtype_of(piece.parameter)).view(piece.shape)
            for piece in pieces
            if piece.num_elements
        }


@final
@dataclass(frozen=True, slots=True)
class Sample:
    """The first layer of a kind, as the dry run met it; `inputs`: shape, type, and whether each takes a gradient."""

    on_zeros: LayerOnZeros
    inputs: tuple[tuple[Shape, torch.dtype, bool], ...]
    trains: bool
    differentiates: bool

    @property
    def module(self) -> str:
        """The name of the layer's module."""
        return self.on_zeros.layer.point.module

    def kind(self, dims: BatchDims | None, rows: int) -> Kind:
        """The kind, whose tiles can be timed; the sample was computed with `rows` rows."""

        def at(tile_rows: int) -> Callable[[bool], object]:
            tensors = self._tensors(dims, rows, tile_rows)
            return lambda with_backward: self.on_zeros.compute(
                tensors, trains=self.trains and with_backward, differentiates=with_backward
            )

        return Kind(at, self.trains, self.differentiates)

    def _tensors(self, dims: BatchDims | None, rows: int, tile_rows: int) -> list[Tensor]:
        tensors = []
        for index, (shape, dtype, requires_grad) in enumerate(self.inputs):
            sizes, dim = list(shape), dims.inputs[index] if dims is not None else None
            if dim is not None:
                sizes[dim] = sizes[dim] // rows * tile_rows
            tensor = torch.zeros(sizes, dtype=dtype, device=self.on_zeros.model.torch_device)
            tensors.append(tensor.requires_grad_(requires_grad))
        return tensors


def storage_key(tensor: Tensor) -> int:
    """The same for tensors that share their memory."""
    return tensor.untyped_storage().data_ptr() if not tensor.is_meta else tensor.untyped_storage()._cdata


def _drop(leaf: Tensor) -> None:
    leaf.grad = None
