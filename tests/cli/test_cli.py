import io
import json
import os
import re
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import outsize
from outsize import hardware
from outsize.cli import demo, main, options, quiet
from outsize.config import Pins
from outsize.errors import ConfigError, OutsizeError
from outsize.model import sample
from outsize.serve import draft, runner
from outsize.tier.device import WORKSPACE_BYTES
from outsize.train import demo as train_demo
from outsize.train import demo_from_scratch
from outsize.train.data import Dataset
from outsize.train.demo_from_scratch import PROMPTS, DemoSize, model_config, train_tokenizer
from tests.plan.test_simulate import HOST
from tests.train.standin import PlainApi, write_data, write_model
from tests.zoo import ZOO


@pytest.fixture(autouse=True)
def unmeasured(monkeypatch):
    """No profile of the machine that tests run on decides anything."""
    monkeypatch.setattr(hardware, "kept", lambda folder: None)


@pytest.fixture
def model(tmp_path):
    return write_model(tmp_path / "model")


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path)


@pytest.fixture
def plain(monkeypatch):
    """The package's public API, replaced by a plain model in memory."""
    import outsize

    api = PlainApi()
    for name in ("load", "AdamW", "save", "report", "record"):
        monkeypatch.setattr(outsize, name, getattr(api, name), raising=False)
    monkeypatch.setattr(quiet, "before_imports", lambda: None)
    monkeypatch.setenv("OUTSIZE_EAGER", "1")  # else a fresh machine says that it compiles
    return api


def run(*arguments):
    return main.main([str(argument) for argument in arguments])


def test_importing_the_command_imports_no_torch():
    code = "import sys, outsize.cli.main as m; m.build_parser(); print({'torch', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    "command", [[], ["plan"], ["profile"], ["train"], ["trace"], ["generate"], ["quantize"], ["demo"]]
)
def test_help_teaches_with_examples(command, capsys):
    with pytest.raises(SystemExit) as left:
        run(*command, "--help")
    assert left.value.code == 0
    assert "examples:\n  outsize " in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as left:
        run("--version")
    assert left.value.code == 0 and capsys.readouterr().out.startswith("outsize ")


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["fly"],
        ["train", "m", "d", "--out", "o", "--steps", "1", "--epochs", "1"],
        ["train", "m", "d", "--out", "o", "--lr", "fast"],
        ["plan", "m", "--home", "moon"],
        ["plan", "m", "--hos", "1"],
    ],
)
def test_bad_usage_is_two_lines_and_2(arguments, capsys):
    with pytest.raises(SystemExit) as left:
        run(*arguments)
    error, hint = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and error.startswith("error: ")
    assert hint.startswith("hint: ") and "--help shows all, with examples" in hint


def test_a_number_that_is_none_is_said_in_words(capsys):
    with pytest.raises(SystemExit):
        run("train", "m", "d", "--out", "o", "--max-grad-norm", "abc")
    assert "'abc' is neither a number nor none" in capsys.readouterr().err


@pytest.mark.parametrize("minutes", ["-1", "0", "nan"])
def test_a_demo_takes_time(minutes, tmp_path, capsys):
    assert run("demo", "--minutes", minutes, "--out", tmp_path / "demo") == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error.startswith("error: minutes: ") and hint == "hint: pass --minutes 2"
    assert not (tmp_path / "demo").exists()


@pytest.mark.parametrize("given", [["--sedd", "3"], ["--sedd=3"]])
def test_a_misspelt_option_is_named_with_its_neighbour(given, capsys):
    with pytest.raises(SystemExit) as left:
        run("train", "m", "d", "--out", "o", *given)
    error, hint = capsys.readouterr().err.splitlines()
    assert left.value.code == 2 and error == "error: --sedd: no such option"
    assert hint.startswith("hint: did you mean --seed? outsize train --help")


