"""The parameters of a module under Outsize: placeholders in the module, values and gradients in blocks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import final

import torch
from torch import Tensor, nn

from outsize.block import Block, Piece
from outsize.engine.executor import Executor
from outsize.engine.placeholder import GradientPlaceholder, OffloadedParameter
from outsize.engine.rng_autocast import outside_inference_mode
from outsize.errors import UsageError
from outsize.model import Source
from outsize.optim import split
from outsize.store.blocks import BlockStore
from outsize.store.commit_store import CommitStore
from outsize.store.offload import ActivationOffload
from outsize.store.state import BlockState, EntryGradient


@final
class Backing:
    """Where the values of parameters are now. `Setup` changes it; everything else reads it."""

    def __init__(self, source: Source) -> None:
        self.source: Source | None = source
        """Where weights come from until their first update; None once all of them live in the store."""
        self.committed: Source | None = None
        """The commit that the model resumes from, until the first call."""
        self.commit_store: CommitStore | None = None
        """The store that outlives the process, if the model has one."""
        self.executor: Executor | None = None
        """Visits blocks; None before the first call and after `close`."""
        self.offload: ActivationOffload | None = None
        """Moves inputs of blocks to another tier between forward and backward, if the placement does."""

    @property
    def running(self) -> Executor:
        """The executor. Raises UsageError before the first call."""
        if self.executor is None:
            raise UsageError(
                "a part of the model runs before the model was called", hint="call the whole model once first"
            )
        return self.executor

    @property
    def store(self) -> BlockStore:
        """The blocks. Raises UsageError before the first call."""
        return self.running.store

    def own_source(self) -> Source:
        """Where weights that were never updated come from."""
        assert self.source is not None, "the source is gone"
        return self.source


@dataclass(frozen=True, slots=True)
class Location:
    """Entry `index` of `block` holds `piece` of a parameter."""

    block: str
    index: int
    piece: Piece


@final
class Parameters(Mapping[str, OffloadedParameter]):
    """Maps each parameter's name to its placeholder, and reads what it stands for: from the source until the first call,
    from blocks afterwards."""

    def __init__(
        self,
        module: nn.Module,
        pieces: Mapping[str, Sequence[Piece]],
        backing: Backing,
        dtype_of: Callable[[str], torch.dtype],
        device: torch.device,
    ) -> None:
        """Replace the parameters of `module` by placeholders. `pieces`: those of each block, in the order of the cut."""
        self._backing = backing
        self._dtype_of = dtype_of
        self._device = device
        self.locate(pieces)
        by_identity: dict[int, OffloadedParameter] = {}
        self._placeholders: dict[str, OffloadedParameter] = {}
        for name, parameter in module.named_parameters():
            by_identity[id(parameter)] = self._placeholders[name] = OffloadedParameter.of(
                parameter,
                name,
                dtype_of(name),
                device,
                fetch=partial(self.value, name),
                get_gradient=partial(self.gradient, name),
                drop_gradient=partial(self.drop_gradient, name),
            )
        for owner in module.modules():
            for attribute, owned in owner._parameters.items():
                if owned is not None:
                    owner._parameters[attribute] = by_identity[id(owned)]  # type: ignore[assignment]

    def __getitem__(self, name: str) -> OffloadedParameter:
        return self._placeholders[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._placeholders)

    def __len__(self) -> int:
        return len(self._placeholders)

    # -- where they are ------------------------------------------------------------------------------------------

    def locate(self, pieces: Mapping[str, Sequence[Piece]]) -> None:
        """From now on each block holds these pieces, in this order."""
        self._locations: dict[str, list[Location]] = {}
        for block, members in pieces.items():
            for index, piece in enumerate(members):
                self._locations.setdefault(piece.parameter, []).append(Location(block, index, piece))
        for found in self._locations.values():
            found.sort(key=lambda at: at.piece.row_start or 0)

    def locations(self, name: str) -> Sequence[Location]:
        """Where the pieces of a parameter are, in the order of rows."""
        return self._locations[name]

    def row_blocks(self, table: str) -> list[tuple[str, int, int]]:
        """`(block, first row, row after the last)` of each block that holds rows of a table, in order."""
        return [
            (at.block, at.piece.row_start or 0, at.piece.row_stop or at.piece.shape[0])
            for at in self._locations[table]
        ]

    def check_trainable(self) -> None:
        """Raise UsageError if a parameter requires grad now that had no place for its gradient at the first call."""
        if self._backing.executor is None:
            return
        for name, placeholder in self.items():
            at = self._locations[name][0]
            entry = self._backing.store[at.block].record.entries[at.index]
            if placeholder.requires_grad and not entry.trainable:
                raise UsageError(
                    f"{name} (in block {at.block}) requires grad now, but had no gradient when memory was laid out",
                    hint="set requires_grad before the first call of the model",
                )

    # -- values --------------------------------------------------------------------------------------------------

    def gives_rows(self, table: str) -> bool:
        """Whether rows of a table can be read without a visit, if nothing trains: its source gives them."""
        backing = self._backing
        return (
            backing.commit_store is None
            and backing.source is not None
            and backing.source.gives_rows(table)
            and (
                backing.executor is None
                or not any(state.update.is_stored for state in backing.executor.store)
            )
        )

    def take_rows(self, block: str, table: str, rows: Tensor, target: Tensor) -> None:
        """Fill `target` with sorted rows, counted from the first of `block`, of a table that `gives_rows`."""
        store = self._backing.store
        index = next(at.index for at in self._locations[table] if at.block == block)
        store.weights.take_rows(store[block], index, rows, target)

    def value(self, name: str) -> Tensor:
        """Return a copy of a parameter's current value."""
        return _joined([self.read(Block(at.block, (at.piece,)))[0] for at in self._locations[name]])

    @outside_inference_mode()
    def read(self, block: Block) -> list[Tensor]:
        """Return copies of the current values of `block`'s pieces, which may be some of those of a block of the cut."""
        if self._backing.executor is None:
            return [value.to(self._device) for value in self._read_source(block)]
        with self._backing.executor.touch(block.name) as state:
            views = {e.piece: v for e, v in zip(state.record.entries, state.planes.pieces(), strict=True)}
            return [views[piece].clone() for piece in block.pieces]

    def _read_source(self, block: Block) -> list[Tensor]:
        """Read pieces that the source holds in the compute type as they are, and together: packed weights and their scales
        are encoded together. The others are fp32, rounded as in a record."""
        source = self._backing.committed or self._backing.own_source()
        dtypes = {piece: self._dtype_of(piece.parameter) for piece in block.pieces}
        values = {
            piece: torch.empty(piece.shape, dtype=dtype, device="cpu")
            for piece, dtype in dtypes.items()
            if source.stored_dtype(piece) is dtype
        }
        source.read(Block(block.name, tuple(values)), list(values.values()))
        for piece in block.pieces:
            if piece not in values:
                exact = torch.empty(piece.shape, dtype=torch.float32, device="cpu")
                source.read(Block(block.name, (piece,)), [exact])
                is_whole = dtypes[piece] is torch.float32
                values[piece] = exact if is_whole else split(exact.view(-1))[0].view(piece.shape)
        return [values[piece] for piece in block.pieces]

    # -- gradients -----------------------------------------------------------------------------------------------

    def gradients(self, name: str) -> list[tuple[BlockState, int, EntryGradient]]:
        """The entries that hold a parameter's gradient, with their blocks and indices; none before the first call."""
        if self._backing.executor is None:
            return []
        states = [(self._backing.store[at.block], at.index) for at in self._locations[name]]
        return [(state, index, state.gradient.entries[index]) for state, index in states]

    @outside_inference_mode()
    def gradient(self, name: str) -> Tensor | None:
        """Return a placeholder of a parameter's gradient; None if it has none."""
        if not any(each.present for _, _, each in self.gradients(name)):
            return None
        return GradientPlaceholder.of(
            self[name],
            f"{name}.grad",
            fetch=partial(self._gradient_value, name),
            norm=partial(self._gradient_norm, name),
            scale_by=partial(self._scale_gradient, name),
            zero=partial(self.zero_gradient, name),
        )

    def drop_gradient(self, name: str) -> None:
        """Forget a parameter's gradient."""
        for state, index, _ in self.gradients(name):
            self._backing.store.gradients.drop(state, index)

    def zero_gradient(self, name: str) -> None:
        """Make a gradient zero where there is one, which moves no bytes: what is stored gets the factor 0.

        Raises UsageError if it holds inf or nan, which no factor makes zero.
        """
        if not any(each.present for _, _, each in self.gradients(name)):
            return
        if not math.isfinite(self._gradient_norm(name)):
            raise UsageError(
                f"the gradient of {name} holds inf or nan and cannot be made zero in place",
                hint="drop it instead: optimizer.zero_grad(), which sets gradients to None",
            )
        self._scale_gradient(name, 0.0)

    def _gradient_norm(self, name: str) -> float:
        self._backing.store.gradients.settle_norms()
        squares = (each.sum_of_squares * each.scale**2 for _, _, each in self.gradients(name))
        return float(sum(squares) ** 0.5)

    def _scale_gradient(self, name: str, factor: float) -> None:
        for _, _, gradient in self.gradients(name):
            gradient.scale *= factor

    @outside_inference_mode()
    def _gradient_value(self, name: str) -> Tensor:
        value = self._backing.store.gradients.value
        return _joined(
            [value(state, index) * gradient.scale for state, index, gradient in self.gradients(name)]
        )


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
