import json

import pytest

from outsize.errors import ConfigError
from outsize.hardware import cache, kept, load_or_measure, profile_path
from outsize.plan.profile import Profile


def changed(path, **values):
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_a_second_call_reads_what_the_first_measured(measured, tmp_path):
    first = load_or_measure(tmp_path, lambda line: None)
    second = load_or_measure(tmp_path, lambda line: pytest.fail(line))
    assert second == first == Profile.read(profile_path(tmp_path)) and measured == [tmp_path]
    assert [entry.name for entry in profile_path(tmp_path).parent.iterdir()] == [profile_path(tmp_path).name]


def test_without_a_folder_it_is_the_disk_of_the_cache(measured, own_cache):
    load_or_measure(None, lambda line: None)
    assert measured == [None] and profile_path(None) == profile_path(own_cache)
    assert profile_path(None).is_file()


def test_again_measures_again(measured, tmp_path):
    for _ in range(2):
        load_or_measure(tmp_path, lambda line: None, again=True)
    assert len(measured) == 2


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda path: path.write_text("{"), "not JSON"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "not text"),
        (lambda path: changed(path, version=0), "version 0, expected 1"),
        (lambda path: changed(path, update=-1), "update is -1"),
        (lambda path: changed(path, update=10**400), "update is a number too large"),
        (lambda path: changed(path, matmul=None), "matmul is None"),
        (lambda path: changed(path, contention={"read": 0.5}), "contention.read is 0.5"),
        (lambda path: changed(path, name=5), "name is 5"),
        (lambda path: path.write_text("[" * 100_000), "not JSON"),
        (
            lambda path: changed(path, identity="a machine sold long ago"),
            "holds for a machine sold long ago, this is",
        ),
        (lambda path: changed(path, identity=""), "holds for no machine, this is"),
    ],
    ids=[
        *("cut", "binary", "version", "value", "huge", "null", "flat", "text", "deep"),
        *("identity", "shipped"),
    ],
)
def test_what_does_not_hold_is_measured_again_and_that_is_said(spoil, reason, measured, tmp_path):
    first, said = load_or_measure(tmp_path, lambda line: None), []
    spoil(profile_path(tmp_path))
    assert load_or_measure(tmp_path, said.append) == first and len(measured) == 2
    assert reason in said[0] and said[0].endswith(": measuring again")
    assert Profile.read(profile_path(tmp_path)) == first


@pytest.mark.parametrize("what", ["machine_text", "package_version"])
def test_another_machine_or_version_is_measured(what, measured, tmp_path, monkeypatch):
    load_or_measure(tmp_path, lambda line: None)
    before = profile_path(tmp_path)
    monkeypatch.setattr(f"outsize.hardware.identity.{what}", lambda: "another")
    load_or_measure(tmp_path, lambda line: None)
    assert len(measured) == 2
    assert (profile_path(tmp_path) == before) is (what == "package_version")


def test_a_profile_serves_all_jobs_of_a_machine_each_within_its_own_memory(measured, tmp_path, monkeypatch):
    whole = load_or_measure(tmp_path, lambda line: None)
    monkeypatch.setattr("outsize.store.cgroup.limit_bytes", lambda: whole.host_bytes // 3)
    job = kept(tmp_path)
    assert job is not None and job.host_bytes == whole.host_bytes // 3
    monkeypatch.setattr("outsize.store.cgroup.limit_bytes", lambda: None)
    assert kept(tmp_path) == whole and len(measured) == 1


def test_another_disk_has_a_profile_of_its_own(measured, tmp_path, monkeypatch):
    load_or_measure(tmp_path, lambda line: None)
    monkeypatch.setattr(cache, "disk_number", lambda folder: "8-1")
    assert not profile_path(tmp_path).exists()


def test_a_cache_that_cannot_be_written_is_said(measured, own_cache, tmp_path):
    own_cache.mkdir()
    (own_cache / "profiles").write_text("in the way")
    said = []
    assert load_or_measure(tmp_path, said.append).disk_read > 0
    assert said[-1].startswith("the profile is not kept: ")


def test_a_missing_folder_is_refused(measured, tmp_path):
    with pytest.raises(ConfigError, match="nowhere"):
        load_or_measure(tmp_path / "nowhere", print)
    assert measured == []


def test_what_is_kept_is_given_without_measuring(measured, tmp_path):
    assert kept(tmp_path) is None and not measured
    profile = load_or_measure(tmp_path, lambda text: None)
    assert kept(tmp_path) == profile and len(measured) == 1


def test_where_no_cache_can_be_made_nothing_is_known(measured, tmp_path, monkeypatch):
    (tmp_path / "home").write_text("no folder")
    monkeypatch.setenv("OUTSIZE_CACHE", str(tmp_path / "home" / "cache"))
    assert kept(None) is None and kept(tmp_path) is None
    with pytest.raises(ConfigError, match=r"cache folder .*home/cache: Not a directory"):
        load_or_measure(None, print)
    said = []
    assert load_or_measure(tmp_path, said.append) and "is not kept" in said[-1]


def test_what_is_kept_makes_no_folder(measured, own_cache):
    assert kept(None) is None and not own_cache.exists()
