"""Where a block's first values come from: safetensors files, or tensors in memory.

A source fills the tensors it is given, one per piece; where they live and how they are laid out is the
caller's affair. Reading is lazy and repeatable: weights stay in their files until a block's first update.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from outsize.block import Block, Piece
from outsize.errors import WeightsError
from outsize.model.conversion import Group, Layouts, Run, group_keys
from outsize.model.direct import wait_read
from outsize.model.initial import InitSource
from outsize.model.names import parameter_aliases, parameter_shapes, persistent_buffers
from outsize.model.shards import Shards
from outsize.model.weight_file import FileDigest

_NAMED = 5
"""Tensors that a message names."""


class Source(Protocol):
    """Gives the values that blocks start from."""

    def read(self, block: Block, targets: Sequence[torch.Tensor]) -> None:
        """Fill `targets`, one per piece and of its shape, cast to their types. The same block gives the same
        bits."""
        ...

    def stored_dtype(self, piece: Piece) -> torch.dtype | None:
        """The type in which the values of `piece` are there; None where they are computed."""
        ...

    def conversion_bytes(self, piece: Piece) -> int:
        """Memory that computing or converting `piece` takes while it is read, beside the target."""
        ...

    def gives_rows(self, parameter: str) -> bool:
        """Whether rows of `parameter` can be read by themselves, for little more than their bytes, with the values that it
        has as a whole."""
        ...

    def check(self) -> None:
        """Raise FileChangedError where a file is not the one that was opened."""
        ...

    @property
    def bytes_read(self) -> int:
        """Bytes read from files so far."""
        ...

    def close(self) -> None:
        """Let go of files and memory."""
        ...


class SafetensorsSource:
    """The weights of a folder in Hugging Face format, single or sharded, through transformers' own
    conversion.

    `module` is the model with its parameters' shapes; its persistent buffers are filled from the files at
    once, and `_weight_conversions` is set as `from_pretrained` does. Parameters are read block by block: a
    read opens only the keys that the block needs, and uses memory for about one block (for a converted
    parameter, up to three times its size). Reading is safe from several threads.

    A parameter that the model says may be absent (`_keys_to_ignore_on_load_missing`, such as sinusoidal
    tables) is computed by the model's own rules, unless these would draw it at random.

    Raises WeightsError, before anything is trained, where files are absent or cut short, a parameter has no
    key, or a shape differs. Warns of buffers that are not in the files, and of keys that the model does not know, which
    are listed in `unexpected`.
    """

    def __init__(self, folder: str | Path, module: nn.Module) -> None:
        self._module = module
        self._shards = Shards(Path(folder))
        aliases = parameter_aliases(module)
        buffers = persistent_buffers(module)
        names = [name for group in aliases.values() for name in group] + list(buffers)
        shapes = {key: stored.shape for key, stored in self._shards.tensors.items()}
        self._groups: dict[str, Group]
        self._groups, found, self.unexpected = group_keys(module, names, shapes)
        self._computed: set[str] = set()
        self._stored_name, absent = self._choose_names(aliases)
        self._initial = self._compute(absent) if absent else None
        self._check_shapes(found)
        self._runs = self._find_runs(shapes, found)
        self._dtypes = {name: parameter.dtype for name, parameter in module.named_parameters()}
        self._fill_buffers(buffers, found)
        absent = [name for name in buffers if name not in self._groups]
        _warn_of_differences(module, self.folder, absent, self.unexpected)

    @property
    def folder(self) -> Path:
        """Where the files are."""
        return self._shards.folder

    def check(self) -> None:
        """Raise FileChangedError where a file is not the one that was opened."""
        self._shards.check()

    def digests(self) -> dict[str, FileDigest]:
        """The digest of each file that holds a tensor, by its name. Raises StorageError."""
        return self._shards.digests()

    def fingerprint(self) -> str:
        """A digest that changes where the files do. Raises StorageError."""
        return self._shards.fingerprint()

    def read(self, block: Block, targets: Sequence[torch.Tensor]) -> None:
        """Fill one tensor per piece of `block`; raises StorageError where a file can no longer be read."""
        reading: list[Future[None]] = []
        converting: dict[int, list[tuple[Piece, torch.Tensor]]] = {}
        for piece, target in zip(block.pieces, targets, strict=True):
            assert tuple(target.shape) == piece.shape, (block.name, piece, target.shape)
            if piece.parameter in self._computed and self._initial is not None:
                self._initial.read(Block(piece.parameter, (piece,)), [target])
            elif piece.parameter in self._runs:
                reading += self._start_runs(piece, target)
            else:
                converting.setdefault(id(self._group(piece)), []).append((piece, target))
        for members in converting.values():
            self._convert(members)
        wait_read(reading)

    def _start_runs(self, piece: Piece, target: torch.Tensor) -> list[Future[None]]:
        """Start reading the runs of stored tensors that `piece` is made of."""
        if target.device.type != "cpu" or not target.is_contiguous():
            value = torch.empty(target.shape, dtype=target.dtype, device="cpu")
            wait_read(self._start_runs(piece, value))
            target.copy_(value)
            return []
        flat = target.detach().view(-1)
        first = (piece.row_start or 0) * (flat.numel() // max(piece.shape[0], 1) if piece.shape else 1)
        reading: list[Future[None]] = []
        begin = 0
        for run in self._runs[piece.parameter]:
            low, high = max(first, begin), min(first + flat.numel(), begin + run.num_elements)
            if low < high:
                part = flat[low - first : high - first]
                reading += self._shards.start_read(run.key, part, run.start + low - begin)
            begin += run.num_elements
        return reading

    def _convert(self, members: Sequence[tuple[Piece, torch.Tensor]]) -> None:
        """Fill pieces that come from one group of keys, which is read once."""
        first = members[0][0]
        group = self._group(first)
        dtype = None if group.moves_only else self._dtypes[first.parameter]
        converted = group.convert(self._module, partial(self._shards.read, dtype=dtype))
        for piece, target in members:
            value = converted[self._stored_name[piece.parameter]]
            target.copy_(value if piece.is_whole else value[piece.row_start : piece.row_stop])

    def stored_dtype(self, piece: Piece) -> torch.dtype | None:
        """The type in the files; None where a conversion computes the values, or the model's rules do."""
        if piece.parameter in self._computed or not self._group(piece).moves_only:
            return None
        dtypes = {self._shards.tensors[key].dtype for _, key in self._group(piece).keys}
        return dtypes.pop() if len(dtypes) == 1 else None

    def conversion_bytes(self, piece: Piece) -> int:
        """What the model's own rules or a conversion take; a cast takes two small buffers."""
        if piece.parameter in self._computed:
            return 8 * piece.num_elements
        if piece.parameter in self._runs:
            return 0
        return 3 * sum(self._shards.tensors[key].num_bytes for _, key in self._group(piece).keys)

    def gives_rows(self, parameter: str) -> bool:
        """Whether the files hold the values of `parameter` in its order."""
        return parameter in self._runs

    @property
    def bytes_read(self) -> int:
        """Bytes read from the files so far."""
        return self._shards.bytes_read

    def close(self) -> None:
        """Close the files."""
        self._shards.close()

    def _group(self, piece: Piece) -> Group:
        return self._groups[self._stored_name[piece.parameter]]

    def _choose_names(self, aliases: Mapping[str, Sequence[str]]) -> tuple[dict[str, str], list[str]]:
        """Which of a parameter's names the files hold, all of which must hold the same values; and the parameters that are
        not in the files."""
        chosen: dict[str, str] = {}
        absent: list[str] = []
        for first, names in aliases.items():
            present = [name for name in names if name in self._groups]
            if not present:
                absent.append(first)
                continue
            chosen[first] = present[0]
            for other in present[1:]:
                if not self._is_one(present[0], other):
                    raise WeightsError(
                        f"{present[0]} and {other} are tied in the model, "
                        f"but differ in {self._shards.folder}",
                        hint='set "tie_word_embeddings": false in config.json to train them separately',
                    )
        return chosen, absent

    def _find_runs(
        self, shapes: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]]
    ) -> dict[str, tuple[Run, ...]]:
        """The runs of parameters that are made of a few, by the parameter."""
        layouts = Layouts(self._module, shapes)
        members: dict[int, dict[str, tuple[int, ...]]] = {}
        for name, group in self._groups.items():
            members.setdefault(id(group), {})[name] = found[name]
        runs: dict[str, tuple[Run, ...]] = {}
        for targets in members.values():
            runs |= layouts.runs(self._groups[next(iter(targets))], targets)
        return {first: runs[name] for first, name in self._stored_name.items() if name in runs}

    def _compute(self, absent: Sequence[str]) -> InitSource:
        """Take parameters that are in no file from the model's own rules. Raises WeightsError for those that the model
        does not declare optional, or that its rules would draw at random."""
        aliases = parameter_aliases(self._module)
        initial = InitSource(self._module, 0)
        missing = [
            first
            for first in absent
            if not any(_is_optional(self._module, name) for name in aliases[first])
            or initial.is_random(first)
        ]
        if missing:
            more = f" and {len(missing) - _NAMED} more" if len(missing) > _NAMED else ""
            raise WeightsError(
                f"{self._shards.folder} has no weights for {', '.join(missing[:_NAMED])}{more}",
                hint="the folder may belong to another class of model, see architectures in its config.json",
            )
        self._computed.update(absent)
        return initial

    def _is_one(self, one: str, other: str) -> bool:
        """Whether two names stand for the same values in the files; what is converted is taken to."""
        groups = self._groups[one], self._groups[other]
        if any(group.converter is not None for group in groups) or groups[0].keys == groups[1].keys:
            return True
        first, second = (group.keys[0][1] for group in groups)
        return self._shards.holds_the_same(first, second)

    def _check_shapes(self, found: Mapping[str, tuple[int, ...]]) -> None:
        for name, shape in parameter_shapes(self._module).items():
            if name in self._computed:
                continue
            stored = found[self._stored_name[name]]
            if stored != shape:
                raise WeightsError(
                    f"{name} has shape {list(stored)} in {self._shards.folder}, expected {list(shape)}",
                    hint="config.json and the weights do not belong together",
                )

    def _fill_buffers(
        self, buffers: Mapping[str, torch.Tensor], found: Mapping[str, tuple[int, ...]]
    ) -> None:
        for name, buffer in buffers.items():
            if name not in found:
                continue
            if found[name] != tuple(buffer.shape):
                raise WeightsError(
                    f"buffer {name} has shape {list(found[name])} in {self._shards.folder}, "
                    f"expected {list(buffer.shape)}"
                )
            with torch.no_grad():
                buffer.copy_(self._groups[name].convert(self._module, self._shards.read)[name])


