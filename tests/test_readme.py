"""The README's loop runs as it stands, on a tiny model in the place of the one it names."""

import torch

import outsize
from tests.documents import ROOT, Runner, fences
from tests.zoo import ZOO


def test_the_loop_of_the_readme_runs(tmp_path, monkeypatch, capsys):
    (block,) = (fence for fence in fences(ROOT / "README.md") if fence.language == "python")
    monkeypatch.chdir(tmp_path)
    ZOO["qwen3"].build().save_pretrained("Qwen3-0.6B")
    (tmp_path / "scratch").mkdir()
    batches = [ZOO["qwen3"].batch(seed=seed) for seed in range(2)]
    runner = Runner(tmp_path / "scratch", lambda: capsys.readouterr().out, {"loader": batches})
    runner.run(block)
    assert (tmp_path / "tuned" / "config.json").is_file()
    assert "process peak" in runner.printed
    assert torch.isfinite(outsize.load(tmp_path / "tuned").lm_head.weight.detach()).all()
