"""Put small faults into the source, one at a time, and see whether the tests of that room fail.

    python -m tests.tools.mutants --out FILE [--count 300] [--seed 17] [--rooms plan kv] [--again]

A fault that no test notices is a survivor: it needs a test, or a line in `survivors.txt` that says why it changes nothing
a test could see. The results go to FILE, one JSON object per line, and a run that was stopped goes on from there. With
`--again` the survivors in FILE are tried once more, against tests that may be new.

Source and tests are copied, so that they can be edited meanwhile. Each room's tests first run once while the functions that
they call are recorded; a mutant then runs against the tests that call its function, the quickest first. It runs in a fork
of a process that has imported the libraries but nothing of ours, under limits of time, memory and file size.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from hypothesis import Phase, settings

from tests.tools.mutations import Mutation, mutations

ROOT = Path(__file__).parents[2]
SURVIVORS = Path(__file__).with_name("survivors.txt")
LIBRARIES = ("torch", "numpy", "transformers", "safetensors", "tokenizers", "hypothesis", "huggingface_hub")
HANGS_S = 90.0
"""A process that takes no processor time for so long waits for what never comes."""

DATA_BYTES = 8 << 30
FILE_BYTES = 4 << 30


@dataclass(frozen=True, slots=True)
class Room:
    """Files to put faults into, the tests that must notice, and the share of all mutants."""

    sources: tuple[str, ...]
    tests: tuple[str, ...]
    share: float
    eager: tuple[str, ...] = ()
    """Files whose mutants run without a compiler: each would build all rules again, from the same functions."""

    most_s: float | None = None
    """A mutant runs against so many seconds of tests, the quickest that call its function; None: against all of them."""


ROOMS = {
    "plan": Room(("plan/*.py",), ("tests/plan",), 0.37),
    "optim": Room(("optim/*.py",), ("tests/optim",), 0.16, eager=("rule.py", "rules.py", "build.py")),
    "checkpoint": Room(
        ("checkpoint/*.py",),
        (
            "tests/checkpoint",
            "--ignore=tests/checkpoint/test_kill.py",
            "--ignore=tests/checkpoint/test_faults.py",
        ),
        0.30,
    ),
    "serve": Room(
        ("serve/schedule.py",), ("tests/serve/test_schedule.py", "tests/serve/test_engine.py"), 0.11
    ),
    "kv": Room(("kv/pages.py",), ("tests/kv/test_pages.py", "tests/serve/test_schedule.py"), 0.06),
    "engine": Room(
        ("engine/*.py", "store/*.py"),
        (
            "tests/engine",
            "tests/store",
            "tests/promises/test_plan_is_what_runs.py",
            "tests/promises/test_placement.py",
            "tests/promises/test_untrained.py",
            "tests/promises/test_layer_state.py",
            "tests/promises/test_off_plan.py",
            "tests/promises/test_inputs.py",
        ),
        0.67,
        most_s=120,
    ),
}


@dataclass(frozen=True, slots=True)
class Trace:
    """Of a run of all tests of a room: seconds of each test, and the tests that call a function."""

    seconds: dict[str, float]
    callers: dict[str, list[str]]
    libraries: list[str]

    def tests_of(self, mutation: Mutation, most_s: float | None = None) -> list[str]:
        """The tests that can notice a mutation, the quickest first; all where its code runs at import or in a fixture.

        Those of the file itself come before all others. Of both, as many as take `most_s` seconds; at least one.
        """
        file = mutation.path.removeprefix("src/")
        names = self.callers.get(f"{file}::{mutation.function}", [])
        if mutation.function.split(".")[-1] in ("<module>", "<shared>") or "<shared>" in names or not names:
            names = list(self.seconds)
        own = f"test_{Path(mutation.path).stem}.py::"
        found = sorted(set(names) & set(self.seconds), key=lambda name: (own not in name, self.seconds[name]))
        spent = list(accumulate(self.seconds[name] for name in found))
        return [name for name, s in zip(found, spent, strict=True) if most_s is None or s <= most_s] or found[
            :1
        ]


class Recorder:
    """A plugin of pytest that takes down which functions of ours each test calls, and how long it takes."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.callers: dict[str, set[str]] = defaultdict(set)
        self._current = "<shared>"

    def trace(self, frame: FrameType, event: str, _: Any) -> None:
        """For sys.settrace: only calls are wanted."""
        code = frame.f_code
        if "/src/outsize/" in code.co_filename:
            file = code.co_filename.split("/src/", 1)[1]
            self.callers[f"{file}::{code.co_qualname}"].add(self._current)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self._current = item.nodeid
        threading.settrace(self.trace)
        sys.settrace(self.trace)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            self._current = "<shared>"

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: pytest.FixtureDef[Any]) -> Iterator[None]:
        before = self._current
        if fixturedef.scope != "function":
            self._current = "<shared>"
        try:
            return (yield)
        finally:
            self._current = before

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.seconds[report.nodeid] += report.duration

    def result(self) -> dict[str, Any]:
        libraries = [name for name in sys.modules if name.split(".")[0] in LIBRARIES]
        callers = {function: sorted(names) for function, names in self.callers.items()}
        return {"seconds": dict(self.seconds), "callers": callers, "libraries": libraries}


