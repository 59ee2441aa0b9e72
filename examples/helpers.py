"""What the examples share: their options, and data that every machine has.

Text is the source of Python's own standard library, images are drawn. Put your own data in their place.
"""

from __future__ import annotations

import argparse
import ast
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SHAPES = ("circle", "square", "triangle", "cross")
COLOURS = {
    "red": (1.0, 0.1, 0.1),
    "green": (0.1, 0.8, 0.1),
    "blue": (0.2, 0.3, 1.0),
    "white": (1.0, 1.0, 1.0),
}


def parser(description: str | None, steps: int, out: str) -> argparse.ArgumentParser:
    """The options that all examples have."""
    options = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    options.add_argument("--steps", type=int, default=steps, help="optimizer steps (%(default)s)")
    options.add_argument(
        "--host", help='memory the whole process may take, such as "3GiB" (default: what is free)'
    )
    options.add_argument("--disk", help="folder on an SSD for what does not fit (default: none)")
    options.add_argument("--out", type=new_folder, default=out, help="where the model goes (%(default)s)")
    options.add_argument(
        "--tiny", action="store_true", help="a model of a few thousand parameters, for a quick look"
    )
    return options


def new_folder(name: str) -> Path:
    """The path `name`, which must be free: better to hear of it before training than after."""
    if Path(name).exists():
        raise argparse.ArgumentTypeError(f"{name} exists already; name another folder")
    return Path(name)


@dataclass(frozen=True, slots=True)
class Function:
    """A function of the standard library: its code without the docstring, and the docstring's first sentence."""

    name: str
    arguments: str
    code: str
    summary: str


def library_sources() -> Iterator[str]:
    """The text of each module of the standard library."""
    for path in sorted(Path(sysconfig.get_path("stdlib")).glob("*.py")):
        yield path.read_text()


def library_functions() -> Iterator[Function]:
    """All functions of the standard library that say what they do."""
    for source in library_sources():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef) and (text := ast.get_docstring(node)):
                node.body = node.body[1:] or [ast.Pass()]
                summary = " ".join(text.split("\n\n")[0].split())
                if 10 < len(summary) < 120:
                    yield Function(node.name, ast.unparse(node.args), ast.unparse(node), summary)


def train_tokenizer(texts: Iterable[str], vocab_size: int, *special: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with the tokens <pad> (0), <eos> (1), and `special`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<pad>", "<eos>", *special],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")


def draw(shape: str, colour: str, size: int, generator: torch.Generator) -> torch.Tensor:
    """An image `[3, size, size]` of one shape near the middle of a dark and noisy ground; values from -1 to 1."""
    growth, x, y = (float(value) for value in torch.rand(3, generator=generator))
    radius = size * (0.25 + 0.15 * growth)
    rows, columns = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    dx = (columns - size * (0.45 + 0.1 * x)) / radius
    dy = (rows - size * (0.45 + 0.1 * y)) / radius
    inside = {
        "circle": dx**2 + dy**2 < 1,
        "square": (dx.abs() < 0.8) & (dy.abs() < 0.8),
        "triangle": (dy < 0.8) & (dy > 2 * dx.abs() - 1),
        "cross": ((dx.abs() < 0.3) | (dy.abs() < 0.3)) & (dx.abs() < 1) & (dy.abs() < 1),
    }[shape]
    image = torch.rand(3, size, size, generator=generator) * 0.2
    image[:, inside] = torch.tensor(COLOURS[colour])[:, None]
    return image * 2 - 1
