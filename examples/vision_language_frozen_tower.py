"""Train a vision-language model to caption drawn shapes, with its vision tower frozen.

As LLaVA was trained: the tower that sees stays as it is, the projector and the language model learn. Outsize keeps no
gradients and no moments for what is frozen (`requires_grad_(False)` before the optimizer is made), and goes back no
further than it must. The model here is small and made on the spot, so even its tower has never seen anything; give the
folder of a trained one with `--base`.

    python examples/vision_language_frozen_tower.py --host 2GiB --disk /nvme/scratch --out captioner
"""

from __future__ import annotations

import tempfile

import torch
from helpers import COLOURS, SHAPES, draw, parser, train_tokenizer
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

import outsize

LEARNING_RATE = 3e-3
PATCH = 8

Batch = dict[str, torch.Tensor]


def make_config(tokenizer: PreTrainedTokenizerFast, size: int, tiny: bool) -> LlavaConfig:
    """A CLIP tower, a projector and a Llama; the image token stands for one patch."""
    width, depth = (64, 2) if tiny else (256, 6)
    shape = {
        "hidden_size": width,
        "intermediate_size": 3 * width,
        "num_hidden_layers": depth,
        "num_attention_heads": 4,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**shape, image_size=size, patch_size=PATCH, projection_dim=width),
        text_config=LlamaConfig(
            **shape, vocab_size=len(tokenizer), pad_token_id=0, eos_token_id=1, bos_token_id=None
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="default",
        vision_feature_layer=-1,
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    return config


def make_batch(
    tokenizer: PreTrainedTokenizerFast, rows: int, size: int, generator: torch.Generator
) -> tuple[Batch, list[str]]:
    """Images, prompts of image tokens followed by a caption each, and labels on the captions; the captions."""
    shapes = [SHAPES[i] for i in torch.randint(len(SHAPES), (rows,), generator=generator)]
    colours = [list(COLOURS)[i] for i in torch.randint(len(COLOURS), (rows,), generator=generator)]
    captions = [f"a {colour} {shape}" for colour, shape in zip(colours, shapes, strict=True)]
    patches = (size // PATCH) ** 2
    text = tokenizer(
        ["<image>" * patches + caption + tokenizer.eos_token for caption in captions],
        padding=True,
        return_tensors="pt",
        return_token_type_ids=False,
    )
    labels = text["input_ids"].masked_fill(text["attention_mask"] == 0, -100)
    labels[:, :patches] = -100
    images = [draw(shape, colour, size, generator) for shape, colour in zip(shapes, colours, strict=True)]
    return {**text, "pixel_values": torch.stack(images), "labels": labels}, captions


def main() -> None:
    """Make a model, freeze its tower, train, save, and let transformers caption new images."""
    options = parser(__doc__, steps=200, out="captioner").parse_args()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    size, rows = 32, 16
    words = [f"a {colour} {shape}" for colour in COLOURS for shape in SHAPES]
    tokenizer = train_tokenizer(words, 300, "<image>")

    with (
        tempfile.TemporaryDirectory() as untrained
    ):  # in its place: the folder of a LLaVA, and its own processor
        make_config(tokenizer, size, options.tiny).save_pretrained(untrained)
        model = outsize.load(untrained, host=options.host, disk=options.disk, from_scratch=True)
    tower = model.model.vision_tower
    tower.requires_grad_(False)
    before = [parameter.detach().clone() for parameter in tower.parameters()]
    model.train()
    optimizer = outsize.AdamW(model, lr=LEARNING_RATE, weight_decay=0.0, max_grad_norm=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, options.steps, cycle_momentum=False
    )
    for step in range(1, options.steps + 1):
        batch, _ = make_batch(tokenizer, rows, size, generator)
        loss = model(**batch).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"step {step}  loss {loss.item():.4f}", flush=True)

    outsize.save(model, options.out)
    tokenizer.save_pretrained(options.out)
    kept = all(torch.equal(old, new.detach()) for old, new in zip(before, tower.parameters(), strict=True))
    print(f"the vision tower is as it was: {kept}")
    print(outsize.report(model))

    opened = LlavaForConditionalGeneration.from_pretrained(options.out)
    tokenizer = AutoTokenizer.from_pretrained(options.out)
    batch, captions = make_batch(tokenizer, 16, size, generator)
    prompt = batch["input_ids"][:, : (size // PATCH) ** 2]
    written = opened.generate(
        input_ids=prompt, pixel_values=batch["pixel_values"].to(opened.dtype), max_new_tokens=12
    )
    guesses = tokenizer.batch_decode(written[:, prompt.shape[1] :], skip_special_tokens=True)
    right = sum(guess == caption for guess, caption in zip(guesses, captions, strict=True))
    print(f"\n{options.out} as transformers opens it captions {right} of {len(captions)} new images rightly:")
    for guess, caption in zip(guesses[:4], captions, strict=False):
        print(f"{caption!r}: it says {guess!r}")


if __name__ == "__main__":
    main()
