"""Evaluation in a run: what it measures, when it comes, and which weights it keeps."""

import json
import os
import signal

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from outsize.errors import ConfigError, DataError, TrainingError
from outsize.train.data import DataFile, DataOptions, open_dataset
from outsize.train.evaluate import Evaluator, mean_loss
from outsize.train.loop import train
from outsize.train.settings import Evaluating, Learning, Length, TrainSettings
from tests.train.standin import WORDS, PlainApi


def settings_for(model, data, out, **changes):
    defaults = dict(
        length=Length(steps=6), batch_size=4, seq_len=16, learning=Learning(lr=1e-2, warmup_steps=2)
    )
    return TrainSettings(model, (DataFile(data),), out, **(defaults | changes))


def test_the_mean_is_over_tokens_not_batches(model, tmp_path):
    path = tmp_path / "pairs.jsonl"
    lines = [{"prompt": "w1 ", "completion": " ".join(WORDS[:n])} for n in (1, 9, 2, 5, 3)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    dataset = open_dataset(model, [DataFile(path)], DataOptions(seq_len=12), is_shuffled=False)
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    plain.train()
    total = count = 0
    for line in lines:
        ids = [0 + int(word[1:]) + 2 for word in (line["prompt"] + line["completion"]).split()] + [0]
        scores = plain.eval()(input_ids=torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
        for place in range(1, len(ids)):
            total -= scores[place - 1, ids[place]].item()
            count += 1
    plain.train()
    for batch_size in (1, 2, 100):
        loss, num_tokens = mean_loss(plain, dataset, batch_size)
        assert num_tokens == count == 1 + 9 + 2 + 5 + 3 + 5
        assert loss == pytest.approx(total / count, rel=1e-5)
        assert plain.training


@pytest.mark.parametrize(
    ("every", "num_steps", "expected"),
    [(2, 7, [2, 4, 6]), (None, 10, [2, 4, 6, 8]), (None, 3, [1, 2]), (None, 8, [2, 4, 6]), (None, None, [])],
)
def test_when_evaluations_come(tmp_path, every, num_steps, expected):
    evaluator = Evaluator(None, 1, every, tmp_path)
    assert [step for step in range(1, (num_steps or 9) + 1) if evaluator.is_due(step, num_steps)] == expected


def test_a_run_with_evaluations(model, data, tmp_path):
    out = tmp_path / "out"
    result = train(
        settings_for(model, data, out, evaluating=Evaluating(fraction=0.2, every=2)), api=(api := PlainApi())
    )
    assert [evaluation.step for evaluation in result.evaluations] == [2, 4, 6]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert [line["eval_loss"] for line in lines if "eval_loss" in line] == [
        e.loss for e in result.evaluations
    ]
    assert result.evaluations[-1].is_best and result.best is None and not (out / "best").exists()
    assert api.calls == 6, "evaluation is not training"


def test_the_best_weights_are_kept_beside_the_last(model, data, tmp_path):
    """A learning rate that destroys the model: the first evaluation is the best."""
    out = tmp_path / "out"
    settings = settings_for(
        model,
        data,
        out,
        learning=Learning(lr=10.0, warmup_steps=50),
        evaluating=Evaluating(files=(DataFile(data),), every=1),
    )
    result = train(settings, api=PlainApi())
    best = min(result.evaluations, key=lambda evaluation: evaluation.loss)
    assert best is not result.evaluations[-1] and result.best == out / "best"
    dataset = open_dataset(model, settings.data, DataOptions(seq_len=16), is_shuffled=False)
    loss, _ = mean_loss(AutoModelForCausalLM.from_pretrained(out / "best", dtype=torch.float32), dataset, 4)
    assert loss == pytest.approx(best.loss, rel=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out", "text.txt"]


class Stopped(PlainApi):
    """Counts the batches of evaluations, and sends SIGTERM in one of training or evaluation, as a scheduler would."""

    def __init__(self, *, step=None, evaluated=None):
        super().__init__()
        self.step, self.evaluated_at = step, evaluated
        self.evaluated = 0

    def _before_forward(self, model, inputs):
        super()._before_forward(model, inputs)
        self.evaluated += not model.training
        if (model.training and self.calls == self.step) or self.evaluated == self.evaluated_at:
            os.kill(os.getpid(), signal.SIGTERM)
            self.step = self.evaluated_at = None


@pytest.mark.parametrize("every", [3, 100], ids=["due then", "due at the end"])
def test_nothing_is_evaluated_after_a_stop(model, data, tmp_path, every):
    evaluating = Evaluating(files=(DataFile(data),), every=every)
    api = Stopped(step=3)
    result = train(settings_for(model, data, tmp_path / "out", evaluating=evaluating), api=api)
    assert result.interrupted and result.num_steps == 3 and not result.evaluations
    assert api.evaluated == 0
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_an_evaluation_under_way_ends_with_its_batch(model, data, tmp_path):
    evaluating = Evaluating(files=(DataFile(data),), every=2)
    batches = -(-open_dataset(model, [DataFile(data)], DataOptions(seq_len=16)).num_sequences // 4)
    api = Stopped(evaluated=batches + 2)  # in the second evaluation
    settings = settings_for(model, data, tmp_path / "out", evaluating=evaluating)
    result = train(settings, api=api)
    assert result.interrupted and result.num_steps == 4
    assert [evaluation.step for evaluation in result.evaluations] == [2]
    assert api.evaluated == batches + 2 and batches > 4
    assert result.best == tmp_path / "out" / "best", "the last weights were taken for the evaluated ones"
    best, last = (
        AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (result.best, result.out)
    )
    assert any(not best[name].equal(last[name]) for name in last)


def test_an_evaluation_that_is_not_finite(model, data, tmp_path):
    class Broken(PlainApi):
        def _before_forward(self, model, inputs):
            super()._before_forward(model, inputs)
            if not model.training:
                with torch.no_grad():
                    model.model.norm.weight.fill_(float("nan"))

    settings = settings_for(model, data, tmp_path / "out", evaluating=Evaluating(fraction=0.2, every=2))
    with pytest.raises(TrainingError, match="evaluation loss after step 2 is nan"):
        train(settings, api=Broken())


def test_an_evaluation_that_is_not_finite_leaves_the_best_weights_and_says_where(model, data, tmp_path):
    class Broken(PlainApi):
        def _before_forward(self, model, inputs):
            super()._before_forward(model, inputs)
            if not model.training and self.calls == 4:
                with torch.no_grad():
                    model.model.norm.weight.fill_(float("nan"))

    settings = settings_for(model, data, tmp_path / "out", evaluating=Evaluating(fraction=0.2, every=2))
    with pytest.raises(TrainingError, match="evaluation loss after step 4 is nan") as caught:
        train(settings, api=Broken())
    best = tmp_path / "out.partial" / "best"
    assert str(best) in caught.value.hint
    kept = AutoModelForCausalLM.from_pretrained(best).state_dict()
    assert all(bool(value.isfinite().all()) for value in kept.values())


def test_an_evaluation_file_without_a_learned_token(model, data, tmp_path):
    empty = tmp_path / "eval.jsonl"
    empty.write_text('{"prompt": "w1", "completion": ""}\n')
    settings = settings_for(model, data, tmp_path / "out", evaluating=Evaluating(files=(DataFile(empty),)))
    with pytest.raises(DataError, match=r"eval\.jsonl:1: the \"completion\" is empty"):
        train(settings, api=PlainApi())
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda: Evaluating(fraction=0.0),
        lambda: Evaluating(fraction=1.0),
        lambda: Evaluating(files=(DataFile("e"),), fraction=0.1),
        lambda: Evaluating(files=(DataFile("e", 0.5),)),
        lambda: Evaluating(fraction=0.1, every=0),
        lambda: Evaluating(every=3),
    ],
)
def test_settings_that_cannot_be(make):
    with pytest.raises(ConfigError) as caught:
        make()
    assert caught.value.hint
