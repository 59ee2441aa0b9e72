"""An exception is raised once at a line that serving passes: no token is wrong, nothing hangs, and no page is lost.

`make test` takes some lines, evenly spread, and more of those that change the books; OUTSIZE_SOAK=1 takes all, for an
interrupt and for memory that runs out.
"""

import linecache
import os
import sys
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

import outsize
from outsize.serve import Engine, Request, Sampling
from tests.serve.families import lively, prompts_of

ROOMS = tuple(str(Path(outsize.__file__).parent / room) + os.sep for room in ("serve", "kv"))
NUM_SAMPLED = 5
BOOKS = (f"kv{os.sep}pages.py", f"serve{os.sep}schedule.py")
BOOKS_STRIDE = 5
"""Allocating a page and ending a sample take five lines each, at which only a repair makes the books right again."""
DRAWN = Sampling(temperature=1.0, seed=3)
REQUESTS = [
    Request(prompt, DRAWN, 6, num_samples=samples)
    for prompt, samples in zip(prompts_of((9, 33, 5)), (1, 2, 1), strict=True)
]
IS_SOAK = bool(os.environ.get("OUTSIZE_SOAK"))


@contextmanager
def traced(visit):
    """Inside, `visit(file, line)` is called at each line of the rooms that serve."""

    def local(frame, event, argument):
        if event == "line":
            visit(frame.f_code.co_filename, frame.f_lineno)
        return local

    before = sys.gettrace()
    sys.settrace(lambda frame, *_: local if frame.f_code.co_filename.startswith(ROOMS) else None)
    try:
        yield
    finally:
        sys.settrace(before)


@pytest.fixture(scope="module")
def models():
    return lively("llama"), lively("llama", 1)


def serve(engine):
    """All streams that were submitted, after steps until the engine is idle or it is clear that it never will be."""
    streams = [engine.submit(request) for request in REQUESTS]
    for _ in range(80):
        if not engine.is_idle:
            with suppress(KeyboardInterrupt, MemoryError):
                engine.step()
    return streams


def tokens_of(streams):
    return [[completion.tokens for completion in stream.completions] for stream in streams]


def opened(models):
    model, draft = models
    engine = Engine(model, pass_tokens=32, draft=draft)
    engine.guesser._pays = lambda trust, guess_s=0.0: True
    return engine


def test_an_exception_at_any_line_ends_with_right_tokens_or_its_error(models):
    lines = {}
    engine = opened(models)
    with traced(lambda *place: lines.setdefault(place)):
        expected = tokens_of(serve(engine))
    # No signal is delivered between the end of a try block and the first line of its finally.
    places = sorted(place for place in lines if "_is_changing = False" not in linecache.getline(*place))
    assert len(places) > 300
    books = [place for place in places if place[0].endswith(BOOKS)]
    chosen = sorted({*places[:: len(places) // NUM_SAMPLED], *books[::BOOKS_STRIDE]})
    if IS_SOAK:
        chosen = places
    for kind in (KeyboardInterrupt, MemoryError) if IS_SOAK else (KeyboardInterrupt,):
        for place in chosen:
            engine, streams, is_due = opened(models), [], [True]

            def visit(*here, place=place, is_due=is_due, kind=kind):
                if here == place and is_due:
                    is_due.clear()
                    raise kind

            with traced(visit), suppress(kind):  # of a submit, whose request is then not there
                streams = serve(engine)
            late = serve(engine)
            engine.check()
            assert engine.is_idle and engine.scheduler.pool.num_free == engine.scheduler.pool.num_usable, (
                place
            )
            assert tokens_of(late) == expected, place
            for stream, tokens in zip(streams, tokens_of(streams), strict=True):
                assert stream.is_finished, place
                assert stream.error is not None or tokens == expected[streams.index(stream)], place
