"""transformers.Trainer with a model and an optimizer of Outsize, against the same Trainer on the plain model."""

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, get_linear_schedule_with_warmup

import outsize
from outsize.errors import UsageError
from tests.running import adamw, assert_same_weights, opened, values_of
from tests.zoo import ZOO, seeded

ROWS, LENGTH = 24, 12


class Rows(torch.utils.data.Dataset):
    """Rows of one batch of the zoo, with padding and positions that are not learned."""

    def __init__(self, name="llama", seed=3):
        self.batch = ZOO[name].batch(rows=ROWS, length=LENGTH, seed=seed)

    def __len__(self):
        return ROWS

    def __getitem__(self, index):
        return {key: value[index] for key, value in self.batch.items()}


def pair(tmp_path, name="llama"):
    with seeded(0):
        plain = ZOO[name].build().train()
    return opened(plain, disk=tmp_path, home="disk", dtype="float32"), plain


def trainer_of(model, folder, *, scheduler=True, **changes):
    options = dict(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=4,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
        disable_tqdm=True,
        seed=0,
        data_seed=0,
    )
    optimizer = adamw(model)
    schedule = get_linear_schedule_with_warmup(optimizer, 1, 6) if scheduler else None
    extra = {key: changes.pop(key) for key in list(changes) if key in ("eval_dataset", "compute_metrics")}
    return Trainer(
        model=model,
        args=TrainingArguments(**(options | changes)),
        train_dataset=Rows(),
        optimizers=(optimizer, schedule),
        **extra,
    )


def logs(trainer, *names):
    return [tuple(entry[name] for name in names) for entry in trainer.state.log_history if names[0] in entry]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("clip", [1.0, 0.05, 0.0])
def test_a_trainer_trains_as_on_the_plain_model(accumulation, clip, tmp_path):
    """Losses, learning rates and gradient norms as logged, and weights: with default clipping, sharp clipping and none."""
    model, plain = pair(tmp_path)
    trainers = [
        trainer_of(subject, tmp_path / "out", gradient_accumulation_steps=accumulation, max_grad_norm=clip)
        for subject in (model, plain)
    ]
    for trainer in trainers:
        trainer.train()
    ours, theirs = (logs(trainer, "loss", "grad_norm", "learning_rate") for trainer in trainers)
    assert len(ours) == 4 and ours == [pytest.approx(entry, rel=1e-4) for entry in theirs]
    assert_same_weights(model, plain)


def test_the_trainers_own_schedule_is_used(tmp_path):
    model, plain = pair(tmp_path)
    trainers = [
        trainer_of(subject, tmp_path / "out", scheduler=False, lr_scheduler_type="cosine", warmup_steps=1)
        for subject in (model, plain)
    ]
    for trainer in trainers:
        trainer.train()
    ours, theirs = (logs(trainer, "learning_rate") for trainer in trainers)
    assert ours == theirs and len(set(ours)) > 2
    assert_same_weights(model, plain)


def test_evaluation_and_metrics(tmp_path):
    model, plain = pair(tmp_path)

    def accuracy(prediction):
        chosen = prediction.predictions[:, :-1].argmax(-1)
        return {"accuracy": float((chosen == prediction.label_ids[:, 1:]).mean())}

    found = []
    for subject in (model, plain):
        trainer = trainer_of(
            subject,
            tmp_path / "out",
            eval_strategy="steps",
            eval_steps=2,
            eval_dataset=Rows(seed=8),
            compute_metrics=accuracy,
        )
        trainer.train()
        found.append(logs(trainer, "eval_loss", "eval_accuracy"))
    assert len(found[0]) == 2 and found[0] == [pytest.approx(entry, rel=1e-4) for entry in found[1]]
    assert_same_weights(model, plain)


