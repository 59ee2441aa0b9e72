"""Documents that are executed: their fenced blocks, and what it takes to run them on a tiny model.

A block may have a title. `title="chat.jsonl"` is a file, which is written; `title="prints"` after a block of commands
is part of what they print, where "..." stands for anything. `bash` blocks run line by line, `outsize` in this process;
`python` blocks of one document share their names. Anything else is shown and not run.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from outsize.cli import main

ROOT = Path(__file__).parent.parent
SCRATCH = "/nvme/scratch"
"""The folder on a disk that every document names."""

_FENCE = re.compile(
    r"^```(?P<language>\w*)[^\n]*?(?: title=\"(?P<title>[^\"]*)\")?\n(?P<text>.*?)^```", re.M | re.S
)


@dataclass(frozen=True, slots=True)
class Fence:
    """A fenced block of a document."""

    language: str
    title: str | None
    text: str


def fences(document: Path) -> list[Fence]:
    """The fenced blocks of `document`, in order."""
    found = _FENCE.finditer(document.read_text())
    return [Fence(match["language"], match["title"], match["text"]) for match in found]


@dataclass
class Runner:
    """Runs blocks in the working folder; `scratch` stands for `SCRATCH`. `read_output` gives what was printed since."""

    scratch: Path
    read_output: Callable[[], str]
    names: dict[str, Any]
    printed: str = ""

    def run_all(self, blocks: Sequence[Fence]) -> None:
        """Run blocks in order. A command fails exactly where the block after it prints an error."""
        for block, following in zip(blocks, [*blocks[1:], None], strict=True):
            shown = following.text if following is not None and following.title == "prints" else ""
            self.run(block, fails=shown.startswith("error: "))

    def run(self, fence: Fence, *, fails: bool = False) -> None:
        """Run, write or check one block; its last command `fails`, or none."""
        text = fence.text.replace(SCRATCH, str(self.scratch))
        if fence.title == "prints":
            self._check(text)
        elif fence.title is not None:
            Path(fence.title).write_text(text)
        elif fence.language == "python":
            exec(compile(text, "document", "exec"), self.names)
            self.printed = self.read_output()
        elif fence.language == "bash":
            commands = list(_commands(text))
            results = [self._command(command) for command in commands]
            self.printed = "".join(printed for _, printed in results)
            failed = [status != 0 for status, _ in results]
            assert failed == [False] * (len(failed) - 1) + [fails], f"{commands}\n{self.printed}"

    def _command(self, command: str) -> tuple[int, str]:
        words = shlex.split(command, comments=True)
        if words[:1] == ["outsize"]:
            return main.main(words[1:]), self.read_output()
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
        return done.returncode, done.stdout + done.stderr

    def _check(self, text: str) -> None:
        for line in text.splitlines():
            pattern = ".*".join(re.escape(part) for part in line.split("..."))
            assert re.search(pattern, self.printed), f"{line!r} is not in:\n{self.printed}"


def _commands(text: str) -> Iterator[str]:
    """The commands of a bash block, one per line; a line may go on after a backslash."""
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            yield line
