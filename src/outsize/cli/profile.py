"""`outsize profile`: measures what this machine can do, and keeps it for planning."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from outsize.cli import options as shared
from outsize.config import ComputeType, DiskBudget, format_bytes
from outsize.errors import ConfigError

if TYPE_CHECKING:
    from outsize.plan.profile import Profile

_EXAMPLES = """\
examples:
  outsize profile --disk /nvme/scratch
      measure this machine and the disk of that folder, in about 20 seconds; later, show what was measured
  outsize profile --disk /nvme/scratch --again
      measure once more, such as when nothing else runs
  outsize profile --disk /nvme/scratch --out this-machine.json
      also write the figures to a file, to plan for this machine on another

Nothing stays on the disk. Measuring writes there for some seconds, as fast as it can.
"""


def add_parser(commands: shared.Commands[argparse.ArgumentParser]) -> None:
    """Add the command to the command line."""
    parser = shared.command(
        commands, "profile", "measure what this machine can do: disk, memory, computing", _EXAMPLES
    )
    parser.add_argument(
        "--disk", metavar="DIR", help="folder on the disk to measure (default: that of the cache)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the figures to this JSON file")
    parser.add_argument("--again", action="store_true", help="measure, even where figures are known")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON instead of a table")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Measure or look up, save, print."""
    from outsize.hardware import load_or_measure, profile_path
    from outsize.hardware.cache import write

    if options.out is not None:
        _check_out(options.out)
    disks = DiskBudget.parse_all(options.disk) if options.disk is not None else ()
    if len(disks) > 1:
        raise ConfigError(
            f"--disk {options.disk}: one disk is measured at a time",
            hint="run it with the first of them: that one's profile is used to plan with several",
        )
    folder = disks[0].folder if disks else None
    profile = load_or_measure(folder, _say, again=options.again)
    if options.out is not None:
        write(profile, options.out)
    if options.json:
        print(profile.to_json())
    else:
        print("\n".join(table(profile)))
        places = [profile_path(folder), *([options.out] if options.out is not None else [])]
        print(f"\nsaved {', '.join(str(place) for place in places if place.exists())}")
    return 0


def table(profile: Profile) -> Iterator[str]:
    """The lines that show a profile: rates with units and meanings, then what each keeps beside another."""
    yield profile.name
    yield profile.source
    yield ""
    for name, value, meaning in _rows(profile):
        yield f"  {name:<18} {value:>14}   {meaning}"
    names = [str(name) for name in profile.contention]
    if names:
        yield ""
        yield "What each keeps of its rate while another runs:"
        yield ""
        yield f"  {'':<18}" + "".join(f"{'+ ' + name:>11}" for name in names)
        for first, others in profile.contention.items():
            speeds = {str(second): f"{speed:.0%}" for second, speed in others.items()}
            cells = "".join(f"{speeds.get(name, ''):>11}" for name in names)
            yield f"  {first:<18}{cells}".rstrip()


def _rows(profile: Profile) -> Iterator[tuple[str, str, str]]:
    place = "device" if profile.has_device else "processor"
    yield "disk read", _bytes(profile.disk_read), "from the disk to memory"
    yield "disk write", _bytes(profile.disk_write), "from memory to the disk"
    yield "host copy", _bytes(profile.host_copy), "copied within memory"
    yield (
        "update",
        _bytes(profile.update),
        "moved in memory by AdamW: 28 bytes per parameter in fp32, 26 in bf16",
    )
    for kind in ComputeType:
        if kind in profile.matmul:
            rate = f"{profile.matmul[kind] / 1e9:,.0f} GFLOP/s"
            yield f"matmul {kind}", rate, f"products of a layer's sizes, on the {place}"
    for name, value, meaning in (
        ("up", profile.up, "from memory to the device"),
        ("down", profile.down, "from the device to memory"),
        ("device update", profile.device_update, "moved by AdamW beside the device"),
        ("device memory", profile.device_memory, "read and written in the device's memory"),
    ):
        if value is not None:
            yield name, _bytes(value), meaning
    yield "memory", format_bytes(profile.host_bytes), f"in all; {profile.num_threads} threads compute"
    for name, count, meaning in (
        ("update threads", profile.update_threads, "are enough to update weights"),
        ("disk threads", profile.io_threads, "are enough to read and write the disk"),
    ):
        if count is not None:
            yield name, str(count), meaning
    if profile.device_bytes is not None:
        yield "device", format_bytes(profile.device_bytes), "memory of the device"
    if profile.disk_endurance_bytes is not None:
        yield "disk endurance", f"{profile.disk_endurance_bytes / 1e12:,.0f} TB", "may be written in its life"


def _bytes(rate: float) -> str:
    return f"{rate / 1e9:,.2f} GB/s"


def _check_out(out: Path) -> None:
    """Refuse, before anything is measured, a file that could not be written or is no profile."""
    from outsize.plan.profile import Profile

    if not out.parent.is_dir():
        raise ConfigError(
            f"--out {out}: there is no folder {out.parent}", hint="make it, or name another file"
        )
    if out.exists():
        try:
            Profile.read(out)
        except ConfigError as error:
            raise ConfigError(
                f"--out {out}: the file there is no profile", hint="name another file, or remove that one"
            ) from error


def _say(text: str) -> None:
    print(text, file=sys.stderr)
