"""Tests use neither the home directory nor the clock: each session has empty caches of its own.

Only what takes half a minute to compile is shared between sessions: packages and libraries whose file names contain a hash
of their sources, the compiler and the processor. `OUTSIZE_TEST_BUILDS` names the folder (default: in pytest's cache). The
processes of one session (`-n`) share everything.
"""

import gc
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests.builds import builds_folder

_FOLDER = pytest.StashKey[Path]()

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


_GPU_KERNELS: dict[tuple[object, ...], Any] = {}


@pytest.fixture(autouse=True)
def few_rules_are_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Models train with compiled kernels of AdamW and eager ones of other rules, which are bit-equal or compared in
    tests/optim: compiling all takes five minutes on a fresh machine. Models of one process share the kernels of a device,
    which take seconds for each model, also where there is no compiler for it. OUTSIZE_SOAK=1 compiles all."""
    optimizer = sys.modules.get("outsize.engine.optimizer")
    if optimizer is None or os.environ.get("OUTSIZE_SOAK"):
        return
    start, compile_for_gpu = optimizer.start_compile, optimizer.gpu_kernel

    def gpu_kernel(rule: Any, compute_type: str, device: Any) -> Any:
        key = rule.name, compute_type, device, os.environ.get("OUTSIZE_EAGER")
        if key not in _GPU_KERNELS:
            _GPU_KERNELS[key] = compile_for_gpu(rule, compute_type, device)
        return _GPU_KERNELS[key]

    monkeypatch.setattr(
        optimizer, "start_compile", lambda rule, kind: start(rule, kind, eager=rule.name != "adamw")
    )
    monkeypatch.setattr(optimizer, "gpu_kernel", gpu_kernel)


def pytest_configure(config: pytest.Config) -> None:
    """Make the session's folders, and point libraries to them, in the process that starts the others."""
    if hasattr(config, "workerinput"):
        return
    builds = builds_folder()
    folder = Path(tempfile.mkdtemp(prefix="outsize-tests-", dir=os.environ.get("TMPDIR", "/var/tmp")))
    config.stash[_FOLDER] = folder
    for name in ("rules", "kernels"):
        (builds / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "cache").mkdir(exist_ok=True)
        (folder / "cache" / name).symlink_to(builds / name)
    for variable in ("HF_HOME", "HF_HUB_CACHE", "HF_DATASETS_CACHE", "XDG_CACHE_HOME"):
        os.environ.pop(variable, None)
    os.environ["HOME"] = str(folder)
    os.environ["OUTSIZE_CACHE"] = str(folder / "cache")
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder / "inductor")


def pytest_collection_finish() -> None:
    """Leave what was imported out of garbage collections: there are a million objects, and they stay."""
    gc.freeze()


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the session's folders; what was compiled stays."""
    if (folder := config.stash.get(_FOLDER, None)) is not None:
        shutil.rmtree(folder, ignore_errors=True)
