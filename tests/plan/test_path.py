"""The legs between a home and where blocks compute."""

import pytest

from outsize.config import Home
from outsize.plan.path import DRIVE, LINK, legs


@pytest.mark.parametrize(
    ("host", "home", "expected"),
    [
        (Home.DEVICE, Home.DEVICE, ()),
        (Home.DEVICE, Home.DISK, (DRIVE,)),
        (Home.DEVICE, Home.FILE, (DRIVE,)),
        (Home.HOST, Home.DEVICE, ()),
        (Home.HOST, Home.HOST, (LINK,)),
        (Home.HOST, Home.DISK, (DRIVE, LINK)),
        (Home.HOST, Home.FILE, (DRIVE, LINK)),
    ],
)
def test_bytes_pass_the_drive_and_the_link_only_where_they_are_between(host, home, expected):
    assert legs(home, Home.DEVICE, host) == expected


@pytest.mark.parametrize(
    ("host", "lives_in"), [(Home.DEVICE, Home.DEVICE), (Home.HOST, Home.DEVICE), (Home.HOST, Home.HOST)]
)
def test_a_copy_to_the_disk_passes_what_is_left_of_the_path(host, lives_in):
    """A commit copies what lives in memory: the host's passes the drive alone, a device's the link as well."""
    rest = legs(Home.DISK, lives_in, host)
    assert (*rest, *legs(lives_in, Home.DEVICE, host)) == legs(Home.DISK, Home.DEVICE, host)
    assert rest[0] is DRIVE
