"""Kernels: an update rule made ready to run on slices of planes, compiled where there is a compiler.

A rule is compiled ahead of time into a package (AOTInductor) that is kept in a cache folder and loads in
milliseconds, without the compiler's modules; building one takes about half a minute and happens in another
process (`build.py`), so it may run beside other work. Where that is not possible the same function runs
eagerly, which can differ in the last bit (eager `sqrt` is not correctly rounded): hence `Kernel.backend`,
which belongs in a commit.

On a GPU a rule is compiled when it is first needed, by `torch.compile` from the same function; the compiler keeps a cache
of its own.

    $OUTSIZE_CACHE     the cache folder (default ~/.cache/outsize)
    $OUTSIZE_EAGER=1   never compile
"""

from __future__ import annotations

import atexit
import hashlib
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import cache, lru_cache
from pathlib import Path
from threading import Lock
from typing import Any, final

import torch
from torch import Tensor

from outsize.config import ComputeType, cache_folder
from outsize.errors import in_short
from outsize.native import cpu_description, find_compiler
from outsize.optim.rule import CODED_GROUP_BYTES, GROUP, Hyper, Rule, part
from outsize.optim.rules import RULES

_EAGER_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 20}
"""Elements per eager pass: its temporaries stay in a CPU's cache, and on a GPU, which needs more to be busy, within the
slack of its memory that no plan uses."""

Function = Callable[[list[Tensor], Tensor], object]
"""Updates planes (weight, state, gradient) in place, given the scalars."""

_MAX_CALLERS = 4
"""Threads that can be inside one compiled kernel at once; more wait their turn."""

_SOURCES = ("rule.py", "rules.py", "build.py")
"""Files that a package is made of: a change to any of them builds all anew."""

_loaders: dict[Path, Any] = {}
"""Packages that are loaded, each once. A loader unpacks into the temporary folder and clears it when it goes."""
atexit.register(_loaders.clear)

_builds: dict[Path, _Build] = {}
"""Packages that are being built: who wants one again joins, and who no longer wants it lets it be finished for the next."""
_builds_lock = Lock()

_log = logging.getLogger("outsize")


class Backend(StrEnum):
    """How a kernel computes; recorded in commits."""

    COMPILED = "compiled"
    EAGER = "eager"