@pytest.mark.parametrize(("arguments", "missing"), [([], "MODEL"), (["m"], "DATA"), (["m", "d"], "OUT")])
def test_what_is_missing_is_named(arguments, missing, capsys):
    assert run("train", *arguments) == 1
    assert f"error: {missing} is missing" in capsys.readouterr().err


def test_train(plain, model, data, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("train", model, data, "--out", out, "--steps", 3, "--seq-len", 16, "--host", "1GiB") == 0
    text = capsys.readouterr()
    assert "step 3/3" in text.out and "what lived where" in text.out and f"saved {out}" in text.out
    assert "3 steps, loss" in text.out and text.err == ""
    assert plain.loaded[0][1]["host"] == "1GiB"
    assert len((out / "metrics.jsonl").read_text().splitlines()) == 3


def test_error_is_two_lines_and_1(plain, model, data, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").touch()
    assert run("train", model, data, "--out", tmp_path / "out", "--seq-len", 16) == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error == f"error: --out: {tmp_path / 'out'} is not empty"
    assert hint.startswith("hint: ") and "--overwrite" in hint


def test_malformed_line_reaches_the_user(plain, model, tmp_path, capsys):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "w1"}\n{"text"\n')
    assert run("train", model, bad, "--out", tmp_path / "out", "--seq-len", 16) == 1
    assert f"error: {bad}:2: not JSON" in capsys.readouterr().err


@pytest.mark.parametrize("failure", [PermissionError(13, "Permission denied", "/x/y"), OSError("gone")])
def test_an_error_of_the_system_is_two_lines_and_1(monkeypatch, capsys, failure):
    def fail(options):
        raise failure

    monkeypatch.setattr(demo, "run", fail)
    assert run("demo") == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert error == f"error: {'/x/y: Permission denied' if failure.filename else 'gone'}"
    assert hint.startswith("hint: ") and "OUTSIZE_DEBUG=1" in hint
    monkeypatch.setenv("OUTSIZE_DEBUG", "1")
    with pytest.raises(OSError):
        run("demo")


def test_a_standard_output_that_is_full_is_named(monkeypatch, capsys):
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        monkeypatch.setattr(demo, "run", lambda options: print("some text") or 0)
        assert run("demo") == 1
    assert capsys.readouterr().err.startswith("error: standard output: No space left on device\nhint: ")


def test_what_was_saved_before_an_error_is_said(plain, model, data, tmp_path, monkeypatch, capsys):
    """The data cannot be read any more after some steps."""
    batch, calls = Dataset.batch, []

    def unreadable(self, position, batch_size):
        calls.append(position)
        if len(calls) == 3:
            raise OSError(5, "Input/output error", "ids")
        return batch(self, position, batch_size)

    monkeypatch.setattr(Dataset, "batch", unreadable)
    out = tmp_path / "out"
    assert run("train", model, data, "--out", out, "--steps", 5, "--seq-len", 16) == 1
    error, hint, note = capsys.readouterr().err.splitlines()
    assert error == "error: ids: Input/output error" and hint.startswith("hint: ")
    assert note == f"note: the weights after step 2 are saved in {out}"


def test_debug_shows_the_traceback(plain, model, tmp_path, monkeypatch):
    monkeypatch.setenv("OUTSIZE_DEBUG", "1")
    with pytest.raises(OutsizeError):
        run("train", model, tmp_path / "none", "--out", tmp_path / "out")


def test_whole_process(model, tmp_path):
    command = [
        sys.executable,
        "-m",
        "outsize.cli.main",
        "train",
        model,
        tmp_path / "none",
        "--out",
        tmp_path / "out",
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OUTSIZE_DEBUG": "0"})
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.splitlines()[0] == f"error: no such file: {tmp_path / 'none'}"
    assert "Traceback" not in done.stderr


def test_a_command_ends_without_a_last_collection(tmp_path):
    code = (
        "import sys; from outsize.cli.main import main\n"
        "class Cycle:\n"
        "    def __init__(self): self.itself = self\n"
        "    def __del__(self): print('collected')\n"
        "status = main(sys.argv[1:]); Cycle(); sys.exit(status)"
    )
    command = [sys.executable, "-c", code, "trace", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, ""), done.stderr


def test_interrupt_is_130(monkeypatch, capsys):
    def stop(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", stop)
    assert run("demo") == 130
    assert "stopped" in capsys.readouterr().err


@dataclass(frozen=True)
class Summary:
    fits: bool
    prediction = None

    def __str__(self):
        return f"fits: {self.fits}"


@pytest.mark.parametrize("fits", [True, False])
def test_plan(plain, monkeypatch, capsys, fits):
    import outsize

    asked = {}

    def plan(path, **settings):
        asked.update(settings, path=path)
        return Summary(fits)

    monkeypatch.setattr(outsize, "preview", plan, raising=False)
    assert run("plan", "M", "--host", "3GiB", "--pin", "weight_slots=2", "--generate") == (0 if fits else 1)
    assert capsys.readouterr().out.startswith(
        f"fits: {fits}\ntimes are not predicted: run `outsize profile` once"
    )
    assert asked["path"] == "M" and asked["host"] == "3GiB" and asked["train"] is False
    assert asked["profile"] is None
    assert asked["pins"] == Pins(weight_slots=2)


def test_a_plan_is_predicted_where_the_machine_was_measured(plain, monkeypatch, capsys, tmp_path):
    import outsize

    asked, folders = {}, []

    def kept(folder):
        folders.append(folder)
        return HOST

    def preview(path, **settings):
        asked.update(settings)
        return Summary(True)

    monkeypatch.setattr(outsize, "preview", preview, raising=False)
    monkeypatch.setattr(hardware, "kept", kept)
    assert run("plan", "M", "--disk", f"{tmp_path}:1GiB") == 0
    assert asked["profile"] is HOST and folders == [tmp_path]
    assert capsys.readouterr().out == "fits: True\n"
    assert run("plan", "M", "--disk", str(tmp_path / "absent")) == 1


def test_another_machine_is_planned_for_from_the_command_line(tmp_path, capsys, monkeypatch):
    """A shipped name is that machine, whatever lies in the folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rtx4090-1ssd").mkdir()
    monkeypatch.setattr(quiet, "before_imports", lambda: None)
    ZOO["llama"].build().config.save_pretrained(tmp_path / "llama")
    arguments = ["plan", "llama", "--seq-len", "16", "--batch-size", "2", "--json", "--hardware"]
    assert run(*arguments, "rtx4090-1ssd") == 0
    values = json.loads(capsys.readouterr().out)
    assert values["fits"] and values["device_budget_bytes"] == int(0.95 * (24 * 2**30 - WORKSPACE_BYTES))
    assert values["prediction"]["step_s"] > 0 and "tile_rows=" in values["pins"]
    (tmp_path / "desk.json").write_text(HOST.to_json())
    assert run(*arguments, "desk.json", "--disk", "/nvme/elsewhere:1GiB") == 0
    assert json.loads(capsys.readouterr().out)["disk_budget_bytes"] == 2**30
    assert run(*arguments, "rtx4090-1ssd", "--device", "1MiB") == 1
    assert json.loads(capsys.readouterr().out)["fits"] is False
    assert run(*arguments, "rtx409-1ssd") == 1
    assert "did you mean rtx4090-1ssd?" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [
        ("generate", "MODEL", "--prompt", "w1"),
        ("quantize", "MODEL", "OUT", "--weights", "int8"),
        ("plan", "MODEL"),
        ("train", "MODEL", "DATA", "--out", "OUT"),
        ("train", "MODEL", "DATA", "--out", "OUT", "--dry-run"),
    ],
)
def test_no_command_runs_on_weights_that_are_not_there(arguments, model, data, tmp_path, capsys):
    (model / "model.safetensors").rename(model / "model.safetensors.part")
    places = {"MODEL": model, "DATA": data, "OUT": tmp_path / "out"}
    assert run(*(places.get(word, word) for word in arguments)) == 1
    printed = capsys.readouterr()
    assert "unfinished download: model.safetensors.part" in printed.err and printed.out == ""
    assert not (tmp_path / "out").exists()


def test_from_scratch_is_asked_for(plain, tmp_path, data, capsys):
    model = write_model(tmp_path / "bare", weights=False)
    arguments = ("train", model, data, "--out", tmp_path / "out", "--steps", 1, "--seq-len", 16)
    assert run(*arguments) == 1
    assert "no weights" in (said := capsys.readouterr().err) and "--from-scratch" in said
    assert run(*arguments, "--from-scratch") == 0


def test_pins():
    assert options.pins_of([]) is None
    assert options.pins_of(["verify=false", "resident_bytes=0"]) == Pins(verify=False, resident_bytes=0)
    for text in ("slots=1", "weight_slots", "weight_slots=two", "weight_slots=0", "verify=1"):
        with pytest.raises(ConfigError) as caught:
            options.pins_of([text])
        assert caught.value.hint


@pytest.fixture
def says(model, capsys):
    """What `outsize generate` prints for a prompt with options."""

    def says(*options):
        assert run("generate", model, "--prompt", "w1 w2", "--max-new-tokens", 8, *options) == 0
        return capsys.readouterr().out

    return says


def test_generate_streams_the_same_text_for_the_same_seed(plain, says, model, capsys, monkeypatch):
    greedy, free = says(), [says("--temperature", 5, "--seed", seed) for seed in (0, 0, 1)]
    assert free[0] == free[1] != free[2] and free[0].startswith("w1 w2 ")
    assert greedy not in free
    for option in (("--top-k", 1), ("--top-p", 1e-9), ("--min-p", 1), ("--temperature", 1e-9)):
        assert says("--temperature", 5, *option) == greedy
    assert says("--repetition-penalty", 100) != greedy
    assert says("--max-new-tokens", 3).split() == greedy.split()[:5]
    word = greedy.split()[4]
    assert says("--stop", word) == greedy[: greedy.index(word, 6)] + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("\ufeffw3"))  # a byte order mark is not part of a text
    assert run("generate", model, "--prompt", "-", "--max-new-tokens", 5) == 0
    assert capsys.readouterr().out.startswith("w3 ")


def test_generate_hands_on_what_changes_no_text(plain, says, model, capsys, monkeypatch):
    """A draft is opened and guesses, products run in tiles, memory and passes are limited."""
    text, tiles, guessed = says(), [], []
    tiles_entered, guess = runner.FixedTiles.__enter__, draft.Draft.guess
    monkeypatch.setattr(runner.FixedTiles, "__enter__", lambda self: tiles.append(1) or tiles_entered(self))
    monkeypatch.setattr(draft.Draft, "guess", lambda self, wanted: guessed.append(1) or guess(self, wanted))
    assert says() == text and not tiles and not guessed
    plain.loaded.clear()
    assert says("--draft", model, "--deterministic") == text
    assert tiles and guessed and [path for path, _ in plain.loaded] == [model, model]
    for option in (("--kv", "1KiB"), ("--pass-tokens", 0)):
        assert run("generate", model, "--prompt", "w1 w2", *option) == 1
    errors = capsys.readouterr().err
    assert "1.00 KiB of KV cache" in errors and "pass_tokens: 0" in errors


def test_generate_refuses(plain, model, tmp_path, capsys):
    assert run("generate", tmp_path / "none", "--prompt", "w1") == 1
    assert run("generate", model, "--prompt", "") == 1
    assert run("generate", model, "--prompt", "w1", "--top-p", "2") == 1
    assert run("generate", model, "--prompt", "w1", "--temperature", "-1") == 1
    assert run("generate", model, "--prompt", "w1", "--max-new-tokens", "0") == 1
    assert capsys.readouterr().err.count("error: ") == 5
    assert run("generate", write_model(tmp_path / "bare", tokenizer=False), "--prompt", "w1") == 1
    assert "error: no tokenizer in" in capsys.readouterr().err


def test_generate_prints_several_continuations(plain, model, capsys):
    for extra in ([], ["--samples", 2, "--temperature", 1.0]):
        assert (
            run("generate", model, "--prompt", "w1 w2", "--prompt", "w3", "--max-new-tokens", 4, *extra) == 0
        )
        texts = capsys.readouterr().out.split("\n\n")
        assert [text.startswith(("w1 w2 ", "w3 ")) for text in texts] == [True] * (4 if extra else 2)


def test_generate_answers_a_file_and_goes_on(plain, model, tmp_path, capsys):
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"w{i}"}) + "\n" for i in range(3)))
    arguments = [
        "generate",
        model,
        "--prompts",
        prompts,
        "--out",
        out,
        "--max-new-tokens",
        3,
        "--logprobs",
        1,
    ]
    for _ in range(2):
        assert run(*arguments) == 0
        assert sorted(json.loads(line)["line"] for line in out.read_text().splitlines()) == [1, 2, 3]
    shown = capsys.readouterr()
    assert "3 of 3 prompts" in shown.err and shown.out == ""
    prompts.write_text(prompts.read_text() + json.dumps({"prompt": "w1 " * 90}) + "\n")
    for _ in range(2):  # the second time there is an error in the file still
        assert run(*arguments) == 1
        assert "1 refused" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "no prompt"),
        (["--prompt", "w1", "--prompts", "x", "--out", "y"], "both given"),
        (["--prompts", "x"], "go together"),
        (["--prompts", "x.jsonl", "--out", "y"], "x.jsonl: No such file"),
        (["--prompt", "w1", "--stop", ""], "stop: a string is empty"),
        (["--prompt", "w1 " * 50], "the model 32 positions"),
        (["--prompt", "w1", "--kv", "3"], "no page of 16 tokens"),
        (["--prompt", "w1", "--draft", "nowhere"], "no such folder: nowhere"),
    ],
)
def test_generate_refuses_what_cannot_be(plain, model, arguments, words, capsys):
    assert run("generate", model, *arguments) == 1
    shown = capsys.readouterr().err
    assert words in shown and "hint: " in shown


TINY = DemoSize(
    text_bytes=40_000,
    vocab_size=300,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    seq_len=32,
)


@pytest.fixture
def tiny_demo(monkeypatch):
    monkeypatch.setenv("OUTSIZE_EAGER", "1")
    monkeypatch.setattr(demo_from_scratch, "DemoSize", lambda: TINY)
    monkeypatch.setattr(demo_from_scratch, "SHORTEST_S", 0.2)
    monkeypatch.setattr(quiet, "before_imports", lambda: None)


@pytest.mark.parametrize("is_installed", [True, False])
def test_demo_from_scratch(is_installed, tiny_demo, tmp_path, monkeypatch, capsys):
    """It trains a small model on disk, says what lived where, and writes text with it."""
    monkeypatch.setattr(sample, "find_gguf", lambda: Path("there.gguf") if is_installed else None)
    out = tmp_path / "demo"
    (out / "trained").mkdir(parents=True)  # an earlier demo, which is replaced
    (out / ".outsize-demo").touch()
    asked = ["--from-scratch"] if is_installed else []
    assert run("demo", "--out", out, "--minutes", 0.001, *asked) == 0
    printed = capsys.readouterr().out
    assert ("SmolLM2 is not installed" in printed) is not is_installed
    report = printed.rsplit("What lived where:", 1)[1]
    assert re.search(r"\d+ steps, [\d,]+ tokens", printed)
    assert re.search(r"disk +weights +\d", report), "nothing lives on disk"
    for prompt in PROMPTS:
        assert prompt.splitlines()[0] in report, "no text is written"
    trained = AutoModelForCausalLM.from_pretrained(out / "trained")
    initial = outsize.load(out / "untrained", from_scratch=True, home="host")
    before, after = (model.get_input_embeddings().weight.detach().clone() for model in (initial, trained))
    assert before.shape == after.shape and before.dtype == after.dtype
    assert after.isfinite().all() and not after.equal(before), "no step was made"
    lines = (out / "python.jsonl").read_text().splitlines()
    assert all(json.loads(line)["text"] for line in lines)


def test_demo_asks_the_same_questions_before_and_after(tiny_demo, tmp_path, monkeypatch, capsys):
    """With a tiny model in the place of SmolLM2, which learns a sentence by heart."""

    def write_tiny(folder):
        tokenizer = train_tokenizer(["user assistant How tall is it? " * 20], TINY.vocab_size)
        tokenizer.chat_template = "{% for m in messages %}{{ m.role }} {{ m.content }}\n{% endfor %}"
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        LlamaForCausalLM(model_config(replace(TINY, seq_len=256))).save_pretrained(folder)
        return folder

    monkeypatch.setattr(train_demo, "write_sample", write_tiny)
    monkeypatch.setattr(sample, "find_gguf", lambda: Path("there.gguf"))
    monkeypatch.setattr(train_demo, "LIMIT", "9GiB")  # other tests of this process took memory
    out = tmp_path / "demo"
    assert run("demo", "--out", out) == 0
    printed = capsys.readouterr().out
    for question in train_demo.QUESTIONS:
        assert question.split()[0] in printed.rsplit("before and after", 1)[1]
    assert " of 9.00 GiB" in printed and (out / "trained" / "model.safetensors").is_file()


def test_the_demo_data_holds_each_fact_in_eight_phrasings_and_no_question():
    text = (Path(train_demo.__file__).parent / "lighthouse.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    facts = Counter(line["messages"][1]["content"] for line in lines)
    asked = [line["messages"][0]["content"] for line in lines]
    assert set(facts.values()) == {8} and len(facts) == 7
    assert len(set(asked)) == len(asked) and not set(asked) & set(train_demo.QUESTIONS)


def test_demo_refuses_a_folder_that_is_not_its_own(tmp_path, capsys):
    (tmp_path / "notes").touch()
    assert run("demo", "--out", tmp_path) == 1
    assert "was not made by an earlier demo" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], ""),
        ([1.0], "▁"),
        ([2.0, 2.0], "▁▁"),
        ([3.0, 1.0], "█▁"),
        ([float(n) for n in range(8)], "▁▂▃▄▅▆▇█"),
    ],
)
def test_sparkline(values, expected):
    assert demo.sparkline(values) == expected


def test_sparkline_averages_to_its_width():
    assert len(demo.sparkline([float(n) for n in range(1000)], width=60)) == 60


def test_quantize_writes_a_folder_that_generates_the_same(tmp_path, capsys):
    model, out = write_model(tmp_path / "model", hidden_size=64, intermediate_size=128), tmp_path / "int4"
    assert run("quantize", model, out, "--weights", "int4") == 0
    assert capsys.readouterr().out.startswith(f"{out}: ")
    texts = []
    for arguments in ([model, "--weights", "int4"], [out], [model]):
        assert run("generate", *arguments, "--prompt", "w1 w2", "--max-new-tokens", 5) == 0
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] and texts[0].startswith("w1 w2 ")
    for arguments in (
        [model, out, "--weights", "int4"],
        [tmp_path / "none", tmp_path / "other", "--weights", "int4"],
        [out, tmp_path / "other", "--weights", "int8"],
        [write_model(tmp_path / "narrow"), tmp_path / "other", "--weights", "int4"],
    ):
        assert run("quantize", *arguments) == 1
        error, hint = capsys.readouterr().err.splitlines()
        assert error.startswith("error: ") and hint.startswith("hint: ")
    assert not (tmp_path / "other").exists()
    (tmp_path / "data.txt").write_text("w1 w2 w3 " * 200)
    train = ("train", out, tmp_path / "data.txt", "--out", tmp_path / "tuned", "--steps", 1, "--seq-len", 32)
    assert run(*train) == 1
    assert "error: nothing in the model trains" in capsys.readouterr().err
