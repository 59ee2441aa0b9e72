"""Tiny models of many architectures, for every test that needs one.

`ZOO["llama"].build(seed=0)` gives the unmodified Hugging Face model, float32, with random weights that depend
on the seed only; `ZOO["llama"].batch(rows=3, length=12, seed=1)` gives arguments for its forward, labels
included (some ignored positions, and padding where the architecture takes an attention mask). Both leave
torch's global RNG as it was. No model has dropout, so that losses can be compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY = 199
"""Tokens; an odd number, so that a last row block is never full."""

IMAGE = 16
"""Pixels per side of an image."""

IMAGE_TOKEN = 198
"""The placeholder of image features in the vision-language model."""


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Run with torch's CPU RNG seeded, and put its state back afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def text_batch(
    rows: int, length: int, seed: int, *, pad: bool = True, low: int = 4
) -> dict[str, torch.Tensor]:
    """Ids `[rows, length]`, labels with ignored positions, and (if `pad`) a right-padded attention mask."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(low, IMAGE_TOKEN - 1, (rows, length), generator=generator)
    labels = ids.clone()
    labels[:, 0] = -100
    batch = {"input_ids": ids, "labels": labels}
    if pad:
        mask = torch.ones_like(ids)
        mask[-1, length - 2 :] = 0
        labels[mask == 0] = -100
        batch["attention_mask"] = mask
    return batch


def seq2seq_batch(rows: int, length: int, seed: int) -> dict[str, torch.Tensor]:
    """Encoder ids `[rows, length]` and decoder labels `[rows, length - 3]`: two different lengths."""
    batch = text_batch(rows, length, seed)
    generator = torch.Generator().manual_seed(seed + 1)
    labels = torch.randint(4, IMAGE_TOKEN - 1, (rows, length - 3), generator=generator)
    labels[-1, -1] = -100
    return {**batch, "labels": labels}


def image_batch(rows: int, length: int, seed: int) -> dict[str, torch.Tensor]:
    """Pixels `[rows, 3, IMAGE, IMAGE]` and one class of five per row; `length` has no meaning here."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.randn(rows, 3, IMAGE, IMAGE, generator=generator),
        "labels": torch.randint(0, 5, (rows,), generator=generator),
    }


def image_text_batch(rows: int, length: int, seed: int) -> dict[str, torch.Tensor]:
    """Text whose positions 1 to 4 hold the four patches of one image per row (at least 8 tokens)."""
    batch = text_batch(rows, length, seed)
    batch["input_ids"][:, 1:5] = IMAGE_TOKEN
    batch["labels"][:, 1:5] = -100
    return {**batch, "pixel_values": image_batch(rows, length, seed)["pixel_values"]}


@dataclass(frozen=True)
class Specimen:
    """One architecture: how to make its config, its class, and its batches.

    `frozen` are prefixes of parameter names that do not train. `tiles_loss` says whether the class hands the
    head's own output to `self.loss_function`.
    """

    name: str
    model_class: str
    config_class: str
    settings: dict[str, Any]
    batch_builder: Callable[[int, int, int], dict[str, torch.Tensor]]
    frozen: tuple[str, ...] = ()
    tiles_loss: bool = True

    def config(self, **changes: Any) -> transformers.PreTrainedConfig:
        """A new config; `changes` override settings."""
        config = getattr(transformers, self.config_class)(**{**self.settings, **changes})
        config.architectures = [self.model_class]
        return config

    def build(
        self, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
    ) -> transformers.PreTrainedModel:
        """The model with weights drawn from `seed`, in eval mode; parameters under `frozen` do not require
        grad.

        Vectors (norms and biases, which start as ones and zeros) are drawn too, so that a swapped pair shows.
        """
        with seeded(seed):
            model = getattr(transformers, self.model_class)(self.config(**changes)).to(dtype)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.dim() < 2:
                        parameter.add_(torch.randn_like(parameter) * 0.05)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(not name.startswith(self.frozen) if self.frozen else True)
        return model.eval()

    def batch(self, rows: int = 3, length: int = 12, seed: int = 0) -> dict[str, torch.Tensor]:
        """Arguments of the model's forward with labels, `rows` rows of `length` tokens."""
        return self.batch_builder(rows, length, seed)


_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

_VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": IMAGE,
    "patch_size": 8,
}

_EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": True, "router_aux_loss_coef": 0.02}

_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def _no_mask(rows: int, length: int, seed: int) -> dict[str, torch.Tensor]:
    return text_batch(rows, length, seed, pad=False)


