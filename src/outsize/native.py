"""Small C libraries: built once with the machine's compiler, kept in the cache folder, run on torch's threads.

They are plain C, so building takes a second and needs none of torch's headers. $OUTSIZE_EAGER=1 builds and uses none.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import cache
from pathlib import Path
from typing import Any

import torch

from outsize.config import ComputeType, cache_folder

_FLAGS = ("-x", "c++", "-O3", "-march=native", "-shared", "-fPIC", "-w")
_PROCESS = os.getpid()
_log = logging.getLogger(__name__)


def library(source: Path, what: str) -> ctypes.CDLL | None:
    """The library built from `source`; None where it cannot be, which is said: `what` then runs slower."""
    if os.environ.get("OUTSIZE_EAGER", "") not in ("", "0"):
        return None
    compiler = find_compiler()
    if compiler is None:
        _log.warning("%s without a compiler, slower: install g++, or set CXX to a C++ compiler", what)
        return None
    key = "\0".join((source.read_text(), *_FLAGS, compiler, cpu_description()))
    name = f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    path = cache_folder() / "kernels" / name
    try:
        if not path.exists():
            _build(compiler, source, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        _log.warning("%s uncompiled, slower: %s", what, error)
        return None


def on_all_threads(function: Any, argument: ctypes.Structure) -> None:
    """Call `function(&argument)`, which shares its work out itself, on as many threads as torch has; wait for all of them.

    They are the threads of torch's own operators, where those can be had. Between operators these spin for a while, and
    others started beside them would find no core: attention on two cores gained nothing by the second.
    """
    num_threads = torch.get_num_threads()
    # GCC's entry, which LLVM's and Intel's have on Linux too; a forked child has none of those threads.
    enter = getattr(openmp(), "GOMP_parallel", None) if os.getpid() == _PROCESS else None
    if num_threads == 1:
        function(ctypes.byref(argument))
    elif enter is not None:
        enter(function, ctypes.byref(argument), ctypes.c_uint(num_threads), ctypes.c_uint(0))
    else:
        _on_own_threads(function, argument, num_threads)


def _on_own_threads(function: Any, argument: ctypes.Structure, num_threads: int) -> None:
    helpers: list[Future[None]] = []
    interrupt: KeyboardInterrupt | None = None
    try:
        helpers.extend(
            _helpers(os.getpid()).submit(function, ctypes.byref(argument)) for _ in range(num_threads - 1)
        )
        function(ctypes.byref(argument))
    finally:
        while not all(helper.done() or helper.cancel() for helper in helpers):
            try:
                wait(helpers)  # who was interrupted would free what they still use
            except KeyboardInterrupt as error:
                interrupt = error
    if interrupt is not None:
        raise interrupt


@cache
def openmp() -> ctypes.CDLL:
    """Where functions of the OpenMP that torch is bound to are found, if there is one; a process may have several."""
    suffix = "dylib" if sys.platform == "darwin" else "so"
    try:
        return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu.{suffix}"))
    except OSError:
        return ctypes.CDLL(None)


@cache
def _helpers(process: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(64, thread_name_prefix="outsize-native")


def find_compiler() -> str | None:
    """The C++ compiler that would be used, or None."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


def native_compute_type() -> ComputeType:
    """bfloat16 on a GPU, and where the CPU multiplies it natively (AMX or AVX512-BF16); else float32, 5x faster there."""
    if torch.cuda.is_available():
        return ComputeType.BFLOAT16
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    has_bfloat16 = "amx_bf16" in flags or "avx512_bf16" in flags
    return ComputeType.BFLOAT16 if has_bfloat16 else ComputeType.FLOAT32


@cache
def cpu_description() -> str:
    """What code for this CPU depends on: packages may lie in a home folder that unlike machines share."""
    lines = {platform.machine(), torch.backends.cpu.get_cpu_capability()}
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features", "model name", "cpu family", "model\t")):
                lines.add(line)
    except OSError:
        lines.add(platform.processor())
    return "\n".join(sorted(lines))


def _build(compiler: str, source: Path, path: Path) -> None:
    """Compile to a file beside `path` and rename it: another process never finds half a library."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        built = Path(folder) / path.name
        subprocess.run([compiler, *_FLAGS, str(source), "-o", str(built)], check=True, capture_output=True)
        built.replace(path)
