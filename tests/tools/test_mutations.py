"""Mutations: what is changed, and what is left alone."""

import ast

import pytest

from tests.tools.mutations import mutations

SOURCE = '''
def f(a: int = 1, *, b=True):
    """Doc of 2."""
    assert a < 3
    if a <= 4 and not b:
        raise ValueError(f"{a + 5}")
    a += 6
    return [x for x in (a, min(a, 7)) if x] or g(a)
'''


def test_mutations_change_one_place_and_leave_texts_and_assertions_alone():
    found = {f"{m.original} -> {m.replacement}" for m in mutations("f.py", SOURCE)}
    assert {
        "1 -> 2",
        "True -> False",
        "a <= 4 -> (a < 4)",
        "4 -> 5",
        "a <= 4 and not b -> (a <= 4 or not b)",
        "not b -> (b)",
        'raise ValueError(f"{a + 5}") -> pass',
        "a += 6 -> pass",
        "6 -> 7",
        "min(a, 7) -> (max(a, 7))",
        "7 -> 8",
        "[x for x in (a, min(a, 7)) if x] -> ([x for x in (a, min(a, 7))])",
        "[x for x in (a, min(a, 7)) if x] or g(a) -> ([x for x in (a, min(a, 7)) if x] and g(a))",
    } == found


@pytest.mark.parametrize("mutation", mutations("f.py", SOURCE), ids=lambda mutation: mutation.key)
def test_a_mutant_is_python_and_differs(mutation):
    changed = mutation.apply(SOURCE)
    assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(SOURCE))


def test_keys_differ_and_survive_changes_elsewhere():
    before = [mutation.key for mutation in mutations("f.py", SOURCE)]
    after = [mutation.key for mutation in mutations("f.py", "X = 9\n" + SOURCE)]
    assert len(set(before)) == len(before) and set(before) < set(after)
