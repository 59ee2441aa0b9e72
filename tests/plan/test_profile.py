import json
from dataclasses import replace

import pytest

from outsize.config import ComputeType
from outsize.errors import ConfigError
from outsize.plan.profile import Profile, Resource

VALUES = {
    "version": 1,
    "name": "desk",
    "source": "made up",
    "disk_read": 7e9,
    "disk_write": 5e9,
    "host_copy": 2e10,
    "update": 5e10,
    "matmul": {"float32": 1e11, "bfloat16": 4e11},
    "host_bytes": 1 << 34,
    "num_threads": 8,
    "contention": {"read": {"write": 0.5, "update": 0.8}},
}


def parse(**changes):
    values = {name: value for name, value in (VALUES | changes).items() if value is not Ellipsis}
    return Profile.from_json(json.dumps(values), "desk.json")


def test_a_file_becomes_a_profile_and_a_profile_the_file():
    profile = parse()
    assert (
        profile.matmul == {ComputeType.FLOAT32: 1e11, ComputeType.BFLOAT16: 4e11} and not profile.has_device
    )
    assert Profile.from_json(profile.to_json(), "again") == profile


def test_speeds_beside_several_multiply():
    profile = parse()
    assert profile.speed(Resource.READ, frozenset({Resource.WRITE, Resource.UPDATE})) == pytest.approx(0.4)
    assert profile.speed(Resource.READ, frozenset({Resource.UP})) == 1.0
    assert profile.speed(Resource.WRITE, frozenset({Resource.READ})) == 1.0


@pytest.mark.parametrize("name", sorted(set(VALUES) - {"version", "contention"}))
def test_a_field_that_is_missing_is_named(name):
    with pytest.raises(ConfigError, match=rf"desk\.json: {name} is missing"):
        parse(**{name: ...})


@pytest.mark.parametrize("value", [-1, 0, "fast", None, float("inf"), float("nan")])
@pytest.mark.parametrize(
    "name", ["disk_read", "disk_write", "host_copy", "update", "host_bytes", "num_threads"]
)
def test_a_rate_that_is_not_positive_is_named(name, value):
    with pytest.raises(ConfigError, match=f"{name} is .*, expected a positive number"):
        parse(**{name: value})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"disk_speed": 1}, "unknown field 'disk_speed'"),
        ({"version": 2}, "version 2, expected 1"),
        ({"version": ...}, "version None, expected 1"),
        ({"matmul": {}}, "matmul has no compute type"),
        ({"matmul": {"float8": 1e12}}, "float8"),
        ({"matmul": {"float32": -1.0}}, r"matmul\.float32 is -1\.0"),
        ({"matmul": 1e12}, "matmul is 1000000000000.0, expected a mapping"),
        ({"matmul": None}, "matmul is None, expected a mapping"),
        ({"matmul": [1]}, r"matmul is \[1\], expected a mapping"),
        ({"matmul": {"float32": True}}, r"matmul\.float32 is True, expected a positive number"),
        ({"disk_read": True}, "disk_read is True, expected a positive number"),
        ({"disk_read": 10**400}, "disk_read is a number too large, expected a positive number"),
        ({"num_threads": 2.5}, r"num_threads is 2\.5, expected a whole number"),
        ({"host_bytes": 0.5}, r"host_bytes is 0\.5, expected a whole number"),
        ({"name": 5}, "name is 5, expected text"),
        ({"source": None}, "source is None, expected text"),
        ({"identity": [1]}, r"identity is \[1\], expected text"),
        ({"up": 2e10}, "device_bytes is missing beside up"),
        ({"up": 2e10, "device_bytes": 1 << 34}, "down is missing beside device_bytes"),
        ({"up": 2e10, "down": 2e10}, "device_bytes is missing beside up"),
        ({"device_bytes": 1 << 34}, "up is missing beside device_bytes"),
        ({"device_bytes": 1.5, "up": 2e10, "down": 2e10}, r"device_bytes is 1\.5, expected a whole number"),
        ({"down": -2e10, "up": 1e10}, "down is -2"),
        ({"contention": {"read": {"write": 1.5}}}, r"contention\.read\.write is 1\.5"),
        ({"contention": {"read": {"write": 0}}}, r"contention\.read\.write is 0"),
        ({"contention": {"tape": {"write": 0.5}}}, "tape"),
        ({"contention": [1]}, r"contention is \[1\], expected a mapping"),
        ({"contention": None}, "contention is None, expected a mapping"),
        ({"contention": {"read": 0.5}}, r"contention\.read is 0\.5, expected a mapping"),
        ({"contention": {"read": {"write": True}}}, r"contention\.read\.write is True"),
        ({"contention": {"read": {"write": 10**400}}}, r"contention\.read\.write is a number too large"),
    ],
)
def test_what_is_wrong_is_named(changes, message):
    with pytest.raises(ConfigError, match=message) as caught:
        parse(**changes)
    assert caught.value.hint


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100_000])
def test_what_is_no_profile_is_refused(text):
    with pytest.raises(ConfigError, match=r"desk\.json: not "):
        Profile.from_json(text, "desk.json")


def test_reading_a_file(tmp_path):
    path = tmp_path / "desk.json"
    with pytest.raises(ConfigError, match=r"desk\.json: No such file"):
        Profile.read(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"desk\.json: not text"):
        Profile.read(path)
    for encoding in ("utf-8", "utf-8-sig"):
        path.write_text(parse().to_json(), encoding=encoding)
        assert Profile.read(path) == parse()


def test_the_ends_of_what_was_measured():
    profile = replace(parse(), spread={"disk_read": 0.25, "update": 1.0})
    fast, slow = profile.at_the_end(fast=True), profile.at_the_end(fast=False)
    assert fast.disk_read == 1.25 * profile.disk_read and slow.disk_read == profile.disk_read / 1.25
    assert fast.update == 2 * profile.update and slow.update == profile.update / 2
    assert fast.disk_write == slow.disk_write == profile.disk_write
    for spread in ({"disk_read": -0.1}, {"matmul": 0.1}, {"disk_read": "much"}):
        with pytest.raises(ConfigError, match="spread"):
            replace(parse(), spread=spread)
