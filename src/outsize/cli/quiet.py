"""Keeps other libraries' progress bars, advice and warnings out of our output. OUTSIZE_DEBUG=1 lets them
through."""

from __future__ import annotations

import os
import warnings


def before_imports() -> None:
    """Set what libraries read while they are imported; imports none of them. Also keeps them off the
    network."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if _is_wanted():
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
        for module in ("torch", "transformers", "huggingface_hub", "tokenizers", "numpy"):
            warnings.filterwarnings("ignore", module=rf"{module}(\..*)?")


def after_imports() -> None:
    """Silence what can only be silenced by a call."""
    if _is_wanted():
        import transformers

        transformers.utils.logging.disable_progress_bar()
        transformers.utils.logging.set_verbosity_error()


def _is_wanted() -> bool:
    return os.environ.get("OUTSIZE_DEBUG") != "1"
