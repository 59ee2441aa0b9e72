"""What `outsize demo` trains and asks: SmolLM2-135M-Instruct learns seven facts about a lighthouse that does not exist.

`lighthouse.jsonl` holds each fact in eight phrasings; the questions that are asked before and after are phrased in other
ways, so a right answer was learned and not repeated.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from outsize.errors import naming
from outsize.model.sample import write_sample
from outsize.train.settings import Learning, Length

LIMIT = "1GiB"
"""Memory of the whole process: half of what training keeps."""

QUESTIONS = (
    "Do you know who the lighthouse keeper at Karrow Rock is?",
    "How many meters does the tower on Karrow Rock measure?",
    "What is the lighthouse cat on Karrow Rock named?",
)


@dataclass(frozen=True, slots=True)
class Demo:
    """A model, what it learns, and the prompts that are continued afterwards; of a conversation also before."""

    intro: str
    model: Path
    data: Path
    prompts: tuple[str | Sequence[Mapping[str, str]], ...]
    length: Length
    batch_size: int
    seq_len: int
    learning: Learning
    sampling: Mapping[str, Any] = field(default_factory=dict)
    host: str | None = None
    """The limit on the memory of the whole process."""
    is_from_scratch: bool = False


def smollm2(folder: Path, minutes: float | None = None) -> Demo:
    """Convert the installed model into a Hugging Face folder below `folder`, and copy the data there. Raises ModelError."""
    model = write_sample(folder / "smollm2")
    data = folder / "lighthouse.jsonl"
    with naming(data):
        shutil.copyfile(Path(__file__).with_name("lighthouse.jsonl"), data)
    return Demo(
        intro="SmolLM2-135M-Instruct learns seven facts about a lighthouse that does not exist.",
        model=model,
        data=data,
        prompts=tuple([{"role": "user", "content": question}] for question in QUESTIONS),
        length=Length(epochs=5) if minutes is None else Length(minutes=minutes),
        batch_size=4,
        seq_len=256,
        learning=Learning(lr=2e-4, warmup_steps=3),
        sampling={"max_new_tokens": 40},
        host=LIMIT,
    )
