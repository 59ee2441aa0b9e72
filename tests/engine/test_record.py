"""A step that is recorded: everything that happened is in it, once, and what was waited for is named."""

import itertools
import threading
import time
from collections import Counter
from concurrent.futures import Future
from contextlib import contextmanager, nullcontext

import pytest
import torch

import outsize
from outsize.errors import UsageError
from outsize.plan import Backward, Forward, Free, Wait
from outsize.plan.profile import Resource
from outsize.plan.simulate import Stall
from outsize.plan.timeline import Span
from outsize.store import offload
from outsize.store.recorder import SHORTEST_STALL_S, causes
from outsize.tier import Verb
from outsize.tier.transfer import TaskTransfer
from tests.running import adamw, loss_of, opened
from tests.seams import (
    call_plan_step,
    device_of,
    flush,
    move_small_inputs,
    plan_executed,
    recorder_of,
    records_of,
    with_twin,
    wrapped_disk,
)
from tests.zoo import ZOO

COMPUTE, UPDATE, READ, WRITE, UP, DOWN = Resource
DELAY_S = 0.02


class Waits:
    """What computing waits for: `L01.weight`, or nothing. Where it `is_open`, late transfers are not held back."""

    def __init__(self, monkeypatch):
        self.is_open = True
        self._current = None
        self._changed = threading.Condition()
        unpack = offload.ActivationOffload._unpack

        def watched_unpack(keeper, saved):
            with self.of(None if isinstance(saved, torch.Tensor) else saved.kept.input.label):
                return unpack(keeper, saved)

        call_plan_step(
            monkeypatch,
            lambda op: self.of(f"{op.block}.{op.plane}" if isinstance(op, Wait | Free) else None),
        )
        monkeypatch.setattr(offload.ActivationOffload, "_unpack", watched_unpack)

    def _set(self, **values):
        with self._changed:
            vars(self).update(values)
            self._changed.notify_all()

    @contextmanager
    def of(self, what):
        self._set(_current=what)
        yield
        self._set(_current=None)

    @contextmanager
    def closed(self):
        self._set(is_open=False)
        yield
        self._set(is_open=True)

    def reach(self, label):
        with self._changed:
            assert self._changed.wait_for(
                lambda: self.is_open or (self._current is not None and label.startswith(self._current)), 100
            ), label


class LateTier:
    """Transfers that `is_late(verb, label)` chooses begin DELAY_S after computing starts to wait for them."""

    def __init__(self, inner, waits, is_late):
        self._inner, self._waits, self._is_late = inner, waits, is_late
        self.late = []

    def start_read(self, offset, buffer, label):
        return self._start(Verb.READ, self._inner.start_read, offset, buffer, label)

    def start_write(self, offset, buffer, label):
        return self._start(Verb.WRITE, self._inner.start_write, offset, buffer, label)

    def _start(self, verb, start, offset, buffer, label):
        if self._waits.is_open or not self._is_late(verb, label):
            return start(offset, buffer, label)
        task, view = Future(), memoryview(buffer)

        def run():
            try:
                with view:
                    self._waits.reach(label)
                    time.sleep(DELAY_S)
                    start(offset, view, label).wait()
            except BaseException as error:
                task.set_exception(error)
            else:
                task.set_result(None)

        self.late.append(label)
        threading.Thread(target=run).start()
        return TaskTransfer(task)

    def __getattr__(self, name):
        return getattr(self._inner, name)


def small_inputs(monkeypatch):
    """Inputs of tiny models move."""
    move_small_inputs(monkeypatch, part_bytes=4096)


def opened_on_disk(tmp_path, name="llama_tied", **options):
    options = {"disk": tmp_path, "home": "disk", "pins": outsize.Pins(resident_bytes=0)} | options
    model = opened(ZOO[name].build(), **options)
    return model, adamw(model, max_grad_norm=1.0)


def step(model, optimizer, seed, name="llama_tied"):
    loss_of(model(**ZOO[name].batch(rows=3, length=12, seed=seed))).backward()
    optimizer.step()
    optimizer.zero_grad()


def settle(model):
    flush(model)
    device_of(model).finish()


def recorded(model, optimizer, steps=4, during=nullcontext):
    """The last of some steps; nothing of it, or of the one before, is under way at its ends."""
    for seed in range(steps - 1):
        step(model, optimizer, seed)
    settle(model)
    before = outsize.report(model)
    with outsize.record(model) as recording:
        with during():
            step(model, optimizer, steps)
        settle(model)
    return recording.timeline, before, outsize.report(model)


