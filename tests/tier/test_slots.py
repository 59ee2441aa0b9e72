import pytest
import torch

from outsize.errors import BudgetError
from outsize.tier.host import HostArena
from outsize.tier.slots import SlotPool


def test_slots_are_disjoint_and_counted():
    arena = HostArena(1 << 20)
    pool = SlotPool(arena, "weights", 5000, 3)
    assert len(pool) == 3 and arena.in_use_bytes == 3 * 8192
    first, second = pool.take("L00"), pool.take("L01")
    assert (first.name, first.owner, first.num_bytes) == ("weights[0]", "L00", 8192)
    first.tensor(torch.uint8, 8192).fill_(1)
    assert not second.tensor(torch.uint8, 8192).any()
    assert len(first.buffer) == 8192
    pool.give(first)
    assert first.owner is None
    assert (pool.num_taken, pool.high_water) == (1, 2)
    assert pool.take("L02") is first
    assert (pool.num_taken, pool.high_water) == (2, 2)


def test_an_empty_pool_names_the_owners():
    pool = SlotPool(HostArena(1 << 20), "w", 4096, 1)
    pool.take("L00")
    with pytest.raises(AssertionError, match=r"w: no slot for L01; w\[0\] is held by L00"):
        pool.take("L01")


def test_giving_back_twice_or_to_another_pool_is_a_bug():
    arena = HostArena(1 << 20)
    pool, other = SlotPool(arena, "a", 4096, 1), SlotPool(arena, "b", 4096, 1)
    slot = pool.take("x")
    with pytest.raises(AssertionError, match="another pool"):
        other.give(slot)
    pool.give(slot)
    with pytest.raises(AssertionError, match="given back twice"):
        pool.give(slot)


def test_books_name_what_is_not_given_back():
    pool = SlotPool(HostArena(1 << 20), "w", 4096, 2)
    pool.check_books()
    slot = pool.take("L03")
    for use in (pool.check_books, pool.free):
        with pytest.raises(AssertionError, match=r"w\[0\] is held by L03"):
            use()
    pool.give(slot)
    pool.check_books()


def test_free_returns_everything_and_a_pool_that_does_not_fit_leaves_nothing():
    arena = HostArena(3 * 4096)
    SlotPool(arena, "w", 4096, 3).free()
    arena.check_books()
    with pytest.raises(BudgetError, match=r"w\[3\] needs"):
        SlotPool(arena, "w", 4096, 4)
    arena.check_books()