def test_saved_steps_are_ordinary_folders_of_the_weights_at_that_step(tmp_path):
    model, plain = pair(tmp_path)
    trainers = [
        trainer_of(subject, tmp_path / f"out{number}", save_strategy="steps", save_steps=2)
        for number, subject in enumerate((model, plain))
    ]
    for trainer in trainers:
        trainer.train()
    for step in (2, 4):
        ours, theirs = (
            AutoModelForCausalLM.from_pretrained(tmp_path / f"out{n}" / f"checkpoint-{step}") for n in (0, 1)
        )
        assert_same_weights(ours, theirs)
    saved = torch.load(tmp_path / "out0" / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert saved["state"] == {} and set(saved) == {"state", "param_groups", "outsize"}


def test_resuming_is_refused_and_does_not_begin_with_moments_of_zero(tmp_path):
    model, plain = pair(tmp_path)
    trainer_of(model, tmp_path / "out", save_strategy="steps", save_steps=2).train()
    fresh = opened(plain, disk=tmp_path, home="disk", dtype="float32")
    with pytest.raises(UsageError, match="weights cannot be put into a model"):
        trainer_of(fresh, tmp_path / "out").train(resume_from_checkpoint=True)


def test_an_optimizer_that_the_trainer_makes_itself_is_refused(tmp_path):
    model, _ = pair(tmp_path)
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"), max_steps=1, report_to="none", disable_tqdm=True
    )
    before = values_of(model)
    with pytest.raises(UsageError) as caught:
        Trainer(model=model, args=arguments, train_dataset=Rows()).train()
    assert "outsize.AdamW" in str(caught.value.hint)
    assert all(value.equal(before[name]) for name, value in values_of(model).items())


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_checkpointing": True},
        {"neftune_noise_alpha": 5.0},
        {"average_tokens_across_devices": False},
        {"label_smoothing_factor": 0.1},
        {"bf16": True},
        {"weight_decay": 0.1},
    ],
    ids=lambda options: next(iter(options)),
)
def test_options_that_work(options, tmp_path):
    model, plain = pair(tmp_path)
    found = []
    for subject in (model, plain):  # making a trainer seeds what is drawn at random, such as NEFTune's noise
        trainer = trainer_of(subject, tmp_path / "out", **options)
        trainer.train()
        found.append(logs(trainer, "loss"))
    ours, theirs = found
    assert ours == [pytest.approx(entry, rel=1e-2 if "bf16" in options else 1e-4) for entry in theirs]
    assert outsize.report(model).num_parameters > 0


def test_a_compiled_model_is_refused_by_name(tmp_path):
    model, _ = pair(tmp_path)
    with pytest.raises(UsageError, match=r"torch\.compile cannot trace a model") as caught:
        trainer_of(model, tmp_path / "out", torch_compile=True).train()
    assert "torch_compile" in str(caught.value.hint)


def test_best_weights_at_the_end_are_refused_before_the_first_step_and_the_hint_works(tmp_path):
    model, _ = pair(tmp_path)
    options = dict(
        eval_dataset=Rows(seed=5), eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1
    )
    trainer = trainer_of(model, tmp_path / "out", load_best_model_at_end=True, **options)
    with pytest.raises(UsageError, match="load_best_model_at_end=True") as caught:
        trainer.train()
    assert trainer.state.global_step == 0 and outsize.report(model).bytes_read == 0, "something was computed"
    assert 'metric_for_best_model="loss"' in caught.value.hint
    trainer = trainer_of(model, tmp_path / "out", metric_for_best_model="loss", max_steps=2, **options)
    trainer.train()
    losses = {
        int(entry["step"]): entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry
    }
    best = min(losses, key=losses.get)
    assert trainer.state.best_model_checkpoint.endswith(f"checkpoint-{best}")
    kept = outsize.load(trainer.state.best_model_checkpoint, dtype="float32")
    assert kept.lm_head.weight.detach().isfinite().all()


def test_a_model_changes_its_mode_as_ever(tmp_path):
    model, _ = pair(tmp_path)
    assert model.eval() is model and not model.training and not model.model.norm.training
    assert model.train() is model and model.training and model.model.layers[0].training
