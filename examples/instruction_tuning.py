"""Tune a language model on conversations, learning from the assistant's turns only.

A plain PyTorch loop with micro-batches, a learning rate schedule and a chat template whose `{% generation %}` marks
say which tokens are the assistant's; all others get the label -100. Questions and answers are about functions of the
standard library. `--base` is the folder of any causal language model; without it a small untrained one is made.

    python examples/instruction_tuning.py --base Qwen3-0.6B --host 3GiB --disk /nvme/scratch --out assistant
"""

from __future__ import annotations

import tempfile
from itertools import islice
from pathlib import Path

import torch
from helpers import Function, library_functions, parser, train_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import outsize

Batch = dict[str, torch.Tensor]
Conversation = list[dict[str, str]]

TEMPLATE = """\
{%- for message in messages %}{{ '<|' + message['role'] + '|>' }}
{%- if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{%- else %}{{ message['content'] }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"""


def conversation(function: Function) -> Conversation:
    """Two questions and two answers."""
    return [
        {"role": "system", "content": "You know Python's standard library."},
        {"role": "user", "content": f"What does {function.name} do?"},
        {"role": "assistant", "content": function.summary},
        {"role": "user", "content": "Which arguments does it take?"},
        {"role": "assistant", "content": function.arguments or "None."},
    ]


def make_base(folder: str, texts: list[str], tiny: bool) -> None:
    """An untrained Llama with a tokenizer, as a folder with a configuration and no weights."""
    tokenizer = train_tokenizer(texts, 512 if tiny else 4096, "<|system|>", "<|user|>", "<|assistant|>")
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64 if tiny else 256,
        intermediate_size=128 if tiny else 768,
        num_hidden_layers=2 if tiny else 6,
        num_attention_heads=4,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


def make_batch(
    tokenizer: PreTrainedTokenizerFast, conversations: list[Conversation], max_length: int
) -> Batch:
    """Padded ids, and labels that are -100 wherever the assistant does not speak."""
    encoded = tokenizer.apply_chat_template(
        conversations,
        return_dict=True,
        return_assistant_tokens_mask=True,
        padding=True,
        truncation=True,
        max_length=max_length,
        tokenizer_kwargs={"pad_to_multiple_of": 64},  # few different lengths: each costs memory of its own
    )
    ids, mask = torch.tensor(encoded["input_ids"]), torch.tensor(encoded["attention_mask"])
    spoken = torch.tensor(encoded["assistant_masks"]).bool()
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(~spoken, -100)}


def main() -> None:
    """Open the base model, tune it, save it with its template, and ask it something."""
    options = parser(__doc__, steps=100, out="instruction-tuned")
    options.add_argument(
        "--base", type=Path, help="folder of the model to tune (default: one made on the spot)"
    )
    options = options.parse_args()
    torch.manual_seed(0)
    conversations = [conversation(f) for f in islice(library_functions(), 100 if options.tiny else 2000)]
    rows, parts = 4, 4  # a step learns from `parts` micro-batches of `rows` conversations

    with tempfile.TemporaryDirectory() as made:
        base = options.base or made
        if options.base is None:
            make_base(made, [turn["content"] for turns in conversations for turn in turns], options.tiny)
        tokenizer = AutoTokenizer.from_pretrained(base, padding_side="right")
        model = outsize.load(base, host=options.host, disk=options.disk, from_scratch=options.base is None)
    if "{% generation %}" not in (tokenizer.chat_template or ""):
        tokenizer.chat_template = TEMPLATE
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    model.train()
    rate = 2e-5 if options.base else 3e-3
    optimizer = outsize.AdamW(model, lr=rate, weight_decay=0.0, max_grad_norm=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, options.steps, cycle_momentum=False)
    for step in range(1, options.steps + 1):
        chosen = [conversations[i] for i in torch.randint(len(conversations), (parts * rows,))]
        batches = [make_batch(tokenizer, chosen[i::parts], max_length=256) for i in range(parts)]
        spoken = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
        total = 0.0
        for batch, count in zip(batches, spoken, strict=True):
            # Every token of the step counts the same, in whichever micro-batch it is.
            loss = model(**batch).loss * (count / sum(spoken))
            loss.backward()
            total += loss.item()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"step {step}  loss {total:.4f}  lr {schedule.get_last_lr()[0]:.2e}", flush=True)

    outsize.save(model, options.out)
    tokenizer.save_pretrained(options.out)
    print(outsize.report(model))

    tokenizer, opened = (
        AutoTokenizer.from_pretrained(options.out),
        AutoModelForCausalLM.from_pretrained(options.out),
    )
    prompt = tokenizer.apply_chat_template(
        conversations[0][:2], add_generation_prompt=True, return_dict=True, return_tensors="pt"
    )
    answer = opened.generate(**prompt, max_new_tokens=40)[0, prompt["input_ids"].shape[1] :]
    print(
        f"\n{options.out} as transformers opens it:\n{conversations[0][1]['content']} {tokenizer.decode(answer)}"
    )


if __name__ == "__main__":
    main()
