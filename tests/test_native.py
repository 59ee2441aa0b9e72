"""C functions on all of torch's threads."""

import ctypes
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from outsize import native

COUNT = """
#include <stdint.h>
struct Call { int64_t next, limit; int64_t *taken; };
extern "C" void count(Call *call) {
  for (int64_t i; (i = __atomic_fetch_add(&call->next, 1, __ATOMIC_RELAXED)) < call->limit;) call->taken[i]++;
}
"""


class Call(ctypes.Structure):
    _fields_ = [("next", ctypes.c_int64), ("limit", ctypes.c_int64), ("taken", ctypes.c_void_p)]


@pytest.fixture(params=["torch's threads", "threads of our own"])
def way(request, monkeypatch):
    if request.param == "threads of our own":
        monkeypatch.setattr(native, "_openmp", lambda: None)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_each_piece_of_work_is_done_once(num_threads, way, tmp_path):
    if native.find_compiler() is None:
        pytest.skip("no compiler")
    source = tmp_path / "count.c"
    source.write_text(COUNT)
    built = native.library(source, "a test")
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        taken = torch.zeros(10_000, dtype=torch.int64)
        native.on_all_threads(built.count, Call(0, len(taken), taken.data_ptr()))
        with ThreadPoolExecutor(1) as elsewhere:  # a server generates in a thread of its own
            elsewhere.submit(
                native.on_all_threads, built.count, Call(0, len(taken), taken.data_ptr())
            ).result()
    finally:
        torch.set_num_threads(before)
    assert taken.eq(2).all()


@pytest.mark.skipif(sys.platform != "linux", reason="OpenMP is entered on Linux only")
def test_the_threads_are_those_of_torchs_operators():
    torch.ones(1 << 20).sum()
    assert native._openmp() is not None
