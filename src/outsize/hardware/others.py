"""What other programs take of the processor meanwhile: figures that are measured beside them are too low."""

from __future__ import annotations

import os
import time
from pathlib import Path

MOST_OTHERS = 0.1
"""Part of the processor that other programs may take before it is said."""

_STAT = Path("/proc/stat")


class OtherPrograms:
    """Watches from when it is made; `part` is the part of all cores' time that was not idle and not this process's."""

    def __init__(self) -> None:
        self._start_s = time.monotonic()
        self._start_busy_s = _busy_s()

    def part(self) -> float:
        """In [0, 1]; 0 where the system does not say. What a virtual machine's host gave to others counts too."""
        cores_s = (time.monotonic() - self._start_s) * (os.cpu_count() or 1)
        return min(max((_busy_s() - self._start_busy_s) / max(cores_s, 1e-9), 0.0), 1.0)


def _busy_s() -> float:
    """Seconds of all cores, since the system started, that were taken by others."""
    try:
        user, nice, system, _idle, _waiting, irq, softirq, steal = map(int, _STAT.read_text().split()[1:9])
    except (OSError, ValueError):
        return 0.0
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK") - time.process_time()
