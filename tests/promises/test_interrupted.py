"""After an exception at any line of a step, what follows is right to the last bit, or refused by name.

`OUTSIZE_SOAK=1` raises at every line, otherwise at a sample of them; `python -m tests.interrupting` prints the table.
"""

import os
import random
import tempfile
from collections import Counter
from pathlib import Path

import pytest

from tests.interrupting import ALLOWED, ERRORS, Subject

IS_SOAK = bool(os.environ.get("OUTSIZE_SOAK"))
PER_KIND = 4
"""Lines of each kind that are tried in a short run."""

NUM_STEPS = 200 if IS_SOAK else 20


@pytest.fixture
def folder():
    """Not on a file system in memory, which the disk tier refuses."""
    with tempfile.TemporaryDirectory(dir="/var/tmp") as path:
        yield Path(path)


def assert_all_right(subject, errors, seed):
    lines = subject.steady if not IS_SOAK else subject.lines
    chooser = random.Random(seed)
    found = Counter()
    for error in errors:
        chosen = lines if IS_SOAK else chooser.sample(lines, min(PER_KIND, len(lines)))
        results = [subject.raising(line, error) for line in chosen]
        failed = [result for result in results if result.outcome not in ALLOWED]
        assert not failed, "\n".join(
            f"{each.line}: {error}: {each.outcome}: {each.text.strip()}" for each in failed
        )
        found.update(result.outcome for result in results)
    subject.finish()
    return found


@pytest.mark.timeout(14400 if IS_SOAK else 300)
@pytest.mark.parametrize("home", ["host", "disk"])
def test_an_exception_at_any_line_leaves_what_follows_right(home, folder):
    assert_all_right(Subject(home, folder, num_steps=NUM_STEPS), ERRORS, seed=home)


@pytest.mark.timeout(14400 if IS_SOAK else 300)
def test_an_exception_at_any_line_of_a_commit_leaves_what_follows_right(folder):
    assert_all_right(
        Subject("disk", folder, commits=True, num_steps=NUM_STEPS), ["KeyboardInterrupt"], seed="commits"
    )


@pytest.mark.timeout(14400 if IS_SOAK else 300)
@pytest.mark.parametrize("home", ["host", "disk"] if IS_SOAK else ["disk"])
def test_an_exception_at_any_line_of_a_worker_is_named(home, folder):
    assert_all_right(
        Subject(home, folder, workers=True, num_steps=NUM_STEPS),
        ["OSError", "MemoryError"] if IS_SOAK else ["OSError"],
        seed=home,
    )
