"""Parameters read, and models saved, at any moment: between forward and backward, and after a loss that was dropped."""

import outsize
from tests.pairs import pairwise
from tests.running import adamw, assert_same_weights, opened, values_of
from tests.zoo import ZOO, seeded


def read_all(model, folder):
    return values_of(model)


def read_table(model, folder):
    return model.get_input_embeddings().weight.detach() + 1


def save(model, folder):
    outsize.save(model, folder)


@pairwise(
    name=["llama", "llama_tied", "gpt2"],
    look={look.__name__: look for look in (read_all, read_table, save)},
    drops={"before backward": False, "instead of backward": True},
)
def test_looking_at_a_model_changes_nothing(name, look, drops, tmp_path):
    with seeded(0):
        plain = ZOO[name].build().train()
    model = opened(plain, disk=tmp_path, home="disk")
    optimizers = {subject: adamw(subject) for subject in (model, plain)}
    for step in range(3):
        batch = ZOO[name].batch(seed=step)
        for subject, optimizer in optimizers.items():
            if drops:
                subject(**ZOO[name].batch(seed=9))
                if subject is model:
                    look(model, tmp_path / f"{step}")
            loss = subject(**batch).loss
            if subject is model and not drops:
                look(model, tmp_path / f"{step}")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_weights(model, plain)
