"""The process's own memory: pages of libraries that are mapped and unused."""

import math
import os

from outsize.store import memory

SMAPS = """\
7f0000000000-7f0000004000 r--p 00000000 08:01 11 /lib/libtorch.so
Rss:                  16 kB
Anonymous:             0 kB
7f0000004000-7f0000010000 r-xp 00004000 08:01 11 /lib/libtorch.so
Rss:                  40 kB
Anonymous:             0 kB
7f0000010000-7f0000014000 r--p 00010000 08:01 11 /lib/libtorch.so
Rss:                  16 kB
Anonymous:            16 kB
7f0000014000-7f0000018000 rw-p 00014000 08:01 11 /lib/libtorch.so
Rss:                  16 kB
Anonymous:             0 kB
7f0000018000-7f000001c000 r--s 00000000 08:01 12 /data/my weights.bin
Rss:                  16 kB
Anonymous:             0 kB
7f000001c000-7f0000020000 r--p 00000000 00:00 0
Rss:                  16 kB
Anonymous:             0 kB
7f0000020000-7f0000021000 r-xp 00000000 00:00 0 [vdso]
Rss:                   4 kB
Anonymous:             0 kB
"""


def test_only_what_nobody_wrote_is_dropped(tmp_path):
    """Not relocated tables, data, files mapped as shared, nor memory without a file."""
    (tmp_path / "smaps").write_text(SMAPS)
    found = list(memory._unchanged_mappings(tmp_path / "smaps"))
    assert found == [(0x7F0000000000, 0x4000), (0x7F0000004000, 0xC000)]


def test_what_was_dropped_comes_back_when_it_is_used():
    memory.drop_file_pages.cache_clear()
    before = memory._status("RssFile:")
    memory.drop_file_pages()
    assert memory._status("RssFile:") < before
    assert math.sqrt(2.0) ** 2 > 1.9 and memory.resident_bytes() > 0


def test_caches_of_kernels_are_bounded_where_the_user_says_nothing(monkeypatch):
    names = ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY")
    for name in names:
        monkeypatch.setenv(name, "7")
    monkeypatch.delenv(names[0])
    memory.bound_kernel_caches()
    assert [os.environ[name] for name in names] == [str(memory.KERNELS), "7"]
