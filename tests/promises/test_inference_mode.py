"""Inside `torch.inference_mode()` everything works as under `torch.no_grad()`, and training goes on afterwards."""

import pytest
import torch
import transformers

import outsize
from outsize.serve import Request, Sampling, open_engine
from tests.running import adamw, assert_same_losses, assert_same_weights, loss_of, opened, values_of
from tests.serve.families import lively, prompts_of
from tests.zoo import ZOO

HOMES = {"host": {}, "disk": {"home": "disk"}}


@pytest.fixture(params=HOMES)
def options(request, tmp_path):
    return {**HOMES[request.param], "disk": tmp_path, "dtype": "float32"}


def plain_of(name="llama"):
    return ZOO[name].build()


@pytest.mark.parametrize("name", ["llama", "mixtral", "t5"])
def test_the_first_call_is_right(name, options):
    plain, batch = plain_of(name), ZOO[name].batch()
    model = opened(plain, **options)
    with torch.inference_mode():
        for some in (batch, {key: value for key, value in batch.items() if key != "labels" or name == "t5"}):
            output, expected = model(**some), plain(**some)
            torch.testing.assert_close(torch.as_tensor(output.logits + 0), expected.logits)


@pytest.mark.parametrize("first", ["call", "load", "all"])
def test_training_goes_on_after_an_evaluation(first, options):
    """Whatever was done first inside: calls, opening the model, making the optimizer."""
    plain, data = plain_of(), [ZOO["llama"].batch(seed=seed) for seed in range(2)]

    def losses(some, is_ours):
        with torch.inference_mode(is_ours and first in ("load", "all")):
            model = opened(some, **options) if is_ours else some
        with torch.inference_mode(is_ours and first in ("optimizer", "all")):
            optimizer = adamw(model)
        found = []
        if first == "call":
            with torch.inference_mode():
                found.append(float(loss_of(model(**data[0]))))
        for batch in data:
            loss = loss_of(model.train()(**batch))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(float(loss.detach()))
            with torch.inference_mode():
                found.append(float(loss_of(model.eval()(**data[0]))))
        return found, model

    (ours, model), (theirs, plain) = losses(plain, True), losses(plain, False)
    assert_same_losses(ours, theirs)
    assert_same_weights(model, plain)


def test_weights_are_read_and_saved(options, tmp_path):
    plain = plain_of()
    model = opened(plain, **options)
    with torch.inference_mode():
        for name, value in values_of(model).items():
            assert torch.equal(value, plain.get_parameter(name))
        weight, expected = model.lm_head.weight, plain.lm_head.weight
        assert torch.equal(weight.data.clone(), expected) and float(weight.sum()) == float(expected.sum())
        assert weight.tolist() == expected.tolist()
        model.save_pretrained(tmp_path / "saved")
        again = outsize.load(tmp_path / "saved", **options)
    assert torch.equal(again.lm_head.weight.clone(), expected)


def test_text_is_generated(options):
    plain = plain_of()
    model, ids = opened(plain, **options), ZOO["llama"].batch()["input_ids"]
    asked = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "do_sample": False}
    with torch.inference_mode():
        assert torch.equal(model.generate(ids, **asked), plain.generate(ids, **asked))
    assert torch.equal(model.generate(ids, **asked), plain.generate(ids, **asked))


def test_gradients_are_read(options):
    plain, batch = plain_of(), ZOO["llama"].batch()
    model = opened(plain, **options)
    for some in (model, plain):
        loss_of(some(**batch)).backward()
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.grad.clone(), plain.get_parameter(name).grad)


def test_a_model_that_was_made_inside_is_wrapped(options):
    with torch.inference_mode():
        made = plain_of()
    model = outsize.wrap(made, **options)
    loss = loss_of(model(**ZOO["llama"].batch()))
    loss.backward()
    assert float(loss.detach()) == pytest.approx(
        float(loss_of(plain_of()(**ZOO["llama"].batch())).detach()), rel=1e-6
    )
    assert isinstance(model, transformers.PreTrainedModel)


def test_an_engine_that_was_opened_inside_serves_everywhere():
    (prompt,), plain = prompts_of((9,)), lively("llama")

    def answer(engine):
        return [completion.tokens for completion in engine.submit(Request(prompt, Sampling(), 3)).wait()]

    expected = answer(open_engine(plain))
    with torch.inference_mode():
        engines = [open_engine(plain), open_engine(opened(plain))]
        assert [answer(engine) for engine in engines] == [expected, expected]
    assert [answer(engine) for engine in engines] == [expected, expected]
