"""Text from a model as it appears: transformers' own `generate`, streamed to a file."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO, cast

import torch
from torch import nn
from transformers import TextStreamer

from outsize.errors import ConfigError, DataError
from outsize.train.data.examples import load_tokenizer


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen.

    Sampling(max_new_tokens=100)   the likeliest each time (greedy)
    Sampling(temperature=0.8)      drawn from the model's probabilities, sharpened
    Sampling(top_p=0.9)            drawn from the likeliest tokens that together have this probability
    """

    max_new_tokens: int = 100
    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ConfigError(
                f"max_new_tokens: {self.max_new_tokens} is less than 1", hint="pass --max-new-tokens 100"
            )
        if self.temperature is not None and not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(
                f"temperature: {self.temperature} is not zero or more", hint="pass --temperature 0.8"
            )
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p: {self.top_p} is not in (0, 1]", hint="pass --top-p 0.9")

    def arguments(self) -> dict[str, Any]:
        """As arguments of transformers' `generate`; settings in the model's folder do not shine through."""
        is_greedy = self.temperature == 0 or (self.temperature is None and self.top_p is None)
        if is_greedy:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        temperature = 1.0 if self.temperature is None else self.temperature
        return {"do_sample": True, "temperature": temperature, "top_p": self.top_p or 1.0, "top_k": 0}


def stream_text(model: nn.Module, folder: Path, prompt: str, sampling: Sampling, out: TextIO) -> None:
    """Write `prompt` and its continuation to `out`, word by word; the tokenizer is that of `folder`."""
    tokenizer = cast(Any, load_tokenizer(folder))
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    if inputs["input_ids"].numel() == 0:
        raise DataError("the prompt holds no token", hint="pass a longer prompt")
    model.eval()
    torch.manual_seed(sampling.seed)
    with torch.no_grad():
        cast(Any, model).generate(
            **inputs,
            **sampling.arguments(),
            max_new_tokens=sampling.max_new_tokens,
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else tokenizer.eos_token_id,
            streamer=_Writer(tokenizer, out),
        )


class _Writer(TextStreamer):  # type: ignore[misc]
    """transformers' streamer, writing to any file."""

    def __init__(self, tokenizer: Any, out: TextIO) -> None:
        super().__init__(tokenizer, skip_prompt=False, skip_special_tokens=True)
        self._out = out

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by the base class with each piece of text that is settled."""
        self._out.write(text + ("\n" if stream_end else ""))
        self._out.flush()
