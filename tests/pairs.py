"""Parametrisation by pairs: for tests of several arguments whose product repeats itself."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest

Row = tuple[int, ...]
"""The index of a value for each argument."""


def pairwise(**arguments: Sequence[Any] | Mapping[str, Any]) -> pytest.MarkDecorator:
    """Parametrise a test so that each value of an argument meets each value of every other argument.

    `OUTSIZE_SOAK=1` runs all combinations. The keys of a mapping name its values in the names of tests.
    """
    values = [list(axis.values()) if isinstance(axis, Mapping) else list(axis) for axis in arguments.values()]
    names = [list(axis) if isinstance(axis, Mapping) else list(map(str, axis)) for axis in arguments.values()]
    sizes = [len(axis) for axis in values]
    is_soak = bool(os.environ.get("OUTSIZE_SOAK"))
    rows = list(product(*map(range, sizes))) if is_soak else list(rows_of_pairs(sizes))
    return pytest.mark.parametrize(
        list(arguments),
        [tuple(axis[at] for axis, at in zip(values, row, strict=True)) for row in rows],
        ids=["-".join(axis[at] for axis, at in zip(names, row, strict=True)) for row in rows],
    )


def rows_of_pairs(sizes: Sequence[int]) -> Iterator[Row]:
    """Few rows that contain every pair of values; each takes the most pairs that no row before it has."""
    rows = list(product(*map(range, sizes)))
    missing = {pair for row in rows for pair in _pairs(row)}
    while missing:
        row = max(rows, key=lambda row: len(missing & _pairs(row)))
        missing -= _pairs(row)
        yield row


def _pairs(row: Row) -> set[tuple[tuple[int, int], ...]]:
    return set(combinations(enumerate(row), 2))