_SPECIMENS = [
    Specimen("llama", "LlamaForCausalLM", "LlamaConfig", _DECODER, text_batch),
    Specimen(
        "llama_tied", "LlamaForCausalLM", "LlamaConfig", {**_DECODER, "tie_word_embeddings": True}, text_batch
    ),
    Specimen(
        "qwen3",
        "Qwen3ForCausalLM",
        "Qwen3Config",
        {**_DECODER, "head_dim": 8, "tie_word_embeddings": True},
        text_batch,
    ),
    Specimen(
        "gemma3",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            **_DECODER,
            "head_dim": 8,
            "sliding_window": 6,
            "num_hidden_layers": 3,
            "query_pre_attn_scalar": 8,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
        text_batch,
    ),
    Specimen(
        "gemma2",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        {
            **_DECODER,
            "head_dim": 8,
            "sliding_window": 6,
            "query_pre_attn_scalar": 8,
            "final_logit_softcapping": 5.0,
            "attn_implementation": "eager",
        },
        text_batch,
        tiles_loss=False,
    ),
    Specimen(
        "gpt2",
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            **_SPECIAL,
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 64,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        text_batch,
    ),
    Specimen(
        "opt",
        "OPTForCausalLM",
        "OPTConfig",
        {
            **_SPECIAL,
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "ffn_dim": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "word_embed_proj_dim": 32,
            "dropout": 0.0,
            "attention_dropout": 0.0,
        },
        text_batch,
    ),
    Specimen(
        "phi",
        "PhiForCausalLM",
        "PhiConfig",
        {
            **_DECODER,
            "num_key_value_heads": 4,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attention_dropout": 0.0,
        },
        text_batch,
    ),
    Specimen("mistral", "MistralForCausalLM", "MistralConfig", {**_DECODER, "sliding_window": 5}, text_batch),
    Specimen(
        "bloom",
        "BloomForCausalLM",
        "BloomConfig",
        {
            **_SPECIAL,
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "n_layer": 3,
            "n_head": 4,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        },
        text_batch,
    ),
    Specimen(
        "mpt",
        "MptForCausalLM",
        "MptConfig",
        {
            **_SPECIAL,
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "n_layers": 3,
            "n_heads": 4,
            "max_seq_len": 64,
            "expansion_ratio": 2,
        },
        text_batch,
    ),
    Specimen(
        "mamba",
        "MambaForCausalLM",
        "MambaConfig",
        {
            **_SPECIAL,
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "state_size": 4,
            "use_mambapy": False,
        },
        _no_mask,
    ),
    Specimen(
        "mixtral",
        "MixtralForCausalLM",
        "MixtralConfig",
        {**_DECODER, **_EXPERTS, "num_local_experts": 4},
        text_batch,
    ),
    Specimen(
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        {
            **_DECODER,
            **_EXPERTS,
            "head_dim": 8,
            "num_experts": 4,
            "moe_intermediate_size": 24,
            "mlp_only_layers": [0],
        },
        text_batch,
    ),
    Specimen(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        "GPTNeoXConfig",
        {
            **_SPECIAL,
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        },
        text_batch,
    ),
    Specimen(
        "albert",
        "AlbertForMaskedLM",
        "AlbertConfig",
        {
            **_SPECIAL,
            "vocab_size": VOCABULARY,
            "embedding_size": 16,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
            "classifier_dropout_prob": 0.0,
        },
        text_batch,
        tiles_loss=False,
    ),
    Specimen(
        "t5",
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 2,
            "num_heads": 4,
            "dropout_rate": 0.0,
            "decoder_start_token_id": 0,
            "pad_token_id": 0,
            "eos_token_id": 1,
        },
        seq2seq_batch,
        tiles_loss=False,
    ),
    Specimen(
        "vit",
        "ViTForImageClassification",
        "ViTConfig",
        {**_VISION, "num_labels": 5, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
        image_batch,
        tiles_loss=False,
    ),
    Specimen(
        "llava",
        "LlavaForConditionalGeneration",
        "LlavaConfig",
        {
            "image_token_index": IMAGE_TOKEN,
            "vision_feature_select_strategy": "default",
            "vision_feature_layer": -1,
            "pad_token_id": 0,
        },
        image_text_batch,
        frozen=("model.vision_tower.",),
    ),
]


class _Llava(Specimen):
    """LLaVA's config is made of two: a CLIP tower and a Llama decoder."""

    def config(self, **changes: Any) -> transformers.PreTrainedConfig:
        parts = {
            "vision_config": transformers.CLIPVisionConfig(**_VISION, projection_dim=32),
            "text_config": transformers.LlamaConfig(**{**_DECODER, "num_hidden_layers": 2}),
        }
        return super().config(**{**parts, **changes})


ZOO: dict[str, Specimen] = {
    specimen.name: _Llava(**vars(specimen)) if specimen.name == "llava" else specimen
    for specimen in _SPECIMENS
}
"""Every specimen by name."""

CAUSAL = tuple(
    name for name, specimen in ZOO.items() if specimen.model_class.endswith(("CausalLM", "LMHeadModel"))
)
"""Names of the decoder-only language models."""


class PlainStack(nn.Module):
    """A model that is no Hugging Face model: linear layers in a list, and a loss."""

    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.inlet = nn.Linear(8, width)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth))
        self.scale = nn.Parameter(torch.ones(width))
        self.outlet = nn.Linear(width, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x = self.inlet(x)
        for layer in self.layers:
            x = x + layer(x)
        return nn.functional.mse_loss(self.outlet(x * self.scale), y)


def plain_stack(seed: int = 0) -> PlainStack:
    """A `PlainStack` with weights drawn from `seed`."""
    with seeded(seed):
        return PlainStack()


def plain_batch(rows: int = 3, seed: int = 0) -> dict[str, torch.Tensor]:
    """Arguments of `PlainStack.forward`: `x` is `[rows, 8]`, `y` is `[rows, 1]`."""
    generator = torch.Generator().manual_seed(seed)
    return {"x": torch.randn(rows, 8, generator=generator), "y": torch.randn(rows, 1, generator=generator)}
