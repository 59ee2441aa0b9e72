"""Memory: a budget is a ceiling on the whole process, and is never exceeded.

In a process of its own: a model of 66 M parameters, whose training state is several times the room it is given.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RUN = """
import json, sys
import torch, outsize
from outsize.store import memory
dtype, spare_mib, rows, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
config_folder, disk = folder + "/model", folder + "/disk"
torch.set_num_threads(1)
model = outsize.load(config_folder, dtype=dtype, disk=disk, host=memory.resident_bytes() + (spare_mib << 20),
                     from_scratch=True).train()
optimizer = outsize.AdamW(model, lr=1e-3, max_grad_norm=1.0)
generator = torch.Generator().manual_seed(0)
losses = []
for step in range(2):
    ids = torch.randint(0, 6000, (rows, 128), generator=generator)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    losses.append(float(loss.detach()))
with torch.no_grad():
    model(input_ids=ids, labels=ids)
outsize.save(model, folder + "/out")
report = outsize.report(model)
high_water = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(json.dumps({
    "peak": max(report.host_peak_bytes, high_water), "budget": report.host_budget_bytes,
    "state": report.state_bytes, "parameters": report.num_parameters, "losses": losses,
    "off_plan": report.off_plan,
}))
"""


@pytest.mark.parametrize(("dtype", "spare_mib", "rows"), [("float32", 420, 2), ("bfloat16", 520, 16)])
def test_the_process_stays_within_its_budget(dtype, spare_mib, rows, tmp_path):
    folder = tmp_path
    (folder / "model").mkdir()
    (folder / "disk").mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 6000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 9,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "max_position_embeddings": 256,
    }
    (folder / "model" / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUN, dtype, str(spare_mib), str(rows), str(folder)],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["parameters"] > 55e6
    assert spare_mib << 20 < 0.6 * figures["state"], "the budget holds a fraction of the state"
    assert figures["peak"] <= figures["budget"], f"{(figures['peak'] - figures['budget']) >> 20} MiB over"
    assert figures["off_plan"] == []
