"""The executor: reads run ahead, slots are given back, waits are counted, nothing is left behind."""

import itertools
import threading
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

import outsize
from outsize import Pins
from outsize.block import Group
from outsize.config import Home
from outsize.errors import UsageError
from outsize.plan import Read, Update, Wait
from tests.running import adamw, assert_same_weights, opened, train, values_of
from tests.seams import (
    close,
    gradients_in_slots,
    placement_of,
    plan_executed,
    records_of,
    settle_updates,
    updates_pending,
    visit_block,
    wrapped_disk,
)
from tests.zoo import ZOO

BATCH = ZOO["llama"].batch()


def llama(tmp_path, **pins):
    return opened(ZOO["llama"].build().train(), disk=tmp_path, home="disk", pins=Pins(**pins))


def test_reads_are_started_before_the_block_is_reached(tmp_path):
    model = llama(tmp_path, weight_slots=3)
    train(model, [BATCH])
    ahead = []
    model.model.layers[0].register_forward_pre_hook(
        lambda *_: ahead.append([op.block for op in plan_executed(model) if isinstance(op, Read)])
    )
    model(**BATCH)
    assert {"L01", "L02"} & set(ahead[0])


def test_updates_are_started_before_the_block_is_reached(tmp_path):
    model = llama(tmp_path, weight_slots=3)
    train(model, [BATCH])
    ahead = []
    model.model.layers[0].register_forward_pre_hook(
        lambda *_: ahead.append([op.block for op in plan_executed(model) if isinstance(op, Update)])
    )
    model(**BATCH)
    assert "L01" in ahead[0]


class StartedReads:
    """A tier that notes the transfers of its reads, with their labels."""

    def __init__(self, inner):
        self._inner = inner
        self.transfers = []

    def start_read(self, offset, buffer, label):
        transfer = self._inner.start_read(offset, buffer, label)
        self.transfers.append((label, transfer))
        return transfer

    def __getattr__(self, name):
        return getattr(self._inner, name)


def test_transfers_run_beside_computing(tmp_path, monkeypatch):
    """What the next layer needs is read to its end while a layer computes: nobody has to wait for it first."""
    with wrapped_disk(monkeypatch, StartedReads) as disks:
        model = llama(tmp_path, weight_slots=3)
        train(model, [BATCH])
    finished = []

    def compute(index):
        for label, transfer in list(disks[0].transfers):
            if label.startswith(f"L{index + 1:02}.weight"):
                transfer.wait()
                finished.append(label)

    with torch.no_grad():
        model(**BATCH)
        disks[0].transfers.clear()
        for index, layer in enumerate(model.model.layers):
            layer.mlp.register_forward_hook(lambda *_, index=index: compute(index))
        model(**BATCH)
    assert finished


def test_waits_are_measured(tmp_path, monkeypatch):
    """On a clock that advances by a second whenever it is read, each wait takes one."""
    monkeypatch.setattr(
        "outsize.engine.executor.time", SimpleNamespace(perf_counter=itertools.count().__next__)
    )
    model = llama(tmp_path, weight_slots=1, gradient_slots=1)
    optimizer = adamw(model)
    train(model, [BATCH], optimizer)
    before = dict(outsize.report(model).wait_s)
    train(model, [BATCH], optimizer)
    waits = Counter(f"wait {op.plane}" for op in plan_executed(model) if isinstance(op, Wait))
    after = outsize.report(model).wait_s
    assert waits["wait weight"] >= 6
    for what, count in waits.items():
        assert after[what] - before[what] == count


def test_touch_brings_a_block_up_to_date_and_resumes(tmp_path):
    model, plain = llama(tmp_path, weight_slots=1, gradient_slots=1), ZOO["llama"].build().train()
    for subject in (model, plain):
        optimizer = adamw(subject)
        subject(**BATCH).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if subject is model:
            assert "L01" in updates_pending(model)
            model.model.layers[1].mlp.up_proj.weight.detach().clone()
            assert "L01" not in updates_pending(model)
            assert "L02" in updates_pending(model)
        train(subject, [BATCH], optimizer)
    assert_same_weights(model, plain)


def test_settling_applies_everything_that_is_pending(tmp_path):
    model = llama(tmp_path)
    train(model, [BATCH])
    assert updates_pending(model) == set(records_of(model))
    settle_updates(model)
    assert not updates_pending(model)


def test_no_gradient_slot_is_held_between_steps(tmp_path):
    model = llama(tmp_path, gradient_slots=2)
    optimizer = adamw(model)
    for _ in range(2):
        train(model, [BATCH], optimizer)
        assert not gradients_in_slots(model)
    model(**BATCH)  # claims slots for a backward that never comes
    with torch.no_grad():
        model(**BATCH)
    assert not gradients_in_slots(model)


def test_what_is_held_is_not_read_again(tmp_path):
    model = llama(tmp_path, weight_slots=3)
    train(model, [BATCH])
    with torch.no_grad():
        for _ in range(3):
            model(**BATCH)
    reads = [op.block for op in plan_executed(model) if isinstance(op, Read)]
    held = [op.block for op in plan_executed(model) if op.verb == "held"]
    assert held and not set(held[:1]) & set(reads[:1])
    assert len(reads) < len(records_of(model))


def test_threads_end_with_the_session(tmp_path):
    before = set(threading.enumerate())
    model = llama(tmp_path)
    train(model, [BATCH])
    names = {thread.name.rstrip("_0123456789") for thread in set(threading.enumerate()) - before}
    assert {"outsize-feed", "outsize-apply", "outsize-source", "outsize-disk"} <= names
    close(model)
    assert not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith("outsize")]


def test_a_visit_inside_another_leaves_that_one_its_place(tmp_path):
    model = llama(tmp_path)
    train(model, [BATCH])
    expected = values_of(model)
    with visit_block(model, "L00") as outer, visit_block(model, "L01") as inner:
        for state in (*outer, *inner):
            for entry, view in zip(state.record.entries, state.planes.pieces(), strict=True):
                assert torch.equal(view, expected[entry.piece.parameter])
    assert all(torch.equal(value, expected[name]) for name, value in values_of(model).items())


def test_a_visit_needs_its_place_to_be_free(tmp_path):
    model = llama(tmp_path, weight_slots=1)
    train(model, [BATCH])
    with (
        pytest.raises(UsageError, match="L01 is visited inside L00, which hold all slots"),
        visit_block(model, "L00"),
        visit_block(model, "L01"),
    ):
        pass
    train_again = values_of(model)
    assert all(value.isfinite().all() for value in train_again.values())


def test_gradients_wait_where_they_were_put(tmp_path):
    """A stored gradient is read back as it was summed, from the disk or from memory."""
    grads = []
    for home in ("disk", "host"):
        model = opened(ZOO["llama"].build().train(), disk=tmp_path, home=home, dtype="bfloat16")
        for _ in range(2):
            model(**BATCH).loss.backward()
        placement = placement_of(model)
        assert placement is not None
        assert (placement.home("L00", Group.GRADIENT) is Home.DEVICE) is (home == "host")
        grads.append({n: p.grad.clone() for n, p in model.named_parameters()})
        close(model)
    assert all(torch.equal(grads[0][name], grads[1][name]) for name in grads[0])
    assert {grad.dtype for grad in grads[0].values()} == {torch.bfloat16}
