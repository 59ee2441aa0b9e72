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
    """A visit of `layer` on weights of zero, with the arguments of `call`, the first of its kind in a dry run."""

    layer: Layer
    call: LayerCall
    inputs: tuple[tuple[Shape, torch.dtype, bool], ...]
    """Shape and type of each tensor that the layer was given, and whether it takes a gradient."""

    @classmethod
    def of(cls, layer: Layer, call: LayerCall, tensors: Tensors) -> LayerOnZeros:
        """The visit `call`, in which `layer` is given `tensors`."""
        return cls(layer, call, tuple((tuple(t.shape), t.dtype, t.requires_grad) for t in tensors))

    def compute(self, tensors: Tensors, *, with_backward: bool = True) -> tuple[list[Tensor], int]:
        """Forward and, where the visit gets one, backward.

        Returns what the outputs are like, on meta, and the bytes that the forward saves for the backward beside its inputs.
        """
        call, values = self.call, self._weights()
        module, bindings = self._model.module, self.layer.point.bindings
        if not (with_backward and call.differentiates):
            with installed(module, bindings, values), torch.no_grad():
                return _on_meta([output.detach().clone() for output in call.run(tensors)]), 0
        leaves = {name: value.detach().requires_grad_(call.trains) for name, value in values.items()}
        if call.trains:
            for leaf in leaves.values():
                leaf.register_post_accumulate_grad_hook(_drop)
        inputs = [tensor.detach().requires_grad_(tensor.requires_grad) for tensor in tensors]
        saved: dict[int, int] = {}

        def save(tensor: Tensor) -> Tensor:
            saved[storage_key(tensor)] = tensor.untyped_storage().nbytes()
            return tensor.detach()

        with (
            installed(module, bindings, leaves),
            call.autocast.restore(),
            torch.enable_grad(),
            torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor),
        ):
            outputs = call.run(inputs)
        for output in outputs:
            save(output)
        for tensor in (*inputs, *leaves.values()):
            saved.pop(storage_key(tensor), None)
        like, roots = _on_meta(outputs), [output for output in outputs if output.requires_grad]
        del outputs
        if roots:
            torch.autograd.backward(roots, [torch.zeros_like(root) for root in roots])
        return like, sum(saved.values())

    def gradient_bytes(self) -> int:
        """The gradients of all parameters of the layer together, for code that computes them all at once."""
        num_elements = sum(piece.num_elements for piece in self._model.pieces(self.layer.blocks))
        return int(num_elements * self._model.dtype.itemsize * memory.SPREAD)

    def kind(self, dims: BatchDims | None, rows: int) -> Kind:
        """The kind, whose tiles can be timed; the visit was computed with `rows` rows, and `dims` are its batch."""

        def at(tile_rows: int) -> Callable[[bool], object]:
            tensors = self._tensors(dims, rows, tile_rows)
            return lambda with_backward: self.compute(tensors, with_backward=with_backward)

        return Kind(at, self.call.trains, self.call.differentiates)

    @property
    def _model(self) -> Model:
        return self.layer.visits.model

    def _tensors(self, dims: BatchDims | None, rows: int, tile_rows: int) -> Tensors:
        """Zeros like the tensors that the layer was given, in a batch of `tile_rows`."""
        tensors = []
        for index, (shape, dtype, requires_grad) in enumerate(self.inputs):
            sizes, dim = list(shape), dims.inputs[index] if dims is not None else None
            if dim is not None:
                sizes[dim] = sizes[dim] // rows * tile_rows
            tensor = torch.zeros(sizes, dtype=dtype, device=self._model.torch_device)
            tensors.append(tensor.requires_grad_(requires_grad))
        return tensors

    def _weights(self) -> dict[str, Tensor]:
        model, pieces = self._model, self._model.pieces(self.layer.blocks)
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


def storage_key(tensor: Tensor) -> int:
    """The same for tensors that share their memory."""
    return tensor.untyped_storage().data_ptr() if not tensor.is_meta else tensor.untyped_storage()._cdata


def _on_meta(tensors: Tensors) -> list[Tensor]:
    return [torch.empty(tensor.shape, dtype=tensor.dtype, device="meta") for tensor in tensors]


def _drop(leaf: Tensor) -> None:
    leaf.grad = None
