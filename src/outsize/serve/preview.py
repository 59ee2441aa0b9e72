"""What a run would need, before it is started: for generating, as the engine would lay memory out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Unpack

from outsize.engine.api import spells_out
from outsize.engine.preview import PreviewOptions
from outsize.engine.preview import preview as preview_calls
from outsize.engine.runtime import Runtime
from outsize.engine.summary import PlanSummary
from outsize.kv import NotPageableError
from outsize.plan.workload import Call
from outsize.serve.runner import Concurrency, Runner


@spells_out(preview_calls, without={"passes"})
def preview(path: str | Path, **options: Unpack[PreviewOptions]) -> PlanSummary:
    """Say what lives where, and whether it fits, for batches of `[batch_size, seq_len]` tokens.

    With `train=False`: for generating, at most `batch_size` sequences at once, each of `seq_len` tokens with its answer.

    With a `profile` of this machine one block of each kind is timed, plans are compared, and a step is predicted. With
    `hardware`, the profile of another machine, that one is planned for: its memory is the budget where none is given, and
    operations are counted instead of timed. `compile`, `attention` and `from_scratch` as in `load`.
    Reads no weights and stores nothing: a `config.json` is enough. Raises ModelError or ConfigError for what cannot be
    opened at all, WeightsError for a folder whose weights `load` would refuse.
    """
    return preview_calls(path, passes=_passes, **options)


def _passes(runtime: Runtime, sequences: int, tokens: int) -> Iterator[tuple[Call, Call]] | None:
    """An engine's passes over so many sequences, with fewer and fewer pages; None if the model cannot use pages."""
    try:
        runner = Runner(runtime.model.module, concurrency=Concurrency(sequences, tokens), only_plan=True)
    except NotPageableError:
        return None
    return (runner.largest_and_decoding(num_pages + 1, sequences) for num_pages in runner.sizes)
