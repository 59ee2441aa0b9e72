"""A record cut into shards: what each rank holds, updates and measures adds up to the whole, bit for bit."""

import mmap
from itertools import chain, pairwise

import pytest
import torch

from outsize.block import CHUNK, NORM_ELEMENTS, Block, Group, Piece, Plane, Record, entry_parts, shards
from outsize.config import ComputeType, Home
from outsize.optim import ADAMW, ADAMW8BIT, compile_rule
from outsize.plan import Read, Update, Wait
from outsize.plan.place import GROUPS, lay_out
from outsize.store import gradients
from outsize.store.blocks import BlockStore
from outsize.store.optimizer_worker import OptimizerWorker
from outsize.store.planes import BlockPlanes
from outsize.store.update_job import Pending, UpdateJob
from outsize.tier import DoneTransfer, HostDevice
from tests.doubles import MemoryTier, NullTier, TwinDevice
from tests.hypers import hyper
from tests.seams import set_chunk

FLOAT32, BFLOAT16 = ComputeType.FLOAT32, ComputeType.BFLOAT16
SIZES = (6000, 1400, 64, 5, 2600)
SMALL_CHUNK = 2048
ALL, SOME = (True,) * 5, (True, False, True, True, False)
COUNTS = (1, 2, 3, 5)
PLANES = (Plane.WEIGHT, Plane.GRADIENT, Plane.MOMENT1, Plane.MOMENT2)
RULES = [(ADAMW, FLOAT32), (ADAMW, BFLOAT16), (ADAMW8BIT, BFLOAT16)]
NAMES = ["fp32", "split", "codes"]
STATE, BOTH = (Group.STATE,), (Group.STATE, Group.GRADIENT)
# A gradient that is stored in fp32 is summed in its home, which has no room for other ranks' part of the sum.
CASES = {
    "fp32": (ADAMW, FLOAT32, ALL, (), HostDevice),
    "split, state in memory": (ADAMW, BFLOAT16, ALL, STATE, HostDevice),
    "split, some train": (ADAMW, BFLOAT16, SOME, (), HostDevice),
    "codes, state and gradient in memory": (ADAMW8BIT, BFLOAT16, SOME, BOTH, HostDevice),
    "codes, beside a device": (ADAMW8BIT, BFLOAT16, ALL, (), TwinDevice),
}


def record_of(rule, kind, sizes, trainable):
    block = Block("L00", tuple(Piece(f"p{index}", (size,)) for index, size in enumerate(sizes)))
    return Record.lay_out(block, trainable, rule.state(kind), rule.element_bytes(kind))


