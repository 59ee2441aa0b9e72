"""Memory stays under its cap with any prompt and batch: weights, pages, and passes of every size are in it.

In a process of its own: a model of 60 M parameters that has room for a part of its weights.
"""

import json
import subprocess
import sys

import pytest

RUN = """
import json, sys
import torch, outsize
from outsize.store import memory
from outsize.serve import Engine, Request, Sampling
folder = sys.argv[1]
torch.set_num_threads(1)
options = {"weights": sys.argv[2]} if sys.argv[2] else {"dtype": "float32"}
host = memory.resident_bytes() + (int(sys.argv[3]) << 20)
model = outsize.load(folder + "/model", disk=folder + "/disk", host=host, from_scratch=True, **options)
engine = Engine(model.requires_grad_(False), pass_tokens=128)
generator = torch.Generator().manual_seed(0)
for length in (900, 3, 200, 17, 1, 64):
    prompt = tuple(torch.randint(5, 6000, (length,), generator=generator).tolist())
    engine.submit(Request(prompt, Sampling(temperature=1.0), 5, num_samples=2, prompt_logprobs=length == 200))
while not engine.is_idle:
    engine.step()
report = outsize.report(model)
print(json.dumps({
    "peak": max(report.host_peak_bytes, memory.peak_bytes()), "budget": report.host_budget_bytes,
    "kv": engine.runner.kv.num_bytes, "off_plan": report.off_plan,
    "weights": sum(row.num_bytes for row in report.rows if "weights" in row.what),
    "on_disk": next((row.num_bytes for row in report.rows if row.tier == "disk"), 0),
}))
"""


@pytest.mark.parametrize(("weights", "mebibytes", "layers"), [("", 290, 8), ("int4", 165, 18)])
def test_the_process_stays_within_its_budget(weights, mebibytes, layers, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "disk").mkdir()
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 6000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": layers,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
    }
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    command = [sys.executable, "-W", "ignore", "-c", RUN, str(tmp_path), weights, str(mebibytes)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["peak"] <= result["budget"], result
    # Room for pages was found, and more than one layer is read from the disk again on each pass.
    assert result["kv"] > 16 << 20 and result["on_disk"] > result["weights"] / layers, result
    assert not result["off_plan"]
