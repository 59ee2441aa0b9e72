"""Each part of a block's state is written by one module."""

import ast
from functools import cache
from pathlib import Path

import pytest

import outsize
from outsize.store.state import GradientState, SnapshotState, UpdateState, WeightState

ROOT = Path(outsize.__file__).parent
OWNERS = {
    "weights": ("store/weights.py", WeightState),
    "gradient": ("store/gradients.py", GradientState),
    "update": ("store/updates.py", UpdateState),
    "snapshot": ("store/snapshots.py", SnapshotState),
}


@cache
def assigned(path):
    """`(holder, name)` of each attribute that a file assigns to, as in `state.holder.name = ...` or `holder.name = ...`."""
    return set(_assigned(ast.parse(path.read_text())))


def _assigned(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            holder = node.value
            yield getattr(holder, "attr", getattr(holder, "id", "")), node.attr


@pytest.mark.parametrize("part", OWNERS)
def test_a_part_of_the_state_has_one_writer(part):
    owner, kind = OWNERS[part]
    fields = set(kind.__dataclass_fields__)
    writers = set()
    for path in ROOT.rglob("*.py"):
        if any(holder == part and name in fields for holder, name in assigned(path)):
            writers.add(str(path.relative_to(ROOT)))
    assert writers == {owner}
