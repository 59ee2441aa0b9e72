"""Every error a user can meet, in one tree.

Each message says what happened, to which thing, and what was expected; `hint:` names the nearest thing that works.

    OutsizeError
    ├── ConfigError              a setting that cannot be used
    ├── BudgetError              the model, batch or state does not fit the memory or disk allowed
    ├── ModelError               a model that cannot be opened, cut or run
    │   └── WeightsError         missing, truncated or mismatched checkpoint files
    ├── DataError                a training file that cannot be read
    ├── RequestError             a prompt or request that cannot be served
    ├── UsageError               a call in an order or way that cannot be right
    ├── DeviceError              the accelerator is lost, or refuses what it is asked for
    ├── StorageError             a tier failed: the file, the place and the cause
    │   ├── StorageFullError     no space left
    │   ├── CorruptionError      bytes read are not the bytes written
    │   ├── FileChangedError     a file of the model is not the one that was opened, or that a commit names
    │   └── StateLostError       an update or a gradient was only partly stored when something failed
    └── TrainingError            training itself went wrong (a loss that is not finite)
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def in_short(error: BaseException) -> str:
    """What the error of a library says, in a line: its first, and the next where the first only announces it.

    >>> in_short(RuntimeError("backend='inductor' raised:\\nNo compiler\\n\\nSet TORCH_LOGS"))
    "backend='inductor' raised: No compiler"
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1])


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an OSError of the body name `path` where it names no file: opening a file names it, writing to it does not.

    >>> with naming(Path("answers.jsonl")):
    ...     raise OSError(28, "No space left on device")
    Traceback (most recent call last):
    OSError: [Errno 28] No space left on device: 'answers.jsonl'
    """
    try:
        yield
    except OSError as error:
        if error.filename is None and not isinstance(error, OutsizeError):
            error.filename = str(path)
        raise


class OutsizeError(Exception):
    """Base of all errors; `hint` is printed on its own line.

    >>> str(OutsizeError("no such folder: x", hint="pass a folder that exists"))
    'no such folder: x\\nhint: pass a folder that exists'
    """

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message if hint is None else f"{message}\nhint: {hint}")
        self.message = message
        self.hint = hint


class ConfigError(OutsizeError, ValueError):
    """A setting is malformed, unknown, or contradicts another."""


class BudgetError(OutsizeError):
    """What was asked for does not fit; the message gives the numbers, the hint the nearest setting that fits."""


class ModelError(OutsizeError):
    """A model cannot be opened, cut into blocks, or run block by block."""


class WeightsError(ModelError):
    """Checkpoint files are missing, truncated, or do not match the model."""


class DataError(OutsizeError):
    """A training file is missing, empty or malformed; the message names file and line."""


class RequestError(OutsizeError, ValueError):
    """A request that cannot be served: empty, too long, or needing more memory than there can ever be."""


class UsageError(OutsizeError, RuntimeError):
    """A call that would be silently wrong if it were carried out."""


class DeviceError(OutsizeError, RuntimeError):
    """The accelerator failed: it is lost, or memory for its transfers could not be pinned."""


class StorageError(OutsizeError, OSError):
    """A read or write of a tier failed; the message names the file, the place in it and the cause."""


class StorageFullError(StorageError):
    """The disk has no room for what has to be stored."""


class CorruptionError(StorageError):
    """A checksum does not match: the bytes read are not the bytes that were written."""


class FileChangedError(StorageError):
    """A file that weights come from was replaced, cut short, written to, moved or removed; the message says which."""


class StateLostError(StorageError):
    """Something failed while weights, optimizer state or gradients were being changed: the message names what is lost."""


class TrainingError(OutsizeError):
    """Training cannot go on: for example, the loss is not finite."""