@pytest.mark.parametrize("count", [*COUNTS, 40])
@pytest.mark.parametrize("trainable", [ALL, SOME], ids=["all", "some"])
@pytest.mark.parametrize(("rule", "kind"), RULES, ids=NAMES)
def test_planes_and_chunks_of_shards_add_up_to_the_whole(rule, kind, trainable, count):
    whole = record_of(rule, kind, [size * 1501 for size in SIZES], trainable)
    parts_of = shards(whole, count)
    assert [shard.shard.start for shard in parts_of[1:]] == [shard.shard.stop for shard in parts_of[:-1]]
    assert max(len(s.shard) for s in parts_of) - min(len(s.shard) for s in parts_of) <= 2 * CHUNK
    for plane in (*PLANES, *whole.state):
        assert [e for s in parts_of for e in s.plane_range(plane)[:: CHUNK // 4]] == list(
            whole.plane_range(plane)[:: CHUNK // 4]
        )
        assert sum(s.plane_elements(plane) for s in parts_of) == whole.plane_elements(plane)
        assert sum(s.plane_bytes(plane) for s in parts_of) == whole.plane_bytes(plane)
        assert list(chain.from_iterable(s.chunks(plane) for s in parts_of)) == list(whole.chunks(plane))
        parts = [(a, b, e.num_bytes) for s in parts_of for a, b, e in s.plane_parts(plane)]
        assert parts == [(a, b, e.num_bytes) for a, b, e in whole.plane_parts(plane)]
    for entry in whole.entries:
        parts = list(chain.from_iterable(entry_parts(s, entry, NORM_ELEMENTS) for s in parts_of))
        assert parts == list(entry_parts(whole, entry, NORM_ELEMENTS))
    assert sum(s.num_bytes for s in parts_of) == whole.num_bytes
    for shard in parts_of:
        extents = sorted(
            (extent.offset, extent.offset + extent.num_bytes)
            for plane in (Plane.WEIGHT, Plane.GRADIENT, *whole.state)
            for _, _, extent in shard.plane_parts(plane)
        )
        gaps = [after - stop for (_, stop), (after, _) in pairwise(extents)]
        assert not any(gaps), "planes of a shard lie side by side"
        assert not extents or (extents[0][0], extents[-1][1]) == (0, shard.num_bytes)


class Values:
    """A source that draws each parameter from its name."""

    bytes_read = 0

    def read(self, block, targets):
        for piece, target in zip(block.pieces, targets, strict=True):
            assert piece.is_whole
            generator = torch.Generator().manual_seed(int(piece.parameter[1:]))
            target.copy_(torch.randn(piece.shape, generator=generator))

    def stored_dtype(self, piece):
        return torch.float32

    def conversion_bytes(self, piece):
        return 0

    def gives_rows(self, parameter):
        return False

    def close(self):
        """Nothing to close."""


def run(record, rule, kind, disk, resident=(), device=HostDevice):
    """Three steps, two of them with two backwards: the weights that the shard holds, all state, and squares."""
    homes = {(record.name, group): Home.DISK for group in GROUPS}
    homes |= {(record.name, group): Home.DEVICE if device is HostDevice else Home.HOST for group in resident}
    placement = lay_out([record], homes, (1, 1), Home.DEVICE if device is HostDevice else Home.HOST)
    kernel = compile_rule(rule, kind, eager=True)
    store = BlockStore(
        [record],
        placement,
        device=device(),
        disk=disk,
        source=Values(),
        rule=rule,
        kernel=lambda kind: kernel,
        device_kernel=None,
    )
    state, sums = store[record.name], store.gradients
    trained = [index for index, entry in enumerate(record.entries) if entry.trainable]
    norms = []
    for step in range(1, 4):
        for backward in range(2 if step > 1 else 1):
            (sums.read if state.gradient.exists else sums.claim)(state)
            if state.gradient.exists:
                sums.wait(state)
            sums.begin(state)
            for index in trained:
                shape = record.entries[index].piece.shape
                generator = torch.Generator().manual_seed(100 * step + 10 * backward + index)
                sums.add(state, index, torch.randn(shape, generator=generator))
            sums.write(state)
            sums.free(state)
        sums.settle_norms()
        norms.append([dict(state.gradient.entries[index].squares) for index in trained])
        settings = hyper(lr=1e-2, step=step)
        hypers = tuple(settings if entry.trainable else None for entry in record.entries)
        state.update.freeze(Pending(hypers), step)
        for index in range(len(record.entries)):
            sums.drop(state, index)
        for op in ((Read, Plane.WEIGHT), (Update, None), (Wait, Plane.WEIGHT)):
            store.runners[op](state)
        store.weights.free(state)
    store.weights.read(state)
    store.weights.wait(state)
    held = record.plane_range(Plane.WEIGHT)
    weights = state.planes.weights()[held.start : held.stop].clone()
    planes = []
    for plane in record.state:
        stored = state.planes.at_home(plane)
        if stored is None:
            parts = []
            for start, stop, extent in record.plane_parts(plane):
                buffer = mmap.mmap(-1, extent.num_bytes)
                disk.start_read(extent.offset, memoryview(buffer), "state").wait()
                parts.append(buffer[: int((stop - start) * record.element_bytes[plane])])
            planes.append(b"".join(parts))
        else:
            num_bytes = int(record.plane_elements(plane) * record.element_bytes[plane])
            planes.append(bytes(stored.view(torch.uint8).numpy())[:num_bytes])
    store.weights.free(state)
    squares = [gradient.sum_of_squares for gradient in state.gradient.entries]
    store.close()
    return weights, planes, norms, squares


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_updates_and_norms_of_shards_add_up_to_the_whole(case, monkeypatch):
    set_chunk(monkeypatch, SMALL_CHUNK)
    monkeypatch.setattr(gradients, "NORM_ELEMENTS", SMALL_CHUNK)
    rule, kind, trainable, resident, device = case
    whole = record_of(rule, kind, SIZES, trainable)
    assert shards(whole, 1) == [whole]

    def outcome(record):
        return run(record, rule, kind, MemoryTier(max(record.num_bytes, 1)), resident, device)

    expected = outcome(whole)
    assert any(len(parts) > 1 for parts in expected[2][0]), "no entry has two parts"
    for count in COUNTS[1:]:
        assert_adds_up(whole, [outcome(shard) for shard in shards(whole, count)], expected)


def assert_adds_up(whole, parts, expected):
    """What the shards of `whole` have come to is what it has itself."""
    weights, planes, norms, sums = expected
    assert torch.equal(torch.cat([part[0] for part in parts]), weights)
    for index in range(len(whole.state)):
        assert b"".join(part[1][index] for part in parts) == planes[index]
    merged = [
        [dict(chain.from_iterable(squares.items() for squares in entry)) for entry in zip(*step, strict=True)]
        for step in zip(*(part[2] for part in parts), strict=True)
    ]
    assert merged == norms
    trained = [total for total, entry in zip(sums, whole.entries, strict=True) if entry.trainable]
    reference = [torch.tensor(list(entry.values()), dtype=torch.float64).sum() for entry in merged[-1]]
    assert trained == pytest.approx([float(each) for each in reference], rel=1e-12)


@pytest.mark.parametrize("count", COUNTS)
def test_ranks_move_the_bytes_of_the_whole(count, monkeypatch):
    """Each rank writes its own part of weights and state, and nothing else."""
    set_chunk(monkeypatch, SMALL_CHUNK)
    whole = record_of(ADAMW, BFLOAT16, SIZES, ALL)
    moved = []
    for record in [whole, *shards(whole, count)]:
        disk = NullTier(record.num_bytes)
        run(record, ADAMW, BFLOAT16, disk)
        moved.append(sorted((transfer.verb, transfer.label, transfer.num_bytes) for transfer in disk.log))
    assert sorted(chain.from_iterable(moved[1:])) == moved[0]


def test_each_chunk_of_a_shard_waits_for_its_own_part_of_the_weights(monkeypatch):
    set_chunk(monkeypatch, SMALL_CHUNK)
    shard = shards(record_of(ADAMW, FLOAT32, SIZES, ALL), 2)[1]
    waited = []

    class Noted(DoneTransfer):
        def __init__(self, number):
            self.number = number

        def wait(self):
            waited.append(self.number)

    kernel = compile_rule(ADAMW, FLOAT32, eager=True)
    worker = OptimizerWorker((), None, lambda kind: kernel)
    job = UpdateJob(
        planes=BlockPlanes(shard, 0, ADAMW.dtypes(FLOAT32), {}, Home.HOST),
        pending=Pending((hyper(lr=1e-2),) * len(SIZES)),
        weight=torch.ones(len(shard.shard)),
        weight_reads=[Noted(index) for index, _ in enumerate(shard.chunks())],
        state_planes=[torch.zeros(len(shard.shard)) for _ in shard.state],
        gradient=torch.ones(len(shard.shard)),
    )
    worker.submit(job)
    job.wait_applied()
    worker.close()
    own = [index for index, _ in enumerate(shard.chunks())]
    assert len(own) > 1
    assert waited == own + own, "each chunk waits for its own, and the end of the job for all"


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize(("rule", "kind"), RULES, ids=NAMES)
def test_what_lives_in_files_has_no_place_on_disk(rule, kind, count):
    """Nor does a page that is read from the disk reach into it: both arrive in one slot, in any order."""
    pieces = tuple(Piece(f"p{index}", (size * 307,)) for index, size in enumerate(SIZES))
    block, in_files = Block("L00", pieces), {pieces[1], pieces[4]}
    whole = Record.lay_out(block, SOME, rule.state(kind), rule.element_bytes(kind), in_files)
    size = whole.element_bytes[Plane.WEIGHT]
    ours = [entry for entry in whole.entries if whole.is_in_files(entry)]
    assert [entry.piece for entry in ours] == [pieces[1], pieces[4]] == [e.piece for e in whole.entries[-2:]]
    stored = [(*part, shard) for shard in shards(whole, count) for part in shard.plane_parts(Plane.WEIGHT)]
    assert max(stop for _, stop, _, _ in stored) == whole.num_stored <= ours[0].start
    assert all(start * size + extent.num_bytes <= ours[0].start * size for start, _, extent, _ in stored)
    trains = Record.lay_out(block, SOME, rule.state(kind), rule.element_bytes(kind))
    assert trains.num_stored == trains.num_elements and whole.num_stored < whole.num_elements
    left_out = trains.num_bytes - whole.num_bytes
    assert abs(left_out - sum(entry.piece.num_elements for entry in ours) * size) < 2 * 4096
