"""The number of threads belongs to the thread that sets it."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from outsize.native import openmp
from outsize.optim import limit_threads, limited_threads, threads

pytestmark = pytest.mark.skipif(
    not hasattr(openmp(), "omp_set_num_threads"), reason="torch has no OpenMP here"
)


def in_new_thread(function):
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(function).result()


def test_a_limit_holds_for_the_thread_that_sets_it_alone():
    before = torch.get_num_threads()

    def limited():
        limit_threads(before + 3)
        return torch.get_num_threads()

    assert in_new_thread(limited) == before + 3
    assert torch.get_num_threads() == before
    assert in_new_thread(torch.get_num_threads) == before


@pytest.mark.parametrize("error", [None, ValueError])
def test_a_limit_ends_with_its_block(error):
    def limited():
        before = torch.get_num_threads()
        try:
            with limited_threads(before + 3):
                inside = torch.get_num_threads()
                if error is not None:
                    raise error
        except ValueError:
            pass
        return inside - before, torch.get_num_threads() - before

    assert in_new_thread(limited) == (3, 0)


def test_without_openmp_nothing_happens(monkeypatch):
    monkeypatch.setattr(threads, "openmp", lambda: None)
    before = torch.get_num_threads()
    limit_threads(before + 3)
    assert torch.get_num_threads() == before
