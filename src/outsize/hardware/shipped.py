"""Profiles of machines that one may want to plan for without having them: `machines/*.json`, from data sheets.

They hold what such a machine reaches in practice, not peaks: 60 % of the peak for products, about 80 % for memory. Where no
data sheet says anything, such as what reads lose to writes, nothing is assumed; `source` names sheets and assumptions.
"""

from __future__ import annotations

import difflib
from importlib.resources import files

from outsize.errors import ConfigError
from outsize.plan.profile import Profile

_FOLDER = files("outsize.hardware") / "machines"


def machine_names() -> tuple[str, ...]:
    """Names of the machines that are known, in order."""
    names = (entry.name for entry in _FOLDER.iterdir())
    return tuple(sorted(name.removesuffix(".json") for name in names if name.endswith(".json")))


def machine(name: str) -> Profile:
    """The profile of machine `name`. Raises ConfigError listing the names that are known."""
    known = machine_names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise ConfigError(f"machine {name!r} is not known", hint=f"{hint}known are {', '.join(known)}")
    return Profile.from_json((_FOLDER / f"{name}.json").read_text(), f"machine {name}")
