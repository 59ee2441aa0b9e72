"""Runs models block by block: visits, the executor, planning and setup, the optimizers."""

from outsize.engine.api import load, save, wrap
from outsize.engine.effects import Repeatable
from outsize.engine.optimizers import SGD, AdamW, AdamW8bit, Adan, Lion, SGDSaI, decay_groups
from outsize.engine.predict import Advice, Prediction, advise, predict
from outsize.engine.preview import preview
from outsize.engine.record import Recording, record
from outsize.engine.report import Report, report
from outsize.engine.summary import PlanSummary

__all__ = [
    "SGD",
    "AdamW",
    "AdamW8bit",
    "Adan",
    "Advice",
    "Lion",
    "PlanSummary",
    "Prediction",
    "Recording",
    "Repeatable",
    "Report",
    "SGDSaI",
    "advise",
    "decay_groups",
    "load",
    "predict",
    "preview",
    "record",
    "report",
    "save",
    "wrap",
]
