"""Computes the table of docs/guides/what-fits.md: public shapes of models, planned for several sizes of memory.

    python docs/what_fits.py                     all models, each in a process of its own
    python docs/what_fits.py Qwen3-4B            one model, printed
    python docs/what_fits.py --write             all, written between the markers of the page

Nothing is downloaded: a shape is a config made from public hyper-parameters, and planning reads no weights. Planning a
model runs one of its layers on weights of zero, so the largest shapes take some minutes and a few GiB of memory.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from pathlib import Path

import transformers

import outsize
from outsize.config import format_bytes

PAGE = Path(__file__).parent / "guides" / "what-fits.md"
BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
BUDGETS_GIB = (8, 16, 32, 64, 128)
TOO_SMALL_GIB = 1 / 1024
BATCH_SIZE, SEQ_LEN = 1, 512
DTYPE = "float32"


def qwen3(hidden: int, inner: int, layers: int, heads: int, *, tied: bool) -> transformers.Qwen3Config:
    """A dense Qwen3: 8 key-value heads of 128 everywhere."""
    return transformers.Qwen3Config(
        architectures=["Qwen3ForCausalLM"],
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        head_dim=128,
        max_position_embeddings=40_960,
        tie_word_embeddings=tied,
    )


def llama(hidden: int, inner: int, layers: int, heads: int) -> transformers.LlamaConfig:
    """A Llama 3.1: 8 key-value heads of 128, a head of its own."""
    return transformers.LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=128_256,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=8,
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
    )


SHAPES = {
    "Qwen3-0.6B": lambda: qwen3(1024, 3072, 28, 16, tied=True),
    "Qwen3-1.7B": lambda: qwen3(2048, 6144, 28, 16, tied=True),
    "Qwen3-4B": lambda: qwen3(2560, 9728, 36, 32, tied=True),
    "Llama-3.1-8B": lambda: llama(4096, 14_336, 32, 32),
    "Qwen3-8B": lambda: qwen3(4096, 12_288, 36, 32, tied=False),
    "Qwen3-14B": lambda: qwen3(5120, 17_408, 40, 40, tied=False),
    "Qwen3-32B": lambda: qwen3(5120, 25_600, 64, 64, tied=False),
    "Llama-3.1-70B": lambda: llama(8192, 28_672, 80, 64),
}


def plans(name: str) -> list[outsize.PlanSummary]:
    """The plan of shape `name` for each budget, and last for one that is too small for any."""
    with tempfile.TemporaryDirectory() as folder:
        SHAPES[name]().save_pretrained(folder)
        return [
            outsize.preview(
                folder, host=f"{gib}GiB", disk=folder, dtype=DTYPE, batch_size=BATCH_SIZE, seq_len=SEQ_LEN
            )
            for gib in (*BUDGETS_GIB, TOO_SMALL_GIB)
        ]


def row(name: str) -> str:
    """One line of the table."""
    *summaries, too_small = plans(name)
    fitting = [summary for summary in summaries if summary.fits]
    cells = [
        name,
        f"{summaries[0].num_parameters / 1e9:.1f}",
        on_disk(fitting) if fitting else "-",
        least(too_small),
    ]
    return "| " + " | ".join(cells + [cell(summary) for summary in summaries]) + " |"


def on_disk(fitting: list[outsize.PlanSummary]) -> str:
    """The whole training state: what the disk must hold where nothing stays in memory."""
    state = {"weights", "gradients", "optimizer state"}
    return format_bytes(sum(row.num_bytes for row in fitting[0].rows if row.what in state))


def least(summary: outsize.PlanSummary) -> str:
    """The smallest budget that works, as the plan of one that does not names it."""
    found = re.search(r'host="(\d+)MiB" works', summary.reason)
    assert found is not None, summary.reason
    return format_bytes(int(found[1]) << 20)


def cell(summary: outsize.PlanSummary) -> str:
    """How much of the training state stays in memory, or that it does not fit."""
    if not summary.fits:
        return "no"
    state = {"weights", "gradients", "optimizer state"}
    kept = sum(row.num_bytes for row in summary.rows if row.what in state and row.tier == "host")
    total = sum(row.num_bytes for row in summary.rows if row.what in state)
    return "all in memory" if kept == total else f"{int(100 * kept / total)} %"


def table(names: list[str]) -> str:
    """The whole table; each shape in a process of its own, since memory that was freed is kept."""
    budgets = " | ".join(f"{gib} GiB" for gib in BUDGETS_GIB)
    lines = [
        f"| model | parameters (10⁹) | training state | least memory | {budgets} |",
        "|---" * (4 + len(BUDGETS_GIB)) + "|",
    ]
    for name in names:
        done = subprocess.run([sys.executable, __file__, name], capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name}: left out: {done.stderr.strip().splitlines()[-1:]}", file=sys.stderr)
            continue
        lines.append(done.stdout.strip())
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def main(arguments: list[str]) -> None:
    """Print or write."""
    if arguments and arguments[0] in SHAPES:
        print(row(arguments[0]))
        return
    text = table(list(SHAPES))
    if "--write" not in arguments:
        print(text)
        return
    page = PAGE.read_text()
    before, after = page.split(BEGIN)[0], page.split(END)[1]
    PAGE.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    main(sys.argv[1:])
