"""How many threads are enough, on machines that are made up."""

import os

import pytest

from outsize.hardware import host, threads
from outsize.hardware.rate import Work
from outsize.native import openmp


def machine(folder, **lists):
    for name, text in lists.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "cpulist").write_text(f"{text}\n")
    return folder


@pytest.mark.parametrize(
    ("rates", "enough"),
    [
        ({1: 10.0, 2: 19.0, 4: 20.0}, 2),
        ({1: 10.0, 2: 18.9, 4: 20.0}, 4),
        ({1: 20.0, 2: 19.0, 4: 12.0}, 1),
        ({1: 5.0}, 1),
    ],
)
def test_the_fewest_threads_that_are_nearly_as_fast_do(rates, enough):
    assert threads.fewest(rates) == enough


def test_every_number_is_measured_once():
    measured = []

    def rate_with(count):
        measured.append(count)
        return min(count, 4) * 1.0

    assert threads.tried([1, 2, 4, 8], rate_with) == 4 and measured == [1, 2, 4, 8]


def test_two_sockets_and_a_node_of_memory_alone(tmp_path):
    root = machine(tmp_path, node0="0-3,8-11", node1="4-7,12-15", node2="")
    (root / "node3").mkdir()
    assert threads.nodes(root, range(16)) == [
        frozenset({0, 1, 2, 3, 8, 9, 10, 11}),
        frozenset({4, 5, 6, 7, 12, 13, 14, 15}),
    ]


def test_cores_that_the_process_may_not_use_do_not_count(tmp_path):
    root = machine(tmp_path, node0="0-3", node1="4-7")
    assert threads.nodes(root, {1, 2, 5}) == [frozenset({1, 2}), frozenset({5})]
    assert threads.nodes(root, {1, 2}) == [frozenset({1, 2})]


@pytest.mark.parametrize("lists", [{}, {"node0": "none"}, {"node0": "0-1"}])
def test_where_the_system_does_not_name_all_cores_there_is_one_node(lists, tmp_path):
    assert threads.nodes(machine(tmp_path, **lists), range(4)) == [frozenset(range(4))]


def test_this_machine_has_a_node():
    found = threads.nodes()
    assert found and frozenset().union(*found) == os.sched_getaffinity(0)


@pytest.mark.parametrize(
    ("most", "sizes", "counts"),
    [
        (2, [2], [1, 2]),
        (6, [6], [1, 2, 4, 6]),
        (48, [24, 24], [1, 2, 4, 8, 16, 24, 32, 48]),
        (8, [12, 12], [1, 2, 4, 8]),
        (1, [1], [1]),
    ],
)
def test_the_cores_of_a_node_are_tried(most, sizes, counts):
    assert threads.update_counts(most, [frozenset(range(size)) for size in sizes]) == counts


@pytest.mark.skipif(not hasattr(openmp(), "omp_set_num_threads"), reason="torch has no OpenMP here")
def test_work_runs_with_so_many_threads():
    library = openmp()
    before, seen = library.omp_get_max_threads(), []
    work = host.with_threads(Work(lambda: seen.append(library.omp_get_max_threads()) or 1.0), 5)
    assert work.run() == 1.0 and seen == [5]
    assert library.omp_get_max_threads() == before
