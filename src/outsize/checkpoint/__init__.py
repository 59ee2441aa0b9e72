"""Commits: a store that outlives the process, resuming from it, and reading it without a model.

`outsize.checkpoint.resume`, `commit`, `finish` and `close` are for loops of one's own; `outsize train` uses the same.
"""

from outsize.checkpoint.api import Resumed, close, commit, finish, resume
from outsize.checkpoint.store import Committed

__all__ = ["Committed", "Resumed", "close", "commit", "finish", "resume"]
