"""One copy of the weights is trained and generates in turn: the same slots, and one budget that holds."""

import pytest
import torch

from outsize.config import Home
from outsize.errors import BudgetError
from outsize.plan.ledger import Purpose
from outsize.serve import Engine, Request
from tests.running import adamw, opened
from tests.seams import budget_of, has_memory, set_process_memory, store_of
from tests.serve.families import assert_greedy, lively, prompts_of

MIB = 1 << 20
BASE = 300 * MIB
PROMPTS = prompts_of((37, 5, 20))
"""The first has full pages, which an engine finds again where they are still right."""


def batch(step):
    ids = torch.randint(5, 190, (4, 24), generator=torch.Generator().manual_seed(step))
    return {"input_ids": ids, "labels": ids}


def backward(model, step):
    model.train()
    loss = model(**batch(step)).loss
    loss.backward()
    return loss.item()


def trained(model, optimizer, steps):
    """Losses of these steps."""
    losses = []
    for step in steps:
        losses.append(backward(model, step))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def assert_generates_with_its_weights(model, engine):
    """What a plain model with the weights that `model` has now generates."""
    plain = lively("llama")
    values = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(values[name])
    model.eval()
    streams = [engine.submit(Request(prompt, max_new_tokens=8)) for prompt in PROMPTS]
    for prompt, stream in zip(PROMPTS, streams, strict=True):
        assert_greedy(plain, prompt, stream.wait()[0].tokens)
    engine.check()


def assert_within_ledger(model):
    """What the arenas hold and what the last call took are in the ledger, and the ledger is within the budget."""
    budget, planes = budget_of(model), store_of(model).planes
    pages = 0 if planes.pages is None else planes.pages.num_bytes
    calls = sum(
        budget.ledger[Home.HOST, purpose] for purpose in (Purpose.ACTIVATIONS, Purpose.VISIT, Purpose.KV)
    )
    assert pages + budget.call_bytes <= calls
    planes_bytes = planes.arena.in_use_bytes - pages
    assert (
        planes_bytes
        == budget.placement.bytes_in(Home.DEVICE)
        <= budget.ledger.total(Home.HOST) - calls - BASE
    )
    assert budget.ledger.total(Home.HOST) + budget.limits.slack_bytes <= budget.limits.host_bytes
    return pages


def opened_on_disk(tmp_path, monkeypatch, room=15 * MIB):
    """A model that streams, within `room` beside the process and what every plan leaves free."""
    set_process_memory(monkeypatch, BASE)
    host = BASE + 96 * MIB + room
    return opened(lively("llama"), disk=tmp_path, home="disk", host=host, dtype="float32")


@pytest.mark.parametrize("first", ["engine", "training", "generating"])
def test_training_and_generating_in_turn(first, tmp_path, monkeypatch):
    alone = opened_on_disk(tmp_path, monkeypatch)
    losses = trained(alone, adamw(alone), range(4))
    model = opened_on_disk(tmp_path, monkeypatch)
    optimizer = adamw(model)
    engine = Engine(model, kv="1MiB", pass_tokens=16) if first != "training" else None
    assert not has_memory(model), "it is placed when the batch is known that it trains with"
    if engine is not None and first == "generating":
        assert_generates_with_its_weights(model, engine)
    found = trained(model, optimizer, range(2))
    assert assert_within_ledger(model) == 0, "training has the memory of pages"
    engine = engine or Engine(model, kv="1MiB", pass_tokens=16)
    assert_generates_with_its_weights(model, engine)
    assert assert_within_ledger(model) == engine.runner.kv.num_bytes > 0.9 * MIB
    found += trained(model, optimizer, range(2, 4))
    assert_generates_with_its_weights(model, engine)
    assert_within_ledger(model)
    assert found == losses


def test_a_step_between_two_requests_changes_what_is_generated(tmp_path, monkeypatch):
    """Keys and values of earlier weights are not found again, whenever the step comes."""
    model = opened_on_disk(tmp_path, monkeypatch)
    optimizer = adamw(model, lr=0.05)
    engine = Engine(model, kv="256KiB", pass_tokens=16)
    backward(model, 0)
    assert_generates_with_its_weights(model, engine)
    optimizer.step()
    assert_generates_with_its_weights(model, engine)


def test_a_request_goes_on_with_the_weights_of_a_step_that_came_between(tmp_path, monkeypatch):
    model = opened_on_disk(tmp_path, monkeypatch)
    optimizer = adamw(model, lr=0.05)
    engine = Engine(model, kv="256KiB", pass_tokens=64)
    stream = engine.submit(Request(PROMPTS[0], max_new_tokens=8))
    while not stream.completions[0].tokens:
        engine.step()
    said = list(stream.completions[0].tokens)
    assert len(said) < 8
    trained(model, optimizer, range(1))
    tokens = stream.wait()[0].tokens
    again = engine.submit(Request((*PROMPTS[0], *said), max_new_tokens=8 - len(said)))
    assert tokens == said + again.wait()[0].tokens


def test_pages_that_do_not_fit_beside_training_are_named(tmp_path, monkeypatch):
    model = opened_on_disk(tmp_path, monkeypatch)
    adamw(model)
    with pytest.raises(BudgetError, match="the KV cache takes 8\\.0"):
        Engine(model, kv="8MiB", pass_tokens=16)
    backward(model, 0)
    with pytest.raises(BudgetError, match="the KV cache takes 8\\.0"):
        Engine(model, kv="8MiB", pass_tokens=16)
    assert_within_ledger(model)
