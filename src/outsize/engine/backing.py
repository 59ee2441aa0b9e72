"""What stands behind a model's placeholders: the source of its weights and, from the first call on, blocks in a store."""

from __future__ import annotations

from typing import final

from outsize.engine.executor import Executor
from outsize.errors import UsageError
from outsize.model import Source
from outsize.store.blocks import BlockStore
from outsize.store.commit_store import CommitStore
from outsize.store.offload import ActivationOffload


@final
class Backing:
    """Where the values of parameters are now. `Setup` changes it; everything else reads it."""

    def __init__(self, source: Source) -> None:
        self.source: Source | None = source
        """Where weights come from until their first update; None once all of them live in the store."""
        self.committed: Source | None = None
        """The commit that the model resumes from, until the first call."""
        self.commit_store: CommitStore | None = None
        """The store that outlives the process, if the model has one."""
        self.executor: Executor | None = None
        """Visits blocks; None before the first call and after `close`."""
        self.offload: ActivationOffload | None = None
        """Moves inputs of blocks to another tier between forward and backward, if the placement does."""

    @property
    def running(self) -> Executor:
        """The executor. Raises UsageError before the first call."""
        if self.executor is None:
            raise UsageError(
                "a part of the model runs before the model was called", hint="call the whole model once first"
            )
        return self.executor

    @property
    def store(self) -> BlockStore:
        """The blocks. Raises UsageError before the first call."""
        return self.running.store

    def own_source(self) -> Source:
        """Where weights that were never updated come from."""
        assert self.source is not None, "the source is gone"
        return self.source
