"""The commands and loops of the guides run as they stand, on a tiny model in the place of the one they name."""

import importlib.util
import inspect
import re
import sys
import tomllib

import pytest

import outsize
from outsize.cli import main, quiet
from outsize.config import Pins
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
        vocab_size=512,
        max_position_embeddings=1024,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
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


def rows(page, heading):
    """The rows of the table under a heading, as cells."""
    part = page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    lines = [line for line in part.splitlines() if line.startswith("|")][2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def options_of(*command):
    """All options of `outsize COMMAND`, or of all commands."""
    parsers = main.build_parser()._subparsers._group_actions[0].choices
    chosen = [parsers[command[0]]] if command else list(parsers.values())
    for name in command[1:]:
        chosen = [chosen[0]._subparsers._group_actions[0].choices[name]]
    return {option for parser in chosen for action in parser._actions for option in action.option_strings}


def is_there(code):
    """Whether what a cell names in code exists: a command with options, an option of train, or something to import."""
    words = code.split()
    if words[:1] == ["outsize"]:
        names = [word for word in words[1:] if not word.startswith("-")]
        names = names[:2] if names[0] == "checkpoint" else names[:1]
        return {word for word in words if word.startswith("--")} <= options_of(*names)
    if code.startswith("--"):
        return words[0] in options_of("train")
    if match := re.fullmatch(r"outsize((?:\.\w+)+)", code):
        value = outsize
        for name in match[1].split(".")[1:]:
            value = getattr(value, name, None)
        return value is not None
    if match := re.fullmatch(r"Pins\((.*)\)", code):
        return all(name.strip().rstrip("=") in Pins.__slots__ for name in match[1].split(","))
    if match := re.fullmatch(r"(\w+)=.*", code):
        return match[1] in inspect.signature(outsize.load).parameters
    return True


NOT_YET = {
    "tensor, pipeline, expert parallelism; several nodes": "init_process_group|init_device_mesh",
    "device mesh, data parallelism": "init_process_group|init_device_mesh",
}
"""What the page says is missing, and what the sources would hold if it were not."""


@pytest.mark.parametrize("other", ["DeepSpeed (ZeRO-3, ZeRO-Infinity)", "FSDP", "Trainer"])
def test_what_stands_beside_others_features_is_there(other):
    found = rows((DOCS / "guides" / "coming-from.md").read_text(), other)
    assert len(found) > 5
    for there, here in found:
        if "not yet" in here:
            sources = "".join(path.read_text() for path in (ROOT / "src").rglob("*.py"))
            assert not re.search(NOT_YET[there], sources), f"{there}: it exists"
        missing = [code for code in re.findall(r"`([^`]+)`", here) if not is_there(code)]
        assert not missing, f"{there}: {missing} do not exist"


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
