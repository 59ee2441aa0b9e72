"""Serves models: requests are batched continuously over pages, while weights stream."""

from outsize.serve.engine import Engine, Serves, open_engine
from outsize.serve.job import Progress, run_job
from outsize.serve.pipeline import Pipeline, pipeline
from outsize.serve.preview import preview
from outsize.serve.request import Completion, Finish, Request, Sampling, Stream, Token
from outsize.serve.runner import Concurrency

__all__ = [
    "Completion",
    "Concurrency",
    "Engine",
    "Finish",
    "Pipeline",
    "Progress",
    "Request",
    "Sampling",
    "Serves",
    "Stream",
    "Token",
    "open_engine",
    "pipeline",
    "preview",
    "run_job",
]
