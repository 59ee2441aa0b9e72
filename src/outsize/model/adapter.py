"""Saving the adapters of a model that peft wrapped, in peft's own folder.

peft and transformers write such a folder themselves; they are handed the values of the adapters, and nothing of the base,
whose weights they would otherwise ask for as a whole.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from torch import nn

from outsize.errors import UsageError
from outsize.model.folder import Existing, written_folder


def has_adapters(module: nn.Module) -> bool:
    """Whether peft wrapped `module`, or transformers put adapters into it (`model.add_adapter`)."""
    return _is_peft_model(module) or bool(getattr(module, "_hf_peft_config_loaded", False))


def write_adapters(module: Any, path: Path, existing: Existing) -> None:
    """Write the adapters of `module`, and nothing of its base, as the folder that `PeftModel.from_pretrained` reads.

    Every adapter of a `PeftModel` is written, the active one of a model with `add_adapter`. Raises UsageError where the
    folder is taken, or peft cannot save these adapters; StorageError where the disk fails.
    """
    from peft import get_peft_model_state_dict

    names = list(module.peft_config) if _is_peft_model(module) else list(module.active_adapters())
    state = module.state_dict()
    wanted = {
        id(value)
        for name in names
        for value in get_peft_model_state_dict(module, state_dict=state, adapter_name=name).values()
    }
    values = {name: value.clone() if id(value) in wanted else value for name, value in state.items()}
    with written_folder(path, existing) as temporary:
        try:
            type(module).save_pretrained(module, str(temporary), state_dict=values)
        except ValueError as error:
            raise UsageError(
                f"{type(module).__name__}: {error}",
                hint="save one adapter at a time with model.set_adapter(name)",
            ) from error


def _is_peft_model(module: nn.Module) -> bool:
    # A model that peft wrapped exists only where peft was imported.
    peft: Any = sys.modules.get("peft")
    return peft is not None and isinstance(module, peft.PeftModel)
