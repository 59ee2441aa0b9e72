"""The figures in docs/optimizers.md."""

from pathlib import Path

import pytest

from outsize.config import ComputeType
from outsize.optim import RULES

TABLE = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit", "SGD", "SGDSaI", "Lion", "Adan"])
def test_bytes_at_rest_are_those_of_the_rule(name):
    rule = RULES[name.lower().removesuffix("sai")]
    expected = []
    for compute_type in ComputeType:
        sizes = rule.element_bytes(compute_type)
        expected += [sum(sizes[plane] for plane in rule.state(compute_type)), sum(sizes.values())]
    row = next(line for line in TABLE.splitlines() if line.startswith(f"| `{name}` |"))
    assert [float(cell) for cell in row.split("|")[3:7]] == expected
