"""A step in time: what a simulation becomes, what is refused, and how spans lie side by side."""

import copy
import dataclasses
import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outsize.errors import ConfigError
from outsize.plan.profile import Resource
from outsize.plan.simulate import Stall, simulate
from outsize.plan.timeline import Span, Timeline, tracks
from tests.plan.test_plan import call
from tests.plan.test_simulate import HOST, blocks, costs, on_disk

READ, WRITE, COMPUTE = Resource.READ, Resource.WRITE, Resource.COMPUTE
SMALL = Timeline(
    2.0,
    (Span(COMPUTE, 0.0, 1.0, "forward L00"), Span(READ, 0.5, 1.5, "read L01.weight", 4096)),
    (Stall(1.0, 1.5, READ),),
    {"host": ((0.0, 100), (2.0, 300))},
)


def simulated():
    records = blocks(6)
    names = list(records)
    result = simulate(call(names), records, on_disk(records), HOST, costs(names, 0.05, 0.15))
    return result, Timeline.simulated(result, {"host": 1 << 30})


def test_a_simulation_begins_at_zero_and_keeps_its_figures():
    result, timeline = simulated()
    assert timeline.step_s == result.step_s
    assert timeline.busy_s == pytest.approx(
        {resource: busy_s for resource, busy_s in result.busy_s.items() if busy_s}
    )
    assert timeline.stall_s == pytest.approx(result.stall_s)
    assert sum(timeline.stall_s.values()) > 0
    inside = [span for span in timeline.spans if span.start_s >= 0 and span.end_s <= result.step_s]
    assert 0.9 * len(timeline.spans) < len(inside) <= len(timeline.spans)
    assert {span.label for span in timeline.spans} >= {"forward L00", "backward L05", "update L03"}
    assert timeline.memory == {"host": ((0.0, 1 << 30), (result.step_s, 1 << 30))}


def test_what_takes_no_time_is_left_out():
    result, timeline = simulated()
    begin = result.start_s
    longer = dataclasses.replace(result, stalls=(*result.stalls, Stall(begin, begin, Resource.READ)))
    assert Timeline.simulated(longer, {"host": 1 << 30}) == timeline


def test_computing_of_a_simulation_is_serial_and_stalls_lie_in_its_gaps():
    _, timeline = simulated()
    computing = [(span.start_s, span.end_s) for span in timeline.spans if span.resource is COMPUTE]
    waiting = [(stall.start_s, stall.end_s) for stall in timeline.stalls]
    both = sorted(computing + waiting)
    assert all(second[0] >= first[1] - 1e-9 for first, second in itertools.pairwise(both))
    assert len(waiting) > 0


def test_busy_counts_what_overlaps_once_and_nothing_outside_of_the_step():
    spans = (
        Span(READ, -1.0, 0.5, "a"),
        Span(READ, 0.25, 1.0, "b"),
        Span(READ, 0.5, 0.75, "c"),
        Span(READ, 1.5, 3.0, "d"),
        Span(WRITE, 0.0, 0.5, "e"),
    )
    assert Timeline(2.0, spans, (), {}).busy_s == {READ: 1.5, WRITE: 0.5}


def test_json_and_back():
    _, timeline = simulated()
    for each in (SMALL, timeline):
        assert Timeline.from_json(json.loads(json.dumps(each.to_json())), "x") == each


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("step_s", None),
        ("step_s", "1"),
        ("step_s", float("nan")),
        ("spans", [["fly", 0.0, 1.0, "a", 0]]),
        ("spans", [["read", 1.0, 0.0, "a", 0]]),
        ("spans", [["read", 0.0, 1.0, "a"]]),
        ("spans", [["read", 0.0, 1.0, "a", -1]]),
        ("spans", [["read", 0.0, 1.0, 5, 0]]),
        ("spans", [["read", 0.0, 1.0, "\ud800", 0]]),
        ("spans", 3),
        ("stalls", [[0.0, True, "read"]]),
        ("stalls", [[0.0, 1.0, "read", 5]]),
        ("memory", []),
        ("memory", {"host": [[0.0, 1.5]]}),
    ],
)
def test_what_is_malformed_is_named(part, value):
    values = copy.deepcopy(SMALL.to_json())
    values[part] = value
    with pytest.raises(ConfigError, match=f"^file: {part} is malformed") as caught:
        Timeline.from_json(values, "file")
    assert caught.value.hint


@pytest.mark.parametrize("part", ["step_s", "spans", "stalls", "memory"])
def test_what_is_missing_is_named(part):
    values = SMALL.to_json()
    del values[part]
    with pytest.raises(ConfigError, match=f"^file: {part} is missing"):
        Timeline.from_json(values, "file")
    with pytest.raises(ConfigError):
        Timeline.from_json([], "file")


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 10)), max_size=40))
def test_tracks_hold_every_span_once_and_none_overlap(intervals):
    spans = sorted(
        (Span(READ, start, start + length, str(index)) for index, (start, length) in enumerate(intervals)),
        key=lambda span: span.start_s,
    )
    found = tracks(spans)
    assert sorted((span for track in found for span in track), key=id) == sorted(spans, key=id)
    for track in found:
        assert all(first.end_s <= second.start_s for first, second in itertools.pairwise(track))
    at_once = max((sum(s.start_s <= t < s.end_s for s in spans) for t in range(61)), default=0)
    assert at_once <= len(found)


def test_spans_that_follow_each_other_at_once_share_a_track():
    first, second = Span(READ, 0.0, 1.0, "a"), Span(READ, 1.0, 2.0, "b")
    assert tracks([first, second]) == [[first, second]]