@final
class Kernel:
    """Updates slices of planes in place; safe to call from any thread on slices that do not overlap."""

    def __init__(self, rule: Rule, compute_type: ComputeType, backend: Backend, function: Function) -> None:
        self.rule = rule
        self.compute_type = compute_type
        self.backend = backend
        self._function = function
        weight, *state, gradient = rule.dtypes(compute_type).values()
        self._dtypes = [weight, *state, gradient]

    def __call__(self, weight: Tensor, state: Sequence[Tensor], gradient: Tensor, hyper: Hyper) -> None:
        """Update 1-D contiguous slices of as many elements, at least 1; `state` in the order of `rule.state`.

        With bf16 weights, or moments in codes, a slice starts on a multiple of 64 elements of its planes, and its
        length is one too or it ends where the planes end. The gradient is only read.
        """
        planes = [weight, *state, gradient]
        num_elements = whole = weight.numel()
        for plane, dtype in zip(planes, self._dtypes, strict=True):
            size = -(-num_elements // GROUP) * CODED_GROUP_BYTES if dtype is torch.uint8 else num_elements
            assert plane.dtype is dtype and plane.shape == (size,) and plane.is_contiguous(), (
                (plane.dtype, plane.shape, plane.stride()),
                (dtype, size),
            )
        assert len(hyper) == len(self.rule.scalars), (self.rule.name, hyper)
        scalars = _scalars(hyper, weight.device)
        if self.rule.needs_groups(self.compute_type):
            whole -= whole % GROUP
        size = num_elements if self.backend is Backend.COMPILED else _EAGER_ELEMENTS[weight.device.type]
        with torch.no_grad():
            if whole == num_elements <= size:
                self._function(planes, scalars)
                return
            for start in range(0, whole, size):
                self._function([part(plane, start, min(start + size, whole)) for plane in planes], scalars)
            if whole < num_elements:
                self._run_rest([part(plane, whole, num_elements) for plane in planes], scalars)

    def _run_rest(self, planes: list[Tensor], scalars: Tensor) -> None:
        """Update the last, partial group on copies of a whole group."""
        is_split = self.compute_type is not ComputeType.FLOAT32
        groups = [plane.clone() if plane.dtype is torch.uint8 else plane.new_zeros(GROUP) for plane in planes]
        views: list[tuple[Tensor, Tensor]] = []
        num_even = (planes[0].numel() + 1) // 2
        for plane, group in zip(planes, groups, strict=True):
            if is_split and plane.dtype is torch.float32:
                views.append((plane[:num_even], group[:num_even]))
                views.append((plane[num_even:], group[GROUP // 2 :][: plane.numel() - num_even]))
            else:
                views.append((plane, group[: plane.numel()]))
        for own, copy in views:
            copy.copy_(own)
        self._function(groups, scalars)
        for own, copy in views[:-1]:
            own.copy_(copy)


@final
class Compilation:
    """A kernel being made; `wait` gives it. Build with `start_compile`."""

    def __init__(self, rule: Rule, compute_type: ComputeType, path: Path | None) -> None:
        self._rule = rule
        self._compute_type = compute_type
        self._path = path
        self._lock = Lock()
        self._kernel: Kernel | None = None
        self._build = None if path is None or path.exists() else _building(rule, compute_type, path)

    def wait(self) -> Kernel:
        """The kernel when it is ready, eager where compiling failed (said once); may be called again."""
        with self._lock:
            if self._kernel is None:
                self._kernel = self._finish()
            return self._kernel

    def _finish(self) -> Kernel:
        if self._path is not None:
            if self._build is None and (kernel := self._load(self._path)) is not None:
                return kernel
            if self._build is None:
                self._path.unlink(missing_ok=True)  # damaged, or left by a machine unlike this one
                self._build = _building(self._rule, self._compute_type, self._path)
            failure = self._build.wait()
            _builds.pop(self._path, None)
            if failure is None and (kernel := self._load(self._path)) is not None:
                return kernel
            _say_once(
                f"update rules run without a compiler, slower: {failure or 'the package does not load'}"
            )
        return _eager(self._rule, self._compute_type)

    def _load(self, path: Path) -> Kernel | None:
        if path not in _loaders:
            if not is_intact(path):
                return None
            try:
                # What torch._inductor.aoti_load_package calls, without importing dynamo (2.5 s) on the way.
                loader = torch._C._aoti.AOTIModelPackageLoader(str(path), "model", False, _MAX_CALLERS, -1)
            except (RuntimeError, OSError) as error:
                _log.debug("cannot load %s: %s", path, error)
                return None
            _loaders[path] = loader
        views = _views(self._rule, self._compute_type)
        return Kernel(
            self._rule,
            self._compute_type,
            Backend.COMPILED,
            lambda planes, scalars: _loaders[path].run([*views(planes), scalars]),
        )


class _Build:
    """The process that builds one package."""

    def __init__(self, rule: Rule, compute_type: ComputeType, path: Path) -> None:
        self._lock = Lock()
        self._failure: str | None = None
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (closed by `wait`)
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "outsize.optim.build", rule.name, compute_type, str(path)],
            env=build_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._errors,
        )

    def wait(self) -> str | None:
        """Wait for the end; what went wrong, or None. May be called again, from any thread."""
        with self._lock:
            if not self._errors.closed:
                self._failure = self._end()
            return self._failure

    def _end(self) -> str | None:
        status = self._process.wait()
        with self._errors as errors:
            errors.seek(0)
            lines = errors.read().decode(errors="replace").strip().splitlines()
        return None if status == 0 else (lines[-1] if lines else f"the compiler ended with status {status}")


def _building(rule: Rule, compute_type: ComputeType, path: Path) -> _Build:
    """The build of a package that is under way, or a new one."""
    with _builds_lock:
        if path not in _builds:
            _say_once(f"compiling the update rule {rule.name} for {compute_type}, once on this machine")
            _builds[path] = _Build(rule, compute_type, path)
        return _builds[path]


def start_compile(rule: Rule, compute_type: ComputeType, *, eager: bool = False) -> Compilation:
    """Start making a kernel for `rule` and return at once; a cached package is only loaded at `wait`."""
    if eager or os.environ.get("OUTSIZE_EAGER", "") not in ("", "0"):
        return Compilation(rule, compute_type, None)
    compiler = find_compiler()
    if compiler is None:
        _say_once("update rules run without a compiler, slower: install g++, or set CXX to a C++ compiler")
        return Compilation(rule, compute_type, None)
    assert RULES.get(rule.name) is rule, f"rule {rule.name} is not in RULES"
    return Compilation(rule, compute_type, package_path(rule, compute_type))


def compile_rule(rule: Rule, compute_type: ComputeType, *, eager: bool = False) -> Kernel:
    """The kernel for `rule`: from the cache in milliseconds, else built first (half a minute)."""
    return start_compile(rule, compute_type, eager=eager).wait()


def gpu_kernel(rule: Rule, compute_type: ComputeType, device: torch.device) -> Kernel:
    """The kernel for `rule` on a GPU, compiled (some 20 s, when it is new) and tried once; eager where that fails."""
    if os.environ.get("OUTSIZE_EAGER", "") not in ("", "0"):
        return _eager(rule, compute_type)
    function = rule.function(compute_type)
    views = _views(rule, compute_type)

    # Views are made inside, so that the compiler sees planes that share no memory.
    def update(planes: list[Tensor], scalars: Tensor) -> None:
        function(*views(planes), scalars)

    kernel = Kernel(rule, compute_type, Backend.COMPILED, torch.compile(update, dynamic=True, fullgraph=True))
    sizes, dtypes = rule.element_bytes(compute_type), rule.dtypes(compute_type)
    try:
        for num_elements in (4 * GROUP, 6 * GROUP):
            weight, *state, gradient = (
                torch.zeros(int(num_elements * sizes[plane]) // dtype.itemsize, dtype=dtype, device=device)
                for plane, dtype in dtypes.items()
            )
            with torch.no_grad():  # as it is called; for another mode it would be compiled again
                kernel._function(
                    [weight, *state, gradient],
                    torch.ones(len(rule.scalars), device=device, dtype=torch.float32),
                )
    except Exception as error:  # whatever a compiler raises
        _say_once(f"update rules run uncompiled on {device}, slower: {in_short(error)}")
        return _eager(rule, compute_type)
    return kernel


def _eager(rule: Rule, compute_type: ComputeType) -> Kernel:
    function, views = rule.function(compute_type), _views(rule, compute_type)
    return Kernel(
        rule, compute_type, Backend.EAGER, lambda planes, scalars: function(*views(planes), scalars)
    )


def _views(rule: Rule, compute_type: ComputeType) -> Callable[[list[Tensor]], list[Tensor]]:
    return lambda planes: rule.views(compute_type, planes[0], planes[1:-1], planes[-1])


def package_path(rule: Rule, compute_type: ComputeType) -> Path:
    """Where the package is cached; the name holds all that its code depends on."""
    folder = cache_folder() / "rules"
    key = hashlib.sha256(
        "\0".join((*_sources(), torch.__version__, cpu_description(), str(find_compiler()))).encode()
    )
    return folder / f"{rule.name}-{compute_type}-{key.hexdigest()[:16]}.pt2"


def is_intact(path: Path) -> bool:
    """Whether `path` holds a whole package: a zip archive whose checksums are all right."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (OSError, zipfile.BadZipFile, EOFError, NotImplementedError):
        return False


def build_environment() -> dict[str, str]:
    """The environment of the building process: ours, and a search path that finds this very package."""
    search = (str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH"))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search))}


@cache
def _sources() -> tuple[str, ...]:
    return tuple(Path(__file__).with_name(name).read_text() for name in _SOURCES)


@lru_cache(maxsize=256)
def _scalars(hyper: Hyper, device: torch.device) -> Tensor:
    scalars = torch.tensor(hyper, dtype=torch.float32, device="cpu")
    # Pinned, so that sending it waits for nothing.
    return scalars.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else scalars.to(device)


@cache
def _say_once(message: str) -> None:
    _log.warning(message)
