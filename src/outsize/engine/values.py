"""The values of parameters and their gradients, read from wherever they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, final

import torch

from outsize.block import Block, Piece
from outsize.engine.backing import Backing
from outsize.engine.locations import Location, Locations
from outsize.engine.placeholder import GradientPlaceholder, OffloadedParameter
from outsize.engine.rng_autocast import outside_inference_mode
from outsize.errors import UsageError
from outsize.optim import split


@final
class Values:
    """Reads parameters of `backing`: from its source before the first call, from blocks in memory after it."""

    def __init__(
        self,
        backing: Backing,
        locations: Locations,
        dtype_of: Callable[[str], torch.dtype],
        device: torch.device,
    ) -> None:
        self._backing = backing
        self._locations = locations
        self._dtype_of = dtype_of
        self._device = device

    def gives_rows(self, parameter: str) -> bool:
        """Whether rows of a table can be taken without a visit, if nothing trains: its source gives them."""
        source = self._backing.source
        return (
            self._backing.commit_store is None
            and source is not None
            and source.gives_rows(parameter)
            and not (
                self._backing.executor is not None
                and any(state.update.is_stored for state in self._backing.executor.store)
            )
        )

    def take_rows(self, block: str, parameter: str, rows: torch.Tensor, target: torch.Tensor) -> None:
        """Fill `target` with sorted rows, counted from the first of `block`, of a table that `gives_rows`."""
        index = next(at.index for at in self._locations[parameter] if at.block == block)
        self._backing.store.weights.take_rows(self._backing.store[block], index, rows, target)

    @outside_inference_mode()
    def value(self, parameter: str) -> torch.Tensor:
        """A copy of a parameter's current value."""
        parts = [self.piece_value(at) for at in self._locations[parameter]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @outside_inference_mode()
    def piece_value(self, at: Location) -> torch.Tensor:
        """A copy of one piece's current value."""
        if self._backing.executor is None:
            piece = at.piece
            exact = torch.empty(piece.shape, dtype=torch.float32, device="cpu")
            source = self._backing.committed or self._backing.own_source()
            source.read(Block(at.block, (piece,)), [exact])
            is_whole = self._dtype_of(piece.parameter) is torch.float32
            value = exact if is_whole else split(exact.view(-1))[0].view(piece.shape)
            return value.to(self._device)
        with self._backing.executor.touch(at.block) as state:
            return state.planes.pieces()[at.index].clone()

    @outside_inference_mode()
    def block_values(self, block: Block) -> list[torch.Tensor]:
        """Copies of the current values of all pieces of a block of the cut."""
        if self._backing.executor is None:
            whole = self._read_stored(block)
            return [
                whole[piece] if piece in whole else self.piece_value(self._place_of(piece))
                for piece in block.pieces
            ]
        with self._backing.executor.touch(block.name) as state:
            views = {e.piece: v for e, v in zip(state.record.entries, state.planes.pieces(), strict=True)}
            return [views[piece].clone() for piece in block.pieces]

    def _read_stored(self, block: Block) -> dict[Piece, torch.Tensor]:
        """Pieces that the source holds in the compute type, read together: codes and their scales are encoded together."""
        if self._backing.committed is not None:
            return {}
        source = self._backing.own_source()
        pieces = tuple(
            piece for piece in block.pieces if source.stored_dtype(piece) is self._dtype_of(piece.parameter)
        )
        values = [
            torch.empty(piece.shape, dtype=self._dtype_of(piece.parameter), device="cpu") for piece in pieces
        ]
        source.read(Block(block.name, pieces), values)
        return {piece: value.to(self._device) for piece, value in zip(pieces, values, strict=True)}

    def _place_of(self, piece: Piece) -> Location:
        return next(at for at in self._locations[piece.parameter] if at.piece == piece)

    @outside_inference_mode()
    def gradient(self, parameter: str, placeholder: OffloadedParameter) -> torch.Tensor | None:
        """A placeholder of the gradient of a parameter, for which `placeholder` stands; None if it has none."""
        if self._backing.executor is None or not any(g.present for g in self._gradients(parameter)):
            return None
        return GradientPlaceholder.of(
            placeholder,
            f"{parameter}.grad",
            fetch=lambda: self._gradient_value(parameter),
            norm=lambda: self._gradient_norm(parameter),
            scale_by=lambda factor: self._scale_gradient(parameter, factor),
            zero=lambda: self.zero_gradient(parameter),
        )

    def drop_gradient(self, parameter: str) -> None:
        """Forget the parameter's gradient."""
        if self._backing.executor is not None:
            for at in self._locations[parameter]:
                self._backing.store.gradients.drop(self._backing.store[at.block], at.index)

    def zero_gradient(self, parameter: str) -> None:
        """Make the gradient zero where there is one, which moves no bytes: what is stored gets the factor 0.

        Raises UsageError where it holds inf or nan, which no factor makes zero.
        """
        if self._backing.executor is None or not any(g.present for g in self._gradients(parameter)):
            return
        if not math.isfinite(self._gradient_norm(parameter)):
            raise UsageError(
                f"the gradient of {parameter} holds inf or nan and cannot be made zero in place",
                hint="drop it instead: optimizer.zero_grad(), which sets gradients to None",
            )
        self._scale_gradient(parameter, 0.0)

    def _gradients(self, parameter: str) -> list[Any]:
        return [self._backing.store[at.block].gradient.entries[at.index] for at in self._locations[parameter]]

    def _gradient_norm(self, parameter: str) -> float:
        self._backing.store.gradients.settle_norms()
        return float(sum(g.sum_of_squares * g.scale**2 for g in self._gradients(parameter)) ** 0.5)

    def _scale_gradient(self, parameter: str, factor: float) -> None:
        for gradient in self._gradients(parameter):
            gradient.scale *= factor

    @outside_inference_mode()
    def _gradient_value(self, parameter: str) -> torch.Tensor:
        parts = []
        for at in self._locations[parameter]:
            state = self._backing.store[at.block]
            parts.append(
                self._backing.store.gradients.value(state, at.index) * state.gradient.entries[at.index].scale
            )
        return parts[0] if len(parts) == 1 else torch.cat(parts)