def assert_stalls_are_all_waits(timeline, before, after):
    """Each wait is a stall in full, but for those that are too short to count; the report counts the same ones."""
    waited_s = sum(after.wait_s.values()) - sum(before.wait_s.values())
    num_waits = sum(1 for span in timeline.spans if span.resource is not COMPUTE)
    assert sum(timeline.stall_s.values()) >= waited_s - num_waits * SHORTEST_STALL_S
    computing = [(span.start_s, span.end_s) for span in timeline.spans if span.resource is COMPUTE]
    both = sorted([*computing, *((stall.start_s, stall.end_s) for stall in timeline.stalls)])
    assert all(b[0] >= a[1] - 1e-5 for a, b in itertools.pairwise(both))


def num_stalls(timeline, cause):
    """Stalls of `cause` that are as long as a late transfer makes them."""
    return sum(stall.cause is cause and stall.end_s - stall.start_s >= DELAY_S for stall in timeline.stalls)


def test_every_visit_is_there_once(tmp_path):
    timeline, _, _ = recorded(*(opened := opened_on_disk(tmp_path)))
    visits = Counter(str(op) for op in plan_executed(opened[0]) if isinstance(op, Forward | Backward))
    assert len(visits) > 6
    seen = Counter(
        span.label
        for span in timeline.spans
        if span.resource is COMPUTE and span.label.split()[0] in ("forward", "backward")
    )
    assert seen == visits


@pytest.mark.parametrize("count", [1, 2])
def test_bytes_are_those_of_the_report(count, tmp_path):
    folders = [tmp_path / str(index) for index in range(count)]
    for folder in folders:
        folder.mkdir()
    timeline, before, after = recorded(*opened_on_disk(tmp_path, disk=folders))
    moved = Counter()
    for span in timeline.spans:
        moved[span.resource] += span.num_bytes
    assert moved[READ] == after.bytes_read - before.bytes_read > 0
    assert moved[WRITE] == after.bytes_written - before.bytes_written > 0
    assert not moved[UP] and not moved[DOWN]


def test_inputs_on_disk_are_in_the_trace_and_waits_for_them_are_counted(tmp_path, monkeypatch):
    small_inputs(monkeypatch)
    waits = Waits(monkeypatch)
    pins = outsize.Pins(resident_bytes=0, inputs="disk")
    with wrapped_disk(monkeypatch, lambda tier: LateTier(tier, waits, lambda verb, label: ".input" in label)):
        timeline, before, after = recorded(*opened_on_disk(tmp_path, pins=pins), during=waits.closed)
    moved = Counter()
    for span in timeline.spans:
        moved[span.resource] += span.num_bytes
    assert moved[READ] == after.bytes_read - before.bytes_read > 0
    assert moved[WRITE] == after.bytes_written - before.bytes_written > 0
    assert any(".input" in span.label for span in timeline.spans if span.resource is READ)
    for what in ("wait input", "free input"):
        assert after.wait_s[what] - before.wait_s[what] >= DELAY_S
    assert num_stalls(timeline, READ) and num_stalls(timeline, WRITE)
    assert_stalls_are_all_waits(timeline, before, after)


def test_computing_is_serial_and_all_lies_within_the_step(tmp_path):
    timeline, _, _ = recorded(*opened_on_disk(tmp_path))
    computing = [span for span in timeline.spans if span.resource is COMPUTE]
    assert all(a.end_s <= b.start_s for a, b in itertools.pairwise(computing))
    assert all(0 <= span.start_s < span.end_s <= timeline.step_s for span in timeline.spans)
    assert list(timeline.spans) == sorted(timeline.spans, key=lambda span: span.start_s)


def test_every_block_is_updated_and_memory_is_sampled_at_every_visit(tmp_path):
    model, optimizer = opened_on_disk(tmp_path)
    timeline, _, _ = recorded(model, optimizer)
    updated = {span.label for span in timeline.spans if span.resource is UPDATE}
    assert updated == {f"update {block}" for block in records_of(model)}
    visits = [s for s in timeline.spans if s.label.split()[0] in ("forward", "backward")]
    assert list(timeline.memory) == ["host"] and len(timeline.memory["host"]) == len(visits) + 2
    times = [time_s for time_s, _ in timeline.memory["host"]]
    assert times == sorted(times) and all(size > 1 << 20 for _, size in timeline.memory["host"])


def test_nothing_is_recorded_before_or_after(tmp_path):
    model, optimizer = opened_on_disk(tmp_path)
    timeline, _, _ = recorded(model, optimizer)
    with outsize.record(model):
        recorder = recorder_of(model)
    told = len(recorder._spans), len(recorder._waits), len(recorder._memory)
    step(model, optimizer, 9)
    settle(model)
    assert (len(recorder._spans), len(recorder._waits), len(recorder._memory)) == told
    again, _, _ = recorded(model, optimizer, steps=1)
    assert Counter(s.label for s in again.spans) == Counter(s.label for s in timeline.spans)


