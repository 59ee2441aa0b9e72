"""Writing a model that lives in the store as a folder, a block at a time."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from outsize.block import Block
from outsize.engine.runtime import Runtime
from outsize.model import MAX_SHARD_BYTES, Existing, has_adapters, write_adapters, write_folder


def write_model(
    runtime: Runtime,
    path: Path,
    *,
    existing: Existing,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer_from: str | Path | None = None,
    watch: Callable[[int, int], object] | None = None,
) -> None:
    """Write a model: a Hugging Face folder, or, where adapters were put around it, a folder of peft's.

    `watch` is called with the number of each block as it begins, from 1, and how many there are. Raises UsageError where
    the model was changed since it was opened, or the folder is taken.
    """
    runtime.check()
    if has_adapters(runtime.model.module):
        write_adapters(runtime.model.module, path, existing)
        return
    numbers = {block.name: number for number, block in enumerate(runtime.model.cut.blocks, 1)}

    def fetch(block: Block) -> list[torch.Tensor]:
        if watch is not None:
            watch(numbers[block.name], len(numbers))
        return runtime.model.parameters.read(block)

    write_folder(
        runtime.model.module,
        runtime.model.cut.blocks,
        fetch,
        path,
        tokenizer_from=tokenizer_from,
        max_shard_bytes=max_shard_bytes,
        existing=existing,
    )
