"""Methods of transformers' models that a model under Outsize answers itself.

They read or replace weights as a whole, which live in the store. Each becomes an instance attribute that shadows the
class's method, so that Trainer and scripts that call it either work or are refused by name before anything changes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import PreTrainedModel

from outsize.block import Block
from outsize.config import parse_bytes
from outsize.engine.placeholder import stands_for_same
from outsize.engine.runtime import Runtime, runtime_of
from outsize.errors import UsageError
from outsize.model import MAX_SHARD_BYTES, Existing, has_adapters, write_adapters, write_folder

_ADAPTERS_HINT = "add them before the model is opened: outsize.wrap(get_peft_model(model, config))"


def take_methods_over(module: nn.Module) -> None:
    """Put the methods below in the place of those that `module` has."""
    own: dict[str, Callable[..., Any]] = {
        "train": _train(module),
        "load_state_dict": _refuse_state_dict,
        "save_pretrained": _save_pretrained(module),
        "add_adapter": _refuse_adapters,
        "load_adapter": _refuse_adapters,
    }
    for name, method in own.items():
        if callable(getattr(type(module), name, None)):
            setattr(module, name, method)
    if isinstance(module, PreTrainedModel):
        module.resize_token_embeddings = _resize_token_embeddings(module)


def _train(module: nn.Module) -> Callable[..., nn.Module]:
    """`train`, which transformers' Trainer calls before each of its steps: what it would ask for after the last one, and
    cannot have, is refused before the first.
    """

    def train(mode: bool = True) -> nn.Module:
        """Set the module's mode. Raises UsageError for a Trainer that will load the best weights at its end."""
        trainer = sys.modules.get("transformers.trainer")
        caller = sys._getframe(1).f_locals.get("self")
        args = caller.args if trainer is not None and isinstance(caller, trainer.Trainer) else None
        if mode and args is not None and args.load_best_model_at_end:
            raise UsageError(
                "load_best_model_at_end=True: weights cannot be put into a model that lives in Outsize's store",
                hint='pass metric_for_best_model="loss" instead: trainer.state.best_model_checkpoint then names the '
                "folder of the best weights, which outsize.load opens",
            )
        return type(module).train(module, mode)

    return train


def write_model(
    runtime: Runtime,
    path: Path,
    *,
    existing: Existing,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    tokenizer_from: str | Path | None = None,
    watch: Callable[[int, int], object] | None = None,
) -> None:
    """Write a model: a Hugging Face folder, or, where adapters were put around it, a folder of peft's.

    `watch` is called with the number of each block as it begins, from 1, and how many there are. Raises UsageError where
    the model was changed since it was opened, or the folder is taken.
    """
    runtime.check()
    if has_adapters(runtime.model.module):
        write_adapters(runtime.model.module, path, existing)
        return
    numbers = {block.name: number for number, block in enumerate(runtime.model.cut.blocks, 1)}

    def fetch(block: Block) -> list[torch.Tensor]:
        if watch is not None:
            watch(numbers[block.name], len(numbers))
        return runtime.model.parameters.read(block)

    write_folder(
        runtime.model.module,
        runtime.model.cut.blocks,
        fetch,
        path,
        tokenizer_from=tokenizer_from,
        max_shard_bytes=max_shard_bytes,
        existing=existing,
    )


def _save_pretrained(module: nn.Module) -> Callable[..., None]:
    """`save_pretrained` with the arguments of transformers and of peft; holds no reference cycle that they do not."""

    def save_pretrained(
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: dict[str, Any] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = MAX_SHARD_BYTES,
        **options: Any,
    ) -> None:
        """Write the model to `save_directory`, which may hold other files, and an earlier model, which is replaced.

        `max_shard_size` is a number of bytes or a size such as "5GB". Raises UsageError for an option that would change
        what is written and that Outsize does not have.
        """
        refused = {name: value for name, value in options.items() if not _changes_nothing(name, value)}
        if push_to_hub:
            refused["push_to_hub"] = push_to_hub
        if state_dict is not None and not _is_state_of(module, state_dict):
            refused["state_dict"] = f"{len(state_dict)} tensors"
        if refused:
            name, value = next(iter(refused.items()))
            raise UsageError(
                f"save_pretrained({name}={value!r}) is not supported for a model that lives in Outsize's store",
                hint=f"leave {name} out; upload or convert the folder once it is written",
            )
        if is_main_process:
            size = parse_bytes(max_shard_size, "max_shard_size")
            write_model(
                runtime_of(module), Path(save_directory), existing=Existing.UPDATE, max_shard_bytes=size
            )

    return save_pretrained


_WITHOUT_EFFECT = {
    "safe_serialization": (True,),
    "variant": (None,),
    "save_peft_format": (True,),
    "save_original_format": (True,),
    "distributed_checkpoint": (False,),
    "save_embedding_layers": ("auto",),
    "selected_adapters": (None,),
    "path_initial_model_for_weight_conversion": (None,),
}


def _changes_nothing(name: str, value: Any) -> bool:
    return name == "token" or any(value is each or value == each for each in _WITHOUT_EFFECT.get(name, ()))


def _is_state_of(module: nn.Module, state: Mapping[str, Any]) -> bool:
    """Whether `state` is the model's own state_dict, so that leaving it out writes the same."""
    own = module.state_dict()
    return state.keys() == own.keys() and all(
        stands_for_same(value, own[name]) or value is own[name] for name, value in state.items()
    )


def _resize_token_embeddings(module: PreTrainedModel) -> Callable[..., Any]:
    def resize_token_embeddings(
        new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> Any:
        """The input embeddings, where their number stays; raises UsageError where it would change."""
        embeddings = module.get_input_embeddings()
        rows = int(embeddings.weight.shape[0])
        wanted = rows if new_num_tokens is None else new_num_tokens
        if pad_to_multiple_of is not None:
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        if wanted != rows:
            raise UsageError(
                f"resize_token_embeddings: {rows} rows cannot become {wanted} in a model that lives in Outsize's store",
                hint="resize it first: open the folder with transformers, resize_token_embeddings, save_pretrained, and "
                "outsize.load what was saved",
            )
        return embeddings

    return resize_token_embeddings


def _refuse_adapters(*args: Any, **kwargs: Any) -> NoReturn:
    raise UsageError("adapters cannot be added to a model that lives in Outsize's store", hint=_ADAPTERS_HINT)


def _refuse_state_dict(*args: Any, **kwargs: Any) -> NoReturn:
    raise UsageError(
        "weights cannot be put into a model that lives in Outsize's store",
        hint="open the folder that holds them with outsize.load(path); going on with a run's moments is not possible yet",
    )
