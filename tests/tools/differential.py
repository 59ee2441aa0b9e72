"""Run two checkouts side by side over drawn models, budgets and placements, and say where they differ.

    python -m tests.tools.differential --before ../other/checkout [--count 200] [--seed 1] [--out FILE]

The other checkout is, for instance, a worktree of the commit before a redesign (`git worktree add ../before COMMIT`). Each
case is carried out by both, many in one process, through the public API and the `tests/seams.py` of the checkout (this
tree's where it has none). What must not change is compared:

- `plan`: the operations as they were carried out, in order, and `transfers`: each read, write and copy by name
- `losses`, `bits`: losses, tokens and log-probabilities, and every weight, bit for bit
- `planned`: where planes live, slots, tiles, budgets, predicted bytes; for a machine that is not here, predicted seconds
- `memory`, `tensors`, `peak`: slots and arena taken, exactly; the most bytes of tensors alive at once, which may
  grow by 1 % or `TENSOR_BYTES`; of large cases, each in a process of its own, the most memory that it took, which may grow
  by `PEAK_SHARE`
- `moved`, `told`: bytes read, written and copied; visits off plan; errors by type and the figures in their message

A redesign renames verbs, planes and homes: `RENAMED` says how, and `ADDED` what older plans do not hold. Both
are applied before anything is compared. Differences are printed by case. The exit status is 1 where there are any, and
where a case crashes on both sides, which compares nothing.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

from tests.tools.cases import Case, draw

ROOT = Path(__file__).parents[2]

RENAMED: Mapping[str, str] = {"relay": "bounce"}
"""Words of older checkouts and what they are called now: verbs, planes, homes, rows of the report."""

ADDED: tuple[str, ...] = (r"(send|fetch|copy) ", r"(held|wait|free) \S+\.input$")
"""Regular expressions of operations that plans of older checkouts do not hold: they are compared on neither side."""

TENSOR_BYTES = 4096
"""Tensors of a few elements come and go with how code is written."""

PEAK_SHARE = 0.15
"""What the peaks of two runs of the same case differ by, at most: it depends on which thread allocates when."""

PER_PROCESS = 25
SHOWN_LINES = 12


class Side:
    """One checkout, and how its cases are carried out."""

    def __init__(self, name: str, checkout: Path, folder: Path, seams: Path | None) -> None:
        self.name = name
        self._source = checkout / "src"
        own = checkout / "tests" / "seams.py"
        self._seams = seams or (own if own.exists() else ROOT / "tests" / "seams.py")
        self._folder = folder / name
        self._folder.mkdir()
        assert (self._source / "outsize").is_dir(), f"{checkout} is not a checkout"

    def run(self, cases: Sequence[Case]) -> dict[int, dict[str, Any]]:
        """What came out, by the case's number; a case that ends its process is run by itself once more."""
        found = self._run(cases)
        missing = [case for case in cases if case.number not in found]
        while missing:
            first, *rest = missing
            found |= self._run([first]) or {first.number: {"crash": "the process ended"}}
            found |= self._run(rest)
            missing = [case for case in rest if case.number not in found]
        return found

    def _run(self, cases: Sequence[Case]) -> dict[int, dict[str, Any]]:
        if not cases:
            return {}
        builds = Path(os.environ.get("OUTSIZE_TEST_BUILDS") or ROOT / ".pytest_cache" / "builds")
        for name in ("rules", "kernels"):
            (builds / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(self._source), str(ROOT))),
            "PYTHONHASHSEED": "0",
            "OMP_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "1",
            "OUTSIZE_CACHE": str(builds),
            "TMPDIR": str(self._folder),
        }
        command = [sys.executable, "-m", "tests.tools.cases", str(self._seams), str(self._folder)]
        asked = "\n".join(json.dumps(asdict(case)) for case in cases)
        done = subprocess.run(
            command,
            input=asked,
            capture_output=True,
            text=True,
            env=environment,
            check=False,
            cwd=self._folder,
        )
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        if not lines:
            raise SystemExit(f"{self.name}: no case could be run\n{done.stderr[-4000:]}")
        assert lines[0]["outsize"].startswith(str(self._source)), lines[0]
        return {line["case"]["number"]: line["found"] for line in lines[1:]}


def renamed(value: Any) -> Any:
    """A value of any checkout in the words of this one."""
    if isinstance(value, str) and RENAMED:
        words = "|".join(map(re.escape, sorted(RENAMED, key=len, reverse=True)))
        return re.sub(rf"(?<![\w-])(?:{words})(?![\w-])", lambda match: RENAMED[match[0]], value)
    if isinstance(value, list):
        return [renamed(each) for each in value]
    if isinstance(value, dict):
        return {renamed(key): renamed(each) for key, each in value.items()}
    return value


