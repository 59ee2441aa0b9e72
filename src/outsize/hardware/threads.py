"""How many threads update weights, and how many move bytes to and from the disk, beside computing.

Updates are limited by memory, and transfers by the disk: from some number of threads on, more of them get nothing more
done, and take cores from computing. So the fewest are taken that are nearly as fast as the best. Where memory has several
nodes (sockets), the cores of one are among the numbers that are tried: what a thread touched first lies on its node, and
the cores of another reach it over the link between them.

What is not done is to bind threads to nodes: it pays where memory is bound too, and has not been measured.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

NODES = Path("/sys/devices/system/node")

ENOUGH = 0.95
"""Of the best rate."""

IO_COUNTS = (2, 4, 8)
"""Numbers to try, reading and writing at once; with one, every read would wait behind a write."""


def fewest(rates: Mapping[int, float]) -> int:
    """The fewest threads that are nearly as fast as the best number; `rates` by number of threads."""
    best = max(rates.values())
    return min(count for count, rate in rates.items() if rate >= ENOUGH * best)


def tried(counts: Iterable[int], rate_with: Callable[[int], float]) -> int:
    """The fewest of `counts` that do, by the rates that are measured with each."""
    return fewest({count: rate_with(count) for count in counts})


def update_counts(most: int, nodes: Iterable[frozenset[int]]) -> list[int]:
    """Numbers of threads to try for updates: powers of two, the cores of a node, and `most`."""
    powers = {1 << index for index in range(most.bit_length())}
    return sorted(count for count in {*powers, *map(len, nodes), most} if 0 < count <= most)


def nodes(root: Path = NODES, allowed: Iterable[int] | None = None) -> list[frozenset[int]]:
    """The cores of each node of memory that this process may use; one node where the system names none."""
    mine = frozenset(os.sched_getaffinity(0) if allowed is None else allowed)
    found = []
    for path in sorted(root.glob("node[0-9]*/cpulist")):
        try:
            cores = _cores(path.read_text()) & mine
        except (OSError, ValueError):
            continue
        if cores:
            found.append(cores)
    return found if frozenset().union(*found) == mine else [mine]


def _cores(text: str) -> frozenset[int]:
    """`0-3,8` as cores; a node that has memory only has none. Raises ValueError for what is no such list."""
    spans = [part.partition("-") for part in text.strip().split(",") if part]
    return frozenset(core for first, _, last in spans for core in range(int(first), int(last or first) + 1))