def test_recording_changes_no_number(tmp_path):
    def losses(is_recorded):
        model, optimizer = opened_on_disk(tmp_path)
        found = []
        for seed in range(4):
            if is_recorded and seed == 2:
                with outsize.record(model):
                    step(model, optimizer, seed)
            else:
                step(model, optimizer, seed)
            found.append(float(loss_of(model(**ZOO["llama_tied"].batch(rows=3, length=12, seed=7))).detach()))
        return found

    assert losses(True) == losses(False)


@pytest.mark.parametrize("inputs", ["disk", "host"])
def test_inputs_of_a_device_are_in_the_trace(inputs, tmp_path, monkeypatch):
    with_twin(monkeypatch)
    small_inputs(monkeypatch)
    pins = outsize.Pins(resident_bytes=0, inputs=inputs)
    timeline, before, after = recorded(*opened_on_disk(tmp_path, pins=pins))
    moved = Counter()
    for span in timeline.spans:
        moved[span.resource] += span.num_bytes
    assert moved[UP] == after.bytes_up - before.bytes_up
    assert moved[READ] == after.bytes_read - before.bytes_read
    assert any(".input" in span.label for span in timeline.spans if span.resource is UP)
    assert "wait input" in after.wait_s and "free input" in after.wait_s


@pytest.mark.parametrize(
    ("verb", "plane", "cause"), [(Verb.READ, ".weight", READ), (Verb.WRITE, ".gradient", WRITE)]
)
def test_what_is_slow_is_what_is_waited_for(tmp_path, monkeypatch, verb, plane, cause):
    """While going back: in forward, weights are read for updates, which wait in line behind those of other blocks."""
    waits = Waits(monkeypatch)
    pins = outsize.Pins(resident_bytes=0, weight_slots=1, gradient_slots=1)
    model, optimizer = opened_on_disk(tmp_path, pins=pins)

    def is_late(given, label):
        goes_back = any(isinstance(op, Backward) for op in plan_executed(model))
        return goes_back and given is verb and plane in label

    with wrapped_disk(monkeypatch, lambda tier: LateTier(tier, waits, is_late)) as tiers:
        timeline, before, after = recorded(model, optimizer, during=waits.closed)
    blocks = {label.partition(".")[0] for label in tiers[0].late}
    assert num_stalls(timeline, cause) >= len(blocks) > 1
    assert_stalls_are_all_waits(timeline, before, after)


def test_copies_of_a_device_are_there(tmp_path, monkeypatch):
    twins = with_twin(monkeypatch)
    model, optimizer = opened_on_disk(tmp_path)
    timeline, before, after = recorded(model, optimizer)
    moved = Counter()
    for span in timeline.spans:
        moved[span.resource] += span.num_bytes
    assert moved[UP] == after.bytes_up - before.bytes_up > 0
    assert moved[DOWN] == after.bytes_down - before.bytes_down > 0
    assert twins[0]._listener is None
    assert {"up L00.weight", "down L00.gradient[0]"} <= {span.label for span in timeline.spans}


def test_what_cannot_be_recorded_is_refused(tmp_path):
    model, optimizer = opened_on_disk(tmp_path)
    with pytest.raises(UsageError, match="before its first call"), outsize.record(model):
        pass
    step(model, optimizer, 0)
    with outsize.record(model) as recording:
        with pytest.raises(UsageError, match="already"), outsize.record(model):
            pass
        with pytest.raises(UsageError, match="not over"):
            _ = recording.timeline
    assert recording.timeline.step_s > 0
    with pytest.raises(ZeroDivisionError), outsize.record(model) as recording:
        raise ZeroDivisionError
    assert recorder_of(model) is None
    with pytest.raises(UsageError):
        _ = recording.timeline


def test_causes_are_what_ended_a_wait_and_what_it_came_after():
    wait, free = Wait.ended_by, Free.ended_by
    read = Span(READ, 1.0, 2.0, "read L00.state[0]")
    update = Span(UPDATE, 2.5, 3.0, "update L00")
    write = Span(WRITE, 3.0, 3.5, "write L00.state[0]")
    assert list(causes(wait, 0.0, 3.0, [read, update])) == [Stall(2.0, 3.0, UPDATE), Stall(0.0, 2.0, READ)]
    # What begins after the wait is over, and a write, do not end it; what was over before it began did not hold it up.
    assert list(causes(wait, 0.5, 2.1, [read, update, write])) == [Stall(0.5, 2.1, READ)]
    assert list(causes(wait, 2.6, 3.6, [read, update, write])) == [Stall(2.6, 3.6, UPDATE)]
    assert list(causes(free, 2.0, 3.5, [read, update, write])) == [
        Stall(3.0, 3.5, WRITE),
        Stall(2.0, 3.0, UPDATE),
    ]
    assert list(causes(wait, 0.0, 1.0, [])) == [Stall(0.0, 1.0, READ)]
    assert list(causes(free, 0.0, 1.0, [])) == [Stall(0.0, 1.0, WRITE)]