class FewExamples:
    """A plugin of pytest that lets property tests try at most `count` examples."""

    def __init__(self, count: int) -> None:
        self._count = count

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        for item in items:
            test = getattr(item, "obj", None)
            used = getattr(test, "_hypothesis_internal_use_settings", None)
            if used is not None and used.max_examples > self._count:
                function = getattr(test, "__func__", test)
                function._hypothesis_internal_use_settings = settings(used, max_examples=self._count)


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a forked process ended: its exit status, or what ended it."""

    status: int | str
    text: str
    seconds: float


def in_child(folder: Path, limit_s: float, run: Callable[[], int], environment: dict[str, str]) -> Outcome:
    """Run a function in a fork; kill it, and what it started, after `limit_s` of processor time, or when it hangs."""
    log = folder / "log"
    start = time.monotonic()
    child = os.fork()
    if not child:
        status = 70
        try:
            os.setsid()
            with log.open("wb") as file:
                os.dup2(file.fileno(), 1)
                os.dup2(file.fileno(), 2)
            os.environ.update(environment)
            tempfile.tempdir = None
            resource.setrlimit(resource.RLIMIT_CPU, (int(limit_s), int(limit_s) + 5))
            resource.setrlimit(resource.RLIMIT_DATA, (DATA_BYTES, DATA_BYTES))
            resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_BYTES, FILE_BYTES))
            status = int(run())
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    progress, since = -1, start
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        now = time.monotonic()
        if (ticks := _ticks(child)) != progress:
            progress, since = ticks, now
        elif now - since > HANGS_S:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
            break
        time.sleep(0.1 if now - start < 30 else 1.0)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(ended[1])
    status = code if code >= 0 else signal.Signals(-code).name
    return Outcome(status, log.read_text(errors="replace"), time.monotonic() - start)


def _ticks(session: int) -> int:
    """Processor time that the processes of a session have taken, in clock ticks: a busy machine is not a hang."""
    total = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            fields = path.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                total += int(fields[11]) + int(fields[12])
    return total


class Bench:
    """A copy of source and tests in a folder of its own, in which mutants are tried."""

    def __init__(self, folder: Path, examples: int) -> None:
        self.folder = folder
        self.copy = folder / "copy"
        self.builds = folder / "builds"
        if (known := ROOT / ".pytest_cache" / "builds").exists():
            shutil.copytree(known, self.builds)
        self._examples = examples
        for name in ("src", "tests"):
            shutil.copytree(ROOT / name, self.copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "README.md", "docs", "examples", "benchmarks"):
            source = ROOT / name
            if source.is_dir():
                (self.copy / name).symlink_to(source)
            else:
                shutil.copy(source, self.copy / name)

    def _environment(self) -> dict[str, str]:
        """What was compiled is copied for each run, so that no mutant leaves anything in it for the next."""
        run = self.folder / "run"
        shutil.rmtree(run, ignore_errors=True)
        (run / "tmp").mkdir(parents=True)
        if self.builds.exists():
            shutil.copytree(self.builds, run / "builds")
        return {
            "OUTSIZE_TEST_BUILDS": str(run / "builds"),
            "TMPDIR": str(run / "tmp"),
            "PYTHONPATH": os.pathsep.join((str(self.copy / "src"), str(self.copy))),
            "OMP_NUM_THREADS": "1",
            "PYTHONDONTWRITEBYTECODE": "1",
        }

    def _pytest(self, arguments: Sequence[str], plugins: Sequence[object]) -> int:
        os.chdir(self.copy)
        sys.path[:] = [
            str(self.copy / "src"),
            str(self.copy),
            *(path for path in sys.path if path not in ("", str(ROOT))),
        ]
        for name in [name for name in sys.modules if name.split(".")[0] in ("outsize", "tests")]:
            del sys.modules[name]
        settings.register_profile(
            "mutants", deadline=None, database=None, derandomize=True, phases=[Phase.explicit, Phase.generate]
        )
        settings.load_profile("mutants")
        options = [
            "-x",
            "-q",
            "-rfE",
            "-p",
            "no:cacheprovider",
            "-p",
            "no:xdist",
            "--tb=line",
            "-o",
            "timeout=0",
            "-W",
            "ignore::pytest.PytestAssertRewriteWarning",
        ]
        return int(
            pytest.main(
                [*options, f"--basetemp={self.folder / 'run' / 'pytest'}", *arguments],
                [*plugins, FewExamples(self._examples)],
            )
        )

    def trace(self, room: Room) -> Trace:
        """Run all tests of a room as they are; they must pass."""
        path = self.folder / "trace.json"

        def run() -> int:
            recorder = Recorder()
            status = self._pytest(room.tests, [recorder])
            path.write_text(json.dumps(recorder.result()))
            return status

        environment = {**self._environment(), "PYTHONDONTWRITEBYTECODE": ""}
        outcome = in_child(self.folder, 3600, run, environment)
        assert outcome.status == 0, (
            f"the tests fail before anything is changed: {outcome.status}\n{outcome.text[-4000:]}"
        )
        if (made := self.folder / "run" / "builds").exists():
            shutil.copytree(made, self.builds, dirs_exist_ok=True)
        return Trace(**json.loads(path.read_text()))

    def attempt(self, mutation: Mutation, room: Room, trace: Trace) -> dict[str, Any]:
        """Whether the tests notice a mutation; what of it goes into the results."""
        tests = trace.tests_of(mutation, room.most_s)
        path = self.copy / mutation.path
        source = path.read_text()
        environment = self._environment()
        if path.name in room.eager:
            environment["CXX"] = "no-such-compiler"
        limit_s = 60 + 4 * sum(trace.seconds[test] for test in tests)

        def run() -> int:
            sys.dont_write_bytecode = True
            return self._pytest(tests, [])

        cached = list(path.parent.glob(f"__pycache__/{path.stem}.*.pyc"))
        try:
            for file in cached:
                file.unlink()
            path.write_text(mutation.apply(source))
            outcome = in_child(self.folder, limit_s, run, environment)
        finally:
            path.write_text(source)
        by = [line for line in outcome.text.splitlines() if line.startswith(("FAILED", "ERROR"))]
        return {
            "key": mutation.key,
            "line": source.encode()[: mutation.start].count(b"\n") + 1,
            "digest": digest(source),
            "survived": outcome.status == 0,
            "status": outcome.status,
            "by": by[0][:200] if by else outcome.text[-200:],
            "num_tests": len(tests),
            "seconds": round(outcome.seconds, 1),
        }


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _everything() -> str:
    """All source and tests, whose traces are known as long as nothing changes."""
    files = sorted([*(ROOT / "src").rglob("*.py"), *(ROOT / "tests").rglob("*.py")])
    return "".join(f"{file.relative_to(ROOT)}\0{file.read_text()}\0" for file in files)


def candidates(room: Room) -> list[Mutation]:
    """All mutations of a room's files, in order."""
    files = sorted(path for pattern in room.sources for path in (ROOT / "src" / "outsize").glob(pattern))
    return [each for file in files for each in mutations(str(file.relative_to(ROOT)), file.read_text())]


