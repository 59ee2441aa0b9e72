"""The ledger of a run is what arenas, files and pages really take: each of its lines, and nothing else."""

from collections import Counter

import pytest
import torch

import outsize
from outsize import Pins
from outsize.config import Home
from outsize.plan.ledger import ACTIVATIONS, Ledger, Purpose
from outsize.serve import open_engine
from tests.running import adamw, opened, train
from tests.seams import (
    activation_offload,
    budget_of,
    computes_on_host,
    disk_of,
    move_small_inputs,
    store_of,
    with_twin,
)
from tests.zoo import ZOO

UNALLOCATED = (*ACTIVATIONS, Purpose.PROCESS)
"""Purposes whose bytes are in no arena of ours."""


def allocated(model):
    """Bytes by home that arenas had at most, and that files hold."""
    planes, offload, disk = store_of(model).planes, activation_offload(model), disk_of(model)
    found = Counter({Home.HOST: planes.host_arena.high_water_bytes})
    if not computes_on_host(model):
        found[Home.DEVICE] += planes.arena.in_use_bytes
    if disk is not None:
        found[Home.DISK] += getattr(disk, "_inner", disk).num_bytes
    if offload is not None:
        found[Home.HOST] += offload.arena.high_water_bytes
        found[Home.DISK] += offload._disk.num_bytes if offload._disk is not None else 0
    return {home: found[home] for home in Home}


def in_arenas(ledger):
    """Bytes by home of the lines that are allocated by us."""
    return {home: ledger.total(home) - ledger.total(home, *UNALLOCATED) for home in Home}


def assert_is_allocated(model, *, purposes):
    """The ledger names what was allocated; without any of its lines it does not."""
    ledger, found = budget_of(model).ledger, allocated(model)
    assert in_arenas(ledger) == found, str(ledger)
    told = {
        line: size
        for line, size in ledger.lines.items()
        if size and line[1] not in (*UNALLOCATED, Purpose.FILES)
    }
    assert {str(purpose) for _, purpose in told} == set(purposes)
    for line in told:
        assert in_arenas(Ledger({key: size for key, size in ledger.lines.items() if key != line})) != found


PLANES = ("weights", "gradients", "optimizer state")
MOVED = ("inputs of blocks", "buffers of inputs")
SPARE = str(Purpose.SPARE)
TRAINED = {
    "host": ({"home": "host"}, {*PLANES, "slots"}),
    "disk": ({"home": "disk"}, {*PLANES, "slots", "buffers"}),
    "some of each": ({"pins": Pins(resident=(2, 1, 2))}, {*PLANES, "slots", "buffers", SPARE}),
    "inputs on disk": ({"home": "host", "pins": Pins(inputs="disk")}, {*PLANES, *MOVED, "slots"}),
}


@pytest.mark.parametrize("case", TRAINED)
def test_a_training_run_takes_what_its_ledger_says(case, tmp_path, monkeypatch):
    move_small_inputs(monkeypatch)
    options, purposes = TRAINED[case]
    model = opened(ZOO["llama"].build().train(), disk=tmp_path, dtype="bfloat16", **options)
    train(model, [ZOO["llama"].batch()], adamw(model))
    assert_is_allocated(model, purposes=purposes)


@pytest.mark.parametrize("home", ["device", "host", "disk"])
def test_a_run_beside_a_device_takes_what_its_ledger_says(home, tmp_path, monkeypatch):
    move_small_inputs(monkeypatch)
    with_twin(monkeypatch)
    model = opened(ZOO["llama"].build().train(), disk=tmp_path, home=home, pins=Pins(inputs="host"))
    train(model, [ZOO["llama"].batch()], adamw(model))
    buffers = {"device": set(), "host": {"slots"}, "disk": {"slots", "buffers"}}
    assert_is_allocated(model, purposes={*PLANES, *buffers[home], "inputs of blocks"})


def test_a_committed_run_takes_what_its_ledger_says(tmp_path):
    model = opened(ZOO["llama"].build().train(), disk=tmp_path, home="disk")
    optimizer = adamw(model)
    outsize.checkpoint.resume(model, optimizer, tmp_path / "run")
    train(model, [ZOO["llama"].batch()], optimizer)
    outsize.checkpoint.commit(model, optimizer, tmp_path / "run")
    outsize.checkpoint.finish(model)
    spare = budget_of(model).ledger[Home.DISK, Purpose.SPARE]
    assert_is_allocated(model, purposes={*PLANES, "slots", "buffers", SPARE})
    assert spare > budget_of(model).placement.disk_bytes / 2, "a commit holds a version of all"


@pytest.mark.parametrize("is_called", [False, True])
def test_pages_of_a_served_model_are_a_line_of_its_ledger(is_called, tmp_path):
    """Also where the model was called, and has its memory, before it is served."""
    model = opened(ZOO["llama"].build().eval(), dtype="float32").requires_grad_(False)
    if is_called:
        with torch.no_grad():
            model(**ZOO["llama"].batch())
    engine = open_engine(model, kv="1MiB")
    pages = engine.runner.kv.num_bytes
    assert 0 < pages <= 2 << 20
    assert_is_allocated(model, purposes={"weights", "KV cache"})
    assert any(row.what == "KV cache" and row.num_bytes == pages for row in outsize.report(model).rows)
