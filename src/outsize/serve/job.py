"""An offline job: a file of prompts, one JSON object a line, into a file of answers; killed and resumed at will.

{"prompt": "..."}                        a text to continue, or
{"messages": [{"role": ..., ...}, ...]}  a conversation to answer
{"id": ..., "temperature": 0.8, ...}     beside it: what is handed through, and settings of this line alone

An answer is one line, written whole and synced, with the number of the line it answers; a prompt that cannot be served, or
whose pass fails, is answered with its error. A job that is started again reads what is there, drops errors and a line that
was cut short, and goes on with what is missing: each prompt is answered exactly once.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from outsize.checkpoint.files import sync_folder
from outsize.errors import ConfigError, DataError, OutsizeError, RequestError, in_short, naming
from outsize.serve.pipeline import SETTINGS, Pipeline, Prompt
from outsize.serve.request import Completion, Stream

MOST_UNDER_WAY = 256
"""Requests that are with the engine at once; more would only wait there."""

_FORMAT = 'each line is a JSON object with "prompt", a text, or "messages", a list'


@dataclass(frozen=True, slots=True)
class Line:
    """Line `number` of the prompts, from 1; `digest` tells whether an answer belongs to it."""

    number: int
    prompt: Prompt
    settings: Mapping[str, Any]
    identity: Any
    digest: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a job is; `num_tokens` were generated in `duration_s`, both by this process."""

    num_done: int
    num_failed: int
    num_prompts: int
    num_before: int
    """Of those done, what earlier processes did."""
    num_tokens: int
    duration_s: float

    @property
    def left_s(self) -> float | None:
        """Seconds that are left at this pace; None before the first answer."""
        num_new = self.num_done - self.num_before
        return (self.num_prompts - self.num_done) * self.duration_s / num_new if num_new else None


def run_job(
    generate: Pipeline,
    prompts: Path,
    answers: Path,
    settings: Mapping[str, Any],
    tell: Callable[[Progress], None] = lambda progress: None,
) -> Progress:
    """Answer all lines of `prompts` that `answers` has no answer to. `tell` is called after each answer, and at the end.

    A prompt that cannot be served, or whose pass fails, is answered with its error and counted in `num_failed`; the next
    run tries it again. Raises DataError for a line that cannot be read, before anything is computed, and for answers to
    other prompts.
    """
    num_prompts = sum(1 for _ in read_lines(prompts))
    start = time.perf_counter()
    num_failed = num_tokens = 0
    with ExitStack() as stack:
        file = stack.enter_context(_opened(answers))
        done, has_errors = _answered(file, answers, prompts)
        if has_errors:
            file = stack.enter_context(_without_errors(file, answers))
        num_before = len(done)
        under_way: list[tuple[Line, Stream]] = []

        def progress() -> Progress:
            duration_s = time.perf_counter() - start
            return Progress(len(done), num_failed, num_prompts, num_before, num_tokens, duration_s)

        def answer(line: Line, what: Mapping[str, Any]) -> None:
            identity = {} if line.identity is None else {"id": line.identity}
            _append(file, {"line": line.number, **identity, "digest": line.digest, **what})
            done[line.number] = line.digest
            tell(progress())

        def refuse(line: Line, error: Exception) -> None:
            nonlocal num_failed
            num_failed += 1
            answer(line, {"error": error.message if isinstance(error, OutsizeError) else in_short(error)})

        def collect() -> None:
            nonlocal num_tokens
            for line, stream in [pair for pair in under_way if pair[1].is_finished]:
                under_way.remove((line, stream))
                num_tokens += sum(len(completion.tokens) for completion in stream.completions)
                if stream.error is None:
                    answer(line, _answer_of(stream))
                else:
                    refuse(line, stream.error)

        for line in read_lines(prompts):
            if line.number in done:
                continue
            while len(under_way) >= MOST_UNDER_WAY:
                generate.engine.step()
                collect()
            try:
                under_way.append((line, generate.submit(line.prompt, **{**settings, **line.settings})))
            except (RequestError, ConfigError) as error:
                refuse(line, error)
        while under_way:
            generate.engine.step()
            collect()
        tell(progress())
        return progress()


def read_lines(path: Path) -> Iterator[Line]:
    """The prompts in `path`. Raises DataError naming file and line of what is none."""
    try:
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    yield _line(text, number, f"{path}:{number}")
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}", hint="pass a file that you may read") from error


