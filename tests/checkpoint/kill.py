"""Kill a training run again and again, at any instant, and check what is left each time.

    python -m tests.checkpoint.kill FOLDER --count 200 --seed 1

Each life resumes from the store, trains, commits every step, exports and removes now and then, and is killed: by itself at
its n-th call of the system that touches a file (before it, after it, or with half of its bytes written), or by its parent
after a random time. After each death every commit is verified to the last byte, no two cells share an extent, and every
loss that was ever computed for a step is the same as in a run that was never interrupted.

Lives are forks of a process that has imported everything and computed nothing: a life takes about a second.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from pathlib import Path

NUM_STEPS = 12
"""Of a run; then the store is removed and the next begins."""

PLACES = (
    {"home": "disk"},
    {"home": "host"},
    {"home": None, "resident": (1, 2, 1)},
    {"home": "disk", "weight_slots": 1},
)
HANGS_S = 300
"""After so long a life has hung."""

CALLS = ("pwritev", "write", "fdatasync", "fsync", "rename", "unlink", "posix_fallocate", "preadv", "open")


class Reaper:
    """Kills this process at its n-th call of one of `CALLS`."""

    def __init__(self, nth: int, how: str) -> None:
        self.nth = nth
        self.how = how
        self.count = 0
        self._lock = threading.Lock()

    def install(self) -> None:
        """Stand between this process and the system."""
        for name in CALLS:
            setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name, call):
        def wrapped(*args, **kwargs):
            if name == "open" and not args[1] & (os.O_WRONLY | os.O_RDWR):
                return call(*args, **kwargs)
            with self._lock:
                self.count += 1
                is_due = self.count == self.nth
            if not is_due:
                return call(*args, **kwargs)
            if self.how == "half" and name == "pwritev":
                fd, (view, *_), offset = args
                half = len(view) // 2 // 4096 * 4096
                if half:
                    call(fd, [view[:half]], offset)
            elif self.how == "half" and name == "write":
                call(args[0], args[1][: len(args[1]) // 2])
            elif self.how == "after":
                call(*args, **kwargs)
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(60)

        return wrapped


def live(folder: Path, seed: int, reaper: Reaper | None) -> None:
    """One life: go on from the last commit to the end of the run."""
    import torch

    import outsize
    from tests.checkpoint.runs import Run, batches

    torch.set_num_threads(1)
    rng = random.Random(seed)
    place = dict(rng.choice(PLACES))
    pins = {key: place.pop(key) for key in ("resident", "weight_slots") if key in place}
    run = Run(folder, keep=rng.choice([1, 2, 3]), pins=outsize.Pins(**pins), **place)
    if reaper is not None:
        reaper.install()
    start = run.resumed.step if run.resumed is not None else 0
    with open(folder / "losses", "a") as log:
        for step in range(start, NUM_STEPS):
            (loss,) = run.go(batches(1, first=step))
            log.write(f"{step} {loss.hex()}\n")
            log.flush()
            if rng.random() < 0.15:
                from outsize.checkpoint.export import export

                run.finish()
                export(run.path, folder / "exported", overwrite=True)
    run.finish()
    if start < NUM_STEPS:  # else it died after its last commit, and nothing was opened now
        run.versions.check_books()
    run.end()


def fork(folder: Path, task, *, lives_s: float | None = None) -> int:
    """Run `task` in a fork, killed after `lives_s`; its exit status, negative where a signal ended it."""
    pid = os.fork()
    if pid == 0:
        faulthandler.dump_traceback_later(HANGS_S - 10, file=open(folder / "error", "a"))  # noqa: SIM115
        try:
            task()
        except BaseException:
            with open(folder / "error", "a") as file:
                traceback.print_exc(file=file)
            os._exit(1)
        os._exit(0)
    if lives_s is not None:
        status = _ended(pid, lives_s)
        if status is not None:
            return status
        os.kill(pid, signal.SIGKILL)
    status = _ended(pid, HANGS_S)
    if status is not None:
        return status
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"a life hung: {(folder / 'error').read_text()}")


def _ended(pid: int, within_s: float) -> int | None:
    """The exit status of a life that ends within this time, else None."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def check(folder: Path, expected: dict[int, str]) -> list[int]:
    """All that must hold after a death; the steps that are committed. Computes nothing."""
    from outsize.checkpoint.catalogue import contents, verify
    from outsize.checkpoint.files import read_header
    from tests.checkpoint.runs import check_store

    for line in (folder / "losses").read_text().splitlines() if (folder / "losses").exists() else ():
        step, value = line.split()
        assert expected[int(step)] == value, f"step {step}: {value}, expected {expected[int(step)]}"
    store = folder / "run"
    if not store.is_dir() or read_header(store) is None:
        return []
    check_store(store)
    found = contents(store).commits
    for commit in found:
        assert commit.error is None, commit.error
        verify(store, commit.step, lambda block, done, total: None)
    if (folder / "exported").exists():
        assert (folder / "exported" / "model.safetensors").exists(), "half an export is there"
    return [commit.step for commit in found]


def soak(folder: Path, count: int, seed: int) -> Counter:
    """`count` deaths; how they came."""
    rng = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    reference = folder / "reference"
    reference.mkdir()
    assert fork(folder, lambda: live(reference, 0, None)) == 0, (folder / "error").read_text()
    expected = dict(line.split() for line in (reference / "losses").read_text().splitlines())
    expected = {int(step): value for step, value in expected.items()}
    assert len(expected) == NUM_STEPS
    deaths: Counter = Counter()
    life = newest = 0
    while deaths.total() < count:
        life += 1
        one = rng.randrange(1 << 30)
        how = rng.choice(["before", "after", "half", "time"])
        if how == "time":
            status = fork(folder, lambda one=one: live(folder, one, None), lives_s=rng.uniform(0.05, 2.0))
        else:
            nth = int(1.5 ** rng.uniform(0, 19))
            status = fork(folder, lambda one=one, nth=nth, how=how: live(folder, one, Reaper(nth, how)))
        if status not in (0, -signal.SIGKILL):
            raise AssertionError((folder / "error").read_text())
        commits = check(folder, expected)
        assert max(commits, default=0) >= newest, f"the commit of step {newest} is lost: there are {commits}"
        newest = max(commits, default=0)
        if status:
            deaths[how] += 1
        steps = (folder / "losses").read_text().splitlines() if (folder / "losses").exists() else []
        print(
            json.dumps(
                {"life": life, "how": how, "killed": bool(status), "commits": commits, "steps": len(steps)}
            )
        )
        if status == 0 or life % 25 == 0:
            shutil.rmtree(folder / "run", ignore_errors=True)
            newest = 0
    assert fork(folder, lambda: live(folder, 1, None)) == 0, (folder / "error").read_text()
    check(folder, expected)
    return deaths


def main() -> None:
    """Soak, and say how often."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    import transformers

    import outsize.checkpoint.catalogue
    import outsize.checkpoint.export
    import outsize.engine  # noqa: F401
    import tests.checkpoint.runs  # noqa: F401

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    deaths = soak(options.folder, options.count, options.seed)
    print(f"{deaths.total()} deaths: {dict(deaths)}; every commit was whole, and every loss the same")


if __name__ == "__main__":
    sys.exit(main())
