"""The README's loop runs as it stands, on a tiny model in the place of the one it names."""

import re
from pathlib import Path

import torch

import outsize
from tests.zoo import ZOO

README = Path(__file__).parent.parent / "README.md"


def test_the_loop_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    ZOO["qwen3"].build().save_pretrained("Qwen3-0.6B")
    (tmp_path / "scratch").mkdir()
    batches = [ZOO["qwen3"].batch(seed=seed) for seed in range(2)]
    exec(block.replace("/nvme/scratch", str(tmp_path / "scratch")), {"loader": batches})
    assert (tmp_path / "tuned" / "config.json").is_file()
    assert "process peak" in capsys.readouterr().out
    assert torch.isfinite(outsize.load(tmp_path / "tuned").lm_head.weight.detach()).all()
