"""What is computed again, in which parts, and what is added how often."""

import gc
import random

import numpy as np
import pytest
import torch

from outsize.engine.batch import Tile
from outsize.engine.oom_retry import Graphs, OomRetry
from outsize.tier import HostDevice


def full():
    raise torch.OutOfMemoryError("CUDA out of memory")


def rows_of(parts):
    return [(part.start, part.stop) for part in parts]


def on(is_on=True):
    return OomRetry(is_on, HostDevice(), lambda: False)


def limited(most, tried):
    """Computes what has at most `most` rows."""

    def attempt(part):
        tried.append((part.start, part.stop))
        if part.stop - part.start > most:
            full()

    return attempt


def test_parts_are_halved_until_they_fit_and_later_ones_begin_there():
    tried = []
    computed = on().compute((Tile(0, 7, 11), Tile(7, 11, 11)), limited(2, tried))
    assert rows_of(computed) == [(0, 2), (2, 4), (4, 6), (6, 8), (8, 10), (10, 11)], "as from the start"
    assert tried[:3] == [(0, 7), (0, 4), (0, 2)] and len(tried) == 2 + len(computed)


def test_what_fits_is_computed_as_it_is():
    parts = (Tile(0, 4, 6), Tile(4, 6, 6))
    assert on().compute(parts, limited(4, [])) == parts
    assert on().compute((), limited(4, [])) == ()


@pytest.mark.parametrize(
    ("is_on", "options"), [(False, {}), (True, {"may_cut": False}), (True, {"may_repeat": lambda: False})]
)
def test_what_must_not_be_repeated_is_not(is_on, options):
    tried = []
    with pytest.raises(torch.OutOfMemoryError):
        on(is_on).compute((Tile(0, 4, 4),), limited(2, tried), **options)
    assert tried == [(0, 4)]


def test_a_single_row_that_does_not_fit_is_an_error_and_the_next_part_is_another():
    oom_retry = on()
    with pytest.raises(torch.OutOfMemoryError):
        oom_retry.compute((Tile(0, 4, 4),), limited(0, []))
    assert oom_retry.compute((Tile(0, 4, 4),), limited(4, [])) == (Tile(0, 4, 4),)


def test_what_was_added_before_memory_ran_out_is_not_added_again():
    oom_retry, sums = on(), {"first": torch.zeros(6), "second": torch.zeros(6)}
    times = []

    def attempt(part):
        def add(name):
            sums[name][part.start : part.stop] += 1

        oom_retry.add("first", lambda: add("first"))
        times.append(part)
        if len(times) in (1, 4):
            full()
        oom_retry.add("second", lambda: add("second"))

    computed = oom_retry.compute((Tile(0, 4, 6), Tile(4, 6, 6)), attempt)
    # [0, 4) failed whole, and [4, 6) too: the first sum has them already, the second has none of them.
    assert rows_of(computed) == [(0, 2), (2, 4), (4, 5), (5, 6)]
    assert all(torch.equal(total, torch.ones(6)) for total in sums.values())


def test_outside_of_parts_everything_is_added():
    oom_retry, total = on(), []
    for _ in range(2):
        oom_retry.add("sum", lambda: total.append(1))
    assert len(total) == 2


def test_additions_to_one_sum_are_counted():
    """A repetition skips the additions that the failed attempt completed, and makes those that it did not."""
    oom_retry, total, attempts = on(), torch.zeros(4), []

    def attempt(part):
        attempts.append(part)
        for number in (1, 10, 100):
            if len(attempts) == 1 and number == 100:
                full()
            oom_retry.add("sum", lambda n=number: total[part.start : part.stop].add_(n))

    oom_retry.compute((Tile(0, 4, 4),), attempt)
    assert len(attempts) == 3 and torch.equal(total, torch.full((4,), 111.0))


@pytest.mark.parametrize("draw", [lambda: torch.rand(1).item(), random.random, np.random.random])
def test_random_numbers_begin_anew_at_each_attempt(draw):
    oom_retry, drawn = on(), []

    def attempt(part):
        values = draw()
        if len(drawn) == 0:
            drawn.append(values)
            full()
        drawn.append(values)

    torch.manual_seed(3)
    oom_retry.compute((Tile(0, 2, 2),), attempt)
    assert drawn[0] == drawn[1] != drawn[2]


def test_activations_that_wait_go_before_tiles_do():
    oom_retry, tried = on(), []
    mine, taken, empty = Graphs({Tile(0, 4, 4): object()}), Graphs({Tile(0, 4, 4): object()}), Graphs()
    for graphs in (mine, taken, empty):
        oom_retry.keep(graphs)
    assert len(oom_retry.take(taken)) == 1 and not taken

    def attempt(part):
        tried.append(part)
        if mine:
            full()

    with pytest.warns(RuntimeWarning, match="keeps its activations"):
        assert oom_retry.compute((Tile(0, 4, 4),), attempt) == (Tile(0, 4, 4),)
    assert not mine and not oom_retry.keeps_graphs and len(tried) == 2
    assert len(oom_retry.notes) == 1


def test_graphs_that_were_dropped_are_forgotten():
    oom_retry = on()
    oom_retry.keep(Graphs({Tile(0, 4, 4): object()}))
    gc.collect()
    with pytest.raises(torch.OutOfMemoryError):
        oom_retry.compute((Tile(0, 1, 1),), limited(0, []))
    assert oom_retry.keeps_graphs
