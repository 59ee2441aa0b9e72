"""Plans of machines that are not there, and how plans are said."""

import dataclasses
import json
import threading

import pytest
import torch
from torch.nn import functional as F
from transformers import masking_utils
from transformers.models.llama import modeling_llama

import outsize
from outsize.config import ComputeType
from outsize.engine.counting import estimated_s, on_paper
from outsize.engine.summary import WIDTH, PlanSummary, bar
from outsize.errors import ConfigError, ModelError
from outsize.hardware import machine
from outsize.plan.ledger import Row
from outsize.plan.profile import Resource
from outsize.store import memory
from outsize.store.live_bytes import LiveBytes
from outsize.tier.device import WORKSPACE_BYTES
from tests.plan.test_simulate import HOST
from tests.zoo import ZOO

ALL = ["llama", "llama_tied", "qwen3", "gpt2", "mixtral", "gemma2", "opt"]


def folder_of(tmp_path, name="llama"):
    ZOO[name].build().config.save_pretrained(tmp_path / name)
    return tmp_path / name


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("hardware", ["rtx4090-1ssd", "h200"])
def test_a_model_is_planned_for_a_device_that_is_not_there(name, hardware, tmp_path):
    summary = outsize.preview(
        folder_of(tmp_path, name), batch_size=4, seq_len=16, hardware=machine(hardware), home="host"
    )
    assert summary.fits and summary.device_bytes > 0 and summary.prediction.step_s > 0
    assert summary.prediction.simulation.bytes_moved[Resource.UP] > 0
    assert summary.device_budget_bytes == int(0.95 * (machine(hardware).device_bytes - WORKSPACE_BYTES))
    assert summary.host_budget_bytes > 0.8 * machine(hardware).host_bytes


def test_experts_are_planned_in_fp32_too(tmp_path):
    """Torch knows the shape of products of experts in bf16 alone where tensors have no values."""
    summary = outsize.preview(
        folder_of(tmp_path, "mixtral"), dtype="float32", seq_len=16, hardware=machine("rtx4090-1ssd")
    )
    assert summary.fits and summary.prediction.step_s > 0


def test_a_faster_machine_is_faster(tmp_path):
    folder = folder_of(tmp_path)
    slow = outsize.preview(folder, batch_size=4, seq_len=32, hardware=machine("rtx4090-1ssd"))
    fast = outsize.preview(folder, batch_size=4, seq_len=32, hardware=machine("h200"))
    assert fast.prediction.step_s < slow.prediction.step_s


def test_another_host_without_a_device_is_planned_for(tmp_path):
    other = dataclasses.replace(HOST, host_bytes=8 << 30)
    summary = outsize.preview(folder_of(tmp_path), batch_size=4, seq_len=16, hardware=other, home="disk")
    assert summary.fits and not summary.device_bytes and summary.disk_bytes
    assert summary.prediction.simulation.bytes_moved[Resource.READ] > 0
    with pytest.raises(ConfigError, match="no device of its own"):
        outsize.preview(folder_of(tmp_path), seq_len=16, hardware=other, device="8GiB")


def test_a_machine_without_a_rate_for_the_type_is_refused_by_name(tmp_path):
    with pytest.raises(ConfigError, match="no rate for products in bfloat16"):
        outsize.preview(folder_of(tmp_path), seq_len=16, hardware=HOST, dtype="bfloat16")


def test_operations_are_counted():
    """A product and an addition: floating-point operations at their rate, bytes at that of memory."""
    profile = dataclasses.replace(HOST, device_memory=1e9, matmul={ComputeType.FLOAT32: 1e9})
    first = torch.empty(100, 200, device="meta")
    second = torch.empty(200, 50, device="meta")
    product_s = 2 * 100 * 200 * 50 / 1e9
    assert estimated_s(profile, ComputeType.FLOAT32, lambda: first @ second) == pytest.approx(product_s)
    addition_s = 3 * 100 * 200 * 4 / 1e9
    assert estimated_s(profile, ComputeType.FLOAT32, lambda: first + first) == pytest.approx(addition_s)
    assert estimated_s(profile, ComputeType.FLOAT32, lambda: first.view(200, 100)) == 0


def test_memory_is_counted_while_tensors_live():
    with LiveBytes() as counted:
        first = torch.ones(1000)
        second = first + 1
        assert counted.peak == 8000
        del first
        third = second.view(10, 100)  # the same bytes
        del second
        assert counted.peak == 8000
        fourth = torch.ones(1500)
        assert counted.peak == 10000
    assert third.numel() == 1000 and fourth.numel() == 1500


def test_the_same_run_counts_the_same_bytes_each_time():
    layer = torch.nn.TransformerEncoderLayer(64, 4, 256, batch_first=True, dropout=0.0)

    def run():
        layer(torch.ones(2, 32, 64)).sum().backward()
        layer.zero_grad()

    counts = {memory.watched(run, torch.device("cpu"))[1] for _ in range(3)}
    assert len(counts) == 1 and counts.pop() > 2 * 32 * 256 * 4


