"""Runs models block by block: sessions, visits, the executor, the optimizer."""

from outsize.engine.api import load, save, wrap
from outsize.engine.optimizer import AdamW
from outsize.engine.preview import PlanSummary, preview
from outsize.engine.report import Report, report

__all__ = ["AdamW", "PlanSummary", "Report", "load", "preview", "report", "save", "wrap"]
