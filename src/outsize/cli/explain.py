"""How a command says what went wrong: two lines on stderr, also for a command line that cannot be understood."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn


def explain(message: str, hint: str | None) -> None:
    """Print an error and its hint; in colour on a terminal."""
    colour = sys.stderr.isatty() and "NO_COLOR" not in os.environ
    red, cyan, plain = ("\033[1;31m", "\033[1;36m", "\033[0m") if colour else ("", "", "")
    print(f"{red}error:{plain} {message}", file=sys.stderr)
    if hint is not None:
        print(f"{cyan}hint:{plain} {hint}", file=sys.stderr)


class Parser(argparse.ArgumentParser):
    """argparse, with errors like all others of ours instead of a page of usage."""

    commands: Mapping[str, Parser]
    """By name; of the whole command line only."""

    def error(self, message: str) -> NoReturn:
        """Explain, and leave with status 2."""
        self._leave(message, f"{self.prog} --help shows all, with examples")

    def unknown(self, arguments: Sequence[str]) -> NoReturn:
        """Explain arguments that no option takes, and leave with status 2."""
        name = next((text for text in arguments if text.startswith("-")), arguments[0])
        option = name.partition("=")[0]
        near = difflib.get_close_matches(option, self._option_string_actions, n=1)
        more = f"{self.prog} --help shows all, with examples"
        kind = "option" if option.startswith("-") else "argument"
        self._leave(f"{option}: no such {kind}", f"did you mean {near[0]}? {more}" if near else more)

    def _leave(self, message: str, hint: str) -> NoReturn:
        explain(message, hint)
        sys.exit(2)
