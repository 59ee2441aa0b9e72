"""What machines can do: this one, measured and remembered, and others, from their data sheets.

The figures are a `Profile` (`outsize.plan.profile`). Everything measured goes through the code that training uses: the disk
tier, the compiled update rule, torch's own products.
"""

from outsize.hardware.cache import kept, load_or_measure, profile_path
from outsize.hardware.measure import measure
from outsize.hardware.shipped import machine, machine_names

__all__ = ["kept", "load_or_measure", "machine", "machine_names", "measure", "profile_path"]
