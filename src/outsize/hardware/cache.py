"""Profiles of this machine, kept between runs: measured once per disk, and again when something has changed.

One file per machine and disk, named after both; home folders may be shared by unlike machines. Versions are not in the name
but in the file, so that upgrading leaves nothing behind.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from outsize.config import cache_folder
from outsize.errors import ConfigError, naming
from outsize.hardware.identity import disk_number, identity, machine_key, memory_bytes
from outsize.hardware.measure import SECONDS, measure
from outsize.plan.profile import Profile


def profile_path(folder: Path | None) -> Path:
    """Where the profile of this machine with the disk of `folder` (None: of the cache folder) is kept.

    Raises ConfigError where there is no such folder.
    """
    return cache_folder() / "profiles" / f"{machine_key()}-{disk_number(_folder(folder))}.json"


def load_or_measure(
    folder: Path | None, say: Callable[[str], None], *, again: bool = False, seconds: float | None = None
) -> Profile:
    """The profile of this machine with the disk of `folder` (None: of the cache folder).

    It is read from the cache where it holds for this machine, else, or with `again`, measured, which takes about `seconds`
    (20), and kept. `say` is told what is done and why. Raises what `measure` raises.
    """
    path = profile_path(folder)
    if not again and (known := _known(path, identity(_folder(folder)), say)) is not None:
        return known
    profile = measure(folder, seconds=SECONDS if seconds is None else seconds, say=say)
    try:
        write(profile, path)
    except OSError as error:
        say(f"the profile is not kept: {path}: {error.strerror}")
    return profile


def kept(folder: Path | None) -> Profile | None:
    """The profile of this machine that an earlier measurement left, if it still holds; nothing is measured or made."""
    if folder is None and not os.path.isdir(cache_folder()):
        return None
    return _known(profile_path(folder), identity(_folder(folder)), lambda text: None)


def write(profile: Profile, path: Path) -> None:
    """Write `profile` to `path`, whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        with naming(partial):
            partial.write_text(profile.to_json() + "\n")
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _folder(folder: Path | None) -> Path:
    if folder is not None:
        return folder
    own = cache_folder()
    try:
        own.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"cache folder {own}: {error.strerror}", hint="name a folder on a local disk with disk="
        ) from error
    return own


def _known(path: Path, wanted: str, say: Callable[[str], None]) -> Profile | None:
    """The profile at `path`, where there is one that holds, with the memory of this job; says why one does not."""
    if not os.path.exists(path):  # nor where it cannot be seen
        return None
    try:
        profile = Profile.read(path)
    except ConfigError as error:
        say(f"{error.message}: measuring again")
        return None
    if profile.identity != wanted:
        say(f"{path} holds for {profile.identity or 'no machine'}, this is {wanted}: measuring again")
        return None
    return replace(profile, host_bytes=memory_bytes())
