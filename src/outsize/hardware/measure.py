"""Measures this machine: every resource alone, and every two of them at once.

All figures are taken in turn, round after round, and the middle one counts: what else the machine did in one round does not
decide. What one resource keeps beside another is compared with what it did alone in the same round.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from itertools import combinations
from pathlib import Path
from statistics import median

import torch

from outsize.config import ComputeType, cache_folder
from outsize.errors import ConfigError
from outsize.hardware import device as on_device
from outsize.hardware import disk, host, identity, threads
from outsize.hardware.others import MOST_OTHERS, OtherPrograms
from outsize.hardware.rate import Rate, Work, rate, rates_together
from outsize.optim import ADAMW, gpu_kernel, start_compile
from outsize.plan.profile import Profile, Resource
from outsize.tier import CudaDevice, DiskTier, HostArena, Verb, Way

SECONDS = 20.0
ROUNDS = 5

_MOST_CHUNKS = 32
"""Chunks of each plane that is updated: half a GiB in all, more than caches hold."""

_TRIALS = 0.1
"""Part of the time in which numbers of threads are tried."""

_OVERHEAD = 0.6
"""Part of the time in which units count; the rest goes into first units, and units that take longer than they may."""

_LEAST_KEPT = 0.01


@dataclass(frozen=True, slots=True)
class Works:
    """All that is measured, by name: `busy` also two at once, `alone` only alone; products under their compute type."""

    busy: Mapping[Resource, Work]
    alone: Mapping[str, Work]
    compute_type: ComputeType
    """Of `busy[Resource.COMPUTE]`."""
    update_threads: int
    io_threads: int
    """With which updates and the disk are measured."""


@dataclass(slots=True)
class Figures:
    """What was measured, one figure per round."""

    rates: dict[str, list[Rate]] = field(default_factory=dict)
    kept: dict[tuple[Resource, Resource], list[float]] = field(default_factory=dict)

    def rate(self, name: str) -> float:
        """The middle rate, to four digits."""
        of_disk = name in (Resource.READ, Resource.WRITE)
        return float(f"{median(each.mean if of_disk else each.middle for each in self.rates[name]):.4g}")

    def spread(self) -> dict[str, float]:
        """By what part of the middle rate the others lie apart from it, the lowest and the highest left out."""
        names = {str(Resource.READ): "disk_read", str(Resource.WRITE): "disk_write"}
        found = {}
        for name in self.rates.keys() - {str(Resource.COMPUTE), *map(str, ComputeType)}:
            of_disk = name in (Resource.READ, Resource.WRITE)
            values = sorted(each.mean if of_disk else each.middle for each in self.rates[name])
            inner = values[1:-1] if len(values) > 3 else values
            middle = median(values)
            found[names.get(name, name)] = round(max(inner[-1] / middle, middle / inner[0]) - 1, 3)
        return found

    def contention(self) -> dict[Resource, dict[Resource, float]]:
        """`[a][b]`: the speed that `a` keeps while `b` runs; the middle one, in (0, 1]."""
        found: dict[Resource, dict[Resource, float]] = {}
        for (first, second), parts in self.kept.items():
            found.setdefault(first, {})[second] = round(min(max(median(parts), _LEAST_KEPT), 1.0), 3)
        return found


def measure(folder: Path | None, *, seconds: float = SECONDS, say: Callable[[str], None]) -> Profile:
    """Measure this machine, with the disk of `folder` (None: of the cache folder), in about `seconds`.

    Takes about 1.2 GiB of memory, less on small machines, and 540 MiB of disk, and writes as fast as the disk can for a
    third of the time. The first time it compiles the update rule, half a minute more. Raises ConfigError where the folder
    cannot hold a store, StorageError where the disk fails.
    """
    if not 0 < seconds < math.inf:
        raise ConfigError(f"seconds: {seconds} is no positive number", hint="pass seconds=20")
    if folder is None:
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
    has_device = torch.cuda.is_available()
    name = identity.identity(folder)
    with _opened(folder, has_device, seconds, say) as works:
        say(f"measuring for about {seconds:.0f} s; what else runs now counts against this machine")
        others = OtherPrograms()
        figures = _measure(works, seconds)
        part = others.part()
    source = f"measured {date.today().isoformat()}, disk of {folder.resolve()}"
    if part > MOST_OTHERS:
        source += f", while other programs took {part:.0%} of the processor"
        say(f"other programs took {part:.0%} of the processor: measure again (--again) when they are done")
    return Profile(
        name=identity.machine_text(),
        source=source,
        disk_read=figures.rate(Resource.READ),
        disk_write=figures.rate(Resource.WRITE),
        host_copy=figures.rate("host_copy"),
        update=figures.rate(Resource.UPDATE),
        matmul={
            kind: figures.rate(Resource.COMPUTE if kind is works.compute_type else kind)
            for kind in ComputeType
        },
        host_bytes=identity.memory_bytes(),
        num_threads=torch.get_num_threads(),
        identity=name,
        device_bytes=torch.cuda.get_device_properties().total_memory if has_device else None,
        up=figures.rate(Resource.UP) if has_device else None,
        down=figures.rate(Resource.DOWN) if has_device else None,
        device_update=figures.rate("device_update") if has_device else None,
        device_memory=figures.rate("device_memory") if has_device else None,
        contention=figures.contention(),
        spread=figures.spread(),
        update_threads=works.update_threads,
        io_threads=works.io_threads,
    )


def _measure(works: Works, seconds: float) -> Figures:
    pairs = list(combinations(works.busy, 2))
    alone: dict[str, Work] = {str(resource): work for resource, work in works.busy.items()}
    alone.update(works.alone)
    slice_s = _slice_s(seconds, len(alone) + len(pairs))
    figures = Figures()
    for _ in range(ROUNDS):
        for key, work in alone.items():
            figures.rates.setdefault(key, []).append(rate(work, slice_s))
        for first, second in pairs:
            together = rates_together(works.busy[first], works.busy[second], slice_s)
            for (one, other), beside in zip(((first, second), (second, first)), together, strict=True):
                figures.kept.setdefault((one, other), []).append(beside.mean / figures.rates[one][-1].mean)
    return figures


def _slice_s(seconds: float, num_slices: int) -> float:
    return seconds * _OVERHEAD / (ROUNDS * num_slices)


@contextmanager
def _opened(folder: Path, has_device: bool, seconds: float, say: Callable[[str], None]) -> Iterator[Works]:
    """Everything that is measured, ready to run; given back at the end."""
    compute_type = ComputeType.BFLOAT16 if has_device else ComputeType.FLOAT32
    arena = HostArena(2 * disk.BUFFERS_BYTES)
    with _open_tier(folder) as tier:
        compilation = start_compile(ADAMW, compute_type)
        say("preparing: filling a file; the first time, compiling the update rule (half a minute)")
        write = disk.transfers(tier, Verb.WRITE, disk.HALF_BYTES, arena)
        disk.fill(disk.transfers(tier, Verb.WRITE, 0, HostArena(disk.BUFFERS_BYTES)))
        disk.fill(write)
        num_chunks = max(4, min(_MOST_CHUNKS, identity.memory_bytes() // (1 << 30)))
        update = host.update(compilation.wait(), num_chunks, torch.device("cpu"))
        read = disk.transfers(tier, Verb.READ, 0, arena)
        counts = threads.update_counts(torch.get_num_threads(), threads.nodes())
        trial_s = seconds * _TRIALS / (len(counts) + len(threads.IO_COUNTS))

        def updates(count: int) -> float:
            return rate(host.with_threads(update, count), trial_s).middle

        def transfers(count: int) -> float:
            tier.use_threads(count)
            return sum(each.mean for each in rates_together(read, write, trial_s))

        update_threads = threads.tried(counts, updates)
        io_threads = threads.tried(threads.IO_COUNTS, transfers)
        tier.use_threads(io_threads)
        busy = {
            Resource.UPDATE: host.with_threads(update, update_threads),
            Resource.READ: read,
            Resource.WRITE: write,
        }
        alone: dict[str, Work] = {"host_copy": host.copy()}
        if has_device:
            with _device_works(busy, alone):
                yield Works(_in_order(busy), alone, compute_type, update_threads, io_threads)
        else:
            most_s = _slice_s(seconds, 12)
            busy[Resource.COMPUTE] = host.matmul(ComputeType.FLOAT32, most_s)
            alone[ComputeType.BFLOAT16] = host.matmul(ComputeType.BFLOAT16, most_s)
            yield Works(_in_order(busy), alone, compute_type, update_threads, io_threads)


def _in_order(busy: Mapping[Resource, Work]) -> dict[Resource, Work]:
    return {resource: busy[resource] for resource in Resource if resource in busy}


@contextmanager
def _open_tier(folder: Path) -> Iterator[DiskTier]:
    # Without a name in the folder: the space goes with this process, however that ends.
    tier = DiskTier(folder, disk.FILE_BYTES, name=f"outsize-profile-{os.getpid()}.store", anonymous=True)
    try:
        yield tier
    finally:
        tier.close()


@contextmanager
def _device_works(busy: dict[Resource, Work], alone: dict[str, Work]) -> Iterator[None]:
    """Add the works of the current CUDA device."""
    device = CudaDevice()
    arena = HostArena(2 * on_device.COPY_BYTES, device)
    regions = {way: arena.allocate(on_device.COPY_BYTES, f"copy {way}") for way in Way}
    kernel = gpu_kernel(ADAMW, ComputeType.BFLOAT16, device.torch_device)
    busy[Resource.COMPUTE] = on_device.matmul(device, ComputeType.BFLOAT16)
    busy[Resource.UP] = on_device.link(device, Way.UP, regions[Way.UP])
    busy[Resource.DOWN] = on_device.link(device, Way.DOWN, regions[Way.DOWN])
    alone[ComputeType.FLOAT32] = on_device.matmul(device, ComputeType.FLOAT32)
    alone["device_memory"] = on_device.memory(device)
    alone["device_update"] = host.update(
        kernel, _MOST_CHUNKS, device.torch_device, lambda: device.mark().wait()
    )
    try:
        yield
    finally:
        device.finish()
        for region in regions.values():
            region.free()
