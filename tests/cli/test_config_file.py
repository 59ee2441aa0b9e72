"""A run described by a TOML file: read, checked, overruled by the command line, and printed back."""

import tomllib
from pathlib import Path

import pytest

from outsize.cli.config_file import merge, read_config, write_config
from outsize.cli.main import build_parser
from outsize.cli.train import resolve, settings_of
from outsize.errors import ConfigError
from outsize.train.data import DataFile, Packing, TooLong
from outsize.train.schedule import Shape
from outsize.train.settings import flat

FILE = """
model = "Qwen3-0.6B"
data = ["chat.jsonl@0.7", "books.parquet@0.3"]
out = "tuned"
steps = 200
lr = 2e-5
schedule = "wsd"
warmup = 20
max-grad-norm = "none"
batch-tokens = 4096
seq-len = 256
packing = "padded"
too-long = "skip"
eval = "held-out.jsonl"
eval-every = 50
host = "3GiB"
disk = "/nvme/scratch:200GiB"
pin = ["weight_slots=2"]
"""


def options(*arguments):
    return build_parser().parse_args(["train", *map(str, arguments)])


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text(FILE)
    return path


def test_a_file_says_all_that_options_say(config):
    from_file = settings_of(resolve(options("--config", config)))
    from_options = settings_of(
        resolve(
            options(
                *("Qwen3-0.6B", "chat.jsonl@0.7", "books.parquet@0.3", "--out", "tuned", "--steps", 200),
                *("--lr", "2e-5", "--schedule", "wsd", "--warmup", 20, "--max-grad-norm", "none"),
                *("--batch-tokens", 4096, "--seq-len", 256, "--packing", "padded", "--too-long", "skip"),
                *("--eval", "held-out.jsonl", "--eval-every", 50, "--host", "3GiB"),
                *("--disk", "/nvme/scratch:200GiB", "--pin", "weight_slots=2"),
            )
        )
    )
    assert from_file == from_options
    assert from_file.data == (DataFile(Path("chat.jsonl"), 0.7), DataFile(Path("books.parquet"), 0.3))
    assert from_file.batch_size == 16 and from_file.learning.max_grad_norm is None
    assert (from_file.packing, from_file.too_long) == (Packing.PADDED, TooLong.SKIP)
    assert from_file.learning.schedule is Shape.WSD and from_file.place["pins"].weight_slots == 2


def test_the_command_line_wins_and_drops_what_it_excludes(config):
    settings = settings_of(
        resolve(options("--config", config, "--epochs", 2, "--batch-size", 3, "--eval-split", 0.1, "--lr", 1))
    )
    assert settings.length.epochs == 2 and settings.length.steps is None
    assert settings.batch_size == 3 and settings.learning.lr == 1
    assert settings.evaluating.fraction == 0.1 and not settings.evaluating.files
    assert settings.learning.warmup_steps == 20


def test_what_is_printed_reads_back_as_the_same_settings(config, tmp_path):
    values = resolve(options("--config", config))
    (tmp_path / "again.toml").write_text(write_config(values))
    again = resolve(options("--config", tmp_path / "again.toml"))
    assert settings_of(again) == settings_of(values)


def test_settings_as_a_flat_table_have_the_names_of_the_options(config):
    table = flat(settings_of(resolve(options("--config", config))))
    known = {key.replace("_", "-") for key in vars(options())} | {"batch-size"}
    assert set(table) <= known
    assert table["data"] == "chat.jsonl@0.7 books.parquet@0.3" and table["pin"] == "weight_slots=2"


def test_every_option_reaches_its_setting():
    given = {
        **{"steps": 7, "batch-size": 3, "seq-len": 64, "packing": "padded", "too-long": "cut", "seed": 5},
        **{
            "eval-split": 0.25,
            "eval-every": 9,
            "optimizer": "lion",
            "lr": 0.5,
            "schedule": "wsd",
            "warmup": 2,
        },
        **{"weight-decay": 0.3, "max-grad-norm": 0.7, "tracker": "tensorboard", "device": "cpu"},
        **{"host": "3GiB", "disk": "/x", "home": "disk", "dtype": "float32", "pin": "weight_slots=2"},
        **{
            "on-device-full": "retry",
            "attention": "eager",
            "trace-step": 6,
            "checkpoint-every": 4,
            "keep": 2,
            "checkpoint": "c",
        },
    }
    arguments = [part for name, value in given.items() for part in (f"--{name}", value)]
    table = flat(
        settings_of(
            resolve(
                options("m", "d@2", "--out", "o", "--overwrite", "--from-scratch", "--no-compile", *arguments)
            )
        )
    )
    asked = {
        "compile": False,
        "model": "m",
        "data": "d@2",
        "out": "o",
        "overwrite": True,
        "from-scratch": True,
        "eval": None,
        "epochs": None,
    }
    assert table == {**given, **asked, "minutes": None}


