"""What a budget gives to a streamed model: passes and peak memory, this checkout against another one in turn.

    git worktree add /tmp/before COMMIT
    python benchmarks/budget.py --other /tmp/before/src --under "memcap {gib}"

`memcap` stands for a command that puts a hard limit on memory. The model is that of benchmarks/packed.py (Qwen3's shape,
1.7 B parameters in bf16, 3.2 GiB, written once), the workload one sequence: a prompt of `--prompt` tokens, then decode
passes. Each run is a process; files are dropped from the page cache before it. Printed: the median pass of each run,
bytes read by one, peak memory, and the ratio of the medians of both checkouts.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from packed import steps_of, write_model

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


def one(folder: Path, gib: float, prompt: int, passes: int) -> dict[str, Any]:
    """Seconds of the decode passes, MiB that the last one read, and the peak of anonymous and shared memory."""
    import outsize
    from outsize import serve
    from outsize.serve.engine import open_engine

    model = outsize.load(folder, dtype="bfloat16", host=f"{int(gib * 1024)}MiB").requires_grad_(False)
    options = {}  # what `outsize generate` states: the oldest checkouts have no name for it
    for name in {"Concurrency", "Workload"} & set(serve.__all__):
        options[name.lower()] = getattr(serve, name)(1, prompt + passes + 1)
    engine = open_engine(model, **options)
    stream = engine.submit(serve.Request(tuple(range(1, prompt + 1)), max_new_tokens=passes + 1))
    times, read, peak = [], 0, 0
    for seconds, step_read in steps_of(engine, model):
        times.append(seconds)
        read = step_read
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak = max(peak, sum(int(status[key].split()[0]) for key in ("RssAnon", "RssShmem")))
    return {
        "passes": times[1:],
        "read": read >> 20,
        "peak": peak >> 10,
        "tokens": stream.completions[0].tokens,
    }


def main() -> None:
    """Run both checkouts in turn, and print what each took."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--other", type=Path, help="the folder src of another checkout")
    parser.add_argument("--under", default="", help='a command that limits memory, such as "memcap {gib}"')
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--prompt", type=int, default=6)
    parser.add_argument("--passes", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    root = Path(os.environ.get("OUTSIZE_BENCH_DIR", "/var/tmp"))
    folder = arguments.folder or root / "outsize-bench-qwen3-1.7b"
    if arguments.one:
        print("RESULT " + json.dumps(one(folder, arguments.gib, arguments.prompt, arguments.passes)))
        return
    if not folder.exists():
        write_model(folder)
    sources = {"this": Path(__file__).parents[1] / "src"}
    if arguments.other:
        sources["other"] = arguments.other
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in sources}
    for _ in range(arguments.rounds):
        for name, source in sources.items():
            for file in folder.glob("*.safetensors"):
                with file.open("rb") as stream:
                    os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            command = [*shlex.split(arguments.under.format(gib=arguments.gib)), sys.executable, __file__]
            command += ["--one", "--folder", str(folder), "--gib", str(arguments.gib)]
            command += ["--prompt", str(arguments.prompt), "--passes", str(arguments.passes)]
            environment = {**os.environ, "PYTHONPATH": str(source)}
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
            run = json.loads(done.stdout.partition("RESULT ")[2].partition("\n")[0])
            runs[name].append(run)
            print(
                f"{name:<6} a pass {statistics.median(run['passes']):5.2f} s, reads {run['read']:,} MiB, "
                f"peak {run['peak']:,} MiB",
                flush=True,
            )
    tokens = [run["tokens"] for found in runs.values() for run in found]
    assert all(each == tokens[0] for each in tokens), "the checkouts disagree on the tokens"
    medians = {
        name: statistics.median(statistics.median(run["passes"]) for run in found)
        for name, found in runs.items()
    }
    print(", ".join(f"{name}: {median:.2f} s" for name, median in medians.items()))
    if arguments.other:
        print(f"this checkout is {medians['other'] / medians['this']:.2f}x as fast")


if __name__ == "__main__":
    main()
