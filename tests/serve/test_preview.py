"""What is planned for generating is what an engine takes."""

import pytest

import outsize
from outsize.config import Home
from outsize.errors import BudgetError
from outsize.plan.ledger import Purpose
from outsize.serve import Concurrency, open_engine
from outsize.serve.runner import Runner
from tests.seams import activation_bytes, budget_of, set_process_memory
from tests.zoo import ZOO, seeded

BASE = 300 << 20


@pytest.fixture
def folder(tmp_path):
    """A model whose vocabulary is large beside its layers."""
    config = ZOO["llama"].build().config
    config.vocab_size, config.max_position_embeddings = 20_000, 256
    with seeded(0):
        model = type(ZOO["llama"].build())(config)
    model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def engine_of(folder, host, concurrency):
    model = outsize.load(folder, dtype="float32", host=host).requires_grad_(False)
    return model, open_engine(model, concurrency=concurrency)


@pytest.mark.parametrize(("sequences", "tokens"), [(1, 20), (3, 200)])
def test_a_plan_for_generating_is_what_an_engine_takes(sequences, tokens, folder, monkeypatch):
    set_process_memory(monkeypatch, BASE)
    host = BASE + (160 << 20)
    options = {"batch_size": sequences, "seq_len": tokens, "dtype": "float32", "train": False}
    summary = outsize.preview(folder, host=host, **options)
    assert summary.fits, summary.reason
    model, engine = engine_of(folder, host, Concurrency(sequences, tokens))
    assert summary.host_bytes == budget_of(model).ledger.total(Home.HOST)
    pages = budget_of(model).ledger[Home.HOST, Purpose.KV]
    assert engine.runner.kv.num_bytes == pages
    assert ("KV cache", pages) in [(row.what, row.num_bytes) for row in summary.rows]


def test_what_a_plan_refuses_an_engine_refuses(folder, monkeypatch):
    set_process_memory(monkeypatch, BASE)
    host = BASE + (60 << 20)
    summary = outsize.preview(folder, host=host, dtype="float32", train=False, seq_len=20)
    assert not summary.fits
    with pytest.raises(BudgetError) as caught:
        engine_of(folder, host, Concurrency(1, 20))
    assert str(caught.value) == summary.reason


def test_only_rows_that_are_wanted_have_logits(folder):
    """Of a short prompt one row and its guesses, not as many as a pass may have tokens."""
    model, _ = engine_of(folder, None, Concurrency(1, 20))
    few = activation_bytes(model)
    model, _ = engine_of(folder, None, Concurrency(8, 200))
    assert few < 17 * 20_000 * 4 * 2 < activation_bytes(model)


def test_one_sequence_longer_than_the_share_is_served(folder):
    model = outsize.load(folder, dtype="float32").requires_grad_(False)
    assert Runner(model, concurrency=Concurrency(4, 250), share=0.0, only_plan=True).sizes == [16]
    assert Runner(model, concurrency=Concurrency(4, 250), share=1.0, only_plan=True).sizes == [64, 32, 16]
