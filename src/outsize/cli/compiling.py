"""Compiles an update rule before anything large is in memory.

A rule is compiled once per machine and kept in the cache folder. The compiler takes some 700 MiB, as much as a small
model in training: a limit that fits the run does not fit both. So a command that trains asks here before it imports torch,
while its own process takes 20 MiB, and waits for the end. Nothing here imports torch: whether a rule is compiled is known
from a stamp beside the package.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import outsize
from outsize.config import cache_folder

_SOURCES = ("rule.py", "rules.py", "build.py", "compile.py")
_CPU_LINES = ("flags", "Features", "model name", "cpu family", "model\t")


def compile_first(rule: str, compute_type: str | None) -> None:
    """Compile `rule` for `compute_type` (None: the machine's own) where that was not done yet, and say so.

    Where it fails the run goes on, and finds out for itself.
    """
    compiler = shutil.which(os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++"))
    if compiler is None or os.environ.get("OUTSIZE_EAGER", "") not in ("", "0"):
        return
    stamp = cache_folder() / "rules" / f"{rule}-{_key(rule, compute_type, compiler)}.stamp"
    if _is_there(stamp):
        return
    print(
        f"compiling the update rule {rule}, once on this machine: about a minute", file=sys.stderr, flush=True
    )
    search = (str(Path(outsize.__file__).parents[1]), os.environ.get("PYTHONPATH"))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "outsize.optim.build", rule, compute_type or ""],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search))},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        made = Path(done.stdout.splitlines()[-1]).name
        part = stamp.with_suffix(f".{os.getpid()}.part")
        part.write_text(made)
        part.replace(stamp)


def _is_there(stamp: Path) -> bool:
    """Whether the package that a stamp names is in the same folder."""
    try:
        name = stamp.read_text()
    except OSError:
        return False
    return bool(name) and (stamp.parent / Path(name).name).is_file()


def _key(*parts: str | None) -> str:
    """All that the package's own name depends on, as far as it can be told without torch."""
    folder = Path(outsize.__file__).parent / "optim"
    lines = [*map(str, parts), sys.version, os.environ.get("ATEN_CPU_CAPABILITY", "")]
    lines += [(folder / name).read_text() for name in _SOURCES]
    try:
        lines.append(metadata.version("torch"))
        cpu = Path("/proc/cpuinfo").read_text().splitlines()
    except (metadata.PackageNotFoundError, OSError):
        cpu = []
    lines += sorted({line for line in cpu if line.startswith(_CPU_LINES)})
    return hashlib.sha256("\0".join(lines).encode()).hexdigest()[:16]
