"""What is known of a model from the moment it is opened: its module, its blocks, its parameters, where it computes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import final

import torch
from torch import nn

from outsize.block import Piece
from outsize.config import ComputeType
from outsize.engine.arguments import Arguments
from outsize.engine.parameters import Backing, Parameters
from outsize.model import Cut
from outsize.plan import Direction, Visit
from outsize.store.planes import DTYPES
from outsize.tier import Device


@final
class Model:
    """A module whose parameters are placeholders, backed by `backing`. Its attributes never change."""

    def __init__(
        self, module: nn.Module, cut: Cut, backing: Backing, compute_type: ComputeType, device: Device
    ) -> None:
        self.module = module
        self.cut = cut
        self.device = device
        self.torch_device = device.torch_device
        self.dtype = DTYPES[compute_type]
        self.anchor = torch.zeros((), requires_grad=True, device=self.torch_device, dtype=torch.float32)
        """Requires grad, so that a visit without differentiable inputs gets a backward."""
        self.arguments = Arguments(self.torch_device)
        self.main_type = compute_type
        """What blocks compute in unless they hold parameters that stay in fp32."""
        self._pieces = {block.name: block.pieces for block in cut.blocks}
        self._full_precision = frozenset(
            piece.parameter for name in cut.full_precision for piece in self._pieces[name]
        )
        self.parameters = Parameters(module, self._pieces, backing, self.dtype_of, self.torch_device)

    def compute_type(self, block: str) -> ComputeType:
        """The type that a block computes in."""
        return ComputeType.FLOAT32 if block in self.cut.full_precision else self.main_type

    def dtype_of(self, parameter: str) -> torch.dtype:
        """The type that a parameter computes in."""
        return torch.float32 if parameter in self._full_precision else self.dtype

    def pieces(self, blocks: Sequence[str]) -> list[Piece]:
        """The pieces of `blocks`."""
        return [piece for name in blocks for piece in self._pieces[name]]

    def trains(self, blocks: Sequence[str]) -> bool:
        """Whether any parameter in `blocks` requires grad."""
        return any(self.parameters[piece.parameter].requires_grad for piece in self.pieces(blocks))

    def differentiates(self, blocks: Sequence[str], tensors: Iterable[torch.Tensor]) -> bool:
        """Whether a visit of `blocks` with `tensors` gets a backward."""
        return torch.is_grad_enabled() and (
            self.trains(blocks) or any(tensor.requires_grad for tensor in tensors)
        )

    def trained_types(self) -> set[ComputeType]:
        """The compute types of blocks that train."""
        return {self.compute_type(name) for name in self._pieces if self.trains((name,))}

    def backward_visits(self, blocks: Sequence[str], needs_weights: bool) -> list[Visit]:
        """The visits of a point with `blocks` in backward."""
        return [
            Visit(
                name,
                Direction.BACKWARD,
                needs_weights,
                trains=self.trains((name,)),
                joins_next=name != blocks[-1],
            )
            for name in blocks
        ]
