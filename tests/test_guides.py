"""The commands and loops of the guides run as they stand, on a tiny model in the place of the one they name."""

import importlib.util
import re
import sys
import tomllib

import pytest

from outsize.cli import main, quiet
from outsize.hardware import cache
from tests.documents import ROOT, SCRATCH, Runner, fences
from tests.train.families import QWEN3, chat_tokenizer
from tests.zoo import ZOO

DOCS = ROOT / "docs"
GUIDES = sorted((DOCS / "guides").glob("*.md"))


@pytest.fixture
def runner(tmp_path, monkeypatch, capsys):
    """A folder with a model of the name that guides use, a disk, and a cache."""
    for name, value in {"OUTSIZE_CACHE": str(tmp_path / "cache"), "OUTSIZE_EAGER": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(quiet, "before_imports", lambda: None)
    monkeypatch.setattr(cache, "SECONDS", 0.01)
    monkeypatch.setattr(sys.modules["outsize.hardware.measure"], "ROUNDS", 1)  # the function hides the module
    monkeypatch.chdir(tmp_path)
    ZOO["qwen3"].build(
        vocab_size=512, max_position_embeddings=1024, hidden_size=64, intermediate_size=128
    ).save_pretrained("Qwen3-8B")
    chat_tokenizer(QWEN3).save_pretrained("Qwen3-8B")
    (tmp_path / "scratch").mkdir()
    for guide in ("five-minutes.md", "data.md"):  # others train on the files of these
        for fence in fences(DOCS / "guides" / guide):
            if fence.title in ("chat.jsonl", "notes.jsonl", "held-out.jsonl"):
                (tmp_path / fence.title).write_text(fence.text)
    capsys.readouterr()

    def read_output():
        printed = capsys.readouterr()
        return printed.out + printed.err

    return Runner(tmp_path / "scratch", read_output, {})


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.stem)
def test_a_guide_does_what_it_says(guide, runner):
    found = fences(guide)
    assert any(fence.language in ("bash", "python") for fence in found), "nothing in it is run"
    runner.run_all(found)


def test_the_options_page_names_every_option_and_no_other():
    parser = main.build_parser()._subparsers._group_actions[0].choices["train"]
    options = {name for action in parser._actions for name in action.option_strings if name.startswith("--")}
    page = (DOCS / "guides" / "config.md").read_text()
    described = set(re.findall(r"^\| `(--[a-z-]+)", page, flags=re.MULTILINE))
    assert described == options - {"--help"}


def test_the_example_of_a_config_file_is_toml():
    (block,) = (fence for fence in fences(DOCS / "guides" / "config.md") if fence.language == "toml")
    assert tomllib.loads(block.text)["disk"] == SCRATCH


def test_pages_need_nothing_from_elsewhere():
    for page in DOCS.rglob("*"):
        if page.suffix in {".md", ".svg"}:
            loaded = re.findall(r"(?:src|href)=\"(https?:[^\"]*)", page.read_text())
            assert not loaded, f"{page}: {loaded}"


def test_the_table_of_what_fits_can_be_made_again(monkeypatch):
    spec = importlib.util.spec_from_file_location("what_fits", DOCS / "what_fits.py")
    what_fits = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(what_fits)
    tiny = ZOO["qwen3"].config(max_position_embeddings=1024)
    monkeypatch.setitem(what_fits.SHAPES, "tiny", lambda: tiny)
    monkeypatch.setattr(what_fits, "BUDGETS_GIB", (8,))
    row = what_fits.row("tiny")
    assert re.fullmatch(r"\| tiny \| 0\.0 \| [\d.]+ KiB \| [\d.]+ [MG]iB \| all in memory \|", row)
    assert what_fits.BEGIN in what_fits.PAGE.read_text() and what_fits.END in what_fits.PAGE.read_text()
