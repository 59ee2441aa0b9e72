"""The disk tier against raw direct I/O on the same disk: same bytes, same piece size, same threads.

    python benchmarks/disk.py --folder /var/tmp

Raw is a thread pool calling preadv and pwritev on its own preallocated file, without checksums. Rounds of
both are interleaved in turns, so that a drive that slows down slows both; the figures are medians. Both files
are written once before anything is measured, since reading what was never written needs no disk. The ratio is
the median of the ratios of neighbours.

Figures (2026-11, virtual machine with 2 cores that other work kept busy, virtio disk, ext4, Python 3.11,
xxhash 4.1, 15 to 21 rounds, some fifteen runs): reads 2.6 to 3.4 GB/s, 0.92 to 0.99 of raw, mostly 0.95;
writes 5.6 to 7.5 GB/s, 0.79 to 0.99 of raw, the less the busier the cores. With the hash taken out writes
reached 0.95 and 1.10 (two runs): what is missing is the core time of XXH3, 25 to 33 GB/s of one core, beside
writes of 7 GB/s.

Tried without effect on that: pieces of 1, 2 and 8 MiB; 6 and 8 threads; hashing after the write; two more
threads than may use the drive at once, so that hashing never lowers the queue depth.
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from outsize.config import format_bytes, parse_bytes
from outsize.tier.base import Transfer
from outsize.tier.disk import PIECE_BYTES, DiskTier
from outsize.tier.host import HostArena


def timed(run: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    run()
    return time.perf_counter() - start_s


def main() -> None:
    parser = argparse.ArgumentParser(description="disk tier against raw direct I/O")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--size", default="768MiB", help="bytes per round, of each of two files")
    parser.add_argument("--transfer", default="32MiB", help="bytes per transfer of the tier")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--no-verify", action="store_true")
    args = parser.parse_args()
    transfer_bytes = parse_bytes(args.transfer)
    num_bytes = parse_bytes(args.size) // transfer_bytes * transfer_bytes

    arena = HostArena(num_bytes)
    region = arena.allocate(num_bytes, "buffer")
    buffer = region.buffer
    noise = os.urandom(1 << 20)
    for at in range(0, num_bytes, mmap.PAGESIZE * 256):
        buffer[at : at + len(noise)] = noise[: num_bytes - at]

    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        tier = DiskTier(Path(folder), num_bytes, verify=not args.no_verify, num_threads=args.threads)
        raw_path = Path(folder) / "raw"
        raw_fd = os.open(raw_path, os.O_RDWR | os.O_CREAT | (os.O_DIRECT if tier.is_direct else 0))
        os.posix_fallocate(raw_fd, 0, num_bytes)
        pool = ThreadPoolExecutor(args.threads)
        pieces = range(0, num_bytes, PIECE_BYTES)

        def raw_write() -> None:
            list(pool.map(lambda at: os.pwritev(raw_fd, [buffer[at : at + PIECE_BYTES]], at), pieces))

        def raw_read() -> None:
            list(pool.map(lambda at: os.preadv(raw_fd, [buffer[at : at + PIECE_BYTES]], at), pieces))

        def each(start: Callable[[int, memoryview, str], Transfer]) -> None:
            spans = range(0, num_bytes, transfer_bytes)
            for transfer in [start(at, buffer[at : at + transfer_bytes], "bench") for at in spans]:
                transfer.wait()

        def tier_write() -> None:
            each(tier.start_write)

        def tier_read() -> None:
            each(tier.start_read)

        runs = {"write": (raw_write, tier_write), "read": (raw_read, tier_read)}
        for pair in runs.values():
            for run in pair:
                run()
        times: dict[str, list[tuple[float, float]]] = {verb: [] for verb in runs}
        for index in range(args.rounds):
            for verb, (raw, ours) in runs.items():
                if index % 2:
                    ours_s = timed(ours)
                    times[verb].append((timed(raw), ours_s))
                else:
                    raw_s = timed(raw)
                    times[verb].append((raw_s, timed(ours)))

        print(
            f"{format_bytes(num_bytes)} in transfers of {format_bytes(transfer_bytes)}, pieces of "
            f"{format_bytes(PIECE_BYTES)}, {args.threads} threads, {args.rounds} rounds, "
            f"{'direct' if tier.is_direct else 'buffered'}, verify {'on' if tier.verify else 'off'}, "
            f"{os.cpu_count()} cores"
        )
        print(f"{'':8}{'raw GB/s':>10}{'tier GB/s':>11}{'ratio':>8}{'lowest':>9}{'highest':>9}")
        for verb, pairs in times.items():
            raw_rate = statistics.median(num_bytes / raw_s / 1e9 for raw_s, _ in pairs)
            tier_rate = statistics.median(num_bytes / ours_s / 1e9 for _, ours_s in pairs)
            ratios = sorted(raw_s / ours_s for raw_s, ours_s in pairs)
            print(
                f"{verb:8}{raw_rate:10.2f}{tier_rate:11.2f}{statistics.median(ratios):8.2f}"
                f"{ratios[0]:9.2f}{ratios[-1]:9.2f}"
            )
        tier.close()
        os.close(raw_fd)
        pool.shutdown()


if __name__ == "__main__":
    main()
