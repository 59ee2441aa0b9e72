"""Puts the emulated device into every Python process that is started with this folder in its PYTHONPATH."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[3]))
import tests.emulation  # noqa: F401 (registers the device)
