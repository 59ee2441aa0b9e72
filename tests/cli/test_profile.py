import json
from dataclasses import replace

import pytest

from outsize.cli import main, quiet
from outsize.cli.profile import table
from outsize.errors import ConfigError
from outsize.hardware import cache, machine, profile_path
from outsize.hardware.identity import memory_bytes
from outsize.plan.profile import Profile, Resource


@pytest.fixture(autouse=True)
def measured(tmp_path, monkeypatch):
    """Folders that were measured, which takes no time."""
    folders = []

    def measure(folder, *, seconds, say):
        folders.append(folder)
        say("measuring")
        return replace(
            machine("h100"),
            host_bytes=memory_bytes(),
            identity=cache.identity(folder or tmp_path / "cache"),
            contention={Resource.READ: {Resource.WRITE: 0.75}, Resource.WRITE: {Resource.READ: 0.5}},
        )

    monkeypatch.setenv("OUTSIZE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quiet, "before_imports", lambda: None)
    monkeypatch.setattr(cache, "measure", measure)
    return folders


def run(*arguments):
    return main.main(["profile", *(str(argument) for argument in arguments)])


def test_it_prints_what_was_measured_and_where_it_is(tmp_path, capsys, measured):
    assert run("--disk", tmp_path) == 0
    printed = capsys.readouterr()
    assert printed.err == "measuring\n"
    lines = [" ".join(line.split()) for line in printed.out.splitlines()]
    assert "disk read 6.50 GB/s from the disk to memory" in lines
    assert "matmul bfloat16 590,000 GFLOP/s products of a layer's sizes, on the device" in lines
    assert "disk endurance 7,000 TB may be written in its life" in lines
    assert lines[-5:-2] == ["+ read + write", "read 75%", "write 50%"]
    assert lines[-1] == f"saved {profile_path(tmp_path)}" and measured == [tmp_path]


def test_a_second_time_nothing_is_measured_unless_asked(tmp_path, capsys, measured):
    for arguments in ([], [], ["--again"]):
        assert run("--disk", f"{tmp_path}:200GiB", *arguments) == 0
    assert measured == [tmp_path, tmp_path] and capsys.readouterr().err == "measuring\nmeasuring\n"


def test_of_several_disks_the_first_is_measured(tmp_path, capsys, measured):
    (tmp_path / "b").mkdir()
    assert run("--disk", f"{tmp_path},{tmp_path / 'b'}") == 1
    assert "one disk is measured at a time" in capsys.readouterr().err and measured == []


def test_json_is_all_that_is_printed(capsys, measured):
    assert run("--json") == 0
    printed = capsys.readouterr().out
    assert Profile.from_json(printed, "printed") == Profile.read(profile_path(None)) and measured == [None]


def test_a_file_is_written_and_written_over(tmp_path, capsys):
    out = tmp_path / "machine.json"
    for _ in range(2):
        assert run("--out", out) == 0
        assert Profile.read(out) == Profile.read(profile_path(None))
        assert capsys.readouterr().out.endswith(f", {out}\n")
    assert {entry.name for entry in tmp_path.iterdir()} == {"cache", "machine.json"}


@pytest.mark.parametrize("text", ["dear diary", json.dumps({"version": 1})])
def test_a_file_that_is_no_profile_is_not_touched(text, tmp_path, capsys, measured):
    out = tmp_path / "diary.txt"
    out.write_text(text)
    assert run("--out", out) == 1
    assert "the file there is no profile" in capsys.readouterr().err
    assert out.read_text() == text and measured == []


def test_a_file_in_no_folder_is_refused_before_measuring(tmp_path, capsys, measured):
    assert run("--out", tmp_path / "nowhere" / "machine.json") == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert "there is no folder" in error and hint.startswith("hint: ") and measured == []


def test_a_disk_that_is_missing_is_two_lines(tmp_path, capsys):
    assert run("--disk", tmp_path / "nowhere") == 1
    error, hint = capsys.readouterr().err.splitlines()
    assert "nowhere: No such file" in error and hint == "hint: pass an existing folder on a local disk"


def test_a_machine_without_device_and_contention_has_fewer_lines():
    host_only = replace(
        machine("h100"), up=None, down=None, device_update=None, device_memory=None, device_bytes=None
    )
    text = "\n".join(table(host_only))
    assert "on the processor" in text and "device" not in text.partition("\n\n")[2] and "keeps" not in text


def test_a_profile_in_the_cache_that_is_broken_is_no_error(tmp_path, capsys):
    path = profile_path(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text("{")
    with pytest.raises(ConfigError):
        Profile.read(path)
    assert run("--disk", tmp_path) == 0
    assert "measuring again" in capsys.readouterr().err