def _line(text: bytes, number: int, place: str) -> Line:
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise DataError(f"{place}: no JSON: {error}", hint=_FORMAT) from error
    if not isinstance(fields, dict):
        raise DataError(f"{place}: a {type(fields).__name__}, not an object", hint=_FORMAT)
    prompt, messages = fields.get("prompt"), fields.get("messages")
    if isinstance(messages, list) and prompt is None and all(isinstance(m, dict) for m in messages):
        prompt = messages
    elif not isinstance(prompt, str) or messages is not None:
        raise DataError(f'{place}: neither a text as "prompt" nor a list as "messages"', hint=_FORMAT)
    settings = {name: value for name, value in fields.items() if name in SETTINGS}
    digest = hashlib.blake2b(text.strip(), digest_size=8).hexdigest()
    return Line(number, prompt, settings, fields.get("id"), digest)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file of answers, for this process alone."""
    try:
        file = path.open("a+b")
    except OSError as error:
        raise DataError(
            f"{path}: {error.strerror or error}", hint="name a file that you may write"
        ) from error
    with file:
        _lock(file, path)
        if not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise DataError(f"{path}: another job has replaced it", hint="start again")
        yield file


def _lock(file: IO[bytes], path: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise DataError(
            f"{path}: another job is writing it", hint="let it end, or name another file"
        ) from error


def _without_errors(file: IO[bytes], path: Path) -> IO[bytes]:
    """Put a file in the place of `path`, without the lines of `file` that are errors; open and locked."""
    path = path.resolve()  # a link stays a link
    partial = path.with_name(path.name + ".partial")
    with ExitStack() as failing:
        try:
            rest = failing.enter_context(partial.open("w+b"))
            failing.callback(partial.unlink, missing_ok=True)
            _lock(rest, path)
            os.fchmod(rest.fileno(), os.fstat(file.fileno()).st_mode & 0o777)
            file.seek(0)
            rest.writelines(text for text in file if "error" not in json.loads(text))
            rest.flush()
            os.fsync(rest.fileno())
            partial.replace(path)
            sync_folder(path.parent)
        except OSError as error:
            raise DataError(
                f"{partial}: {error.strerror or error}", hint="make its folder writable, or name another file"
            ) from error
        failing.pop_all()
    return rest


def _answered(file: IO[bytes], path: Path, prompts: Path) -> tuple[dict[int, str], bool]:
    """The numbers of lines that are answered, and their digests; and whether there are errors, which count as unanswered.

    A line that was cut short by a kill is dropped.
    """
    file.seek(0)
    done: dict[int, str] = {}
    has_errors = False
    end = 0
    for number, text in enumerate(file, 1):
        if not text.endswith(b"\n"):
            break
        try:
            fields = json.loads(text)
            line, digest = int(fields["line"]), str(fields["digest"])
            if "error" in fields:
                has_errors = True
            else:
                done[line] = digest
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number}: no answer of a job", hint="name another file for the answers"
            ) from error
        end += len(text)
    file.truncate(end)
    expected = {line.number: line.digest for line in read_lines(prompts) if line.number in done}
    for number in sorted(done):
        if expected.get(number) != done[number]:
            raise DataError(
                f"{path} answers a line {number} that {prompts} does not have, or no longer",
                hint="name another file for the answers, or put the prompts back as they were",
            )
    return done, has_errors


def _append(file: IO[bytes], fields: Mapping[str, Any]) -> None:
    try:
        text = json.dumps(fields, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair, handed through from the prompts
        text = json.dumps(fields).encode()
    with naming(Path(file.name)):
        file.write(text + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _answer_of(stream: Stream) -> dict[str, Any]:
    request = stream.request
    samples = [_sample_of(completion, request.logprobs > 0) for completion in stream.completions]
    told = {"prompt_logprobs": stream.prompt_logprobs} if request.prompt_logprobs else {}
    return {"num_prompt_tokens": len(request.prompt), "samples": samples, **told}


def _sample_of(completion: Completion, with_logprobs: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "text": completion.text,
        "finish": completion.finish,
        "num_tokens": len(completion.tokens),
    }
    if with_logprobs:
        fields |= {
            "tokens": completion.tokens,
            "logprobs": completion.logprobs,
            "likeliest": completion.likeliest,
        }
    return fields
