"""The optimizer worker: chunks through few buffers, in order, and errors that reach every job that waits."""

import inspect
import threading

import pytest
import torch

from outsize.block import CHUNK, Block, Piece, Plane, Record
from outsize.config import ComputeType, Home
from outsize.errors import StorageError
from outsize.optim import ADAMW, compile_rule
from outsize.store.optimizer_worker import OptimizerWorker
from outsize.store.planes import BlockPlanes
from outsize.store.update_job import Pending, UpdateJob, runs
from outsize.tier import HostArena, Verb
from tests.doubles import Fault, FaultKind, FaultyTier, NullTier
from tests.hypers import hyper

TYPE = ComputeType.FLOAT32
SIZES = (CHUNK + 100, 64, 500)


@pytest.fixture(scope="module")
def kernel():
    return compile_rule(ADAMW, TYPE, eager=True)


def make_record(sizes=SIZES, trainable=(True, True, True)):
    block = Block("L00", tuple(Piece(f"p{i}", (size,)) for i, size in enumerate(sizes)))
    return Record.lay_out(block, trainable, ADAMW.state(TYPE), ADAMW.element_bytes(TYPE))


def make_job(record, hypers, after=None, weight=None, planes=None, gradient=None):
    n = record.num_trainable
    return UpdateJob(
        planes=BlockPlanes(record, 0, ADAMW.dtypes(TYPE), {}, Home.HOST),
        pending=Pending(tuple(hypers)),
        weight=torch.ones(record.num_elements) if weight is None else weight,
        state_planes=planes or [torch.zeros(n), torch.zeros(n)],
        gradient=torch.full((n,), 0.5) if gradient is None else gradient,
        after=after,
    )


def first(record, start, stop, target):
    """Given to the first update of a block: a remainder of zero."""


def make_lane(kernel, disk=None, num_buffers=2):
    record = make_record()
    num_bytes = record.state_bytes(CHUNK) + 4 * CHUNK
    arena = HostArena(num_buffers * num_bytes)
    buffers = [arena.allocate(num_bytes, f"chunk{i}") for i in range(num_buffers)]
    return OptimizerWorker(
        buffers,
        disk,
        kernel if callable(kernel) and not hasattr(kernel, "rule") else lambda kind: kernel,
    )


def test_runs_join_what_is_updated_alike_and_leave_out_the_rest():
    record = make_record()
    one, other = hyper(lr=1e-3), hyper(lr=1e-2)
    first, second, third = record.entries

    def found(hypers, start, stop):
        return runs(record, Pending(tuple(hypers)), start, stop)

    assert found([one, one, one], 0, CHUNK) == [(0, CHUNK, one)]
    tail = found([one, other, None], CHUNK, record.num_trainable)
    assert tail == [(CHUNK, first.stop, one), (second.start, second.stop, other)]
    assert found([None, None, one], 0, CHUNK) == []
    assert found([None, None, one], CHUNK, record.num_trainable) == [(third.start, third.stop, one)]


def test_chunks_cover_what_trains_and_at_first_everything():
    record = make_record((CHUNK, CHUNK, 64), (True, False, False))
    job = make_job(record, [hyper(lr=1.0), None, None])
    assert list(job.chunks()) == [(0, CHUNK, CHUNK)]
    job.fill_remainder = first
    assert list(job.chunks()) == [
        (0, CHUNK, CHUNK),
        (CHUNK, CHUNK, 2 * CHUNK),
        (2 * CHUNK, 2 * CHUNK, record.num_elements),
    ]


def test_padding_and_what_has_no_hyperparameters_stay(kernel):
    lane, record = make_lane(kernel), make_record()
    job = make_job(record, [hyper(lr=0.1, weight_decay=0.0), None, hyper(lr=0.2, weight_decay=0.0)])
    lane.submit(job)
    job.wait_applied()
    lane.close()
    first, second, third = record.entries
    assert torch.allclose(job.weight[first.start : first.stop], torch.tensor(0.9), atol=1e-5)
    assert torch.equal(job.weight[second.start : second.stop], torch.ones(64))
    assert torch.allclose(job.weight[third.start : third.stop], torch.tensor(0.8), atol=1e-5)
    assert torch.equal(job.weight[first.stop : second.start], torch.ones(second.start - first.stop))


def test_jobs_are_applied_in_order(kernel):
    lane, record = make_lane(kernel), make_record()
    order = []

    def slow_kernel(*args):
        order.append(hypers.index(args[3]) + 1)
        kernel(*args)

    lane = make_lane(lambda kind: slow_kernel)
    weight, planes = torch.ones(record.num_elements), [torch.zeros(record.num_trainable) for _ in range(2)]
    jobs, hypers = [], [hyper(lr=0.1, step=step) for step in range(1, 6)]
    for own in hypers:
        jobs.append(make_job(record, [own] * 3, jobs[-1] if jobs else None, weight, planes))
        lane.submit(jobs[-1])
    jobs[-1].wait_applied()
    lane.close()
    assert order == sorted(order) and set(order) == {1, 2, 3, 4, 5}
    assert all(job.after is None for job in jobs), "a chain of jobs keeps what they hold alive"


