"""Train an encoder-decoder: it reads the code of a function and writes what the function does.

The pairs are the functions of Python's standard library and the first paragraphs of their docstrings. The T5 is made
on PyTorch's meta device, where it takes no memory; `outsize.wrap` draws its weights where they will live. The wrapped
model keeps its own `generate()`.

    python examples/t5_summarisation.py --host 2GiB --disk /nvme/scratch --out summariser
"""

from __future__ import annotations

from itertools import islice

import torch
from helpers import library_functions, parser, train_tokenizer
from transformers import AutoTokenizer, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

import outsize

LEARNING_RATE = 2e-3


def make_model(tokenizer: PreTrainedTokenizerFast, tiny: bool) -> T5ForConditionalGeneration:
    """A T5 without values; with `from_pretrained` in its place this is fine-tuning."""
    width = 64 if tiny else 256
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=32,
        d_ff=4 * width,
        num_layers=2 if tiny else 4,
        num_heads=width // 32,
        dropout_rate=0.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.pad_token_id,
    )
    with torch.device("meta"):
        return T5ForConditionalGeneration(config)


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str], length: int) -> dict[str, torch.Tensor]:
    """Ids and mask of `texts`, `[texts, at most length]`, each with an end token."""
    marked = [text + tokenizer.eos_token for text in texts]
    return tokenizer(
        marked,
        padding=True,
        truncation=True,
        max_length=length,
        return_tensors="pt",
        return_token_type_ids=False,
    )


def main() -> None:
    """Wrap, train, summarise functions that were kept aside, save, and summarise with what transformers opens."""
    options = parser(__doc__, steps=300, out="t5-summariser").parse_args()
    torch.manual_seed(0)
    functions = list(islice(library_functions(), 100 if options.tiny else 3000))
    functions, aside = functions[:-3], functions[-3:]
    tokenizer = train_tokenizer(
        [text for function in functions for text in (function.code, function.summary)],
        512 if options.tiny else 4096,
    )
    length, rows = (64, 8) if options.tiny else (256, 16)

    model = outsize.wrap(make_model(tokenizer, options.tiny), host=options.host, disk=options.disk)
    model.train()
    optimizer = outsize.AdamW(model, lr=LEARNING_RATE, weight_decay=0.0, max_grad_norm=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, options.steps, cycle_momentum=False
    )
    for step in range(1, options.steps + 1):
        chosen = [functions[i] for i in torch.randint(len(functions), (rows,))]
        summaries = encode(tokenizer, [function.summary for function in chosen], 48)
        labels = summaries["input_ids"].masked_fill(summaries["attention_mask"] == 0, -100)
        loss = model(**encode(tokenizer, [function.code for function in chosen], length), labels=labels).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"step {step}  loss {loss.item():.4f}", flush=True)

    model.eval()
    inputs = encode(tokenizer, [function.code for function in aside], length)
    written = model.generate(**inputs, max_new_tokens=30, do_sample=False)
    for function, summary in zip(
        aside, tokenizer.batch_decode(written, skip_special_tokens=True), strict=True
    ):
        print(f"{function.name}: {summary!r}\n    (its docstring: {function.summary!r})")

    outsize.save(model, options.out)
    tokenizer.save_pretrained(options.out)
    print(outsize.report(model))

    opened = T5ForConditionalGeneration.from_pretrained(options.out)
    inputs = encode(AutoTokenizer.from_pretrained(options.out), [function.code for function in aside], length)
    again = opened.generate(**inputs, max_new_tokens=30, do_sample=False)
    print(f"{options.out} as transformers opens it writes the same: {torch.equal(again, written)}")


if __name__ == "__main__":
    main()
