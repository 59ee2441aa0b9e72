"""Tiny models of the architectures that are served, beside those of the zoo that also train."""

from __future__ import annotations

import torch
import transformers

from tests.zoo import _DECODER, _EXPERTS, _SPECIAL, VOCABULARY, ZOO, Specimen, text_batch

_PHI3_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 2.5, 3.0, 4.0],
    "original_max_position_embeddings": 24,
}

_EXTRA = [
    Specimen(
        "gpt_oss",
        "GptOssForCausalLM",
        "GptOssConfig",
        {
            **_DECODER,
            "head_dim": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": 6,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        },
        text_batch,
    ),
    Specimen(
        "phi3",
        "Phi3ForCausalLM",
        "Phi3Config",
        {
            **_DECODER,
            "original_max_position_embeddings": 24,
            "rope_parameters": _PHI3_ROPE,
            "resid_pdrop": 0.0,
        },
        text_batch,
    ),
    Specimen(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **_DECODER,
            "num_key_value_heads": 4,
            "n_routed_experts": 4,
            "n_shared_experts": 1,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "first_k_dense_replace": 1,
            "moe_intermediate_size": 24,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 6,
        },
        text_batch,
    ),
    Specimen("qwen2", "Qwen2ForCausalLM", "Qwen2Config", _DECODER, text_batch),
    Specimen(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        {
            **_DECODER,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "shared_expert_intermediate_size": 24,
        },
        text_batch,
    ),
    Specimen("granite", "GraniteForCausalLM", "GraniteConfig", _DECODER, text_batch),
    Specimen(
        "starcoder2",
        "Starcoder2ForCausalLM",
        "Starcoder2Config",
        {**_DECODER, "sliding_window": 7},
        text_batch,
    ),
    Specimen("nemotron", "NemotronForCausalLM", "NemotronConfig", _DECODER, text_batch),
    Specimen("olmo2", "Olmo2ForCausalLM", "Olmo2Config", {**_DECODER, "num_key_value_heads": 4}, text_batch),
    Specimen(
        "gptj",
        "GPTJForCausalLM",
        "GPTJConfig",
        {
            **_SPECIAL,
            "vocab_size": VOCABULARY,
            "n_embd": 32,
            "n_layer": 3,
            "n_head": 4,
            "n_positions": 64,
            "rotary_dim": 4,
            "resid_pdrop": 0.0,
            "embd_pdrop": 0.0,
            "attn_pdrop": 0.0,
        },
        text_batch,
    ),
    Specimen(
        "falcon",
        "FalconForCausalLM",
        "FalconConfig",
        {
            **_SPECIAL,
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "max_position_embeddings": 64,
            "hidden_dropout": 0.0,
            "attention_dropout": 0.0,
        },
        text_batch,
    ),
    Specimen(
        "llama4",
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        {
            **_DECODER,
            **_EXPERTS,
            "head_dim": 8,
            "intermediate_size_mlp": 48,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "attention_chunk_size": 8,
        },
        text_batch,
    ),
]

FAMILIES: dict[str, Specimen] = {**ZOO, **{specimen.name: specimen for specimen in _EXTRA}}

PAGED = (
    "llama",
    "llama_tied",
    "qwen2",
    "qwen3",
    "gemma2",
    "gemma3",
    "mistral",
    "phi",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "olmo2",
    "mixtral",
    "qwen2_moe",
    "qwen3_moe",
    "granite",
    "starcoder2",
    "llava",
    "gpt_oss",
    "deepseek_v3",
)
"""Those that run over pages."""

SINGLE = ("gptj", "falcon", "bloom", "llama4", "mamba", "nemotron")
"""Those that are served one request at a time."""


def lively(name: str, seed: int = 0, **changes: object) -> transformers.PreTrainedModel:
    """A model whose next token depends on all before: matrices are larger than a config would draw them."""
    model = FAMILIES[name].build(seed, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    model.generation_config.eos_token_id = None
    return model


def prompts_of(lengths: tuple[int, ...], seed: int = 0) -> list[tuple[int, ...]]:
    """Prompts of these lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [tuple(torch.randint(4, 198, (length,), generator=generator).tolist()) for length in lengths]


@torch.no_grad()
def reference(model: transformers.PreTrainedModel, prompt: tuple[int, ...], num_new: int) -> list[int]:
    """What transformers' own `generate` says, greedily."""
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_new, do_sample=False, pad_token_id=0
    )
    return output[0, len(prompt) :].tolist()


@torch.no_grad()
def assert_greedy(model: transformers.PreTrainedModel, prompt: tuple[int, ...], tokens: list[int]) -> None:
    """`tokens` are what `generate` says; where they first differ, its two best logits are as good as equal."""
    expected = reference(model, prompt, len(tokens))
    for index, (ours, theirs) in enumerate(zip(tokens, expected, strict=True)):
        if ours != theirs:
            logits = model(torch.tensor([[*prompt, *expected[:index]]])).logits[0, -1]
            best = logits.topk(2).values
            assert float(best[0] - best[1]) <= 1e-4 * float(logits.std()), (index, tokens, expected)
            return
