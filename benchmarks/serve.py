"""What a decode pass costs beside its linear layers and the bytes of its keys and values.

    python benchmarks/serve.py                              32 requests of 1,024 tokens, four layers of Qwen3-0.6B's shape
    python benchmarks/serve.py --requests 8 --context 4096
    python benchmarks/serve.py --dense                      beside them, transformers' attention over a dense cache

A pass is that of the engine (`Runner.run`). Its floor is each linear layer alone, on as many rows, and the keys and values
read once at the bandwidth that adding up a large array reaches. The goal is 1.25 times the floor. All are measured in turn,
round by round; medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from torch.nn import functional as F

from outsize.kv import PAGE_TOKENS, pages_for
from outsize.serve.runner import Part, Runner


def in_turn(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of each of `runs`, which follow one another `rounds` times, after once."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(each[1:]) for name, each in times.items()}


def open_model(layers: int) -> transformers.PreTrainedModel:
    config = transformers.Qwen3Config(
        hidden_size=1024,
        intermediate_size=3072,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=2048,
        max_position_embeddings=40960,
    )
    return transformers.Qwen3ForCausalLM(config).eval()


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--requests", type=int, default=32)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--dense", action="store_true")
    options = parser.parse_args()
    model = open_model(options.layers)
    count, context = options.requests, options.context
    per_request = pages_for(context + 1)
    token_bytes = options.layers * 2 * 8 * 128 * 4
    runner = Runner(model, kv=(count * per_request + 1) * PAGE_TOKENS * token_bytes)
    parts = [
        Part((5,), context, range(1 + i * per_request, 1 + (i + 1) * per_request), (0,)) for i in range(count)
    ]
    inputs = {width: torch.randn(count, width) for width in (1024, 2048, 3072)}
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    array = torch.ones(256 << 20)

    def products() -> None:
        for linear in linears:
            F.linear(inputs[linear.in_features], linear.weight)

    runs: dict[str, Callable[[], object]] = {
        "pass": lambda: runner.run(parts),
        "linear layers": products,
        "array": array.sum,
    }
    if options.dense:
        cache = transformers.DynamicCache(config=model.config)
        for layer in range(options.layers):
            keys = torch.randn(count, 8, context, 128)
            cache.update(keys, keys.clone(), layer)
        ids, mask = torch.full((count, 1), 5), torch.ones(count, context + 1, dtype=torch.long)
        mask[:, :3] = 0  # requests of one batch have unlike lengths: a mask is made

        def dense() -> None:
            model(ids, attention_mask=mask, past_key_values=cache)
            cache.crop(-1)

        runs["dense cache"] = dense
    took = in_turn(runs, options.repeat)
    kv_bytes = count * (context + 1) * token_bytes
    bandwidth = array.nbytes / took.pop("array")
    kv_s = kv_bytes / bandwidth
    floor_s = took["linear layers"] + kv_s
    print(f"{count} requests of {context} tokens, {options.layers} layers, {torch.get_num_threads()} threads")
    print(f"keys and values {kv_s * 1e3:8.1f} ms  ({kv_bytes / 1e6:.0f} MB at {bandwidth / 1e9:.1f} GB/s)")
    for name, each_s in took.items():
        print(f"{name:15} {each_s * 1e3:8.1f} ms  {each_s / floor_s:.2f} times the floor")


if __name__ == "__main__":
    main()
