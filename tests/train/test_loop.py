import io
import json
import os
import signal

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from outsize.config import OptimizerName, Pins
from outsize.engine.api import Options
from outsize.errors import ConfigError, DataError, TrainingError
from outsize.train.data import DataFile, DataOptions, Packing, Position, TooLong, open_dataset
from outsize.train.evaluate import mean_loss
from outsize.train.loop import train
from outsize.train.metrics import StepMetrics
from outsize.train.progress import (
    PlainProgress,
    course,
    fixed,
    moving,
    progress_on,
    sparkline,
    where_time_goes,
)
from outsize.train.schedule import Shape
from outsize.train.settings import Evaluating, Learning, Length, TrainSettings
from outsize.train.watch import Watcher
from tests.train.standin import WORDS, PlainAdamW, PlainApi, PlainReport


def settings_for(model, data, out, **changes):
    defaults = dict(
        length=Length(steps=6), batch_size=4, seq_len=16, learning=Learning(lr=1e-2, warmup_steps=2)
    )
    return TrainSettings(model, (DataFile(data),), out, **(defaults | changes))


def weights(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()


def test_run_leaves_a_folder_that_loads_and_metrics(model, data, tmp_path):
    out = tmp_path / "out"
    place = Options(
        device="2GiB", host="1GiB", disk=str(tmp_path), home="disk", dtype="float32", pins=Pins(tile_rows=2)
    )
    result = train(settings_for(model, data, out, place=place), api=(api := PlainApi()))
    assert result.num_steps == 6 and not result.interrupted
    assert result.losses[-1] < result.losses[0]
    assert result.num_tokens == 6 * 4 * 16
    assert api.loaded == [(model, {**place, "attention": None, "profile": None})]
    weights(out)
    assert AutoTokenizer.from_pretrained(out).eos_token == "<eos>"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [line["loss"] for line in lines] == list(result.losses)
    assert lines[0]["lr"] == 0.5e-2 and lines[1]["lr"] == 1e-2 and lines[5]["lr"] == pytest.approx(1e-3)
    assert lines[0]["bytes_read"] == 100 and lines[0]["grad_norm"] > 0
    assert set(lines[0]) == {
        *("step", "loss", "lr", "grad_norm", "tokens_per_s", "step_s"),
        *("host_peak_bytes", "bytes_read", "bytes_written", "wait_s"),
    }
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "text.txt"]


def test_a_run_is_a_plain_loop(model, tmp_path):
    """The same losses and weights as a loop written out here, with every setting other than the default."""
    config = AutoConfig.from_pretrained(model, attention_dropout=0.5)
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    data = tmp_path / "pairs.jsonl"
    lines = [{"prompt": "w1 w2 ", "completion": " ".join(WORDS[n : 2 * n])} for n in range(1, 20)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = DataOptions(12, Packing.PADDED, TooLong.SKIP, seed=3)
    settings = settings_for(
        model,
        data,
        tmp_path / "out",
        seq_len=options.seq_len,
        packing=options.packing,
        too_long=options.too_long,
        seed=options.seed,
        learning=Learning(
            lr=1e-2, warmup_steps=2, schedule=Shape.LINEAR, weight_decay=0.3, max_grad_norm=0.2
        ),
    )

    class Drawing(PlainApi):
        def load(self, path, **options):
            loaded = super().load(path, **options)
            torch.rand(7)  # loading may draw: what is dropped out depends on the seed alone
            return loaded

    result = train(settings, api=Drawing())

    dataset = open_dataset(model, settings.data, options)
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).train()
    matrices, vectors = ([p for p in plain.parameters() if (p.dim() >= 2) is flag] for flag in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.3}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2)
    torch.manual_seed(3)
    losses, position = [], Position()
    for factor in (0.5, 1.0, 0.775, 0.55, 0.325, 0.1):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * factor
        loss = plain(**dataset.batch(position, 4)).loss
        plain.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.2)
        optimizer.step()
        losses.append(loss.item())
        position = dataset.advance(position, 4)
    assert result.losses == pytest.approx(losses, rel=1e-6)
    saved = weights(tmp_path / "out")
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(saved[name], value)


