import pytest

from outsize.errors import ConfigError
from outsize.hardware import machine, machine_names


def test_the_names():
    assert machine_names() == ("a100x8", "gh200", "h100", "h200", "rtx4090-1ssd", "rtx4090-4ssd")


@pytest.mark.parametrize("name", machine_names())
def test_a_shipped_profile_is_whole(name):
    profile = machine(name)
    assert profile.name == name and profile.identity == "" and "data sheet" in profile.source
    assert (
        profile.has_device and profile.device_bytes and profile.device_update and profile.disk_endurance_bytes
    )
    assert profile.update > profile.host_copy  # bytes read and written, against bytes copied


def test_an_unknown_machine_is_an_error_that_lists_the_known():
    with pytest.raises(ConfigError, match="machine 'rtx4090' is not known") as caught:
        machine("rtx4090")
    assert "did you mean rtx4090-" in caught.value.hint and ", h200, " in caught.value.hint