def without_added(found: Mapping[str, Any]) -> dict[str, Any]:
    """What came out, without the operations that plans of older checkouts do not hold."""
    plan = [line for line in found.get("plan", []) if not any(re.match(each, line) for each in ADDED)]
    return {**found, "plan": plan} if "plan" in found else dict(found)


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[tuple[str, list[str]]]:
    """`(what, lines)` of everything that is not the same."""
    before, after = renamed(without_added(before)), renamed(without_added(after))
    for name in sorted({*before, *after}):
        one, other = before.get(name), after.get(name)
        if name == "peak":
            if one is not None and other is not None and _has_grown(_taken(one), _taken(other), PEAK_SHARE):
                yield name, [f"{_taken(one) / 2**20:.1f} MiB -> {_taken(other) / 2**20:.1f} MiB"]
        elif name == "tensors":
            if one is not None and other is not None and _has_grown(one, other, 0.01, TENSOR_BYTES):
                yield name, [f"{one} bytes -> {other} bytes"]
        elif name == "crash":
            if (one is None) is not (other is None):
                yield name, [str(one or other)]
        elif one != other:
            yield name, list(_shown(one, other))


def _taken(peak: Sequence[int]) -> int:
    return peak[1] - peak[0]


def _has_grown(before: int, after: int, share: float, least: int = 0) -> bool:
    return after - before > max(least, share * before)


def _shown(before: Any, after: Any, path: str = "") -> Iterator[str]:
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}, key=str):
            if before.get(key) != after.get(key):
                yield from _shown(before.get(key), after.get(key), f"{path}{key}: ")
    elif (
        isinstance(before, list)
        and isinstance(after, list)
        and all(isinstance(e, str) for e in before + after)
    ):
        yield from (
            f"{path}{line}"
            for line in difflib.unified_diff(before, after, lineterm="", n=1)
            if line[:3] not in ("---", "+++")
        )
    elif isinstance(before, list) and isinstance(after, list):
        for index, (one, other) in enumerate(zip_longest(before, after)):
            if one != other:
                yield from _shown(one, other, f"{path}{index}: ")
    else:
        yield f"{path}{before} -> {after}"


def compare(sides: Sequence[Side], cases: Sequence[Case], out: Path | None) -> Counter[str]:
    """Carry cases out on both sides and print what differs; how often each kind of thing does."""
    kinds: Counter[str] = Counter()
    groups = [[case] for case in cases if case.is_large]
    small = [case for case in cases if not case.is_large]
    groups += [small[at : at + PER_PROCESS] for at in range(0, len(small), PER_PROCESS)]
    for group in groups:
        start = time.monotonic()
        before, after = (side.run(group) for side in sides)
        for case in group:
            found = dict(differences(before[case.number], after[case.number]))
            kinds["cases"] += 1
            kinds["refused by both"] += "error" in before[case.number] and not found
            kinds["crashed in both"] += "crash" in before[case.number] and "crash" in after[case.number]
            kinds["different"] += bool(found)
            kinds.update(list(found))
            if out is not None:
                one, other = before[case.number], after[case.number]
                line = {"case": asdict(case), "differences": found, "before": one, "after": other}
                with out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
            if found:
                print(f"DIFFERENT {case}")
            for what, lines in found.items():
                print("\n".join([f"  {what}", *(f"    {line}" for line in lines[:SHOWN_LINES])]))
                if len(lines) > SHOWN_LINES:
                    print(f"    ... {len(lines) - SHOWN_LINES} lines more")
        print(f"{kinds['cases']} of {len(cases)} cases, {time.monotonic() - start:.0f} s", flush=True)
    return kinds


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--before", type=Path, required=True, help="the other checkout")
    parser.add_argument("--after", type=Path, default=ROOT, help="the checkout to compare with it (this one)")
    parser.add_argument("--before-seams", type=Path, help="the seams of the other checkout")
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", type=int, nargs="+", help="numbers of cases")
    parser.add_argument("--out", type=Path, help="everything that came out, one JSON object a line")
    options = parser.parse_args()
    numbers = options.only or range(options.count)
    cases = [draw(options.seed, number) for number in numbers]
    if options.out is not None:
        options.out.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(dir="/var/tmp", prefix="differential-") as folder:
        sides = [
            Side("before", options.before.resolve(), Path(folder), options.before_seams),
            Side("after", options.after.resolve(), Path(folder), None),
        ]
        kinds = compare(sides, cases, options.out)
    print(", ".join(f"{count} {kind}" for kind, count in kinds.items()))
    return bool(kinds["different"] or kinds["crashed in both"])


if __name__ == "__main__":
    sys.exit(main())
