"""`outsize trace`: a step of a run in time, predicted above measured, as a page and for Perfetto. Imports no torch."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from outsize.cli import options as shared
from outsize.errors import ConfigError, naming

if TYPE_CHECKING:
    from outsize.train.trace import Trace

_EXAMPLES = """\
examples:
  outsize trace tuned
      tuned/trace.html to look at in a browser, tuned/trace.json for ui.perfetto.dev
  outsize trace tuned.partial --out step.html
      of a run that is still going on, or was broken off

outsize train records one step, the fourth unless --trace-step says otherwise. It is predicted too where outsize profile
had measured the machine before.
"""

_MARKED_CHARACTERS = 1 << 16
"""Within which a file of ours says that it is one."""


def add_parser(commands: shared.Commands[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = shared.command(
        commands, "trace", "draw a step of a run in time, predicted and measured", _EXAMPLES
    )
    parser.add_argument("folder", metavar="RUN", type=Path, help="folder that outsize train wrote")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page (RUN/trace.html)")
    parser.add_argument(
        "--perfetto", type=Path, metavar="FILE", help="the same for Perfetto and Chrome (RUN/trace.json)"
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write both files, and say how the two timelines differ."""
    from outsize.train import perfetto, trace_page
    from outsize.train.trace import Trace

    trace = Trace.read(options.folder)
    page_path = options.out or options.folder / "trace.html"
    perfetto_path = options.perfetto or options.folder / "trace.json"
    if page_path.resolve() == perfetto_path.resolve():
        raise ConfigError(f"--out and --perfetto are both {page_path}", hint="name two files")
    _check(page_path, "--out", trace_page.MARK)
    _check(perfetto_path, "--perfetto", perfetto.MARK)
    texts = {page_path: trace_page.page(trace), perfetto_path: perfetto.perfetto(trace)}
    for path, text in texts.items():
        with naming(path):
            path.write_text(text, encoding="utf-8")
    print("\n".join(summary(trace)))
    print(f"saved {page_path}: open it in a browser")
    print(f"saved {perfetto_path}: open it at ui.perfetto.dev")
    return 0


def summary(trace: Trace) -> Iterator[str]:
    """The lines that are printed: the step, what it waited for, and what was predicted least well."""
    from outsize.plan.profile import WORDS
    from outsize.train.trace import MOST_DIFFERENCES, seconds

    measured, predicted = trace.measured, trace.predicted
    if predicted is None:
        yield f"step {trace.step}: measured {seconds(measured.step_s)}, not predicted"
    else:
        error = (predicted.step_s - measured.step_s) / measured.step_s
        both = f"predicted {seconds(predicted.step_s)}, measured {seconds(measured.step_s)}"
        yield f"step {trace.step}: {both} ({error:+.0%})"
    if stalls := measured.stall_s:
        most = max(stalls, key=lambda cause: stalls[cause])
        yield f"computing waited {seconds(sum(stalls.values()))} of it, mostly for {WORDS[most]}"
    else:
        yield "computing waited for nothing"
    if differences := trace.differences()[:MOST_DIFFERENCES]:
        yield "seconds busy that differ most:"
        yield from (f"  {difference}" for difference in differences)
    elif predicted is None:
        yield "run `outsize profile` once: what is trained after it is predicted"


def _check(path: Path, option: str, mark: str) -> None:
    """Refuse to write where there is no folder, and over a file that is no earlier trace."""
    if not path.parent.is_dir():
        raise ConfigError(
            f"{option} {path}: there is no folder {path.parent}", hint="make it, or name another file"
        )
    if path.is_dir():
        raise ConfigError(f"{option} {path} is a folder", hint=f"name a file in it: {option} {path}/trace")
    if path.exists():
        with path.open(encoding="utf-8", errors="replace") as file:
            is_ours = mark in file.read(_MARKED_CHARACTERS)
        if not is_ours:
            raise ConfigError(
                f"{option} {path}: the file there is no trace", hint="name another file, or remove that one"
            )
