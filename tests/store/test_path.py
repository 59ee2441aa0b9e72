"""How planes get home and back, and memory that what is read from a checkpoint passes through."""

import pytest
import torch

from outsize.block import CHUNK, Plane
from outsize.config import Home
from outsize.errors import StorageError
from outsize.optim import ADAMW
from outsize.plan.path import DRIVE, LINK
from outsize.plan.place import GROUPS, lay_out
from outsize.store.path import Path, Staging
from outsize.store.planes import Planes
from outsize.tier import HostArena, HostDevice, wait_all
from tests.doubles import MemoryTier, TwinDevice
from tests.store.test_planes import record_of


class Failed:
    def wait(self):
        raise StorageError("no", hint="")


def test_staging_is_not_lost_with_a_write_that_failed():
    """Who comes next would wait for it forever."""
    arena = HostArena(4096)
    region = arena.allocate(4096, "staging")
    staging = Staging([region])
    staging.give(staging.take(), [Failed()])
    assert staging.take() is region
    region.free()


@pytest.mark.parametrize("plane", [Plane.WEIGHT, Plane.GRADIENT])
@pytest.mark.parametrize(
    ("host", "home", "expected"),
    [
        (Home.DEVICE, Home.DISK, (DRIVE,)),
        (Home.HOST, Home.HOST, (LINK,)),
        (Home.HOST, Home.DISK, (DRIVE, LINK)),
    ],
)
def test_a_plane_goes_home_and_comes_back_over_the_legs_of_its_path(host, home, expected, plane):
    record = record_of("L00", (2 * CHUNK + 100, 64))
    placement = lay_out([record], {(record.name, group): home for group in GROUPS}, (1, 1), host)
    device = HostDevice() if host is Home.DEVICE else TwinDevice()
    planes = Planes([record], placement, device, ADAMW)
    disk = MemoryTier(record.num_bytes) if DRIVE in expected else None
    path, block = Path(device, disk, planes.bounce_buffers), planes["L00"]
    planes.take_slot(block, plane)
    route = block.route(plane)
    assert route.legs == expected
    values = torch.arange(route.place.numel()).to(route.place.dtype)
    route.place.copy_(values)
    wait_all(path.drain(route))
    wait_all(route.slot.after)
    route.place.zero_()
    wait_all(path.fill(route))
    assert torch.equal(route.place, values)
    moved = values.nbytes if LINK in expected else 0
    assert (device.links().bytes_up, device.links().bytes_down) == (moved, moved)
    path.close()
    planes.free()