@pytest.mark.parametrize(
    ("name", "kind"), [("adamw8bit", "AdamW8bit"), ("lion", "Lion"), ("sgdsai", "SGDSaI")]
)
def test_what_is_said_of_learning_reaches_the_optimizer(model, data, tmp_path, name, kind):
    made = []

    def make(model, groups, **options):
        decays = {
            parameter.dim() >= 2: group["weight_decay"] for group in groups for parameter in group["params"]
        }
        made.append((decays, options))
        return PlainAdamW(model, groups, **options)

    api = PlainApi()
    setattr(api, kind, make)
    learning = Learning(lr=3e-3, weight_decay=0.3, max_grad_norm=0.5, optimizer=OptimizerName(name))
    train(settings_for(model, data, tmp_path / "out", learning=learning), api=api)
    assert made == [({True: 0.3, False: 0.0}, {"lr": 3e-3, "max_grad_norm": 0.5})]


def test_a_model_that_is_loaded_for_inference_is_put_to_training(model, data, tmp_path):
    """`PlainApi` counts calls in training; transformers loads weights for evaluation, where nothing is dropped out."""
    AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model)).save_pretrained(model)
    train(settings_for(model, data, tmp_path / "out"), api=(api := PlainApi()))
    assert api.calls == 6


def test_same_seed_same_losses(model, data, tmp_path):
    runs = [
        train(settings_for(model, data, tmp_path / f"out{index}", seed=seed), api=PlainApi())
        for index, seed in enumerate([1, 1, 2])
    ]
    assert runs[0].losses == runs[1].losses != runs[2].losses


def test_epochs_become_steps(model, data, tmp_path):
    # 20 * 60 + 1 tokens are 75 sequences, 18 batches of 4
    assert (
        train(settings_for(model, data, tmp_path / "o", length=Length(epochs=1)), api=PlainApi()).num_steps
        == 18
    )


def test_minutes_end_a_run(model, data, tmp_path):
    settings = settings_for(model, data, tmp_path / "out", length=Length(minutes=1e-9))
    assert train(settings, api=PlainApi()).num_steps == 1


def spoil_at(step):
    def spoil(call, model):
        if call == step:
            model.model.norm.register_forward_hook(lambda module, inputs, output: output * float("nan"))

    return spoil


def test_loss_that_is_not_finite_stops_before_the_update_and_saves(model, data, tmp_path):
    with pytest.raises(
        TrainingError,
        match=r"the loss of step 4 is nan \(the batch begins at .*text.txt:1.*\); that step was not taken",
    ) as caught:
        train(settings_for(model, data, tmp_path / "out"), api=PlainApi(spoil_at(4)))
    assert f"after step 3 are saved in {tmp_path / 'out'}" in caught.value.hint
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 3

    stop = {"done": False}

    def stop_after_three(call, module):
        if call == 3 and not stop["done"]:
            stop["done"] = True
            os.kill(os.getpid(), signal.SIGINT)

    train(settings_for(model, data, tmp_path / "three"), api=PlainApi(stop_after_three))
    saved, expected = weights(tmp_path / "out"), weights(tmp_path / "three")
    assert all(saved[name].equal(expected[name]) for name in expected)


def test_first_loss_not_finite_saves_nothing(model, data, tmp_path):
    api = PlainApi(spoil_at(1))
    with pytest.raises(
        TrainingError, match=r"the loss of step 1 is nan .*; no step was taken and nothing was saved"
    ):
        train(settings_for(model, data, tmp_path / "out"), api=api)
    assert not api.saved and sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]


def test_gradient_not_finite_stops_before_the_update_and_saves(model, data, tmp_path):
    def spoil(call, module):
        if call == 2:
            module.lm_head.weight.register_hook(lambda gradient: gradient * float("inf"))

    api = PlainApi(spoil)
    with pytest.raises(
        TrainingError, match=r"the gradient norm of step 2 is (nan|inf) .*; that step was not taken"
    ):
        train(settings_for(model, data, tmp_path / "out"), api=api)
    assert all(bool(value.isfinite().all()) for value in weights(tmp_path / "out").values())


def test_interrupt_finishes_the_step_and_saves(model, data, tmp_path, capfd):
    def interrupt(call, module):
        if call == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    progress = PlainProgress(Console(file=io.StringIO()))
    result = train(settings_for(model, data, tmp_path / "out"), api=PlainApi(interrupt), watchers=[progress])
    assert result.interrupted and result.num_steps == 3
    weights(tmp_path / "out")
    assert "finishing this step" in capfd.readouterr().err
    assert signal.getsignal(signal.SIGINT) is before


