"""Small C libraries of this package: built once with the machine's compiler, kept in the cache folder.

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
from functools import cache
from pathlib import Path

import torch

from outsize.config import cache_folder

_FLAGS = ("-x", "c++", "-O3", "-march=native", "-shared", "-fPIC", "-w")
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


def find_compiler() -> str | None:
    """The C++ compiler that would be used, or None."""
    return shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))


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
