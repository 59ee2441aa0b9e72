"""Raising an exception once at each source line that a training step passes, and what the program then gets.

A step of a tiny model is traced; the exception is raised in the place of one line, in the main thread or in a worker.
Then the program does what its author would do: drop the gradients and repeat the step. What follows has to be right to
the last bit, or refused by the error that says what was lost. `python -m tests.interrupting --help` prints the table.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import transformers

import outsize
from outsize import Pins
from outsize.errors import OutsizeError, StateLostError
from tests.running import adamw, opened
from tests.seams import abandon, close, close_unchecked
from tests.zoo import ZOO

ROOT = str(Path(outsize.__file__).parent)
ERRORS: dict[str, Callable[[], BaseException]] = {
    "KeyboardInterrupt": KeyboardInterrupt,
    "OSError": lambda: OSError(5, "injected"),
    "MemoryError": MemoryError,
}
DEADLINE_S = 30.0
"""A run takes a fraction of a second. One whose main thread stands at the same place for so long, or that takes as many of
these as PATIENCE, waits for something that never comes; on a busy machine a run that only takes long does not."""
PATIENCE = 40


class Outcome(StrEnum):
    """What a program meets after the exception."""

    NOT_REACHED = "not reached"
    RIGHT = "right"
    REFUSED = "refused by name"
    WRONG = "silently wrong"
    HANG = "hang"
    ASSERTION = "AssertionError"
    BLAMED = "blames the caller"
    OTHER = "another error"


ALLOWED = frozenset({Outcome.NOT_REACHED, Outcome.RIGHT, Outcome.REFUSED})


@dataclass(frozen=True, slots=True, order=True)
class Line:
    """A source line, and whether a worker thread passed it."""

    file: str
    number: int
    is_worker: bool = False

    def __str__(self) -> str:
        where = " (worker)" if self.is_worker else ""
        return f"{self.file.removeprefix(ROOT).lstrip('/')}:{self.number}{where}"


@dataclass(frozen=True, slots=True)
class Result:
    """What an exception at `line` led to; `text` is the last error, if one was raised."""

    line: Line
    error: str
    outcome: Outcome
    text: str = ""


class Hang(BaseException):
    """Raised in the main thread where a run is not over by its deadline."""


class Tracer:
    """Sees each line of Outsize that the threads of a step pass, and raises at one of them, once.

    Threads that were started inside `watching` are workers; the main thread is seen inside `here`.
    """

    def __init__(self) -> None:
        self.seen: dict[Line, int] = {}
        self.is_recording = False
        self._target: Line | None = None
        self._passages = 0
        self._make: Callable[[], BaseException] = KeyboardInterrupt
        self._main = threading.get_ident()
        self._lock = threading.Lock()
        self.raised: BaseException | None = None

    def arm(self, line: Line, make: Callable[[], BaseException], passage: int = 1) -> None:
        """Raise at the `passage`-th time that `line` is reached from now on."""
        self._target, self._passages, self._make, self.raised = line, passage, make, None

    def disarm(self) -> None:
        """Raise nothing any more."""
        self._target = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """See threads that are started inside."""
        threading.settrace(self._call)
        try:
            yield
        finally:
            threading.settrace(None)  # type: ignore[arg-type]

    @contextmanager
    def here(self) -> Iterator[None]:
        """See the calling thread inside."""
        before = sys.gettrace()
        sys.settrace(self._call)
        try:
            yield
        finally:
            sys.settrace(before)

    def _call(self, frame: FrameType, event: str, argument: Any) -> Any:
        return self._line if frame.f_code.co_filename.startswith(ROOT) else None

    def _line(self, frame: FrameType, event: str, argument: Any) -> Any:
        if event != "line" or not (self.is_recording or self._target is not None):
            return self._line
        line = Line(frame.f_code.co_filename, frame.f_lineno, threading.get_ident() != self._main)
        if self.is_recording:
            with self._lock:
                self.seen[line] = self.seen.get(line, 0) + 1
        if line == self._target:
            with self._lock:
                self._passages -= 1
                strikes = self._passages == 0
                if strikes:
                    self._target = None
            if strikes:
                self.raised = self._make()
                raise self.raised
        return self._line


@contextmanager
def deadline(seconds: float) -> Iterator[None]:
    """Raise Hang in the main thread where it stands still for `seconds`, or is not over in PATIENCE times that."""

    def strike(number: int, frame: FrameType | None) -> None:
        raise Hang

    before = signal.signal(signal.SIGUSR2, strike)
    main, over = threading.get_ident(), threading.Event()

    def watch() -> None:
        places = [_place(main)]
        while not over.wait(seconds / 5):
            places.append(_place(main))
            if len(places) > 5 * PATIENCE or (len(places) > 5 and len(set(places[-6:])) == 1):
                signal.pthread_kill(main, signal.SIGUSR2)
                places = [_place(main)]  # a wait that goes on after one interrupt ends at the second

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        signal.signal(signal.SIGUSR2, before)


def _place(thread: int) -> tuple[tuple[object, int], ...]:
    """Where a thread stands, in all of its frames."""
    frame, place = sys._current_frames().get(thread), []
    while frame is not None:
        place.append((frame.f_code, frame.f_lasti))
        frame = frame.f_back
    return tuple(place)


@dataclass
class Program:
    """A plain training loop over one model: what it does when something is raised, and what it came to."""

    model: Any
    optimizer: Any
    batches: Sequence[Any]
    commit_to: Path | None = None
    losses: list[float] = field(default_factory=list)
    errors: list[BaseException] = field(default_factory=list)

    def step(self, index: int) -> None:
        """One step; whatever is raised in it once is answered by repeating the part that was not done."""
        losses: list[float] = []

        def forward_and_backward() -> None:
            loss = self.model(**self.batches[index % len(self.batches)]).loss
            loss.backward()
            losses.append(float(loss.detach()))

        before = self.optimizer.num_updates
        self._try(forward_and_backward, self.optimizer.zero_grad)
        self._try(lambda: self.optimizer.num_updates > before or self.optimizer.step())
        self._try(self.optimizer.zero_grad)
        if self.commit_to is not None:
            self._try(lambda: outsize.checkpoint.commit(self.model, self.optimizer, self.commit_to))
        self.losses.append(losses[-1])

    def _try(self, act: Callable[[], object], clean: Callable[[], object] = lambda: None) -> None:
        for left in (1, 0):
            try:
                act()
                return
            except (KeyboardInterrupt, OSError, MemoryError) as error:
                self.errors.append(error)
                if not left or isinstance(error, StateLostError):
                    raise
                clean()


class Subject:
    """One model in one home, with an exception at another line each time.

    A program that went on rightly is used for the next line. Lines that only a second step passes (the first update, the
    last reads from the model's files) are `early`: each of them takes a program of its own.
    """

    EARLY = 1
    """The step that passes early lines."""
    STEADY = 3
    """From here on all steps pass the same lines."""

    def __init__(
        self, home: str, folder: Path, *, commits: bool = False, workers: bool = False, num_steps: int = 20
    ) -> None:
        """`num_steps` are those of the longest program: more save time where many lines are tried."""
        self.home = home
        self.num_steps = num_steps
        self.folder = folder
        self.commits = commits
        self.workers = workers
        self.tracer = Tracer()
        self.plain = ZOO["llama"].build(seed=0).train()
        self.batches = [ZOO["llama"].batch(seed=seed) for seed in range(4)]
        self._program: Program | None = None
        self.expected: list[float] = []
        program = self._opened()
        for index in range(1, self.num_steps):
            if index in (self.EARLY, self.STEADY):
                self.tracer.is_recording = True
                with self.tracer.here():
                    program.step(index)
                self.tracer.is_recording = False
                if index == self.EARLY:
                    early = dict(self.tracer.seen)
                    self.tracer.seen.clear()
            else:
                program.step(index)
        self.expected = program.losses
        close_unchecked(program.model)
        wanted = [line for line in {**self.tracer.seen, **early} if line.is_worker == workers]
        self.steady = [line for line in wanted if line in self.tracer.seen]
        self.early = [line for line in wanted if line not in self.tracer.seen]

    @property
    def lines(self) -> list[Line]:
        """All lines of a step."""
        return self.early + self.steady

    def _opened(self) -> Program:
        number = len(os.listdir(self.folder))
        scratch = self.folder / str(number)
        scratch.mkdir()
        pins = Pins(weight_slots=2, gradient_slots=1) if self.home == "disk" else None
        with self.tracer.watching() if self.workers else nullcontext():
            model = opened(self.plain, disk=scratch, home=self.home, dtype="float32", pins=pins)
            program = Program(model, adamw(model), self.batches, scratch / "store" if self.commits else None)
            if program.commit_to is not None:
                outsize.checkpoint.resume(program.model, program.optimizer, program.commit_to)
            program.step(0)  # which starts the workers
        return program

    def raising(self, line: Line, error: str, passage: int = 1) -> Result:
        """What a program gets where `error` is raised at `line`."""
        outcome, text = Outcome.OTHER, ""
        try:
            with deadline(DEADLINE_S):
                outcome, text = self._run(line, error, passage)
        except BaseException as failure:
            text = "".join(traceback.format_exception(failure)[-6:])
            outcome = self._judge(failure)
        finally:
            self.tracer.disarm()
        if outcome not in (Outcome.RIGHT, Outcome.NOT_REACHED) and self._program is not None:
            with suppress(BaseException), deadline(DEADLINE_S):
                abandon(self._program.model)
            self._program = None
        return Result(line, error, outcome, text)

    def _run(self, line: Line, error: str, passage: int) -> tuple[Outcome, str]:
        if self._program is None or line in self.early:
            self.finish()
            self._program = self._opened()
        program = self._program
        if line in self.steady:
            while len(program.losses) < self.STEADY:
                program.step(len(program.losses))
        self.tracer.arm(line, ERRORS[error], passage)
        with self.tracer.here():
            program.step(len(program.losses))
        self.tracer.disarm()
        program.step(len(program.losses))
        expected = self.expected[: len(program.losses)]
        if program.losses != expected:
            return Outcome.WRONG, f"losses {program.losses[-2:]} instead of {expected[-2:]}"
        if len(program.losses) + 2 > self.num_steps or line in self.early:
            self.finish()
        return (Outcome.RIGHT if self.tracer.raised is not None else Outcome.NOT_REACHED), ""

    def finish(self) -> None:
        """End the program that goes on: its weights must be those of a run without exceptions, and its books balance."""
        program, self._program = self._program, None
        if program is not None:
            close(program.model)

    def _judge(self, failure: BaseException) -> Outcome:
        if isinstance(failure, Hang):
            return Outcome.HANG
        if isinstance(failure, AssertionError):
            return Outcome.ASSERTION
        if isinstance(failure, StateLostError):
            return self._refuses_for_good()
        if isinstance(failure, OutsizeError):
            return Outcome.BLAMED
        return Outcome.OTHER

    def _refuses_for_good(self) -> Outcome:
        """A refusal must stay one, whatever is asked; and giving everything back must work."""
        program = self._program
        assert program is not None
        name, parameter = next(iter(program.model.named_parameters()))
        for ask in (
            lambda: program.model(**self.batches[0]),
            lambda: parameter.detach().clone(),
            program.optimizer.step,
            lambda: outsize.save(program.model, self.folder / f"{name}.saved"),
        ):
            try:
                with deadline(DEADLINE_S):
                    ask()
            except StateLostError:
                continue
            except Hang:
                return Outcome.HANG
            except AssertionError:
                return Outcome.ASSERTION
            except BaseException:
                return Outcome.OTHER
            return Outcome.WRONG
        try:
            with deadline(DEADLINE_S):
                close_unchecked(program.model)
        except StateLostError:
            pass
        except Hang:
            return Outcome.HANG
        except BaseException:
            return Outcome.OTHER
        return Outcome.REFUSED


def _table(found: Counter[Outcome]) -> str:
    return ", ".join(f"{count} {outcome}" for outcome, count in found.most_common())


def main() -> None:
    """Print the outcome of each line, and how many there are of each kind."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--home", nargs="+", default=["host", "disk"])
    parser.add_argument("--error", nargs="+", default=list(ERRORS), choices=list(ERRORS))
    parser.add_argument(
        "--workers", action="store_true", help="raise in worker threads instead of the main one"
    )
    parser.add_argument("--commits", action="store_true", help="commit after each step")
    parser.add_argument("--passage", type=int, default=1, help="raise at the n-th passage of a line")
    parser.add_argument("--only", help="lines whose place contains this text")
    parser.add_argument("--stride", type=int, default=1, help="every n-th line")
    parser.add_argument("--offset", type=int, default=0, help="the first line of those")
    parser.add_argument("--show", action="store_true", help="show the errors")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    failed = 0
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        for home in options.home:
            place = Path(folder) / home
            place.mkdir()
            subject = Subject(home, place, commits=options.commits, workers=options.workers, num_steps=200)
            lines = [line for line in subject.lines if options.only is None or options.only in str(line)]
            lines = lines[options.offset :: options.stride]
            for error in options.error:
                found: Counter[Outcome] = Counter()
                for line in lines:
                    result = subject.raising(line, error, options.passage)
                    found[result.outcome] += 1
                    if found.total() % 50 == 0:
                        print(
                            f"{home} {error}: {found.total()} of {len(lines)} lines: {_table(found)}",
                            flush=True,
                        )
                    if result.outcome not in ALLOWED or (options.show and result.outcome is Outcome.REFUSED):
                        print(f"{line}: {result.outcome}", flush=True)
                        if options.show:
                            print(result.text, flush=True)
                failed += sum(count for outcome, count in found.items() if outcome not in ALLOWED)
                print(f"{home} {error}: {len(lines)} lines: {_table(found)}", flush=True)
    sys.stdout.flush()
    os._exit(1 if failed else 0)  # threads that hang are not waited for


if __name__ == "__main__":
    main()
