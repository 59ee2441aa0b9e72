import random

import pytest

from outsize.kv import PAGE_TOKENS, PagePool, pages_for, prefix_hashes
from outsize.kv.pages import SCRATCH


def test_prefix_hashes_tell_all_tokens_up_to_a_page():
    first = list(range(40))
    assert len(prefix_hashes(first)) == 2
    assert prefix_hashes(first)[0] == prefix_hashes(first[:16] + [9] * 16)[0]
    assert prefix_hashes(first)[1] != prefix_hashes([9] * 16 + first[16:])[1]
    assert prefix_hashes(first, b"long") != prefix_hashes(first)
    assert prefix_hashes(first[:15]) == []
    assert pages_for(16) == 1 and pages_for(17) == 2


def test_a_freed_prefix_is_found_until_its_page_is_needed():
    pool, hashes = PagePool(4), prefix_hashes(range(48))
    table = pool.allocate(3)
    for page, digest in zip(table, hashes, strict=True):
        pool.register(page, digest)
    pool.free(table)
    assert pool.match(hashes) == table and pool.num_free == 0
    pool.free(table)
    other = pool.allocate(1)
    assert other == [table[2]]  # the end of a prefix goes first
    assert pool.match(hashes) == table[:2]
    pool.check([table[:2], other])


def test_the_same_prefix_computed_twice_is_known_once():
    pool, hashes = PagePool(4), prefix_hashes(range(16))
    first, second = pool.allocate(1), pool.allocate(1)
    pool.register(first[0], hashes[0])
    pool.register(second[0], hashes[0])
    assert pool.match(hashes) == first
    pool.free(first)
    pool.check([first, second])


def test_books_are_right_whatever_happens():
    chance = random.Random(0)
    pool, tables = PagePool(12), []
    for _ in range(2000):
        tokens = [chance.randrange(2)] * (PAGE_TOKENS * chance.randrange(1, 5))
        if tables and chance.random() < 0.5:
            pool.free(tables.pop(chance.randrange(len(tables))))
        else:
            hashes = prefix_hashes(tokens)
            shared = pool.match(hashes)
            if pool.num_free < len(hashes) - len(shared):
                pool.free(shared)
                continue
            table = shared + pool.allocate(len(hashes) - len(shared))
            for page, digest in zip(table, hashes, strict=True):
                pool.register(page, digest)
            tables.append(table)
        pool.check(tables)


def test_freeing_twice_is_a_broken_invariant():
    pool = PagePool(3)
    table = pool.allocate(1)
    pool.free(table)
    with pytest.raises(AssertionError, match="has no user"):
        pool.free(table)


def test_every_page_but_the_scratch_page_can_be_allocated():
    pool = PagePool(4)
    assert pool.num_usable == pool.num_free == 3
    assert sorted([*pool.allocate(3), SCRATCH]) == [0, 1, 2, 3]


def test_repair_frees_the_pages_that_no_table_holds():
    pool, hashes = PagePool(6), prefix_hashes(range(48))
    table = pool.allocate(3)
    for page, digest in zip(table, hashes, strict=True):
        pool.register(page, digest)
    pool.free(table[1:])
    lost = pool.allocate(1)  # by a request that an exception ended before it had a table
    pool.repair([table[:1]])
    pool.check([table[:1]])
    assert pool.match(hashes) == table
    assert pool.allocate(2) == [5, *lost], "the longest unused first, those that were lost last"


@pytest.mark.parametrize("change", ["register", "allocate"])
def test_repair_forgets_a_prefix_of_which_only_one_direction_is_known(change):
    """Both changes touch two dictionaries; an exception between them leaves the hash without its page."""

    class Interrupted(dict):
        def __setitem__(self, key, value):
            raise KeyboardInterrupt

        def pop(self, *arguments):
            super().pop(*arguments)
            raise KeyboardInterrupt

    pool, hashes = PagePool(2), prefix_hashes(range(16))
    table = pool.allocate(1)
    if change == "allocate":
        pool.register(table[0], hashes[0])
        pool.free(table)
        table = []
    pool._hash_of = Interrupted(pool._hash_of)
    with pytest.raises(KeyboardInterrupt):
        pool.register(table[0], hashes[0]) if table else pool.allocate(1)
    pool._hash_of = dict(pool._hash_of)
    pool.repair([table])
    pool.check([table])
    assert pool.match(hashes) == []


def test_repair_starts_with_page_one():
    pool = PagePool(3)
    pool.allocate(1)
    pool.repair([])
    pool.check([])
