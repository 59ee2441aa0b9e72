"""A real browser, without a window: what a page becomes in it, and what it says on its console."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
REQUIRED = "OUTSIZE_BROWSER"
"""Set to `required`, a machine without a browser fails the tests that need one, instead of leaving them out."""


@dataclass(frozen=True)
class Opened:
    """A page after its scripts ran: the document as HTML, the attributes of its body, and its console."""

    html: str
    body: dict[str, str]
    console: list[str]


def find() -> str:
    """The path of a Chromium; skips the test where there is none."""
    found = next((path for name in NAMES if (path := shutil.which(name)) is not None), None)
    if found is None and os.environ.get(REQUIRED) == "required":
        pytest.fail(f"no browser, and {REQUIRED}=required: install one of {', '.join(NAMES)}")
    if found is None:
        pytest.skip(f"no browser: install one of {', '.join(NAMES)}")
    return found


def open_page(page: Path, home: Path, *, width: int = 1280, dark: bool = False) -> Opened:
    """Open a file; `home` is a folder for what the browser keeps."""
    command = [
        *(
            find(),
            "--headless=new",
            "--no-sandbox",
            "--disable-gpu",
            "--no-first-run",
            "--disable-dev-shm-usage",
        ),
        *(f"--user-data-dir={home}", f"--window-size={width},900"),
        f"--blink-settings=preferredColorScheme={0 if dark else 1}",
        *("--enable-logging=stderr", "--virtual-time-budget=5000", "--dump-dom", page.as_uri()),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "<body" in done.stdout, done.stderr
    (attributes,) = re.findall(r"<body([^>]*)>", done.stdout)
    return Opened(
        html=done.stdout,
        body=dict(re.findall(r'([\w-]+)="([^"]*)"', attributes)),
        console=[line for line in done.stderr.splitlines() if ":CONSOLE" in line],
    )
