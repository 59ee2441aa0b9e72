"""Scratch space of a run on the disks it was given."""

from __future__ import annotations

from pathlib import Path

from outsize.config import Settings
from outsize.tier import DiskTier, StripedTier, Tier
from outsize.tier.striped import part_bytes


def open_scratch(name: str, num_bytes: int, settings: Settings, num_threads: int) -> Tier | None:
    """`num_bytes` under `name`, spread over all folders, gone with the process; None where nothing is asked for."""
    if not num_bytes:
        return None
    folders = [disk.folder for disk in settings.budgets.disks]
    verify = settings.pins.verify

    def open_one(folder: Path, size: int) -> Tier:
        return DiskTier(
            folder,
            size,
            name=name,
            verify=verify,
            anonymous=True,
            num_threads=num_threads,
        )

    if len(folders) == 1:
        return open_one(folders[0], num_bytes)
    opened: list[Tier] = []
    try:
        for folder in folders:
            opened.append(open_one(folder, part_bytes(num_bytes, len(folders))))
    except BaseException:
        for tier in opened:
            tier.close()
        raise
    return StripedTier(opened, num_bytes)
