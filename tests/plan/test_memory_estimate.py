"""What activations take: sums that a person can check."""

import pytest

from outsize.block import ALIGNMENT, align
from outsize.config import Home
from outsize.plan.ledger import Ledger
from outsize.plan.memory_estimate import estimate
from outsize.plan.workload import Linear, LossMemory
from tests.plan.test_planner import MIB, SHAPE, workload_of
from tests.plan.test_simulate import blocks

ROWS, TILE_ROWS, NUM_BLOCKS = SHAPE.rows, 2, 6
WORKLOAD = workload_of(blocks(NUM_BLOCKS))
BOUNDARY = NUM_BLOCKS * ROWS * MIB
"""One MiB of each row of a block's input, all of which may wait elsewhere."""
MOVED = align(BOUNDARY + ALIGNMENT * 2 * NUM_BLOCKS)


def estimated(inputs, kept=()):
    return estimate(WORKLOAD, SHAPE, TILE_ROWS, Home.HOST, inputs, frozenset(kept))


def test_inputs_that_stay_count_as_activations():
    assert estimated(Home.HOST) == Ledger.of(Home.HOST, activations=BOUNDARY, visit=TILE_ROWS * 4 * MIB)


@pytest.mark.parametrize(("kept", "num_copies", "saved"), [((), 4, 0), (("L05",), 5, 8 * ROWS * MIB)])
def test_inputs_that_wait_on_disk_leave_copies_and_buffers_in_memory(kept, num_copies, saved):
    """Four copies are on their way or in use, beside those of layers that save their activations."""
    here = {"activations": num_copies * ROWS * MIB + saved, "visit": TILE_ROWS * 4 * MIB}
    expected = Ledger.of(Home.HOST, **here, input_buffers=8 * 4 * MIB) + Ledger.of(Home.DISK, inputs=MOVED)
    assert estimated(Home.DISK, kept) == expected


def test_the_loss_takes_all_its_logits_or_a_tile_of_them_and_what_lies_beside():
    memory = LossMemory(Linear(10.0, 0.0), Linear(0.0, 4.0), 20, Linear(1.0, 1.0))
    assert [memory.at(rows) for rows in (1, 2, 100)] == [10, 8 + 3, 20 + 101]
