"""Full fine-tuning on one GPU with little of its memory: Outsize beside the same model with room, and its rivals.

One call, no network: models are made from configs with random weights. First parity with plain PyTorch (fp32 and bf16),
then the machine's own figures (products, both ways of the link), then tokens per second of each contender in a process
of its own, and a table last. Contenders that are not installed, or that do not fit, are named and left out.

    python benchmarks/gpu/train.py --size 8b --cap 24GiB --tokens 16384,32768,65536
    python benchmarks/gpu/train.py --size 4b --tokens 32768 --contenders outsize,fsdp2,deepspeed,accelerate
    python benchmarks/gpu/train.py --size tiny --tokens 512      a trial of the script itself, on any machine
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

SIZES = {
    "8b": {
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
    },
    "10b": {
        "hidden_size": 4096,
        "num_hidden_layers": 48,
        "intermediate_size": 12288,
        "num_attention_heads": 32,
    },
    "4b": {
        "hidden_size": 2560,
        "num_hidden_layers": 36,
        "intermediate_size": 9728,
        "num_attention_heads": 32,
    },
    "tiny": {"hidden_size": 64, "num_hidden_layers": 3, "intermediate_size": 128, "num_attention_heads": 4},
}
SEQ_LEN = 4096
CONTENDERS = ("outsize", "resident", "fsdp2", "accelerate", "deepspeed")


def config(size: str) -> Any:
    """Qwen3 of a size."""
    import transformers

    is_tiny = size == "tiny"
    return transformers.Qwen3Config(
        **SIZES[size],
        vocab_size=512 if is_tiny else 151936,
        num_key_value_heads=2 if is_tiny else 8,
        head_dim=16 if is_tiny else 128,
        max_position_embeddings=1 << 19,
        tie_word_embeddings=size == "4b",
        architectures=["Qwen3ForCausalLM"],
    )


def batches(size: str, tokens: int) -> Callable[[], Any]:
    """Random tokens `[rows, seq_len]`, on the host."""
    import torch

    generator = torch.Generator().manual_seed(0)
    seq_len = min(SEQ_LEN, tokens)
    vocab_size = config(size).vocab_size
    return lambda: torch.randint(0, vocab_size, (tokens // seq_len, seq_len), generator=generator)


# -- contenders: each returns what makes one step and gives its loss ---------------------------------------------------


def outsize_step(arguments: argparse.Namespace, folder: Path, *, home: str | None, capped: bool) -> Any:
    """Outsize: capped with state on the host, or with all of it resident."""
    import torch

    import outsize

    config(arguments.size).save_pretrained(folder / "model")
    has_device = torch.cuda.is_available()
    model = outsize.load(
        folder / "model",
        device=arguments.cap if capped and has_device else None,
        disk=folder,
        home=home,
        dtype="bfloat16",
        compile=arguments.compile,
        attention=arguments.attention,
        from_scratch=True,
    ).train()
    optimizer = outsize.AdamW(model, lr=1e-5, max_grad_norm=1.0)
    draw = batches(arguments.size, arguments.tokens)

    def step() -> float:
        ids = draw()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return step, lambda: print(outsize.report(model), file=sys.stderr)


def plain_model(arguments: argparse.Namespace, device: str) -> Any:
    """The model in fp32 masters with activation checkpointing."""
    import torch
    import transformers

    with torch.device(device):
        model = transformers.Qwen3ForCausalLM(config(arguments.size)).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


def plain_step(arguments: argparse.Namespace, model: Any, optimizer: Any, backward: Any = None) -> Any:
    """A plain loop on a GPU; the batch in one call."""
    import torch

    draw = batches(arguments.size, arguments.tokens)

    def step() -> float:
        ids = draw().cuda()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        (backward or torch.Tensor.backward)(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.item())

    return step, lambda: None


def fsdp2_step(arguments: argparse.Namespace, folder: Path) -> Any:
    """FSDP2 on one rank with `CPUOffloadPolicy`."""
    import torch
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29511", RANK="0", WORLD_SIZE="1")
    torch.distributed.init_process_group("cpu:gloo,cuda:nccl")
    model = plain_model(arguments, "cpu")
    policy: dict[str, Any] = {
        "offload_policy": CPUOffloadPolicy(),
        "mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16),
    }
    for layer in model.model.layers:
        fully_shard(layer, **policy)
    fully_shard(model, **policy)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    return plain_step(arguments, model, optimizer)


def accelerate_step(arguments: argparse.Namespace, folder: Path) -> Any:
    """accelerate with its FSDP plugin and CPU offload."""
    import accelerate
    import torch

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29512", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    plugin = accelerate.FullyShardedDataParallelPlugin(
        fsdp_version=2,
        cpu_offload=True,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["Qwen3DecoderLayer"],
    )
    accelerator = accelerate.Accelerator(mixed_precision="bf16", fsdp_plugin=plugin)
    model = plain_model(arguments, "cpu")
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    model, optimizer = accelerator.prepare(model, optimizer)
    return plain_step(arguments, model, optimizer, accelerator.backward)


def deepspeed_step(arguments: argparse.Namespace, folder: Path) -> Any:
    """ZeRO-3 with parameters and optimizer offloaded to the CPU (0.19.5 or later)."""
    import deepspeed

    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29513", RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")
    model = plain_model(arguments, "cpu")
    seq_len = min(SEQ_LEN, arguments.tokens)
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=model.parameters(),
        config={
            "train_micro_batch_size_per_gpu": arguments.tokens // seq_len,
            "gradient_clipping": 1.0,
            "bf16": {"enabled": True},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-5}},
            "zero_optimization": {
                "stage": 3,
                "overlap_comm": True,
                "offload_param": {"device": "cpu", "pin_memory": True},
                "offload_optimizer": {"device": "cpu", "pin_memory": True},
            },
        },
    )
    draw = batches(arguments.size, arguments.tokens)

    def step() -> float:
        ids = draw().cuda()
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        return float(loss.item())

    return step, lambda: None


def contend(arguments: argparse.Namespace) -> None:
    """One contender, in this process: a JSON line of step times, or of why there are none."""
    import torch

    started = time.monotonic()
    folder = Path(arguments.folder)
    if arguments.kind != "resident" and torch.cuda.is_available():
        from outsize.config import parse_bytes

        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, parse_bytes(arguments.cap) / total))
    makers: dict[str, Callable[[], Any]] = {
        "outsize": lambda: outsize_step(arguments, folder, home=arguments.home, capped=True),
        "resident": lambda: outsize_step(arguments, folder, home="device", capped=False),
        "fsdp2": lambda: fsdp2_step(arguments, folder),
        "accelerate": lambda: accelerate_step(arguments, folder),
        "deepspeed": lambda: deepspeed_step(arguments, folder),
    }
    try:
        step, report = makers[arguments.kind]()
        times: list[float] = []
        loss = 0.0
        while len(times) < arguments.steps + arguments.warmup:
            if times and time.monotonic() - started > arguments.seconds:
                break
            start = time.perf_counter()
            loss = step()
            times.append(time.perf_counter() - start)
        report()
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        counted = times[arguments.warmup :] or times[-1:]
        answer: dict[str, Any] = {"times": counted, "peak": peak, "loss": loss}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:160]}
    print("RESULT " + json.dumps(answer), flush=True)


# -- what comes before -------------------------------------------------------------------------------------------------


def parity() -> None:
    """Losses of some steps against plain PyTorch on the same device. Raises AssertionError where they differ."""
    import copy

    import torch
    import transformers

    import outsize

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    plain = transformers.Qwen3ForCausalLM(config("tiny")).train()
    ids = [torch.randint(0, 512, (4, 64)) for _ in range(5)]
    for dtype, bound in (("float32", 1e-4), ("bfloat16", 3e-2)):
        losses: list[list[float]] = []
        for home in ("host", None):
            model = outsize.wrap(copy.deepcopy(plain), dtype=dtype, home=home)
            losses.append(run_steps(model, outsize.AdamW(model, lr=1e-3, eps=1e-4), ids))
        reference = copy.deepcopy(plain).to(device)
        optimizer = torch.optim.AdamW(reference.parameters(), lr=1e-3, eps=1e-4)
        losses.append(run_steps(reference, optimizer, [each.to(device) for each in ids]))
        worst = max(abs(a - b) for own in losses[:2] for a, b in zip(own, losses[2], strict=True))
        print(f"parity {dtype}: losses differ from plain PyTorch by at most {worst:.2e} (bound {bound})")
        assert worst < bound, losses


def run_steps(model: Any, optimizer: Any, ids: list[Any]) -> list[float]:
    losses = []
    for batch in ids:
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.item()))
    return losses


def machine(side: int, size: int) -> dict[str, float]:
    """Products of `side` in bf16 and both ways of the link with `size` bytes, alone and together; FLOP/s and bytes/s."""
    import torch

    if not torch.cuda.is_available():
        return {}
    figures: dict[str, float] = {}
    a = torch.randn(side, side, device="cuda", dtype=torch.bfloat16)

    def timed(run: Callable[[], object]) -> float:
        run()
        torch.cuda.synchronize()
        times = []
        for _ in range(5):
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    figures["matmul"] = 20 * 2 * side**3 / timed(lambda: [a @ a for _ in range(20)])
    host = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    device = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2)]
    streams = [torch.cuda.Stream() for _ in range(2)]

    def copy(up: bool, down: bool) -> None:
        if up:
            with torch.cuda.stream(streams[0]):
                device[0].copy_(host[0], non_blocking=True)
        if down:
            with torch.cuda.stream(streams[1]):
                host[1].copy_(device[1], non_blocking=True)

    figures["up"] = size / timed(lambda: copy(True, False))
    figures["down"] = size / timed(lambda: copy(False, True))
    figures["both"] = 2 * size / timed(lambda: copy(True, True))
    return figures


def flop_per_token(size: str, seq_len: int) -> float:
    """Executed: two forwards and a backward of every product, 8 per parameter, and of attention."""
    own = config(size)
    layer = own.hidden_size * own.intermediate_size * 3
    heads = own.num_attention_heads * own.head_dim
    layer += own.hidden_size * (2 * heads + 2 * own.num_key_value_heads * own.head_dim)
    products = layer * own.num_hidden_layers + own.vocab_size * own.hidden_size
    attention = own.num_hidden_layers * heads * seq_len  # causal: half of 2 x (scores and values)
    return float(8 * products + 8 * attention)


def main() -> None:
    """Parity, the machine, the contenders, the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="8b")
    parser.add_argument("--cap", default="24GiB", help="device memory of all but `resident` (%(default)s)")
    parser.add_argument("--tokens", default="32768", help="tokens per step, comma-separated (%(default)s)")
    parser.add_argument("--contenders", default="outsize,resident", help=f"of {', '.join(CONTENDERS)}")
    parser.add_argument(
        "--home", choices=["host", "disk"], help="where Outsize keeps state (default: planned)"
    )
    parser.add_argument("--compile", action="store_true", help="let Outsize compile layers")
    parser.add_argument("--attention", help="implementation that Outsize computes attention with (sdpa)")
    parser.add_argument("--steps", type=int, default=3, help="counted steps of each")
    parser.add_argument("--warmup", type=int, default=2, help="steps before that, not counted")
    parser.add_argument("--seconds", type=float, default=150, help="time for each contender (%(default)s)")
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.kind:
        arguments.tokens = int(arguments.tokens)
        contend(arguments)
        return
    parity()
    is_tiny = arguments.size == "tiny"
    figures = machine(512 if is_tiny else 8192, 1 << (24 if is_tiny else 30))
    for name, figure in figures.items():
        unit = "TFLOP/s" if name == "matmul" else "GB/s"
        print(f"{name}: {figure / (1e12 if name == 'matmul' else 1e9):.1f} {unit}", flush=True)
    table: list[str] = []
    for tokens in map(int, arguments.tokens.split(",")):
        rates: dict[str, float] = {}
        for kind in arguments.contenders.split(","):
            answer = run_one(arguments, kind, tokens)
            if "error" in answer:
                table.append(f"{tokens:>7}  {kind:<10} {answer['error']}")
                print(table[-1], flush=True)
                continue
            step_s = statistics.median(answer["times"])
            rates[kind] = tokens / step_s
            seq_len = min(SEQ_LEN, tokens)
            executed = flop_per_token(arguments.size, seq_len) * rates[kind]
            share = f"{executed / figures['matmul']:.0%} of products" if figures else ""
            ratio = f"outsize is {rates['outsize'] / rates[kind]:.2f}x" if "outsize" in rates else ""
            table.append(
                f"{tokens:>7}  {kind:<10} {step_s:7.2f} s/step {rates[kind]:9.0f} tokens/s  "
                f"peak {answer['peak'] / 2**30:6.2f} GiB  loss {answer['loss']:.4f}  {share}  {ratio}"
            )
            print(table[-1], flush=True)
    print("\n" + "\n".join(table))


def run_one(arguments: argparse.Namespace, kind: str, tokens: int) -> dict[str, Any]:
    """One contender in a process of its own."""
    with tempfile.TemporaryDirectory(dir=os.environ.get("OUTSIZE_BENCH_DIR", "/var/tmp")) as folder:
        command = [sys.executable, __file__, f"--kind={kind}", f"--folder={folder}", f"--tokens={tokens}"]
        command += [
            f"--{name}={getattr(arguments, name)}" for name in ("size", "cap", "steps", "warmup", "seconds")
        ]
        command += [f"--home={arguments.home}"] if arguments.home else []
        command += ["--compile"] if arguments.compile else []
        command += [f"--attention={arguments.attention}"] if arguments.attention else []
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not lines:
        return {"error": f"the process ended with status {done.returncode}"}
    answer: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return answer


if __name__ == "__main__":
    main()
