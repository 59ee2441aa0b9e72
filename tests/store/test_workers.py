"""The threads of a store end with it."""

import threading

import pytest

import outsize
from tests.running import opened
from tests.seams import with_twin
from tests.zoo import ZOO

SHARED = ("outsize-closing", "outsize-native")
"""Threads that serve all models of a process."""


def own_threads():
    return {
        thread.name.rstrip("0123456789").rstrip("_")
        for thread in threading.enumerate()
        if thread.name.startswith("outsize") and not thread.name.startswith(SHARED)
    }


@pytest.mark.parametrize("apart", [False, True])
def test_closing_a_model_ends_all_its_threads(apart, tmp_path, monkeypatch):
    before = own_threads()
    if apart:
        with_twin(monkeypatch)
    model = opened(ZOO["llama"].build().train(), disk=tmp_path, home="disk", dtype="float32")
    optimizer = outsize.AdamW(model)
    outsize.checkpoint.resume(model, optimizer, tmp_path / "store")
    for seed in range(2):
        model(**ZOO["llama"].batch(seed=seed)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        outsize.checkpoint.commit(model, optimizer, tmp_path / "store")
    outsize.checkpoint.finish(model)
    started = own_threads() - before
    assert {"outsize-source", "outsize-disk"} <= started
    outsize.checkpoint.close(model)
    twins = {f"outsize-{way}" for way in ("up", "down")}  # a twin's threads are the test's
    assert own_threads() - before <= twins
