"""Closes what was dropped, on a thread of its own, never where the garbage collector happens to run.

A model that is dropped without being closed is collected in whichever thread allocates next, inside any lock that this
thread holds, such as that of an executor whose workers have to end. So its finalizer only puts a note into a queue, which
any thread may do at any time.
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
    """Call `close(*workers)`, which must not refer to `owner`, some time after `owner` was dropped; not at exit."""
    with _lock:
        if not _threads:
            _threads.append(threading.Thread(target=_run, name="outsize-closing", daemon=True))
            _threads[0].start()
    note = weakref.finalize(owner, _notes.put, partial(close, *workers))
    note.atexit = False
    return note


def finish() -> None:
    """Wait until everything dropped so far is closed."""
    if _threads and threading.current_thread() is not _threads[0]:
        done = threading.Event()
        _notes.put(done.set)
        done.wait()


def _forget_parent() -> None:
    """Forget the parent's threads, locks and notes in a forked child, where their workers do not exist."""
    global _notes, _lock
    _notes, _lock = SimpleQueue(), threading.Lock()
    _threads.clear()


os.register_at_fork(after_in_child=_forget_parent)


def _run() -> None:
    while True:
        _close(_notes.get())


def _close(note: Callable[[], object]) -> None:
    """Run `note` in a function of its own, so that its references end with it; log errors, as no caller is left."""
    try:
        note()
    except BaseException as error:
        _log.error("closing a model that was dropped failed: %s", in_short(error), exc_info=error)
