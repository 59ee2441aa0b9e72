"""Decode attention over pages in two layouts: `python benchmarks/pages.py --layers 16 --requests 8`.

Page-major: all layers of a page lie together, as the engine has them. Layer-major: each layer has an allocation for its
keys and one for its values. The compiled kernel reads both, on one thread, in turn; a step goes through all layers, as
decoding does, over pages in random order. CPU time is printed, which other processes disturb least.
"""

import argparse
import statistics
import time
from collections.abc import Sequence

import torch

from outsize.block import align
from outsize.kv.kernel import Kernel, Units, load
from outsize.kv.pages import PAGE_TOKENS
from outsize.kv.store import LayerShape, PagedKV, page_bytes
from outsize.tier import HostArena

Pages = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""Keys and values of each layer."""


def zeros(num_elements: int, dtype: torch.dtype) -> torch.Tensor:
    num_bytes = num_elements * dtype.itemsize
    return HostArena(align(num_bytes)).allocate(num_bytes, "pages").tensor(dtype, num_elements)


def layer_major(like: Pages) -> Pages:
    """The same contents, each layer's keys and values apart from all others."""
    copies = []
    for part in (part for layer in like for part in layer):
        copies.append(zeros(part.numel(), part.dtype).view(part.shape).copy_(part))
    return list(zip(copies[::2], copies[1::2], strict=True))


def attend(kernel: Kernel, pages: Pages, query: torch.Tensor, units: Units, tables: torch.Tensor) -> float:
    """CPU seconds of one step."""
    start = time.process_time()
    for keys, values in pages:
        kernel.attend(query, keys, values, units, tables, scale=0.1, softcap=0.0, window=0, sinks=None)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--requests", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--turns", type=int, default=60)
    given = parser.parse_args()
    torch.set_num_threads(1)
    dtype = getattr(torch, given.dtype)
    kernel = load(dtype)
    assert kernel is not None, "no compiler"
    shape = LayerShape(given.heads, given.kv_heads, given.width, given.width, None)
    layers = dict.fromkeys(range(given.layers), shape)
    pages_each = given.tokens // PAGE_TOKENS
    num_pages = given.requests * pages_each
    size = page_bytes(layers, dtype)
    kv = PagedKV(layers, zeros(num_pages * size // dtype.itemsize, dtype), num_pages)
    kv.pages.normal_()
    page_major = [(kv.keys[layer], kv.values[layer]) for layer in layers]
    layouts = {"layer-major": layer_major(page_major), "page-major": page_major}
    query = torch.randn(given.requests, given.heads, given.width)
    units = Units([(row, 1, row * pages_each, given.tokens - 1) for row in range(given.requests)])
    tables = torch.randperm(num_pages).to(torch.int32)
    times: dict[str, list[float]] = {name: [] for name in layouts}
    for turn in range(given.turns + 1):
        for name in sorted(layouts, reverse=turn % 2 == 1):
            taken = attend(kernel, layouts[name], query, units, tables)
            if turn:
                times[name].append(taken)
    for name, found in times.items():
        first, median, _ = statistics.quantiles(found, n=4)
        print(
            f"{name}: least {1e3 * min(found):.1f} ms, first quartile {1e3 * first:.1f}, median {1e3 * median:.1f}"
        )
    ratios = [new / old for old, new in zip(*times.values(), strict=True)]
    print(f"page-major takes {statistics.median(ratios):.3f} of layer-major (pages of {size >> 10} KiB)")


if __name__ == "__main__":
    main()
