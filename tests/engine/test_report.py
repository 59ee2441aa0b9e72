"""The report and the preview: figures that are those of the run."""

import re

import pytest
import torch

import outsize
from outsize import Pins
from outsize.errors import ConfigError, ModelError
from outsize.store import memory
from tests.running import adamw, opened, train
from tests.seams import arena_of, budget_of, placement_of, records_of
from tests.zoo import ZOO


def tiers(rows, *whats):
    return {(row.tier, row.what): row.num_bytes for row in rows if row.what in whats}


def test_before_the_first_call_there_are_no_rows():
    model = opened(ZOO["llama"].build())
    report = outsize.report(model)
    assert report.rows == () and report.num_parameters == ZOO["llama"].build().num_parameters()
    assert "M parameters" in str(report)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("home", ["host", "disk"])
def test_rows_are_the_bytes_of_the_model(home, dtype, tmp_path):
    model = opened(ZOO["llama"].build().train(), disk=tmp_path, home=home, dtype=dtype)
    resident = []
    model.model.layers[0].register_forward_hook(lambda *_: resident.append(memory.resident_bytes()))
    train(model, [ZOO["llama"].batch()])
    report = outsize.report(model)
    figures = tiers(report.rows, "weights", "gradients", "optimizer state")
    size = {"float32": 4, "bfloat16": 2}[dtype]
    parameters = report.num_parameters
    assert parameters <= figures[home, "weights"] / size <= 1.7 * parameters  # pages are whole
    assert parameters <= figures[home, "gradients"] / size <= 1.7 * parameters
    per_parameter = {"float32": 8, "bfloat16": 10}[dtype]
    assert parameters <= figures[home, "optimizer state"] / per_parameter <= 1.7 * parameters
    assert report.state_bytes == sum(figures.values()) and len(figures) == 3
    in_arena = sum(n for (tier, _), n in figures.items() if tier == "host")
    buffers = sum(row.num_bytes for row in report.rows if row.what in ("slots", "buffers"))
    assert in_arena + buffers == arena_of(model).in_use_bytes
    assert max(resident) <= report.host_peak_bytes <= memory.peak_bytes()
    assert report.host_budget_bytes == budget_of(model).limits.host_bytes > max(resident)
    text = str(report)
    assert re.search(rf"{home} +weights +[\d.]+ KiB", text) and "training state" in text


def test_waiting_and_moving_are_counted(tmp_path):
    model = opened(ZOO["llama"].build().train(), disk=tmp_path, home="disk", pins=Pins(weight_slots=1))
    optimizer = adamw(model)
    train(model, [ZOO["llama"].batch()], optimizer)
    first = outsize.report(model)
    train(model, [ZOO["llama"].batch()], optimizer)
    second = outsize.report(model)
    assert second.bytes_read > first.bytes_read > 0 and second.bytes_written > first.bytes_written > 0
    assert set(second.wait_s) >= {"wait weight", "free weight"}


@pytest.fixture
def folder(tmp_path):
    ZOO["llama"].config(hidden_size=128, intermediate_size=512).save_pretrained(tmp_path / "model")
    (tmp_path / "disk").mkdir()
    return tmp_path


@pytest.mark.parametrize("home", ["host", "disk"])
def test_a_preview_is_what_the_run_will_be(home, folder):
    options = {"home": home, "disk": folder / "disk", "dtype": "bfloat16", "pins": Pins(weight_slots=2)}
    preview = outsize.preview(folder / "model", batch_size=3, seq_len=12, **options)
    assert preview.fits and not list((folder / "disk").iterdir())
    model = outsize.load(folder / "model", from_scratch=True, **options).train()
    optimizer = outsize.AdamW(model)
    train(model, [ZOO["llama"].batch(rows=3, length=12)], optimizer)
    report = outsize.report(model)
    names = ("weights", "gradients", "optimizer state", "slots", "buffers")
    assert tiers(preview.rows, *names) == tiers(report.rows, *names)
    assert preview.num_parameters == report.num_parameters
    assert preview.num_blocks == len(records_of(model))
    placement = placement_of(model)
    assert placement is not None
    assert bool(preview.disk_bytes) is (home == "disk")
    assert len(preview.slots) == (sum(map(len, placement.slots.values())) + bool(placement.chunks.count))
    assert ("fits:" in str(preview) and "weight slots" in str(preview)) or home == "host"


def test_a_preview_of_what_does_not_fit_says_why_and_what_would(folder):
    preview = outsize.preview(folder / "model", host="200MiB", disk=folder / "disk", seq_len=64)
    assert not preview.fits and preview.rows == ()
    assert re.search(r'host="\d+MiB" works', preview.reason)
    assert "does not fit" in str(preview)


def test_each_setting_that_is_named_instead_really_fits(folder):
    options = {"disk": folder / "disk", "dtype": "float32", "home": "disk"}
    batch = {"batch_size": 1024, "seq_len": 64}
    needed = outsize.preview(folder / "model", **options, **batch).host_bytes
    refused = outsize.preview(folder / "model", **options, **batch, host=f"{(needed >> 20) - 8}MiB")
    if refused.fits:  # smaller tiles made it fit
        refused = outsize.preview(folder / "model", **options, **batch, host=f"{(needed >> 20) - 60}MiB")
    assert not refused.fits
    hint = refused.reason.rpartition("hint: ")[2]
    host = re.search(r'host="(\d+MiB)" works', hint)[1]
    rows = int(re.search(r"a batch of (\d+) instead of 1024", hint)[1])
    length = int(re.search(r"sequences of (\d+)", hint)[1])
    short = f"{refused.host_budget_bytes >> 20}MiB"
    assert outsize.preview(folder / "model", **options, **batch, host=host).fits
    assert outsize.preview(folder / "model", **options, batch_size=rows, seq_len=64, host=short).fits
    assert outsize.preview(folder / "model", **options, batch_size=1024, seq_len=length, host=short).fits
    assert 0 < rows < 1024 and 16 <= length < 64


def test_a_preview_of_inference_has_no_state(folder):
    training = outsize.preview(folder / "model", dtype="float32", seq_len=64)
    serving = outsize.preview(folder / "model", dtype="float32", seq_len=64, train=False)
    assert ("host", "optimizer state") in tiers(training.rows, "optimizer state")
    assert not tiers(serving.rows, "optimizer state")
    assert serving.fits


def test_a_preview_is_of_models_that_take_text(tmp_path):
    ZOO["vit"].config().save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="does not take text"):
        outsize.preview(tmp_path)
    with pytest.raises((ConfigError, ModelError)):
        outsize.preview(tmp_path / "absent")


def test_a_preview_allocates_nothing(folder):
    from outsize.store import memory

    before = memory.resident_bytes()
    outsize.preview(folder / "model", batch_size=2, seq_len=16)
    assert memory.resident_bytes() - before < 40 << 20
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0 is less than 1"),
        ({"seq_len": -1}, "seq_len: -1 is less than 1"),
        ({"seq_len": 1 << 20}, "positions end at"),
    ],
)
def test_a_preview_of_a_batch_that_cannot_be_is_refused_at_once(folder, shape, message):
    with pytest.raises(ConfigError, match=message) as caught:
        outsize.preview(folder / "model", **shape)
    assert caught.value.hint
