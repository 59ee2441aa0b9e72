"""Memory limits of the control groups that contain this process.

A job started by systemd, Slurm or a container runtime runs in a control group (cgroup) below the root of the hierarchy, and
every ancestor may have a limit of its own: the kernel kills when any of them is exceeded. /proc/self/cgroup names the
group, /proc/self/mountinfo the folder where its hierarchy is mounted, and where in the hierarchy that mount begins.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True, slots=True)
class _Version:
    """The file names of one version of the memory controller."""

    limits: tuple[str, ...]
    usage: str
    reclaimable: tuple[str, ...]
    """Keys of memory.stat: page cache, which the kernel drops before it kills."""


_V1 = _Version(
    ("memory.limit_in_bytes",), "memory.usage_in_bytes", ("total_active_file", "total_inactive_file")
)
_V2 = _Version(("memory.max", "memory.high"), "memory.current", ("active_file", "inactive_file"))


def available_bytes(proc: Path = Path("/proc"), root: Path = Path("/")) -> int | None:
    """The memory that this process can still take within the limits of its control group and all of its ancestors.

    None where no limit is visible. Page cache charged to a group counts as available. `proc` and `root` are the process
    file system and the folder that mount points are relative to.
    """
    groups = (group for version, folders in _hierarchies(proc, root) for group in _levels(version, folders))
    return min(groups, default=None)


def limit_bytes(proc: Path = Path("/proc"), root: Path = Path("/")) -> int | None:
    """The lowest memory limit of this process's control group and all of its ancestors; None where none is visible.

    `proc` and `root` are as in `available_bytes`.
    """
    limits = (
        limit
        for version, folders in _hierarchies(proc, root)
        for folder in folders
        for limit in _limits(version, folder)
    )
    return min(limits, default=None)


def _levels(version: _Version, folders: tuple[Path, ...]) -> Iterator[int]:
    """The available bytes of each group that has a limit."""
    for folder in folders:
        limit = min(_limits(version, folder), default=None)
        usage = _number(folder / version.usage)
        if limit is not None and usage is not None:
            yield max(0, limit - max(0, usage - _reclaimable(folder, version)))


def _limits(version: _Version, folder: Path) -> Iterator[int]:
    """The limits that the group of `folder` itself has."""
    for name in version.limits:
        if (limit := _number(folder / name)) is not None:
            yield limit


def _hierarchies(proc: Path, root: Path) -> Iterator[tuple[_Version, tuple[Path, ...]]]:
    """Each mounted hierarchy with the memory controller: the folders of this process's group and its ancestors."""
    groups = dict(_groups(_read(proc / "self/cgroup")))
    for line in _read(proc / "self/mountinfo").splitlines():
        mount, _, kind = line.partition(" - ")
        fields, options = mount.split(), kind.split()
        if len(fields) < 5 or len(options) < 3:
            continue
        version = _V2 if options[0] == "cgroup2" else _V1
        if options[0] not in ("cgroup", "cgroup2") or (
            version is _V1 and "memory" not in options[2].split(",")
        ):
            continue
        if version in groups:
            top = root / _unescaped(fields[4]).lstrip("/")
            yield version, _ancestry(top, _unescaped(fields[3]), groups[version])


def _groups(text: str) -> Iterator[tuple[_Version, str]]:
    """The path of the group that this process is in, per version of the memory controller."""
    for line in text.splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            yield _V2, path
        elif "memory" in controllers.split(","):
            yield _V1, path


def _ancestry(top: Path, mounted: str, group: str) -> tuple[Path, ...]:
    """The folders from `group` up to `top`, where the part of the hierarchy below `mounted` is mounted.

    Only `top` where the group lies outside of that part, as a container without a namespace of its own sees it.
    """
    path, begin = PurePosixPath(group), PurePosixPath(mounted)
    if ".." in path.parts or not path.is_relative_to(begin):
        return (top,)
    inner = path.relative_to(begin)
    return tuple(top / each for each in (inner, *inner.parents))


def _reclaimable(folder: Path, version: _Version) -> int:
    stat = dict(line.split(maxsplit=1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
    return sum(int(stat[key]) for key in version.reclaimable if stat.get(key, "").isdigit())


def _number(path: Path) -> int | None:
    """The number in a file; None where there is no such file, or it says "max"."""
    text = _read(path).strip()
    return int(text) if text.isdigit() else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _unescaped(path: str) -> str:
    """A path of mountinfo, where white space and backslashes stand as octal codes."""
    for code, character in (("\\040", " "), ("\\011", "\t"), ("\\012", "\n"), ("\\134", "\\")):
        path = path.replace(code, character)
    return path
