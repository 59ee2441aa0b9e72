"""The tables in docs/optimizers.md."""

import inspect
from pathlib import Path

import pytest

import outsize
from outsize.config import ComputeType
from outsize.optim import ALGORITHMS

TEXT = (Path(__file__).parents[2] / "docs" / "optimizers.md").read_text()


def row_of(name, heading):
    lines = TEXT[TEXT.index(heading) :].splitlines()
    return next(line for line in lines if line.startswith(f"| `{name}` |"))


@pytest.mark.parametrize("name", ALGORITHMS)
def test_bytes_at_rest_are_those_of_the_rule(name):
    rule = ALGORITHMS[name].rule
    expected = []
    for compute_type in ComputeType:
        sizes = rule.element_bytes(compute_type)
        expected += [sum(sizes[plane] for plane in rule.state(compute_type)), sum(sizes.values())]
    row = row_of(name, "## Bytes per parameter at rest")
    assert [float(cell) for cell in row.split("|")[3:7]] == expected


@pytest.mark.parametrize("name", ALGORITHMS)
def test_settings_and_defaults_are_those_of_the_signature(name):
    parameters = inspect.signature(getattr(outsize, name)).parameters.values()
    settings = [f"{p.name}={p.default}" for p in parameters if p.kind is p.KEYWORD_ONLY]
    assert settings.pop() == "max_grad_norm=None"
    assert row_of(name, "## Settings") == f"| `{name}` | `{', '.join(settings)}` |"
