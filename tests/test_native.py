"""C functions on all of torch's threads."""

import ctypes
import os
import subprocess
import sys
import threading
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path

import pytest
import torch

from outsize import native
from outsize.native import find_compiler, library, on_all_threads

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
        monkeypatch.setattr(native, "openmp", lambda: None)


@pytest.mark.parametrize("num_threads", [1, 2, 5])
def test_each_piece_of_work_is_done_once(num_threads, way, tmp_path):
    if find_compiler() is None:
        pytest.skip("no compiler")
    source = tmp_path / "count.c"
    source.write_text(COUNT)
    built = library(source, "a test")
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        taken = torch.zeros(10_000, dtype=torch.int64)
        on_all_threads(built.count, Call(0, len(taken), taken.data_ptr()))
        with ThreadPoolExecutor(1) as elsewhere:  # a server generates in a thread of its own
            elsewhere.submit(on_all_threads, built.count, Call(0, len(taken), taken.data_ptr())).result()
    finally:
        torch.set_num_threads(before)
    assert taken.eq(2).all()


NOTE = """
#include <stdint.h>
#include <sys/syscall.h>
#include <unistd.h>
struct Call { int64_t next, limit; int64_t *taken; };
extern "C" void note(Call *call) {
  call->taken[__atomic_fetch_add(&call->next, 1, __ATOMIC_RELAXED)] = syscall(SYS_gettid);
}
"""


@pytest.mark.skipif(sys.platform != "linux" or find_compiler() is None, reason="needs Linux and a compiler")
def test_the_threads_are_those_of_torchs_operators(tmp_path):
    """All of them, and none besides: those there were after an operator ran."""
    (tmp_path / "note.c").write_text(NOTE)
    program = f"""
import os
from pathlib import Path
import torch
from outsize.native import library, on_all_threads
from tests.test_native import Call
built = library(Path({str(tmp_path / "note.c")!r}), "a test")
torch.set_num_threads(3)
before = set(map(int, os.listdir("/proc/self/task")))
torch.ones(1 << 20).exp_()
operators = set(map(int, os.listdir("/proc/self/task"))) - before | {{os.getpid()}}
taken = torch.zeros(8, dtype=torch.int64)
on_all_threads(built.note, Call(0, 8, taken.data_ptr()))
assert set(taken.tolist()) == operators | {{0}} and len(operators) == 3, (taken, operators)
"""
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.skipif(find_compiler() is None, reason="no compiler")
def test_a_forked_child_has_threads_of_its_own(tmp_path):
    """torch's threads, and the parent's own, are the parent's: whoever waited for them would wait for ever."""
    (tmp_path / "count.c").write_text(COUNT)
    program = f"""
import os, sys
from pathlib import Path
import torch
from outsize.native import _on_own_threads, library, on_all_threads
from tests.test_native import Call
torch.set_num_threads(2)
built = library(Path({str(tmp_path / "count.c")!r}), "a test")
taken = torch.zeros(100, dtype=torch.int64)
on_all_threads(built.count, Call(0, 100, taken.data_ptr()))
_on_own_threads(built.count, Call(0, 100, taken.data_ptr()), 2)
if os.fork() == 0:
    on_all_threads(built.count, Call(0, 100, taken.data_ptr()))
    os._exit(int(taken.sum()) != 300)
sys.exit(os.waitstatus_to_exitcode(os.wait()[1]))
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_whoever_is_interrupted_waits_for_the_others(monkeypatch):
    """They use memory that would be freed."""
    monkeypatch.setattr(native, "openmp", lambda: None)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    begun, ended = threading.Barrier(3), []

    def work(_):
        begun.wait()
        if threading.current_thread() is threading.main_thread():
            raise KeyboardInterrupt
        time.sleep(0.05)
        ended.append(1)

    started = [native._helpers(os.getpid()).submit(time.sleep, 0) for _ in range(4)]
    wait(started)
    with pytest.raises(KeyboardInterrupt):
        on_all_threads(work, Call())
    assert len(ended) == 2


def test_every_source_is_in_the_package():
    """An installation compiles them: it must have them."""
    root = Path(__file__).parent.parent
    settings = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    package = root / "src" / "outsize"
    packaged = {path for pattern in settings["outsize"] for path in package.glob(pattern)}
    sources = set(package.rglob("*.c"))
    assert len(sources) >= 2 and sources <= packaged
