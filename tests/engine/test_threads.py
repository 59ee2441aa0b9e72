"""Threads beside computing are as many as the profile says, and no number of them changes a bit."""

import dataclasses

import pytest
import torch

import outsize
from outsize.errors import ConfigError
from outsize.hardware import machine
from outsize.store import optimizer_worker
from outsize.tier import IO_THREADS
from tests.running import opened, values_of
from tests.seams import close, disk_of
from tests.zoo import ZOO


def profile(**threads):
    shipped = machine("h200")
    return dataclasses.replace(
        shipped, up=None, down=None, device_bytes=None, device_update=None, device_memory=None, **threads
    )


def trained(monkeypatch, disk, threads, *, store=None):
    limits = []
    with monkeypatch.context() as patch:
        plain = optimizer_worker.limit_threads
        patch.setattr(optimizer_worker, "limit_threads", lambda count: (limits.append(count), plain(count)))
        known = profile(**threads) if threads is not None else None
        model = opened(ZOO["llama"].build().train(), disk=disk, home="disk", dtype="float32", profile=known)
        optimizer = outsize.AdamW(model, lr=1e-3)
        if store is not None:
            outsize.checkpoint.resume(model, optimizer, store)
        for seed in range(2):
            model(**ZOO["llama"].batch(seed=seed)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        values = values_of(model)
    tier = disk_of(model)
    tier = tier if store is None else tier._inner
    num_io_threads = tier._threads._max_workers
    close(model)
    return values, limits, num_io_threads


@pytest.mark.parametrize("commits", [False, True])
def test_threads_are_those_of_the_profile(commits, tmp_path, monkeypatch):
    store = tmp_path / "store" if commits else None
    values, limits, num_io_threads = trained(
        monkeypatch, tmp_path, {"update_threads": 2, "io_threads": 3}, store=store
    )
    assert (limits, num_io_threads) == ([2], 3)
    expected, limits, num_io_threads = trained(monkeypatch, tmp_path, None)
    assert (limits, num_io_threads) == ([], IO_THREADS)
    assert all(torch.equal(values[name], expected[name]) for name in expected)
    assert trained(monkeypatch, tmp_path, {})[1:] == ([], IO_THREADS), "a profile of before"


@pytest.mark.parametrize("name", ["update_threads", "io_threads"])
@pytest.mark.parametrize("count", [0, -1, 1.5, "two"])
def test_a_number_that_is_none_is_refused(name, count):
    with pytest.raises(ConfigError, match=name):
        profile(**{name: count})