def test_attention_on_paper_takes_no_square_of_the_length():
    query = torch.empty(1, 4, 4096, 64, device="meta", requires_grad=True)
    key = torch.empty(1, 2, 4096, 64, device="meta", requires_grad=True)
    with on_paper(), LiveBytes() as counted:
        F.scaled_dot_product_attention(query, key, key, is_causal=True, enable_gqa=True).sum().backward()
    assert counted.peak < 10 * query.nbytes


def test_a_model_that_asks_for_values_is_refused_on_paper(tmp_path, monkeypatch):
    forward = modeling_llama.LlamaMLP.forward
    monkeypatch.setattr(
        modeling_llama.LlamaMLP, "forward", lambda self, x: forward(self, x) if x.sum() >= 0 else x
    )
    with pytest.raises(ModelError, match="depends on values"):
        outsize.preview(folder_of(tmp_path), seq_len=16, hardware=machine("h100"))


def test_a_plan_on_paper_changes_nothing_for_other_threads():
    before, found = masking_utils.is_tracing, []
    with on_paper(), on_paper():
        thread = threading.Thread(target=lambda: found.append(masking_utils.is_tracing()))
        thread.start()
        thread.join()
        assert masking_utils.is_tracing() and found == [False]
    assert masking_utils.is_tracing is before and not before()


def test_a_plan_as_json_holds_what_its_page_says(tmp_path):
    summary = outsize.preview(
        folder_of(tmp_path), batch_size=4, seq_len=16, hardware=machine("h100"), home="host"
    )
    values = json.loads(summary.to_json())
    assert values["fits"] is True and values["host_bytes"] == summary.host_bytes
    prediction = values["prediction"]
    assert prediction["step_s_least"] < prediction["step_s"] < prediction["step_s_most"]
    assert prediction["bottleneck"] in set(Resource)
    assert sum(row["num_bytes"] for row in values["rows"]) == sum(row.num_bytes for row in summary.rows)
    refused = outsize.preview(folder_of(tmp_path), seq_len=16, hardware=machine("h100"), device="1MiB")
    assert json.loads(refused.to_json())["prediction"] is None and "does not fit" in str(refused)


@pytest.mark.parametrize(
    "parts",
    [[1, 99], [50, 50], [1, 1, 1, 997], [0.2, 10], [30, 30, 30], [998, 1, 1], [1, 990, 1, 1, 1, 1, 1, 1]],
)
def test_a_bar_shows_each_part_and_what_is_free(parts):
    text = bar(parts, 100 if sum(parts) <= 100 else 1000)
    inner = text[1:-1]
    assert len(inner) == WIDTH and text[0] == text[-1] == "|"
    shades = [shade for shade in dict.fromkeys(inner) if shade != " "]
    assert len(shades) == len(parts)
    free = 1 - sum(parts) / (100 if sum(parts) <= 100 else 1000)
    assert abs(inner.count(" ") / WIDTH - free) < 0.08


def test_the_bar_of_a_disk_shows_its_budget(tmp_path):
    options = {"seq_len": 16, "hardware": HOST, "home": "disk"}
    summary = outsize.preview(folder_of(tmp_path), disk=f"{tmp_path}:1GiB", **options)
    (line,) = (line for line in str(summary).splitlines() if line.startswith("disk "))
    assert line.endswith("| 1.00 GiB") and line.count(" ") > WIDTH // 2
    assert "of 1.00 GiB of disk" in str(summary)
    assert "GiB of disk" not in str(outsize.preview(folder_of(tmp_path), disk=tmp_path, **options))


def test_every_part_of_a_tier_has_a_shade_of_its_own():
    rows = tuple(Row("host", f"part {index}", 1 + index) for index in range(8))
    page = str(PlanSummary(True, "", rows, (), 10, 1, 4 << 30, 2 << 30, 0))
    shades = {line.split()[0] for line in page.splitlines() if " part " in line}
    assert len(shades) == 8 and all(shade in page.splitlines()[2] for shade in shades)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"host": "10TiB"}, r"host=10\.0 TiB: rtx4090-1ssd has 128\.0 GiB"),
        ({"device": "1TiB"}, r"device=1\.00 TiB: rtx4090-1ssd has 24\.0 GiB"),
    ],
)
def test_more_than_another_machine_has_is_refused(options, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        outsize.preview(folder_of(tmp_path), seq_len=16, hardware=machine("rtx4090-1ssd"), **options)
    assert "or leave it out" in caught.value.hint


def test_the_disk_of_another_machine_need_not_be_here(tmp_path):
    options = {"disk": "/nvme/elsewhere:20GiB", "home": "disk", "seq_len": 16}
    assert outsize.preview(folder_of(tmp_path), hardware=HOST, **options).disk_bytes
    with pytest.raises(ConfigError, match="no folder /nvme/elsewhere"):
        outsize.preview(folder_of(tmp_path), **options)


def test_each_tier_is_drawn_with_its_parts():
    rows = (
        Row("device", "weights", 1 << 30),
        Row("host", "gradients", 2 << 30),
        Row("disk", "state", 3 << 30),
    )
    page = str(PlanSummary(True, "", rows, (), 10, 1, 4 << 30, 2 << 30, 3 << 30, 2 << 30, 1 << 30))
    for word in ("device |", "host   |", "disk   |", "weights  1.00 GiB", "| 4.00 GiB", "| 2.00 GiB"):
        assert word in page