def chosen(room: Room, count: int, seed: int) -> list[Mutation]:
    """A sample of a room's mutations; a longer one begins with a shorter one of the same seed."""
    found = candidates(room)
    random.Random(seed).shuffle(found)
    return found[: round(count * room.share)]


def preload(names: Sequence[str]) -> None:
    """Import libraries before forking, so that no mutant has to."""
    for name in names:
        with contextlib.suppress(Exception):
            importlib.import_module(name)


def read(path: Path) -> dict[str, dict[str, Any]]:
    lines = path.read_text().splitlines() if path.exists() else []
    return {result["key"]: result for result in map(json.loads, lines)}


def accepted() -> dict[str, str]:
    """Survivors that are known, with the reason."""
    lines = SURVIVORS.read_text().splitlines() if SURVIVORS.exists() else []
    pairs = [line.rsplit("  # ", 1) for line in lines if line and not line.startswith("#")]
    return {key.strip(): reason for key, reason in pairs}


def run_room(name: str, options: argparse.Namespace, folder: Path) -> None:
    room, known = ROOMS[name], read(options.out)
    if options.again:
        again = {key for key, result in known.items() if result["survived"] and key not in accepted()}
        wanted = [each for each in candidates(room) if each.key in again]
    else:
        wanted = [
            each
            for each in chosen(room, options.count, options.seed)
            if known.get(each.key, {}).get("digest") != digest((ROOT / each.path).read_text())
        ]
    if not wanted:
        return
    bench = Bench(folder / name, options.examples)
    known_trace = options.out.with_name(f"{options.out.stem}-{name}-{digest(_everything())}.trace")
    if not known_trace.exists():
        known_trace.write_text(json.dumps(asdict(bench.trace(room))))
    trace = Trace(**json.loads(known_trace.read_text()))
    preload(trace.libraries)
    unchanged = replace(wanted[0], replacement=wanted[0].original, function="<module>")
    control = bench.attempt(unchanged, room, trace)
    assert control["survived"], f"tests fail in a fork though nothing is changed: {control['by']}"
    for mutation in wanted:
        result = bench.attempt(mutation, room, trace)
        with options.out.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(
            "SURVIVED" if result["survived"] else "killed  ",
            f"{result['seconds']:6.1f} s",
            mutation.key,
            flush=True,
        )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--rooms", nargs="+", choices=ROOMS, default=list(ROOMS))
    parser.add_argument("--examples", type=int, default=1000, help="of a property test, at most")
    parser.add_argument("--again", action="store_true")
    options = parser.parse_args()
    options.out = options.out.absolute()
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="mutants-") as folder:
        for name in options.rooms:
            run_room(name, options, Path(folder))
    results, excused = read(options.out), accepted()
    survivors = [key for key, result in results.items() if result["survived"] and key not in excused]
    num_survived = sum(result["survived"] for result in results.values())
    print(f"{len(results)} mutants, {num_survived} survived, {len(survivors)} of them without a reason")
    print("\n".join(sorted(survivors)))
    return bool(survivors)


if __name__ == "__main__":
    sys.exit(main())