@pytest.mark.parametrize("verb", [Verb.READ, Verb.WRITE])
def test_an_error_reaches_whoever_waits_and_the_lane_goes_on(verb, kernel):
    record = make_record()
    disk = FaultyTier(NullTier(record.num_bytes), [Fault(FaultKind.EIO, verb, nth=2)])
    lane = make_lane(kernel, disk, num_buffers=1)
    bad = make_job(record, [hyper(lr=0.1)] * 3)
    bad.state_planes = None
    good = make_job(record, [hyper(lr=0.1)] * 3)
    lane.submit(bad)
    lane.submit(good)
    with pytest.raises(StorageError, match=r"L00.state\[1\]"):
        bad.wait()
    good.wait_applied()
    third = make_job(record, [hyper(lr=0.1)] * 3, after=bad)
    third.state_planes = None
    lane.submit(third)
    with pytest.raises(StorageError):
        third.wait_applied()
    lane.close()


def test_a_failed_write_is_an_error_of_its_own_job_only(kernel):
    """The next job takes the chunk buffer that the failed write used."""
    record = make_record()
    disk = FaultyTier(NullTier(record.num_bytes), [Fault(FaultKind.EIO, Verb.WRITE, nth=1)])
    lane = make_lane(kernel, disk, num_buffers=1)
    jobs = [make_job(record, [hyper(lr=0.1)] * 3) for _ in range(3)]
    for job in jobs:
        job.state_planes = None
        lane.submit(job)
    for job in jobs:
        job.wait_applied()
    with pytest.raises(StorageError, match=r"L00.state\[0\]"):
        jobs[0].wait()
    for job in jobs[1:]:
        job.wait()
    lane.close()


def test_an_error_of_the_rule_reaches_whoever_waits():
    def broken(*args):
        raise ZeroDivisionError("a defect")

    lane, record = make_lane(lambda kind: broken), make_record()
    job = make_job(record, [hyper(lr=0.1)] * 3)
    lane.submit(job)
    with pytest.raises(ZeroDivisionError):
        job.wait_applied()
    assert job.is_applied()
    lane.close()


def test_closing_finishes_what_was_submitted(kernel):
    before = threading.active_count()
    lane, record = make_lane(kernel), make_record()
    jobs = [make_job(record, [hyper(lr=0.1)] * 3) for _ in range(3)]
    for job in jobs:
        lane.submit(job)
    lane.close()
    assert all(job.is_applied() for job in jobs)
    assert threading.active_count() == before


def test_a_first_update_zeroes_state_that_streams(kernel):
    """What an earlier job left in the buffer must not be taken for this block's moments."""
    record = make_record()
    disk = NullTier(record.num_bytes)
    lane = make_lane(kernel, disk, num_buffers=1)
    results = []
    for _ in range(2):
        job = make_job(record, [hyper(lr=0.1)] * 3)
        job.state_planes, job.fill_remainder = None, first
        lane.submit(job)
        job.wait()
        results.append(job.weight)
    lane.close()
    assert torch.equal(*results)
    assert not torch.equal(results[0], torch.ones(record.num_elements))


def test_planes_of_a_first_job_are_wide_enough():
    record = make_record()
    assert record.plane_bytes(Plane.MOMENT1) >= 4 * record.num_trainable


def lines_of(function):
    """The numbers of the lines of a loop, after its `while`."""
    lines, start = inspect.getsourcelines(function)
    return range(start + 2, start + len(lines))


@pytest.mark.parametrize("loop", [OptimizerWorker._feed_jobs, OptimizerWorker._apply_chunks])
@pytest.mark.parametrize("passage", [1, 2])
def test_an_exception_at_any_line_of_a_thread_loses_no_job(loop, passage, kernel, monkeypatch):
    """Each job is applied or fails; none is waited for without end, and the threads end when they should."""
    struck = []

    def watched(line):
        left = [passage]

        def trace(frame, event, argument):
            if frame.f_code is not loop.__code__:
                return None
            if event == "line" and frame.f_lineno == line:
                left[0] -= 1
                if not left[0]:
                    struck.append(line)
                    raise MemoryError("injected")
            return trace

        return trace

    for line in lines_of(loop):
        threading.settrace(watched(line))
        lane, record = make_lane(kernel), make_record()
        threading.settrace(None)
        jobs = [make_job(record, [hyper(lr=0.1)] * 3) for _ in range(3)]
        for job in jobs:
            lane.submit(job)
        for job in jobs:
            assert job._is_applied.wait(60), f"a job was lost at line {line}"
        closing = threading.Thread(target=lane.close, daemon=True)
        closing.start()
        closing.join(60)
        assert not closing.is_alive(), f"the threads go on after line {line}"
    assert len(struck) >= 4
