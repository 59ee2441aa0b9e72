"""What carriers share: memory that checkpoints pass through."""

from outsize.errors import StorageError
from outsize.store.path import Staging
from outsize.tier import HostArena


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