def test_none_is_read_in_any_case_as_on_the_command_line(tmp_path):
    (tmp_path / "run.toml").write_text('max-grad-norm = "None"')
    for arguments in (["--config", tmp_path / "run.toml"], ["--max-grad-norm", "None"]):
        assert (
            settings_of(resolve(options("m", "d", "--out", "o", *arguments))).learning.max_grad_norm is None
        )


def test_a_byte_order_mark_is_not_part_of_a_file(tmp_path):
    (tmp_path / "run.toml").write_text("steps = 3", encoding="utf-8-sig")
    assert resolve(options("m", "d", "--out", "o", "--config", tmp_path / "run.toml"))["steps"] == 3


BAD = {
    "no toml": ("lr = ", "run.toml"),
    "unknown": ("learning-rate = 1", "no option 'learning-rate'"),
    "misspelt": ("sched = 'linear'", "no option 'sched'"),
    "wrong type": ("steps = 'many'", "steps: is str, expected int"),
    "a truth is no number": ("steps = true", "steps: is bool, expected int"),
    "no list of strings": ("data = [1]", "data: expected a string or a list of strings"),
    "excluding": ("steps = 1\nepochs = 1", "steps and epochs exclude each other"),
    "table": ("[learning]\nlr = 1", "no option 'learning'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_that_cannot_be(name, tmp_path):
    text, message = BAD[name]
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        settings_of(resolve(options("m", "d", "--out", "o", "--config", tmp_path / "run.toml")))
    assert message in str(caught.value) and caught.value.hint


def test_hints_are_lines_that_would_work(tmp_path):
    path = tmp_path / "run.toml"
    for text, key in (("lr = 'fast'", "lr"), ("steps = 1.5", "steps"), ("overwrite = 1", "overwrite")):
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            read_config(path, {key})
        assert caught.value.hint.startswith("such as  ")
        path.write_text(caught.value.hint.removeprefix("such as  "))
        assert key in read_config(path, {key})
    path.write_text("[train]\nlr = 1")
    with pytest.raises(ConfigError) as caught:
        read_config(path, {"lr"})
    assert caught.value.hint == "write the options without [train] above them"


def test_a_misspelt_option_is_named(tmp_path):
    (tmp_path / "run.toml").write_text("sched = 'linear'")
    with pytest.raises(ConfigError) as caught:
        read_config(tmp_path / "run.toml", {"schedule", "steps"})
    assert caught.value.hint == "did you mean schedule?"
    with pytest.raises(ConfigError, match="No such file"):
        read_config(tmp_path / "none.toml", {"steps"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("schedule = 'sine'", "schedule: 'sine'"),
        ("packing = 'tight'", "packing: 'tight'"),
        ("batch-tokens = 100", "batch_tokens: 100 are no whole sequence of 512"),
        ("batch-tokens = 100\nseq-len = 0", "batch_tokens: 100 are no whole sequence of 0"),
    ],
)
def test_a_value_that_cannot_be(line, message, tmp_path):
    (tmp_path / "run.toml").write_text(line)
    with pytest.raises(ConfigError, match=message) as caught:
        settings_of(resolve(options("m", "d", "--out", "o", "--config", tmp_path / "run.toml")))
    assert caught.value.hint


def test_merge_keeps_the_last():
    assert merge({"lr": 1, "seed": 0}, {"lr": 2, "steps": 5}, {"lr": 3}) == {"lr": 3, "seed": 0, "steps": 5}


def test_written_text_is_toml():
    values = {
        "out": 'a "b" \\ é',
        "lr": 1e-5,
        "overwrite": False,
        "pin": [],
        "steps": None,
        "max_grad_norm": None,
    }
    assert tomllib.loads(write_config(values)) == {
        "out": 'a "b" \\ é',
        "lr": 1e-5,
        "overwrite": False,
        "max-grad-norm": "none",
    }
