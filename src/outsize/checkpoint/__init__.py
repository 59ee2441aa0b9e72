"""Commits: a store that outlives the process, resuming from it, and reading it without a model.

`outsize.checkpoint.resume`, `commit` and `finish` are for loops of one's own; `outsize train` uses the same.
"""

from outsize.checkpoint.api import Resumed, commit, finish, resume
from outsize.checkpoint.store import Committed

__all__ = ["Committed", "Resumed", "commit", "finish", "resume"]
