"""Layers that run compiled: one compilation for all that are alike, whatever the tile, the slot or the placement.

What is counted and repeated is checked with a backend that compiles nothing (`aot_eager`), the bits with the real one.
"""

import os
import shutil
import warnings
from functools import partial

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException
from torch._dynamo.utils import counters

import outsize
from outsize import Pins
from outsize.engine import compiled
from outsize.errors import ConfigError, ModelError
from tests.running import opened, values_of
from tests.seams import (
    around_backwards_of_layers,
    around_compiled_layers,
    close,
    last_training_call,
    with_twin,
)
from tests.zoo import ZOO

IS_SOAK = bool(os.environ.get("OUTSIZE_SOAK"))
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")


@pytest.fixture(autouse=True)
def anew():
    """Nothing is compiled yet, and nothing counted."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def no_inductor(monkeypatch):
    with_backend(monkeypatch, "aot_eager")


@pytest.fixture
def only_traced(monkeypatch):
    """What is traced runs as it is, without the trace of its backward, which takes three quarters of the time."""
    with_backend(monkeypatch, "aot_eager" if IS_SOAK else "eager")


def with_backend(monkeypatch, backend):
    monkeypatch.setattr(compiled.torch, "compile", partial(torch.compile, backend=backend))


def num_graphs():
    return counters["stats"]["unique_graphs"]


def trained(name="llama", *, compile=True, steps=3, changes=None, tile_rows=None, **options):
    """Losses and weights after some steps of batches of different sizes."""
    pins = options.pop("pins", Pins(tile_rows=tile_rows))
    model = opened(
        ZOO[name].build(**(changes or {})).train(), dtype="float32", compile=compile, pins=pins, **options
    )
    optimizer = outsize.AdamW(model, lr=1e-3, eps=1e-4, max_grad_norm=0.5)
    torch.manual_seed(0)
    losses = []
    for step in range(steps):
        loss = model(**ZOO[name].batch(rows=5 + step, length=10 + step, seed=step)).loss
        loss.backward()
        losses.append(loss.detach().clone())
        optimizer.step()
        optimizer.zero_grad()
    result = losses, values_of(model), outsize.report(model)
    close(model)
    return result


def assert_close(one, other):
    assert torch.allclose(torch.stack(one[0]), torch.stack(other[0]), rtol=1e-5, atol=0)
    for name, value in other[1].items():
        assert float((one[1][name] - value).norm()) <= 1e-4 * float(value.norm()), name


def assert_same(one, other):
    assert all(torch.equal(mine, yours) for mine, yours in zip(one[0], other[0], strict=True))
    assert all(torch.equal(one[1][name], other[1][name]) for name in other[1])


@pytest.mark.parametrize("name", ["llama", "gpt2", "qwen3"] if IS_SOAK else ["gpt2", "qwen3"])
def test_layers_that_are_alike_are_compiled_once(name, no_inductor):
    """For all layers, batches and tiles, forward and recomputation; what is no layer of many is not compiled."""
    expected = trained(name, compile=False)
    assert num_graphs() == 0 and not expected[2].compiled
    result = trained(name)
    assert num_graphs() == 1
    assert_close(result, expected)
    assert len(result[2].compiled) == 1 and "compiled: " in str(result[2])


@pytest.mark.parametrize("tile_rows", [2, 3] if IS_SOAK else [3])
def test_tiles_of_all_sizes_share_the_code(tile_rows, no_inductor):
    trained(tile_rows=tile_rows)
    assert num_graphs() <= 2  # a last tile of one row is compiled apart: torch does not take 1 for a symbol


def test_layers_of_two_kinds_are_compiled_twice(only_traced):
    """One of the encoder and one of the decoder: the first of several has a bias that the others take from it."""
    options = {"steps": 1, "changes": {"num_layers": 1}}
    result = trained("t5", **options)
    assert result[2].compiled == ("T5Block",)
    assert num_graphs() == 2
    assert_close(result, trained("t5", compile=False, **options))


@needs_compiler
def test_no_placement_changes_a_bit(tmp_path, monkeypatch):
    """In the short form one compilation serves all models, in the long form each has its own."""
    if not IS_SOAK:
        monkeypatch.setattr(compiled, "_own_code", lambda function: function)
    expected = trained()
    assert num_graphs() == 1
    for options in (
        {"home": "disk", "disk": tmp_path, "pins": Pins(weight_slots=1, gradient_slots=1)},
        {"pins": Pins(kept_blocks=2)},
    ):
        assert_same(trained(**options), expected)
    with_twin(monkeypatch, lambda way, label: 0.001)
    for home in ("host", "disk") if IS_SOAK else ("disk",):
        assert_same(trained(home=home, disk=tmp_path), expected)
    assert IS_SOAK or num_graphs() == 1
    assert_close(trained(compile=False), expected)


def test_random_numbers_are_the_same_in_forward_and_backward(no_inductor, monkeypatch):
    """With another mask in backward, keeping the graph would give another gradient than computing it again."""
    changes = {"resid_pdrop": 0.3}
    expected = trained("gpt2", changes=changes)
    assert_same(trained("gpt2", changes=changes, pins=Pins(kept_blocks=3)), expected)


def test_where_a_compiler_fails_layers_run_as_they_are(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("the compiler is broken\nand says much")

    with_backend(monkeypatch, broken)
    expected = trained(compile=False)
    with pytest.warns(RuntimeWarning, match="LlamaDecoderLayer cannot be compiled") as said:
        result = trained()
    assert len(said) == 1 and not result[2].compiled
    assert_same(result, expected)


class Late:
    """A compiler that fails at the n-th call."""

    def __init__(self, monkeypatch, at):
        self.calls = 0

        def failing(run):
            self.calls += 1
            if self.calls == at:
                torch.rand(1)
                raise TorchDynamoException("a shape that was not there before")
            return run()

        around_compiled_layers(monkeypatch, failing)


@pytest.mark.parametrize("at", [8, 11, 14, 18])
def test_a_compiler_that_fails_later_loses_nothing(at, only_traced, monkeypatch):
    expected = trained(compile=False)
    late = Late(monkeypatch, at)
    with pytest.warns(RuntimeWarning, match="cannot be compiled") as said:
        result = trained()
    assert late.calls == at and len(said) == 1
    assert_close(result, expected)


def test_a_backward_that_would_draw_other_random_numbers_is_an_error(only_traced, monkeypatch):
    def going_back(run, layer):
        with monkeypatch.context() as patch:
            Late(patch, 1)
            return run()

    around_backwards_of_layers(monkeypatch, going_back)
    with warnings.catch_warnings(), pytest.raises(ModelError, match="other random numbers"):
        warnings.simplefilter("ignore")
        trained("gpt2", changes={"resid_pdrop": 0.3})


def test_calls_with_a_cache_are_not_compiled(only_traced):
    model = opened(ZOO["llama"].build(), compile=True)
    ids = ZOO["llama"].batch()["input_ids"]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
        before = num_graphs()
        model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert before >= 1 and num_graphs() == before
    close(model)


def test_what_hooks_record_inside_a_layer_is_recorded(no_inductor):
    result = trained("mixtral", steps=2)
    assert num_graphs() == 0
    assert_same(result, trained("mixtral", compile=False, steps=2))


def test_gradients_that_come_at_once_are_planned_for(no_inductor):
    most = []
    for compile in (False, True):
        model = opened(ZOO["llama"].build().train(), compile=compile)
        model(**ZOO["llama"].batch()).loss.backward()
        most.append(last_training_call(model).workload.tile_bytes.fixed)
        close(model)
    layer = ZOO["llama"].build().model.layers[0]
    assert most[1] - most[0] >= 4 * sum(parameter.numel() for parameter in layer.parameters())


@pytest.mark.parametrize("asked", [None, False])
def test_a_run_that_is_resumed_is_compiled_as_before_unless_one_says(asked, tmp_path, only_traced):
    def start(compile):
        model = opened(ZOO["llama"].build().train(), disk=tmp_path, dtype="float32", compile=compile)
        optimizer = outsize.AdamW(model, lr=1e-3)
        return model, optimizer, outsize.checkpoint.resume(model, optimizer, tmp_path / "store")

    def step(model, optimizer):
        model(**ZOO["llama"].batch(rows=4)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    model, optimizer, _ = start(True)
    step(model, optimizer)
    outsize.checkpoint.commit(model, optimizer, tmp_path / "store")
    outsize.checkpoint.finish(model)
    outsize.checkpoint.close(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        model, optimizer, resumed = start(asked)
    assert any("layers were compiled before" in note for note in resumed.notes) is (asked is False)
    assert len(said) == len(resumed.notes)
    step(model, optimizer)
    assert bool(outsize.report(model).compiled) is (asked is None)
    outsize.checkpoint.close(model)


def test_a_plan_says_that_layers_are_compiled(tmp_path, only_traced):
    ZOO["llama"].build().save_pretrained(tmp_path / "model")
    summary = outsize.preview(tmp_path / "model", seq_len=16, compile=True)
    assert summary.compiled == ("LlamaDecoderLayer",) and "compiled: LlamaDecoderLayer" in str(summary)
    from outsize.hardware import machine

    with pytest.raises(ConfigError, match="another machine"):
        outsize.preview(tmp_path / "model", compile=True, hardware=machine("rtx4090-1ssd"))