def test_second_interrupt_stops_at_once(model, data, tmp_path):
    def interrupt(call, module):
        if call == 3:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    api = PlainApi(interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(settings_for(model, data, tmp_path / "out"), api=api)
    assert not api.saved and not (tmp_path / "out").exists()
    assert len((tmp_path / "out.partial" / "metrics.jsonl").read_text().splitlines()) == 2


def test_output_is_checked_before_anything_is_loaded(model, data, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes").touch()
    api = PlainApi()
    with pytest.raises(ConfigError, match="is not empty") as caught:
        train(settings_for(model, data, out), api=api)
    assert "--overwrite" in caught.value.hint
    with pytest.raises(ConfigError, match="holds no earlier run"):
        train(settings_for(model, data, out, overwrite=True), api=api)
    with pytest.raises(ConfigError, match="is a file"):
        train(settings_for(model, data, data), api=api)
    with pytest.raises(ConfigError, match="which is read"):
        train(settings_for(model, data, model, overwrite=True), api=api)
    assert not api.loaded and (out / "notes").exists()


def test_overwrite_replaces_an_earlier_run_only_when_saved(model, data, tmp_path):
    out = tmp_path / "out"
    train(settings_for(model, data, out), api=PlainApi())
    before = weights(out)
    with pytest.raises(TrainingError):
        train(settings_for(model, data, out, overwrite=True), api=PlainApi(spoil_at(1)))
    assert all(weights(out)[name].equal(before[name]) for name in before)
    train(settings_for(model, data, out, overwrite=True, seed=5), api=PlainApi())
    assert any(not weights(out)[name].equal(before[name]) for name in before)
    assert not (tmp_path / "out.partial").exists()


def test_bad_data_leaves_nothing_behind(model, data, tmp_path):
    data.write_text("  ")
    with pytest.raises(DataError):
        train(settings_for(model, data, tmp_path / "out"), api=PlainApi())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "text.txt"]


@pytest.mark.parametrize(
    "make",
    [
        lambda: Length(),
        lambda: Length(steps=1, epochs=1),
        lambda: Length(steps=0),
        lambda: Length(minutes=float("nan")),
        lambda: Learning(lr=0),
        lambda: Learning(lr=float("inf")),
        lambda: Learning(warmup_steps=-1),
        lambda: Learning(weight_decay=-1),
        lambda: Learning(max_grad_norm=0),
        lambda: settings_for("m", "d", "o", batch_size=0),
        lambda: settings_for("m", "d", "o", seed=-1),
    ],
)
def test_settings_that_cannot_be(make):
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.hint


def test_figures_name_the_device_where_there_is_one():
    metrics = StepMetrics(1, 2.0, 1e-3, None, 10.0, 1.0, 1 << 29, 0, 0, {})
    assert "device" not in " ".join(moving(metrics, PlainReport()))
    report = PlainReport(device_budget_bytes=24 << 30, device_peak_bytes=3 << 30)
    assert "device 3.00 GiB of 24.0 GiB" in moving(metrics, report)


def test_progress_without_a_terminal_is_one_line_per_step(model, data, tmp_path):
    console = Console(file=io.StringIO(), width=40)
    progress = progress_on(console)
    assert isinstance(progress, PlainProgress)
    train(settings_for(model, data, tmp_path / "out"), api=PlainApi(), watchers=[progress])
    lines = console.file.getvalue().splitlines()
    steps = [line for line in lines if line.startswith("step ")]
    assert [line.split(" | ")[0] for line in steps] == [f"step {step}/6" for step in range(1, 7)]
    assert "mem 512.0 MiB of 1.00 GiB" in steps[0] and "read 100 B" in steps[0] and "wrote 10 B" in steps[0]
    assert steps[-1].endswith("left 0:00") and "\x1b" not in console.file.getvalue()
    assert lines[-1] == f"saving {tmp_path / 'out'}"


def test_progress_on_a_terminal_redraws(model, data, tmp_path):
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    train(settings_for(model, data, tmp_path / "out"), api=PlainApi(), watchers=[progress_on(console)])
    assert "step 6/6" in console.file.getvalue() and "loss" in console.file.getvalue()


@pytest.mark.parametrize("name", list(OptimizerName))
def test_every_optimizer_trains(model, data, tmp_path, name, monkeypatch):
    """Through the real engine, on disk: every parameter moves, and the loss on what was learned falls."""
    (tmp_path / "scratch").mkdir()
    settings = settings_for(
        model,
        data,
        tmp_path / "out",
        length=Length(steps=3),
        place=Options(disk=str(tmp_path / "scratch"), home="disk", dtype="float32"),
        learning=Learning(lr=1e-3, warmup_steps=1, optimizer=name),
    )
    monkeypatch.setenv("OUTSIZE_EAGER", "1")
    result = train(settings)
    assert result.num_steps == 3
    before, after = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (model, tmp_path / "out")
    )
    moved = {
        key: value.isfinite().all() and not value.equal(before.get_parameter(key))
        for key, value in after.named_parameters()
    }
    assert all(moved.values()), moved
    dataset = open_dataset(model, settings.data, DataOptions(seq_len=16), is_shuffled=False)
    assert mean_loss(after, dataset, 25)[0] < mean_loss(before, dataset, 25)[0]


