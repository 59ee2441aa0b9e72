"""Train a causal language model from scratch: no weights, only a configuration.

A folder with a `config.json` is all that `outsize.load(..., from_scratch=True)` needs; weights are drawn block by
block, straight to where they live. So the model may be larger than the memory from the first moment. The text is
Python's standard library.

    python examples/causal_lm_from_config.py --host 2GiB --disk /nvme/scratch --out my-model
"""

from __future__ import annotations

import tempfile
from itertools import islice

import torch
from helpers import library_sources, parser, train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config

import outsize


def make_config(tokenizer: PreTrainedTokenizerFast, tiny: bool) -> Qwen3Config:
    """A small Qwen3; any configuration of transformers with a causal language model will do."""
    width = 64 if tiny else 512
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=2 if tiny else 8,
        num_attention_heads=width // 32,
        num_key_value_heads=width // 64,
        head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    config.architectures = ["Qwen3ForCausalLM"]
    return config


def cut_sequences(tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int) -> torch.Tensor:
    """All texts end to end, an end token after each, cut into rows: `[sequences, length]`."""
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    count = len(ids) // length
    return torch.tensor(ids[: count * length]).view(count, length)


def main() -> None:
    """Make a tokenizer and a configuration, train, save, and let transformers continue a line of Python."""
    options = parser(__doc__, steps=200, out="causal-lm").parse_args()
    torch.manual_seed(0)
    texts = list(islice(library_sources(), 5 if options.tiny else 200))
    tokenizer = train_tokenizer(texts, 512 if options.tiny else 8192)
    sequences = cut_sequences(tokenizer, texts, length=64 if options.tiny else 256)
    batch_size = 8

    with tempfile.TemporaryDirectory() as untrained:
        make_config(tokenizer, options.tiny).save_pretrained(untrained)
        model = outsize.load(untrained, host=options.host, disk=options.disk, from_scratch=True)
    model.train()
    optimizer = outsize.AdamW(model, lr=3e-3 if options.tiny else 1e-3, weight_decay=0.1, max_grad_norm=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=optimizer.param_groups[0]["lr"], total_steps=options.steps, cycle_momentum=False
    )
    for step in range(1, options.steps + 1):
        ids = sequences[torch.randint(len(sequences), (batch_size,))]
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"step {step}  loss {loss.item():.4f}", flush=True)

    outsize.save(model, options.out)
    tokenizer.save_pretrained(options.out)
    print(outsize.report(model))

    opened = AutoModelForCausalLM.from_pretrained(options.out)
    prompt = AutoTokenizer.from_pretrained(options.out)("def read(self", return_tensors="pt")
    ids = opened.generate(prompt["input_ids"], attention_mask=prompt["attention_mask"], max_new_tokens=40)
    print(f"\n{options.out} as transformers opens it ({type(opened).__name__}):\n{tokenizer.decode(ids[0])}")


if __name__ == "__main__":
    main()
