"""What cutting a model yields: blocks, and the points at which the model's forward needs them."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from outsize.block import Block


class PointKind(StrEnum):
    """How a visit at this point uses its blocks."""

    LAYER = "layer"
    """The module's forward runs on the whole block."""
    EMBEDDING = "embedding"
    """An `nn.Embedding` (or subclass) whose table is cut into row blocks; only rows that are looked up are needed."""
    HEAD = "head"
    """The output `nn.Linear`, cut into row blocks; with labels, logits and loss are computed tile by tile."""
    LOOSE = "loose"
    """Parameters owned directly by a module that contains other points; installed while its forward runs."""


@dataclass(frozen=True, slots=True)
class Binding:
    """Parameter `attribute` of submodule `module` (full name in the model) is `parameter` (its first name)."""

    module: str
    attribute: str
    parameter: str


@dataclass(frozen=True, slots=True)
class Point:
    """A module whose forward is a visit. `blocks` are the names of the blocks that hold its parameters."""

    module: str
    kind: PointKind
    blocks: tuple[str, ...]
    bindings: tuple[Binding, ...]


@dataclass(frozen=True, slots=True)
class Cut:
    """A model in blocks. Every parameter of the model is in exactly one block (row blocks: in several, disjoint)."""

    blocks: tuple[Block, ...]
    points: tuple[Point, ...]
    full_precision: frozenset[str] = frozenset()
    """Names of the blocks whose parameters stay in fp32, whatever the rest computes in."""
