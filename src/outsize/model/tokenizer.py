"""The tokenizer that lies beside a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from outsize.errors import DataError

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)


def load_tokenizer(model: Path) -> Any:
    """The tokenizer in folder `model`, never from the network; DataError where there is none."""
    hint = f"copy tokenizer.json and tokenizer_config.json of the model's family into {model}"
    if not any((model / name).is_file() for name in _TOKENIZER_FILES):
        raise DataError(f"no tokenizer in {model}", hint=hint)
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(model), local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise bare Exceptions for malformed files
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(": ")
        raise DataError(f"the tokenizer in {model} cannot be opened: {reason}", hint=hint) from error
    return tokenizer
