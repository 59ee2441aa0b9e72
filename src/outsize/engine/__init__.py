"""Runs models block by block: sessions, visits, the executor, the optimizer."""

from outsize.engine.api import load, save, wrap
from outsize.engine.optimizer import AdamW
from outsize.engine.report import Report, report

__all__ = ["AdamW", "Report", "load", "report", "save", "wrap"]
