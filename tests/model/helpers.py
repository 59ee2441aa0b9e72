"""What the tests of this room share."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import safe_open
from torch import nn

from outsize.block import Block, Piece
from outsize.model import Cut, PointKind, Source


def rows(value: torch.Tensor, piece: Piece) -> torch.Tensor:
    """What `piece` is of a whole parameter."""
    return value if piece.is_whole else value[piece.row_start : piece.row_stop]


def read(source: Source, block: Block, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """One new tensor per piece, read from `source`."""
    targets = [torch.full(piece.shape, 7.0, dtype=dtype) for piece in block.pieces]
    source.read(block, targets)
    return targets


def assert_reads(source: Source, cut: Cut, expected: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Every piece that `source` gives has the bits of `expected`'s parameter."""
    parameters = dict(expected.named_parameters())
    for block in cut.blocks:
        for piece, value in zip(block.pieces, read(source, block, dtype), strict=True):
            assert torch.equal(value, rows(parameters[piece.parameter].detach().to(dtype), piece)), piece


def assert_covers(module: nn.Module, cut: Cut) -> None:
    """Every element of every parameter is in one block, every block at a point, every binding right."""
    parameters = dict(module.named_parameters())
    counts = {name: torch.zeros(p.shape, dtype=torch.int32) for name, p in parameters.items()}
    for block in cut.blocks:
        for piece in block.pieces:
            part = rows(counts[piece.parameter], piece)
            assert tuple(part.shape) == piece.shape
            part += 1
    for name, count in counts.items():
        assert bool((count == 1).all()), name
    names = [block.name for block in cut.blocks]
    assert len(set(names)) == len(names)
    assert {name for point in cut.points for name in point.blocks} == set(names)
    holds = {block.name: {piece.parameter for piece in block.pieces} for block in cut.blocks}
    for point in cut.points:
        bound = {binding.parameter for binding in point.bindings}
        # A head's bias is in the blocks of the table, which an embedding tied to it has too.
        extra = set().union(*(holds[name] for name in point.blocks)) - bound
        assert not extra or (point.kind is PointKind.EMBEDDING and len(extra) == 1), point.module
        assert bound <= set().union(*(holds[name] for name in point.blocks)), point.module
        for binding in point.bindings:
            owner = module.get_submodule(binding.module)
            assert getattr(owner, binding.attribute) is parameters[binding.parameter]


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor in the safetensors files of `folder`, read with the safetensors library."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            for key in handle.keys():  # noqa: SIM118
                assert key not in found
                found[key] = handle.get_tensor(key)
    return found


def edit_json(file: Path, **changes: object) -> None:
    """Set keys of a JSON file; a value of None removes the key."""
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
