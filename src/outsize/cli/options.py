"""Options that several commands share: where bytes may live."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any, cast

from outsize.config import HOME_CHOICES, ComputeType, Pins
from outsize.errors import ConfigError

if TYPE_CHECKING:
    from outsize.engine.api import Options
    from outsize.plan.profile import Profile

Commands = argparse._SubParsersAction  # the type that add_subparsers returns has no public name

LOAD_OPTIONS = ("device", "host", "disk", "home", "dtype", "on_device_full", "compile")
"""Options that are keywords of `outsize.load` as they are."""

MODEL_HELP = "folder of a Hugging Face model"


def command(
    commands: Commands[argparse.ArgumentParser], name: str, text: str, examples: str
) -> argparse.ArgumentParser:
    """A parser for command `name`, with `text` in the list of commands and `examples` under its help."""
    return commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def add_place(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The options that say where bytes may live, as a group; `load_options` reads them."""
    group = parser.add_argument_group(
        "where it may live", "Hard limits; what is not given is measured and planned."
    )
    group.add_argument("--device", metavar="SIZE", help="memory of the accelerator, such as 20GiB")
    group.add_argument("--host", metavar="SIZE", help="memory of the whole process, such as 3GiB")
    group.add_argument(
        "--disk",
        metavar="DIR[:SIZE][,...]",
        help="folder on a local disk, such as /nvme/scratch:200GiB; several on different drives are used side by side",
    )
    group.add_argument(
        "--home", choices=[str(home) for home in HOME_CHOICES], help="where weights and state live at rest"
    )
    group.add_argument(
        "--dtype", choices=[str(kind) for kind in ComputeType], help="number type to compute in"
    )
    group.add_argument(
        "--attention",
        metavar="NAME",
        help="implementation to compute attention with, such as flash_attention_2 (the model's, or torch's own)",
    )
    group.add_argument(
        "--pin",
        metavar="NAME=VALUE",
        action="append",
        help=f"decide something the planner would: {', '.join(pin.name for pin in fields(Pins))}",
    )
    return group


def add_compile(group: argparse._ArgumentGroup) -> None:
    """Whether layers are compiled."""
    group.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="run layers through torch.compile, once for all that are alike (no; a resumed run: as before)",
    )


UNPREDICTED = "times are not predicted: run `outsize profile`{disk} once, it measures this machine in 20 s"


def profile_of(disk: str | None) -> Profile | None:
    """The profile of this machine with the disk that an option names, where `outsize profile` left one that holds.

    Raises ConfigError for a folder that is not there.
    """
    from outsize.config import Budgets
    from outsize.hardware import kept

    budgets = Budgets.parse(None, None, disk)
    budgets.check_folders()
    return kept(budgets.disks[0].folder if budgets.disks else None)


def load_options(options: argparse.Namespace | Mapping[str, Any]) -> Options:
    """The keywords of `outsize.load` that `add_place`'s options give, and `add_compile`'s and others if there are such."""
    values = options if isinstance(options, Mapping) else vars(options)
    given = {name: values[name] for name in LOAD_OPTIONS if values.get(name) is not None}
    return cast("Options", {**given, "pins": pins_of(values.get("pin") or [])})


def pins_of(texts: list[str]) -> Pins | None:
    """`["weight_slots=2"]` as Pins; None for no pins. Raises ConfigError naming the pin that is malformed."""
    known = {pin.name for pin in fields(Pins)}
    words: dict[str, dict[str, Any]] = {
        "verify": {"true": True, "false": False},
        "inputs": {str(home): str(home) for home in HOME_CHOICES},
    }
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if name not in known or not equals:
            raise ConfigError(f"--pin {text}: no such pin", hint=f"known are {', '.join(sorted(known))}")
        if name == "resident" and re.fullmatch(r"\d+,\d+,\d+", value):
            values[name] = tuple(map(int, value.split(",")))
        elif name in words and value in words[name]:
            values[name] = words[name][value]
        elif name not in {*words, "resident"} and value.isdecimal():
            values[name] = int(value)
        else:
            known_words = list(words.get(name, ()))
            expected, example = (
                (" or ".join(known_words), known_words[-1]) if known_words else ("a whole number", "2")
            )
            if name == "resident":
                expected, example = "three whole numbers of blocks", "12,24,0"
            raise ConfigError(f"--pin {text}: expected {expected}", hint=f"pass --pin {name}={example}")
    return Pins(**values) if texts else None
