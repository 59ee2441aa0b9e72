"""Where compiled code lies that test sessions share."""

import os
from pathlib import Path


def builds_folder() -> Path:
    """`OUTSIZE_TEST_BUILDS`, or a folder in pytest's cache; nothing under the home directory."""
    default = Path(__file__).parent.parent / ".pytest_cache" / "builds"
    return Path(os.environ.get("OUTSIZE_TEST_BUILDS") or default)
