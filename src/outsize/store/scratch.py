"""Scratch files of a run on its disks, and their budgets."""

from __future__ import annotations

from pathlib import Path

from outsize.config import DiskBudget, Home, Settings, cache_folder, cache_limit, format_bytes
from outsize.plan import Placement
from outsize.plan.planner import DiskShortage
from outsize.tier import DiskTier, StripedTier, Tier
from outsize.tier.striped import part_bytes


def open_scratch(name: str, num_bytes: int, settings: Settings, num_threads: int) -> Tier | None:
    """Open `num_bytes` of scratch space, striped over all folders, that goes with the process; None for no bytes."""
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


def packed_places(settings: Settings) -> tuple[DiskBudget, ...]:
    """Folders for packed weights, which outlive the process: below the disks' folders, else in the cache folder.

    Raises ConfigError if the limit of the cache is not a size.
    """
    if settings.budgets.disks:
        return tuple(
            DiskBudget(disk.folder / "outsize-packed", disk.num_bytes) for disk in settings.budgets.disks
        )
    return (DiskBudget(cache_folder() / "packed", cache_limit()),)


def disk_bytes(placement: Placement, settings: Settings, versions_bytes: int | None = None) -> int:
    """Bytes that records and inputs of blocks take on disk. Raises DiskShortage if a budget does not allow them.

    `versions_bytes` is what records take if commits are kept.
    """
    disks = settings.budgets.disks
    inputs = placement.inputs_bytes if placement.inputs is Home.DISK else 0
    store = placement.disk_bytes if disks else 0
    if versions_bytes is not None:
        store = versions_bytes
    num_bytes = store + inputs
    share = num_bytes if len(disks) < 2 else sum(part_bytes(each, len(disks)) for each in (store, inputs))
    for disk in disks:
        if disk.num_bytes is not None and share > disk.num_bytes:
            part = "" if len(disks) == 1 else f", {format_bytes(share)} on each of {len(disks)}"
            what = "the state" if not inputs else "the state and the inputs of blocks"
            what += " and commits of it" if versions_bytes is not None else ""
            raise DiskShortage(
                f"{what} {'takes' if what == 'the state' else 'take'} {format_bytes(num_bytes)} on disk{part}; "
                f"{disk.folder} may hold {format_bytes(disk.num_bytes)}",
                hint=f'disk="{disk.folder}:{-(-share // 2**20)}MiB" works',
            )
    return num_bytes
