import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from outsize.files import is_memory_backed


@pytest.fixture
def disk_folder(tmp_path: Path) -> Iterator[Path]:
    """An empty folder on a disk; the system's temporary folder may be on tmpfs."""
    if not is_memory_backed(tmp_path):
        yield tmp_path
        return
    if is_memory_backed(Path("/var/tmp")):
        pytest.skip("no folder on a disk")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        yield Path(folder)
