"""A TOML file with the names of a command's options: read, checked, merged, and written back.

model = "Qwen3-0.6B"
data = ["chat.jsonl@0.7", "books.parquet@0.3"]
out = "tuned"
steps = 200
lr = 1e-5
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

from outsize.errors import ConfigError

_LISTS = frozenset({"data", "eval", "pin", "tracker"})
_TYPES: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(
        (
            *("steps", "batch_size", "batch_tokens", "seq_len", "eval_every", "warmup", "seed", "trace_step"),
            *("checkpoint_every", "keep"),
        ),
        (int,),
    ),
    **dict.fromkeys(("epochs", "minutes", "lr", "weight_decay", "eval_split"), (int, float)),
    "max_grad_norm": (int, float, str),
    "overwrite": (bool,),
    "resume": (bool,),
    "from_scratch": (bool,),
    "compile": (bool,),
}
_EXAMPLES = {int: "100", float: "0.1", bool: "true", str: '"..."'}
_EXCLUSIVE = (("steps", "epochs", "minutes"), ("batch_size", "batch_tokens"), ("eval", "eval_split"))


def read_config(path: Path, known: Set[str]) -> dict[str, Any]:
    """The options in a TOML file. Raises ConfigError for a file that cannot be read and an option that is not known."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}", hint="pass a TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(
            f"--config {path}: {error}", hint='lines such as  lr = 1e-5  and  out = "tuned"'
        ) from error
    options: dict[str, Any] = {}
    for name, value in values.items():
        key = name.replace("-", "_")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            names = ", ".join(sorted(known)).replace("_", "-")
            hint = f"did you mean {near[0].replace('_', '-')}?" if near else f"known are {names}"
            if isinstance(value, dict):
                hint = f"write the options without [{name}] above them"
            raise ConfigError(f"--config {path}: no option {name!r}", hint=hint)
        options[key] = _checked(value, key, f"--config {path}: {name}")
    return options


def merge(defaults: Mapping[str, Any], config: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """The later over the earlier; an option given drops those that it excludes."""
    values = dict(config)
    for group in _EXCLUSIVE:
        if any(name in given for name in group):
            for name in group:
                values.pop(name, None)
        chosen = [name for name in group if name in values]
        if len(chosen) > 1:
            raise ConfigError(f"--config: {' and '.join(chosen)} exclude each other", hint="keep one of them")
    return {**defaults, **values, **given}


def write_config(values: Mapping[str, Any]) -> str:
    """TOML text that `read_config` takes."""
    lines = []
    for key, value in values.items():
        if value is None:
            value = "none" if key == "max_grad_norm" else None
        if value not in (None, []):
            # JSON strings, numbers, booleans and lists of strings are TOML as well.
            lines.append(f"{key.replace('_', '-')} = {json.dumps(value, ensure_ascii=False, default=str)}")
    return "\n".join(lines)


def _checked(value: Any, key: str, place: str) -> Any:
    name = key.replace("_", "-")
    if key in _LISTS:
        values = [value] if isinstance(value, str) else value
        if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
            raise ConfigError(
                f"{place}: expected a string or a list of strings",
                hint=f'such as  {name} = ["..."]',
            )
        return values
    kinds = _TYPES.get(key, (str,))
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join(kind.__name__ for kind in kinds)
        raise ConfigError(
            f"{place}: is {type(value).__name__}, expected {expected}",
            hint=f"such as  {name} = {_EXAMPLES[float if float in kinds else kinds[0]]}",
        )
    return value
