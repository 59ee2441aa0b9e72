"""The demo that needs nothing but Python: a small Llama with random weights learns Python's own standard library.

The text is the source of the standard library; the tokenizer is a byte-level BPE trained on it.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from outsize.errors import naming
from outsize.train.demo import Demo
from outsize.train.settings import Learning, Length

END_OF_TEXT = "<|endoftext|>"

_SKIPPED = {"test", "tests", "site-packages", "dist-packages", "idlelib", "lib2to3"} | {
    "encodings",
    "pydoc_data",
    "turtledemo",
    "ensurepip",
}
"""Folders of the library that are not good reading."""

LARGEST_FILE_BYTES = 40_000
"""Larger files are left out, so that no single one makes up most of a short text."""


@dataclass(frozen=True, slots=True)
class DemoSize:
    """How large the demo is: 1024 tokens per step, about a second on two cores; its state is 310 MiB."""

    text_bytes: int = 300_000
    vocab_size: int = 2048
    hidden_size: int = 448
    intermediate_size: int = 1216
    num_layers: int = 8
    num_heads: int = 7
    seq_len: int = 256
    batch_size: int = 4


PREPARATION_S = 20.0
"""Seconds of the demo that are not training: tokenizer, imports, saving, generating."""

SHORTEST_S = 5.0
"""The shortest training, in seconds."""

PROMPTS = ("def", "import os\n\n\nclass")


def from_scratch(folder: Path, minutes: float | None, size: DemoSize) -> Demo:
    """Write the text, the tokenizer and the model's config below `folder`; the same on every machine with this Python.

    The demo takes `minutes` (default: two).
    """
    texts = python_sources(size.text_bytes)
    model, data = folder / "untrained", folder / "python.jsonl"
    model.mkdir(parents=True, exist_ok=True)
    with naming(data), data.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    train_tokenizer(texts, size.vocab_size).save_pretrained(model)
    model_config(size).save_pretrained(model)
    seconds = max(60 * (2.0 if minutes is None else minutes) - PREPARATION_S, SHORTEST_S)
    return Demo(
        intro=f"A small Llama with random weights learns Python from {len(texts)} files of its standard library.",
        model=model,
        data=data,
        prompts=PROMPTS,
        length=Length(minutes=seconds / 60),
        batch_size=size.batch_size,
        seq_len=size.seq_len,
        learning=Learning(lr=1.5e-3, warmup_steps=8),
        sampling={"max_new_tokens": 48, "temperature": 0.6, "top_p": 0.9},
        is_from_scratch=True,
    )


def python_sources(max_bytes: int) -> list[str]:
    """Source files of the standard library, in alphabetical order, until `max_bytes` are reached."""
    root = Path(sysconfig.get_paths()["stdlib"])
    texts: list[str] = []
    num_bytes = 0
    for path in sorted(root.rglob("*.py")):
        if num_bytes >= max_bytes:
            break
        is_skipped = _SKIPPED.intersection(path.relative_to(root).parts)
        if not is_skipped and path.stat().st_size <= LARGEST_FILE_BYTES:
            text = path.read_text(encoding="utf-8", errors="ignore")
            num_bytes += len(text)
            texts.extend([text] if text.strip() else [])
    return texts


def train_tokenizer(texts: Sequence[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` tokens, as in GPT-2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT)


def model_config(size: DemoSize) -> LlamaConfig:
    """A small Llama with tied embeddings."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=size.vocab_size,
        hidden_size=size.hidden_size,
        intermediate_size=size.intermediate_size,
        num_hidden_layers=size.num_layers,
        num_attention_heads=size.num_heads,
        num_key_value_heads=size.num_heads,
        max_position_embeddings=4 * size.seq_len,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
