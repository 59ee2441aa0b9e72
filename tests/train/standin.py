"""`outsize`'s public API over a plain model in memory: the loop and the commands can be tested without
tiers."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import outsize
from outsize.plan.profile import Resource
from outsize.plan.timeline import Span, Timeline


@dataclass(frozen=True)
class PlainReport:
    num_parameters: int = 1000
    state_bytes: int = 16000
    host_budget_bytes: int = 1 << 30
    host_peak_bytes: int = 1 << 29
    device_budget_bytes: int = 0
    device_peak_bytes: int = 0
    bytes_read: int = 0
    bytes_written: int = 0
    wait_s: dict = field(default_factory=dict)

    def __str__(self):
        return "what lived where: all of it in memory"


class PlainAdamW(torch.optim.AdamW):
    def __init__(self, model, params, *, lr, max_grad_norm=None):
        super().__init__(params, lr=lr)
        self.max_grad_norm = max_grad_norm
        self.grad_norm = None

    def gradient_norm(self):
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    def step(self, closure=None):
        if self.max_grad_norm is not None:
            parameters = [p for group in self.param_groups for p in group["params"]]
            self.grad_norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.max_grad_norm))
        return super().step(closure)


@dataclass(frozen=True)
class PlainRecording:
    timeline: Timeline


class PlainApi:
    """Counts what is called; `spoil(step, model)` runs before each forward in training."""

    def __init__(self, spoil=None):
        self.loaded = []
        self.saved = []
        self.calls = 0
        self.recorded = []
        self.spoil = spoil

    def load(self, path, *, from_scratch=False, seed=0, **place):
        self.loaded.append((Path(path), place))
        torch.manual_seed(seed)
        if not from_scratch:
            model = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
        else:
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path))
        model.register_forward_pre_hook(self._before_forward)
        return model

    def _before_forward(self, model, inputs):
        if model.training:
            self.calls += 1
            if self.spoil is not None:
                self.spoil(self.calls, model)

    AdamW = PlainAdamW
    decay_groups = staticmethod(outsize.decay_groups)

    def save(self, model, path, tokenizer_from=None):
        self.saved.append(Path(path))
        model.save_pretrained(path)
        if tokenizer_from is not None:
            AutoTokenizer.from_pretrained(tokenizer_from).save_pretrained(path)

    def report(self, model):
        return PlainReport(bytes_read=100 * self.calls, bytes_written=10 * self.calls, wait_s={"disk": 0.5})

    @contextmanager
    def record(self, model):
        before = self.calls
        yield PlainRecording(Timeline(1.0, (Span(Resource.COMPUTE, 0.0, 1.0, "forward L00"),), (), {}))
        self.recorded.append((before + 1, self.calls))


WORDS = [f"w{number}" for number in range(60)]


def word_tokenizer(eos="<eos>"):
    vocab = {"<eos>": 0, "<unk>": 1} | {word: index + 2 for index, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos, unk_token="<unk>")


def write_data(folder):
    """A text of these words."""
    path = folder / "text.txt"
    path.write_text((" ".join(WORDS) + "\n") * 20)
    return path


def write_model(folder, *, vocab_size=64, tokenizer=True, eos="<eos>", positions=32, weights=True, **changes):
    config = LlamaConfig(
        vocab_size=vocab_size,
        **{"hidden_size": 16, "intermediate_size": 32, **changes},
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        tie_word_embeddings=True,
        architectures=["LlamaForCausalLM"],
        bos_token_id=0,
        eos_token_id=0,
    )
    if weights:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            LlamaForCausalLM(config).save_pretrained(folder)
    else:
        config.save_pretrained(folder)
    if tokenizer:
        word_tokenizer(eos).save_pretrained(folder)
    return folder
