"""Each example runs as a script: its loss falls, and what it saves is what it trained, for transformers too."""

import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import transformers

import outsize

EXAMPLES = Path(__file__).parent.parent.parent / "examples"
STEPS = {
    "causal_lm_from_config": ("AutoModelForCausalLM", 12),
    "instruction_tuning": ("AutoModelForCausalLM", 10),
    "t5_summarisation": ("T5ForConditionalGeneration", 12),
    "vit_classifier": ("ViTForImageClassification", 36),
    "vision_language_frozen_tower": ("LlavaForConditionalGeneration", 12),
}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run an example on a tiny model: what it printed, where it saved, and the weights that it saved."""

    write = outsize.save

    def run(name, *arguments):
        saved = {}

        def save(model, path, **options):
            write(model, path, **options)
            saved.update((name, value.detach().clone()) for name, value in model.named_parameters())

        monkeypatch.setattr(outsize, "save", save, raising=False)
        out = tmp_path / "out"
        argv = [f"{name}.py", "--tiny", "--disk", str(tmp_path), "--out", str(out), *arguments]
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(str(EXAMPLES / argv[0]), run_name="__main__")
        return capsys.readouterr().out, out, saved

    monkeypatch.syspath_prepend(EXAMPLES)
    with torch.random.fork_rng(devices=[]):
        yield run


def assert_same_weights(model_class, folder, saved):
    opened = dict(getattr(transformers, model_class).from_pretrained(folder).named_parameters())
    assert opened.keys() == saved.keys()
    for name, value in saved.items():
        assert torch.equal(opened[name].detach(), value), name


@pytest.mark.parametrize("name", STEPS)
def test_an_example_trains_and_leaves_a_folder_of_transformers(name, run):
    model_class, steps = STEPS[name]
    printed, out, saved = run(name, "--steps", str(steps))
    losses = [float(loss) for loss in re.findall(r"^step \d+  loss (\S+)", printed, flags=re.MULTILINE)]
    assert len(losses) == steps
    assert sum(losses[-4:]) < 0.95 * sum(losses[:4])
    assert "process peak" in printed
    assert f"{out} as transformers opens it" in printed
    assert_same_weights(model_class, out, saved)
    if name == "vit_classifier":
        before, after, opened = (
            float(part) for part in re.findall(r"accuracy\D*([\d.]+)$", printed, re.MULTILINE)
        )
        assert before < after == opened
    if name == "t5_summarisation":
        assert "writes the same: True" in printed
    if name == "vision_language_frozen_tower":
        assert "the vision tower is as it was: True" in printed


def test_a_base_model_of_ones_own_is_tuned(run, tmp_path):
    """The folder that the causal example saves has a tokenizer without a chat template."""
    run("causal_lm_from_config", "--steps", "4", "--out", str(tmp_path / "base"))
    _, out, saved = run("instruction_tuning", "--steps", "2", "--base", str(tmp_path / "base"))
    assert_same_weights("AutoModelForCausalLM", out, saved)
    assert transformers.AutoTokenizer.from_pretrained(out).chat_template


def test_every_example_is_listed():
    listed = (EXAMPLES / "README.md").read_text()
    scripts = {path.stem for path in EXAMPLES.glob("*.py")} - {"helpers"}
    assert scripts == set(STEPS)
    assert all(f"[{name}.py]({name}.py)" in listed for name in scripts)


def test_a_folder_that_exists_is_refused_before_training(run, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    with pytest.raises(SystemExit):
        run("vit_classifier")
    assert "name another folder" in capsys.readouterr().err
