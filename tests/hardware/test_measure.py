import math

import pytest
import torch

from outsize.config import ComputeType
from outsize.errors import ConfigError
from outsize.hardware import host, identity, measure
from outsize.hardware.measure import Figures
from outsize.plan.profile import Profile, Resource
from outsize.tier.probe import is_memory_backed

BUSY = [Resource.COMPUTE, Resource.UPDATE, Resource.READ, Resource.WRITE]


@pytest.fixture(autouse=True)
def eager(monkeypatch):
    monkeypatch.setenv("OUTSIZE_EAGER", "1")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device is measured too")
def test_a_machine_without_a_device(disk_folder):
    said = []
    profile = measure(disk_folder, seconds=0.01, say=said.append)
    assert Profile.from_json(profile.to_json(), "again") == profile
    assert set(profile.matmul) == set(ComputeType) and not profile.has_device
    assert list(profile.contention) == BUSY
    for first, others in profile.contention.items():
        assert sorted(others) == sorted(set(BUSY) - {first})
    assert profile.identity == identity.identity(disk_folder) and str(disk_folder) in profile.source
    assert list(disk_folder.iterdir()) == []
    assert len(said) == 2 and all(len(line) < 110 for line in said)


def test_without_a_folder_the_disk_of_the_cache_is_measured(disk_folder, monkeypatch):
    monkeypatch.setenv("OUTSIZE_CACHE", str(disk_folder / "new" / "cache"))
    profile = measure(None, seconds=0.01, say=lambda line: None)
    assert profile.source.endswith(str((disk_folder / "new" / "cache").resolve()))


@pytest.mark.parametrize("seconds", [0, -1, math.nan, math.inf])
def test_it_takes_time(seconds, disk_folder):
    with pytest.raises(ConfigError, match=r"seconds: .* is no positive number"):
        measure(disk_folder, seconds=seconds, say=print)


def test_a_folder_that_is_missing_is_refused_before_anything_is_done(tmp_path):
    with pytest.raises(ConfigError, match="nowhere: No such file"):
        measure(tmp_path / "nowhere", seconds=1, say=lambda line: pytest.fail(line))


@pytest.mark.skipif(not is_memory_backed("/dev/shm"), reason="no tmpfs here")
def test_a_folder_in_memory_is_refused(monkeypatch):
    with pytest.raises(ConfigError, match="is on tmpfs"):
        measure(identity.Path("/dev/shm"), seconds=1, say=lambda line: pytest.fail(line))


def test_figures_are_those_in_the_middle():
    figures = Figures(
        {"update": [1.0, 123456.7, 9e9]}, {(Resource.READ, Resource.WRITE): [0.2, 0.61239, 0.9]}
    )
    assert figures.rate("update") == 123500.0
    assert figures.contention() == {Resource.READ: {Resource.WRITE: 0.612}}


@pytest.mark.parametrize(("parts", "kept"), [([1.2, 1.1, 0.9], 1.0), ([0.0, 0.0, 1.0], 0.01)])
def test_what_is_kept_is_a_part(parts, kept):
    figures = Figures({}, {(Resource.READ, Resource.WRITE): parts})
    assert figures.contention() == {Resource.READ: {Resource.WRITE: kept}}


@pytest.mark.parametrize(("compute_type", "num_bytes"), [("float32", 28), ("bfloat16", 26)])
def test_an_update_moves_every_plane_and_the_gradient_once(compute_type, num_bytes):
    assert host.update_bytes(ComputeType(compute_type)) == num_bytes


def test_products_are_smaller_where_they_would_take_too_long():
    full = host.matmul(ComputeType.FLOAT32, 1e9)
    assert [full.run() for _ in host.WIDTHS] == [2 * 2048 * i * o for i, o in host.WIDTHS]
    least = host.matmul(ComputeType.FLOAT32, 1e-9)
    assert [least.run() for _ in host.WIDTHS] == [2 * 64 * i * o for i, o in host.WIDTHS]
