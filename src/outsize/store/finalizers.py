"""Closing what was dropped: on a thread of its own, and never where the garbage collector happens to run.

A model that is dropped without being closed is collected in whichever thread allocates next, inside any lock that thread
holds: that of an executor, say, whose workers have to end. So what is dropped only leaves a note, in a queue that may be
written to from anywhere.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue

from outsize.errors import in_short

_log = logging.getLogger(__name__)

_notes: SimpleQueue[Callable[[], object]] = SimpleQueue()
_lock = threading.Lock()
_threads: list[threading.Thread] = []


def when_dropped(
    owner: object, close: Callable[..., None], *workers: object
) -> weakref.finalize[..., object]:
    """Call `close(*workers)`, which must not hold `owner`, some time after `owner` was dropped; at exit nothing is done."""
    with _lock:
        if not _threads:
            _threads.append(threading.Thread(target=_run, name="outsize-closing", daemon=True))
            _threads[0].start()
    note = weakref.finalize(owner, _notes.put, partial(close, *workers))
    note.atexit = False
    return note


def finish() -> None:
    """Wait until everything that was dropped so far is closed."""
    if _threads and threading.current_thread() is not _threads[0]:
        done = threading.Event()
        _notes.put(done.set)
        done.wait()


def _begin_anew() -> None:
    """In a child that was forked: threads and locks are its parent's, as are the workers of what the notes tell of."""
    global _notes, _lock
    _notes, _lock = SimpleQueue(), threading.Lock()
    _threads.clear()


os.register_at_fork(after_in_child=_begin_anew)


def _run() -> None:
    while True:
        _close(_notes.get())


def _close(note: Callable[[], object]) -> None:
    """Run `note` in a function of its own, so that what it holds goes with it; log what goes wrong: no caller is left."""
    try:
        note()
    except BaseException as error:
        _log.error("closing a model that was dropped failed: %s", in_short(error), exc_info=error)
