from dataclasses import replace

import pytest

from outsize.hardware import cache
from outsize.hardware.shipped import machine
from tests.tier.conftest import disk_folder  # noqa: F401


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("OUTSIZE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def measured(own_cache, monkeypatch):
    """The folders that were measured; measuring takes no time and gives the figures of another machine."""
    folders = []

    def measure(folder, *, seconds, say):
        folders.append(folder)
        say("measuring")
        own = cache.identity(folder or own_cache)
        return replace(machine("h100"), identity=own, host_bytes=cache.memory_bytes())

    monkeypatch.setattr(cache, "measure", measure)
    return folders
