"""Closing what was dropped: elsewhere, later, and whatever the thread that dropped it holds."""

import gc
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

from outsize.errors import StorageError
from outsize.store import finalizers


class Owner:
    """Something that has workers."""


def test_it_happens_on_another_thread_and_is_waited_for():
    owner, seen = Owner(), []
    finalizers.when_dropped(owner, lambda *args: seen.append((threading.current_thread().name, args)), 1, 2)
    finalizers.finish()
    assert not seen
    del owner
    finalizers.finish()
    assert seen == [("outsize-closing", (1, 2))]


def test_what_was_detached_is_left_alone():
    owner, seen = Owner(), []
    finalizers.when_dropped(owner, seen.append, 1).detach()
    del owner
    finalizers.finish()
    assert not seen


def test_an_error_is_logged_and_does_not_keep_others_from_being_closed(caplog):
    def fail():
        raise StorageError("the disk is full")

    owners, seen = [Owner(), Owner()], []
    finalizers.when_dropped(owners[0], fail)
    finalizers.when_dropped(owners[1], seen.append, 1)
    while owners:
        del owners[0]
    finalizers.finish()
    assert seen == [1]
    assert "the disk is full" in caplog.text


def test_a_lock_that_is_held_where_something_is_dropped_is_no_obstacle():
    """As an executor's, in whose `submit` the garbage collector may run."""
    lock, closed = threading.Lock(), threading.Event()

    def close(workers):
        with lock:
            workers.shutdown()
        closed.set()

    owner = Owner()
    owner.itself = owner
    finalizers.when_dropped(owner, close, ThreadPoolExecutor(1))
    with lock:
        del owner
        gc.collect()
        assert not closed.is_set()
    finalizers.finish()
    assert closed.is_set()


FORKED = """
import os, signal
from outsize.store import finalizers
class Owner: pass
owner, seen = Owner(), []
finalizers.when_dropped(owner, seen.append, "parent's")
if os.fork() == 0:
    signal.alarm(10)
    del owner
    finalizers.finish()
    own = Owner()
    finalizers.when_dropped(own, seen.append, "own")
    del own
    finalizers.finish()
    os._exit(seen != ["own"])
assert os.waitstatus_to_exitcode(os.wait()[1]) == 0
del owner
finalizers.finish()
assert seen == ["parent's"]
"""


def test_a_forked_child_waits_for_nothing_of_its_parent():
    """As a worker that loads data: the thread that closes is not there."""
    subprocess.run([sys.executable, "-W", "ignore", "-c", FORKED], check=True)


def test_what_closing_needed_is_let_go():
    owner, worker = Owner(), Owner()
    known = weakref.ref(worker)
    finalizers.when_dropped(owner, lambda worker: None, worker)
    del owner, worker
    finalizers.finish()
    assert known() is None
