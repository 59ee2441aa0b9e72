"""Run a script, and the Python processes it starts, on the emulated device: `python -m tests.emulation SCRIPT ...`."""

import os
import sys
from pathlib import Path

site = str(Path(__file__).with_name("site"))
search = os.pathsep.join(filter(None, (site, os.environ.get("PYTHONPATH"))))
os.execve(sys.executable, [sys.executable, *sys.argv[1:]], {**os.environ, "PYTHONPATH": search})
