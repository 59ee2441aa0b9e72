"""trl.SFTTrainer with a model and an optimizer of Outsize, against the same trainer on the plain model."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from outsize.errors import UsageError
from tests.running import adamw, assert_same_weights, opened
from tests.train.families import FAMILIES, chat_tokenizer
from tests.zoo import seeded

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")

CHATS = [
    [{"role": "user", "content": f"what is {n}"}, {"role": "assistant", "content": "one two three " * n}]
    for n in range(1, 9)
]


def models(tmp_path, tokenizer):
    with seeded(0):
        plain = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=256,
            )
        ).train()
    return opened(plain, disk=tmp_path, home="disk", dtype="float32"), plain


def trained(make, model, tokenizer, folder, **options):
    trainer = make(
        model=model,
        args=trl.SFTConfig(
            output_dir=str(folder),
            per_device_train_batch_size=2,
            max_steps=3,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=False,
            disable_tqdm=True,
            **options,
        ),
        train_dataset=datasets.Dataset.from_list([{"messages": chat} for chat in CHATS]),
        processing_class=tokenizer,
        optimizers=(adamw(model), None),
    )
    trainer.train()
    return [(entry["loss"], entry["grad_norm"]) for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture
def tokenizer():
    tokenizer = chat_tokenizer(FAMILIES["chatml"][0])
    tokenizer.pad_token = "<eos>"
    return tokenizer


@pytest.mark.parametrize("options", [{}, {"max_length": 40}, {"gradient_accumulation_steps": 3}])
def test_supervised_fine_tuning_with_the_models_own_loss(options, tokenizer, tmp_path):
    class OwnLoss(trl.SFTTrainer):
        compute_loss = Trainer.compute_loss

    model, plain = models(tmp_path, tokenizer)
    ours, theirs = (
        trained(OwnLoss, subject, tokenizer, tmp_path / "out", **options) for subject in (model, plain)
    )
    assert len(ours) == 3 and ours == [pytest.approx(entry, rel=1e-3) for entry in theirs]
    assert_same_weights(model, plain)


def test_a_loss_that_multiplies_with_the_head_itself_is_refused(tokenizer, tmp_path):
    """trl from 1.16 on takes the head's weight out of the model; it is not there outside the model's forward."""
    model, _ = models(tmp_path, tokenizer)
    with pytest.raises(UsageError, match=r"lm_head\.weight lives in Outsize's store"):
        trained(trl.SFTTrainer, model, tokenizer, tmp_path / "out")