def shown_at(width):
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    progress = progress_on(console)
    waits = {"wait weight": 0.5, "free gradient": 0.1}
    with progress:
        for number, loss in enumerate([3.0, 2.0, 1.0], 1):
            metrics = StepMetrics(number, loss, 1e-4, 0.5, 900.0, 1.0, 1 << 29, 1 << 20, 1 << 19, waits)
            progress.stepped(metrics, PlainReport(), 9)
    return console.file.getvalue()


@pytest.mark.parametrize("width", [40, 80, 160])
def test_a_terminal_shows_where_memory_and_time_go(width):
    text = shown_at(width)
    assert "█▅▁" in text and "step 3/9" in text
    if width >= 80:
        assert "waited 60% of the step, most for weights" in text and "mem 512.0 MiB of 1.00 GiB" in text


def test_a_terminal_says_that_it_will_stop_and_tears_nothing(capfd):
    console = Console(file=io.StringIO(), force_terminal=True, width=110, _environ={"TERM": "xterm"})
    with progress_on(console) as progress:
        progress.stopping()
        progress.stepped(StepMetrics(1, 3.0, 1e-4, 0.5, 900.0, 1.0, 1, 1, 1, {}), PlainReport(), 9)
        assert "finishing this step" in console.file.getvalue()
        progress.ended(PlainReport(), True)
        console.file.seek(0)
        console.file.truncate()
    assert "finishing this step" not in console.file.getvalue(), "it stays on the screen"
    assert capfd.readouterr().err == "", "the redrawn lines are torn apart"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_progress_tells_what_the_files_hold(model, data, tmp_path, is_terminal):
    console = Console(file=io.StringIO(), force_terminal=is_terminal, width=160)
    evaluating = Evaluating(fraction=0.4)
    settings = settings_for(model, data, tmp_path / "out", evaluating=evaluating)
    train(settings, api=PlainApi(), watchers=[progress_on(console)])
    text = console.file.getvalue()
    assert f"{data.name}: " in text and f"evaluation: {data.name}: " in text
    assert "of the tokens" in text, "a part is told as if it were the whole"


@pytest.mark.parametrize(
    "place", [Options(host="lots"), Options(disk="/nowhere/at/all"), Options(device="big")]
)
def test_a_place_that_cannot_be_is_refused_before_text_is_read(model, data, tmp_path, place):
    class Listener(Watcher):
        said = ()

        def say(self, text):
            self.said += (text,)

    listener = Listener()
    with pytest.raises(ConfigError) as caught:
        train(settings_for(model, data, tmp_path / "out", place=place), api=PlainApi(), watchers=[listener])
    assert caught.value.hint and not listener.said
    assert not (tmp_path / "out.partial").exists()


def test_waiting_in_words():
    def words(waits, step_s=1.0):
        return where_time_goes(StepMetrics(1, 1.0, 1e-4, None, 1.0, step_s, 1, 1, 1, waits))

    assert words({}) == words({"wait weight": 0.0})
    assert "moving is hidden behind computing" in words({"wait weight": 0.01})
    assert "most for gradients" in words({"wait weight": 0.1, "free gradient": 0.3})
    assert sparkline([1.0, float("nan"), 1.0]) == "▁ ▁"


def test_figures_of_a_run_that_diverges_fit_on_a_line():
    assert (fixed(2.5, 4), fixed(1e30, 4), fixed(float("inf"), 2)) == ("2.5000", "1e+30", "inf")
    assert course([2.0]) == "loss ▁" and course([]) == "loss "
    assert course([3.0, float("nan"), 1.0]) == "loss █ ▁ 1.00 to 3.00 in 3 steps"


def test_a_warm_up_that_would_not_end_is_made_shorter_and_said(model, data, tmp_path):
    console = Console(file=io.StringIO(), width=200)
    learning = Learning(lr=1e-2, warmup_steps=10)
    short = settings_for(model, data, tmp_path / "out", length=Length(steps=4), learning=learning)
    train(short, api=PlainApi(), watchers=[PlainProgress(console)])
    rates = [json.loads(line)["lr"] for line in (short.out / "metrics.jsonl").read_text().splitlines()]
    assert rates[:2] == pytest.approx([5e-3, 1e-2]) and rates[-1] < 1e-2
    assert "warming up in 2 of 4 steps" in console.file.getvalue()
