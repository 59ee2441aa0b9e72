"""On a device with memory of its own, nothing of a forward or a backward waits for the device, or mixes the two memories.

The device is one on paper: its tensors have shapes and no values (torch's meta device), so that whatever reads a value,
copies one to the host, or computes with tensors of both memories raises. What it costs to run is nothing; what it shows
is what `torch.cuda.set_sync_debug_mode` shows on a GPU.
"""

from collections import Counter

import pytest
import torch
from transformers import masking_utils

import outsize
from outsize import Pins
from outsize.config import ComputeType
from outsize.engine import layer
from outsize.optim import Kernel, gpu_kernel
from outsize.optim.rules import RULES
from outsize.tier import Device, LinkStats, Way
from outsize.tier.transfer import DoneTransfer
from tests.pairs import pairwise
from tests.running import opened
from tests.seams import (
    arguments_of,
    blocks_that_move,
    compute_on,
    flush,
    move_small_inputs,
    settle_norms_of_paper,
)
from tests.zoo import ZOO


class PaperDevice(Device):
    """Computes shapes; copies nothing, but counts."""

    torch_device = torch.device("meta")

    def __init__(self):
        self.copies = Counter()
        self.num_marks = 0

    def start_copy(self, way, target, source, *, after=(), label):
        on_device, on_host = (target, source) if way is Way.UP else (source, target)
        assert on_device.device.type == "meta" and on_host.device.type == "cpu", label
        assert target.dtype is source.dtype and target.shape == source.shape, label
        if way is Way.UP:
            target.zero_()
        self.copies[way, label.partition("[")[0]] += 1
        return DoneTransfer()

    def mark(self):
        self.num_marks += 1
        return DoneTransfer()

    def zeros(self, num_bytes, name):
        return torch.zeros(num_bytes, dtype=torch.uint8, device="meta")

    def links(self):
        return LinkStats()


@pytest.fixture
def paper(monkeypatch):
    """Models are opened on paper, with all that is needed for that and would be there on a real device."""
    devices = []

    def open_device():
        devices.append(PaperDevice())
        return devices[-1]

    plain_call = Kernel.__call__

    def call(kernel, weight, state, gradient, hyper):
        places = {tensor.device.type for tensor in (weight, *state, gradient)}
        assert len(places) == 1
        if places == {"cpu"}:
            plain_call(kernel, weight, state, gradient, hyper)

    compute_on(monkeypatch, open_device)
    settle_norms_of_paper(monkeypatch)
    monkeypatch.setattr(Kernel, "__call__", call)
    # Where a mask is made, transformers asks the device once per call whether sequences are packed.
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *values: True)
    off = classmethod(lambda cls, device: cls("cpu", False, torch.bfloat16))
    monkeypatch.setattr(layer.Autocast, "current", off)
    return devices


NAMES = ["llama", "llama_tied", "qwen3", "gpt2", "mixtral"]


@pairwise(
    name=NAMES,
    home=["device", "host", "disk"],
    pins={"whole": Pins(), "tiled": Pins(tile_rows=1, inputs="host", weight_slots=1)},
)
def test_a_step_reads_no_value_of_the_device(name, home, pins, paper, tmp_path, monkeypatch):
    move_small_inputs(monkeypatch)
    model = opened(ZOO[name].build().train(), disk=tmp_path, home=home, dtype="bfloat16", pins=pins)
    optimizer = outsize.AdamW(model, max_grad_norm=1.0)
    for seed in range(3):
        if seed == 1:
            first = Counter(paper[0].copies)
        batch = ZOO[name].batch(seed=seed)
        loss = model(**batch).loss
        assert loss.device.type == "meta"
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    flush(model)
    copies = paper[0].copies
    if home == "device":
        return
    moving = blocks_that_move(model)
    # With one slot, a layer is streamed twice per step, for forward and for backward. Its gradients go down once.
    layers = [block for block in moving if block.startswith("L")]
    ups = {copies[Way.UP, f"{block}.weight"] - first[Way.UP, f"{block}.weight"] for block in layers}
    assert max(ups) == 4 if pins.weight_slots == 1 else ups <= {2, 3, 4}
    assert {copies[Way.DOWN, f"{block}.gradient"] for block in layers} == {3}
    # A tied table is visited more often.
    assert all(copies[Way.UP, f"{b}.weight"] >= 3 <= copies[Way.DOWN, f"{b}.gradient"] for b in moving)


def test_an_argument_that_the_model_changed_is_not_taken_from_the_host(paper, tmp_path):
    arguments = arguments_of(opened(ZOO["llama"].build().train(), home="host"))
    ids = torch.zeros(2, 3, dtype=torch.long)
    (moved,), _ = arguments.moved((ids,), {})
    assert arguments.known_on_host(moved.view(3, 2)).shape == (3, 2)
    moved[:, 0] = 1
    assert arguments.known_on_host(moved) is None


def test_a_rule_is_tried_on_the_device_as_it_is_called(monkeypatch):
    """torch.compile compiles once more for another grad mode: inside a step, where it holds everything up."""
    modes = []

    def compiled(function, **options):
        return lambda *args: modes.append(torch.is_grad_enabled())

    monkeypatch.setattr(torch, "compile", compiled)
    monkeypatch.delenv("OUTSIZE_EAGER", raising=False)
    gpu_kernel(RULES["adamw"], ComputeType.BFLOAT16, torch.device("cpu"))
    assert modes and not any(modes)


def test_what_a_model_is_and_gives_is_on_the_device(paper, tmp_path):
    model = opened(ZOO["llama"].build().train(), home="host", dtype="bfloat16", pins=Pins(weight_slots=1))
    assert model.device.type == "meta"
    assert all(buffer.device.type == "meta" for buffer in model.buffers())
    outsize.AdamW(model)
    batch = ZOO["llama"].batch()
    model(**batch).loss.backward()
    assert batch["input_ids"].device.type == "cpu"
    gradient = model.model.layers[0].mlp.up_proj.weight.grad
    assert gradient.device.type == "meta"
