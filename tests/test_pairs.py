"""Parametrisation by pairs leaves out no pair, and nothing in a soak."""

from itertools import combinations, product

import pytest

from tests.pairs import pairwise, rows_of_pairs


@pytest.mark.parametrize(
    ("sizes", "most"), [((2, 6, 2), 12), ((2, 2, 2, 2), 6), ((3, 4, 2), 12), ((3, 5), 15)]
)
def test_every_pair_of_values_occurs(sizes, most):
    rows = list(rows_of_pairs(sizes))
    assert len(rows) == len(set(rows)) <= most
    for (one, size), (other, other_size) in combinations(enumerate(sizes), 2):
        found = {(row[one], row[other]) for row in rows}
        assert found == set(product(range(size), range(other_size)))


def test_a_soak_runs_all_combinations(monkeypatch):
    monkeypatch.setenv("OUTSIZE_SOAK", "1")
    mark = pairwise(x=[1, 2], y={"low": 0.1, "high": 0.9}, z=[True, False]).mark
    assert mark.args[0] == ["x", "y", "z"] and set(mark.args[1]) == set(
        product([1, 2], [0.1, 0.9], [True, False])
    )
    assert "2-high-True" in mark.kwargs["ids"] and len(set(mark.kwargs["ids"])) == 8
