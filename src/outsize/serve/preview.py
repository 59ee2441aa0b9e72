"""What a run would need, before it is started: for generating, as the engine would lay memory out."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

from outsize.config import Disk, Pins
from outsize.engine.preview import Call
from outsize.engine.preview import preview as preview_calls
from outsize.engine.runtime import Runtime
from outsize.engine.summary import PlanSummary
from outsize.kv import NotPageableError
from outsize.plan.profile import Profile
from outsize.serve.runner import Concurrency, Runner


def preview(
    path: str | Path,
    *,
    device: str | int | None = None,
    host: str | int | None = None,
    disk: Disk | None = None,
    home: str | None = None,
    dtype: str | torch.dtype | None = None,
    pins: Pins | None = None,
    compile: bool | None = None,
    attention: str | None = None,
    batch_size: int = 1,
    seq_len: int = 512,
    train: bool = True,
    from_scratch: bool = False,
    profile: Profile | None = None,
    hardware: Profile | None = None,
) -> PlanSummary:
    """Say what lives where, and whether it fits, for batches of `[batch_size, seq_len]` tokens.

    With `train=False`: for generating, at most `batch_size` sequences at once, each of `seq_len` tokens with its answer.

    With a `profile` of this machine one block of each kind is timed, plans are compared, and a step is predicted. With
    `hardware`, the profile of another machine, that one is planned for: its memory is the budget where none is given, and
    operations are counted instead of timed. `compile`, `attention` and `from_scratch` as in `load`.
    Reads no weights and stores nothing: a `config.json` is enough. Raises ModelError or ConfigError for what cannot be
    opened at all, WeightsError for a folder whose weights `load` would refuse.
    """
    return preview_calls(
        path,
        device=device,
        host=host,
        disk=disk,
        home=home,
        dtype=dtype,
        pins=pins,
        compile=compile,
        attention=attention,
        batch_size=batch_size,
        seq_len=seq_len,
        train=train,
        from_scratch=from_scratch,
        profile=profile,
        hardware=hardware,
        passes=_passes,
    )


def _passes(runtime: Runtime, sequences: int, tokens: int) -> Iterator[tuple[Call, Call]] | None:
    """The passes of an engine for so many sequences, with fewer and fewer pages; None where the model runs over none."""
    if not runtime.model.device.is_host:
        return None
    try:
        runner = Runner(runtime.model.module, concurrency=Concurrency(sequences, tokens), only_plan=True)
    except NotPageableError:
        return None
    return (runner.largest_and_decoding(num_pages + 1, sequences) for num_pages in runner.sizes)
