"""Train, fine-tune and run transformer models that are larger than the memory of the machine.

model = outsize.load("path/to/model", host="20GiB", disk="/nvme/scratch")
optimizer = outsize.AdamW(model, lr=1e-5, max_grad_norm=1.0)
for batch in loader:
    loss = model(**batch).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
outsize.save(model, "out")
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from outsize.config import Pins
from outsize.errors import OutsizeError

if TYPE_CHECKING:
    from outsize import checkpoint
    from outsize.engine import (
        SGD,
        AdamW,
        AdamW8bit,
        Adan,
        Advice,
        Lion,
        PlanSummary,
        Prediction,
        Recording,
        Report,
        SGDSaI,
        advise,
        decay_groups,
        load,
        predict,
        record,
        report,
        save,
        wrap,
    )
    from outsize.serve import pipeline, preview

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "AdamW",
    "AdamW8bit",
    "Adan",
    "Advice",
    "Lion",
    "OutsizeError",
    "Pins",
    "PlanSummary",
    "Prediction",
    "Recording",
    "Report",
    "SGDSaI",
    "advise",
    "checkpoint",
    "decay_groups",
    "load",
    "pipeline",
    "predict",
    "preview",
    "record",
    "report",
    "save",
    "wrap",
]


def __getattr__(name: str) -> Any:
    # torch and transformers take seconds to import; a command that only prints its help needs neither.
    if name == "checkpoint":
        return importlib.import_module("outsize.checkpoint")
    if name in ("pipeline", "preview"):
        from outsize import serve

        return getattr(serve, name)
    if name in __all__:
        from outsize import engine

        return getattr(engine, name)
    raise AttributeError(f"module 'outsize' has no attribute {name!r}")
