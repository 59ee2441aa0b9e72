import math
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from outsize.config import ComputeType
from outsize.errors import ConfigError
from outsize.files import is_memory_backed
from outsize.hardware import device, host, identity, measure
from outsize.hardware.measure import Figures
from outsize.hardware.others import OtherPrograms
from outsize.hardware.rate import Rate
from outsize.plan.profile import Profile, Resource
from tests.doubles import TwinDevice

measure_module = sys.modules["outsize.hardware.measure"]  # the function hides it
BUSY = [Resource.COMPUTE, Resource.UPDATE, Resource.READ, Resource.WRITE]


@pytest.fixture(autouse=True)
def in_small(monkeypatch):
    """No compiler, one round, little memory."""
    monkeypatch.setenv("OUTSIZE_EAGER", "1")
    monkeypatch.setattr(measure_module, "ROUNDS", 1)
    monkeypatch.setattr(measure_module, "_MOST_CHUNKS", 4)
    monkeypatch.setattr(host, "COPY_BYTES", 1 << 20)


@pytest.fixture
def nothing_runs(monkeypatch):
    """Nothing is opened or timed: every rate is 1."""
    names = [*BUSY, "host_copy", *ComputeType]
    figures = Figures({str(name): [Rate(1.0, 1.0)] for name in names})
    works = measure_module.Works({}, {}, ComputeType.FLOAT32, 1, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(measure_module, "_opened", lambda *arguments: nullcontext(works))
    monkeypatch.setattr(measure_module, "_measure", lambda works, seconds: figures)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a device is measured too")
def test_a_machine_without_a_device(disk_folder):
    said = []
    profile = measure(disk_folder, seconds=0.01, say=said.append)
    assert Profile.from_json(profile.to_json(), "again") == profile
    assert set(profile.matmul) == set(ComputeType) and not profile.has_device
    assert 1 <= profile.update_threads <= profile.num_threads and profile.io_threads in (2, 4, 8)
    assert list(profile.contention) == BUSY
    for first, others in profile.contention.items():
        assert sorted(others) == sorted(set(BUSY) - {first})
    assert profile.identity == identity.identity(disk_folder) and str(disk_folder) in profile.source
    assert list(disk_folder.iterdir()) == []
    assert 2 <= len(said) <= 3 and all(len(line) < 110 for line in said)


def test_without_a_folder_the_disk_of_the_cache_is_measured(disk_folder, nothing_runs, monkeypatch):
    monkeypatch.setenv("OUTSIZE_CACHE", str(disk_folder / "new" / "cache"))
    profile = measure(None, seconds=0.01, say=lambda line: None)
    assert profile.source.partition("disk of ")[2].startswith(str((disk_folder / "new" / "cache").resolve()))


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
    rates = [Rate(1.0, 9e9), Rate(123456.7, 5555.5), Rate(9e9, 1.0)]
    figures = Figures(
        {"update": rates, "read": rates}, {(Resource.READ, Resource.WRITE): [0.2, 0.61239, 0.9]}
    )
    assert figures.rate("update") == 123500.0
    assert figures.rate("read") == 5556.0  # the stalls of a disk are its own
    assert figures.contention() == {Resource.READ: {Resource.WRITE: 0.612}}


@pytest.mark.parametrize(("part", "is_said"), [(0.05, False), (0.45, True)])
def test_other_programs_are_named_as_what_they_are(part, is_said, disk_folder, nothing_runs, monkeypatch):
    monkeypatch.setattr(OtherPrograms, "part", lambda self: part)
    said = []
    profile = measure(disk_folder, seconds=0.01, say=said.append)
    assert ("while other programs took 45% of the processor" in profile.source) is is_said
    assert any(line.startswith("other programs took 45%") for line in said) is is_said


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


def test_a_machine_with_a_device(disk_folder, monkeypatch):
    """On a stand-in for the device, and in small: which figures there are, not what they are."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Twin")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: SimpleNamespace(total_memory=1 << 34))
    monkeypatch.setattr(measure_module, "CudaDevice", TwinDevice)
    for name, value in {"ROWS": 64, "COPY_BYTES": 1 << 20, "PRODUCTS_PER_UNIT": 1}.items():
        monkeypatch.setattr(device, name, value)
    profile = measure(disk_folder, seconds=0.01, say=lambda line: None)
    assert profile.has_device and profile.device_bytes == 1 << 34 and "Twin" in profile.name
    assert profile.device_update and profile.device_memory and set(profile.matmul) == set(ComputeType)
    assert list(profile.contention) == list(Resource)


def test_the_spread_is_that_of_the_rounds_without_the_extremes():
    rates = {
        "read": [Rate(1.0, mean) for mean in (100.0, 80.0, 125.0, 1.0, 900.0)],
        "update": [Rate(middle, 1.0) for middle in (10.0, 10.0, 11.0, 10.0, 50.0)],
        "compute": [Rate(1.0, 1.0)],
        "host_copy": [Rate(5.0, 1.0)],
    }
    assert Figures(rates).spread() == {"disk_read": 0.25, "update": 0.1, "host_copy": 0.0}