def _is_optional(module: nn.Module, name: str) -> bool:
    """Whether the model says that files need not hold `name`."""
    unsaved = getattr(module, "_keys_to_ignore_on_save", None) or ()
    patterns = getattr(module, "_keys_to_ignore_on_load_missing", None) or ()
    return name in unsaved or any(re.search(pattern, name) for pattern in patterns)


def _warn_of_differences(
    module: nn.Module, folder: Path, absent: Iterable[str], unexpected: Iterable[str]
) -> None:
    """Warn of `absent` buffers and `unexpected` keys, as `from_pretrained` does, except of those that the model allows."""
    missing = [name for name in absent if not _is_optional(module, name)]
    ignored = getattr(module, "_keys_to_ignore_on_load_unexpected", None) or ()
    surplus = [key for key in unexpected if not any(re.search(each, key) for each in ignored)]
    for names, what in (
        (missing, "has no values for the buffers {}: they are as the model's constructor makes them"),
        (surplus, "holds tensors that the model does not have, and that are not read: {}"),
    ):
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            warnings.warn(
                f"{folder} {what.format(', '.join(names[:_NAMED]) + more)}", RuntimeWarning, stacklevel=4
            )


class TensorSource:
    """Values from memory, by the parameters' first names: a model that is already there.

    Raises WeightsError where a block needs a tensor that is not given, or has another shape.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor]) -> None:
        self._tensors = dict(tensors)

    def read(self, block: Block, targets: Sequence[torch.Tensor]) -> None:
        """Copy one tensor, or rows of it, per piece of `block`."""
        for piece, target in zip(block.pieces, targets, strict=True):
            if piece.parameter not in self._tensors:
                raise WeightsError(f"no tensor for {piece.parameter} of block {block.name}")
            value = self._tensors[piece.parameter].detach()
            value = value if piece.is_whole else value[piece.row_start : piece.row_stop]
            if tuple(value.shape) != piece.shape:
                raise WeightsError(
                    f"{piece.parameter} has shape {list(value.shape)}, expected {list(piece.shape)}"
                )
            target.copy_(value)

    def stored_dtype(self, piece: Piece) -> torch.dtype | None:
        """The type of the tensor."""
        value = self._tensors.get(piece.parameter)
        return None if value is None else value.dtype

    def conversion_bytes(self, piece: Piece) -> int:
        """Nothing."""
        return 0

    def gives_rows(self, parameter: str) -> bool:
        """Always."""
        return True

    def check(self) -> None:
        """Nothing to check."""

    @property
    def bytes_read(self) -> int:
        """None."""
        return 0

    def close(self) -> None:
        """Let go of the tensors."""
        self._tensors.clear()
