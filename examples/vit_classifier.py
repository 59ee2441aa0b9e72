"""Train a vision transformer to tell circles, squares, triangles and crosses apart.

`outsize.wrap` takes any PyTorch module with repeated layers and leaves its code as it is: what holds for language
models holds for images. The accuracy on images it has never seen is measured before and after.

    python examples/vit_classifier.py --host 2GiB --disk /nvme/scratch --out shapes
"""

from __future__ import annotations

import torch
from helpers import SHAPES, draw, parser
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import outsize

LEARNING_RATE = 1e-3

Batch = dict[str, torch.Tensor]


def make_model(size: int, tiny: bool) -> ViTForImageClassification:
    """A ViT for images of `size` pixels; with `from_pretrained` in its place this is fine-tuning."""
    width = 64 if tiny else 256
    config = ViTConfig(
        image_size=size,
        patch_size=8,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=3 if tiny else 6,
        num_attention_heads=width // 32,
        id2label=dict(enumerate(SHAPES)),
        label2id={shape: index for index, shape in enumerate(SHAPES)},
    )
    return ViTForImageClassification(config)


def make_batch(rows: int, size: int, generator: torch.Generator) -> Batch:
    """Drawn images `[rows, 3, size, size]` and their classes `[rows]`."""
    labels = torch.randint(len(SHAPES), (rows,), generator=generator)
    images = [draw(SHAPES[label], "white", size, generator) for label in labels]
    return {"pixel_values": torch.stack(images), "labels": labels}


def accuracy(model: nn.Module, test: Batch) -> float:
    """The part of `test` that the model classifies rightly."""
    model.eval()
    with torch.no_grad():
        guesses = model(pixel_values=test["pixel_values"]).logits.argmax(-1)
    model.train()
    return float((guesses == test["labels"]).float().mean())


def main() -> None:
    """Wrap, train, evaluate, save, and evaluate again what transformers opens."""
    options = parser(__doc__, steps=200, out="vit-classifier").parse_args()
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    size, rows = (32, 32) if options.tiny else (64, 32)
    test = make_batch(256, size, generator)

    model = outsize.wrap(make_model(size, options.tiny), host=options.host, disk=options.disk)
    optimizer = outsize.AdamW(model, lr=LEARNING_RATE, weight_decay=0.05, max_grad_norm=1.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATE, total_steps=options.steps, cycle_momentum=False
    )
    print(f"accuracy before: {accuracy(model, test):.3f}")
    for step in range(1, options.steps + 1):
        loss = model(**make_batch(rows, size, generator)).loss
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        print(f"step {step}  loss {loss.item():.4f}", flush=True)
    print(f"accuracy after: {accuracy(model, test):.3f}")

    outsize.save(model, options.out)
    print(outsize.report(model))

    opened = ViTForImageClassification.from_pretrained(options.out)
    print(f"{options.out} as transformers opens it: accuracy {accuracy(opened, test):.3f}")


if __name__ == "__main__":
    main()
