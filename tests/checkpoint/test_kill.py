"""A short run of the kill suite; `make soak` runs the long one."""

import subprocess
import sys
from pathlib import Path


def test_a_killed_run_loses_nothing_that_was_committed(tmp_path):
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.checkpoint.kill",
            str(tmp_path / "soak"),
            "--count",
            "5",
            "--seed",
            "7",
        ],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert "5 deaths" in done.stdout
