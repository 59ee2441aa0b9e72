"""Tensors that leave a block beside its outputs: recordings of the running call.

transformers records router logits, attentions and the like with forward hooks on modules inside a block, into lists of
the running call. A recording made while a block runs without a graph would have no gradient (an auxiliary loss would
train nothing), and one made during recomputation would be a second copy. So they are caught, declared outputs of the
visit, and handed on to the recorder from outside. Source: transformers, `utils/output_capturing.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial

import torch
from transformers.utils import output_capturing

from outsize.store.recovery import undone_by


@dataclass(slots=True)
class Caught:
    """Recordings made inside a block, by key."""

    lists: dict[str, list[torch.Tensor]] = field(default_factory=dict)

    def tensors(self) -> list[torch.Tensor]:
        """All recordings, in a fixed order."""
        return [tensor for key in sorted(self.lists) for tensor in self.lists[key]]


@dataclass(slots=True)
class CapturedOutputs:
    """The keys that the running call records (`hidden_states` are recorded outside of blocks)."""

    keys: tuple[str, ...]
    counts: dict[str, int] = field(default_factory=dict)

    @classmethod
    def current(cls) -> CapturedOutputs:
        """What the call in progress records."""
        collector = output_capturing._active_collector.get()
        return cls(tuple(sorted(key for key, value in (collector or {}).items() if isinstance(value, list))))

    @contextmanager
    def catch(self) -> Iterator[Caught]:
        """Record into lists of our own inside the context."""
        caught = Caught({key: [] for key in self.keys})
        if not self.keys:
            yield caught
            return
        before = output_capturing._active_collector.get()
        with undone_by(partial(output_capturing._active_collector.set, before)):
            output_capturing._active_collector.set(caught.lists)
            yield caught
        self.counts = {key: len(values) for key, values in caught.lists.items()}

    def pass_on(self, tensors: Sequence[torch.Tensor]) -> None:
        """Give `tensors`, in the order of `Caught.tensors`, to the recorder of the call in progress."""
        collector = output_capturing._active_collector.get()
        rest = list(tensors)
        for key in self.keys:
            count = self.counts.get(key, 0)
            if collector is not None and key in collector:
                collector[key].extend(rest[:count])
            rest = rest[count:]
