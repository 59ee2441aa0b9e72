"""Writing the weights of a run, so that what was trained is not lost with the last write.

Room for them is held on the disk of OUT from before the first step. Where they cannot be written there all the same, they
are saved in another folder: on a disk of the run, in the working directory, or at home.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from pathlib import Path

from torch import nn

from outsize.config import format_bytes
from outsize.engine.api import settings_of
from outsize.errors import OutsizeError, StorageError, StorageFullError
from outsize.files import is_memory_backed
from outsize.train.api import Api
from outsize.train.output import OutputFolder
from outsize.train.room import Room, free_bytes
from outsize.train.settings import TrainSettings

_BESIDE_BYTES = 16 << 20
"""For what lies beside the weights: measurements, the report, one step in time."""

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}


class Saver:
    """Writes the weights of `model` into `folder`, now and then the best ones, at last the last ones."""

    def __init__(
        self,
        settings: TrainSettings,
        api: Api,
        model: nn.Module,
        folder: OutputFolder,
        say: Callable[[str], None],
    ) -> None:
        self._settings = settings
        self._api = api
        self._model = model
        self._folder = folder
        self._say = say
        self._room = Room(folder.partial)
        self._num_bytes = weights_bytes(model, settings.model)

    def hold_room(self) -> None:
        """Hold room on the disk of OUT for all weights that are still to be written at once: the last, and the best ones
        where the run is evaluated and none are there yet. Raises StorageFullError where it is not free.
        """
        copies = 2 if self._settings.evaluating.is_on and not self._folder.best.exists() else 1
        needed = copies * self._num_bytes + _BESIDE_BYTES
        try:
            self._room.hold(needed)
        except StorageFullError as error:
            what = "the weights" if copies == 1 else "the best and the last weights"
            free = format_bytes(free_bytes(self._folder.partial))
            raise StorageFullError(
                f"--out {self._folder.out}: {what} take {format_bytes(needed)}, and {free} are free on its disk",
                hint=f"free some space there, or pass --out with a folder on a disk with {format_bytes(needed)} free",
            ) from error

    def close(self) -> None:
        """Give back the room that is held."""
        self._room.release()

    def save_best(self) -> None:
        """Make the weights as they are now the best ones. Raises StorageError where they cannot be written."""
        self._room.release()
        self._folder.replace_best(self._save)
        try:
            self.hold_room()
        except StorageFullError as error:
            self._say(f"room for the last weights is not held any more: {error.message}")

    def publish(self, num_steps: int, *, keep_best: bool = True, is_committed: bool = False) -> None:
        """Write the weights after step `num_steps`, and make the folder OUT.

        Raises StorageError, saying where the weights are, where that fails. With `is_committed` they are in the run's
        store too.
        """
        self._room.release()
        try:
            self._folder.publish(self._save, keep_best=keep_best)
        except OSError as error:
            raise self._saved_elsewhere(error, num_steps, is_committed) from error

    def _save(self, path: Path) -> None:
        self._api.save(self._model, path, tokenizer_from=self._settings.model)

    def _saved_elsewhere(self, error: OSError, num_steps: int, is_committed: bool) -> StorageError:
        out = self._folder.out
        reason = error.message if isinstance(error, OutsizeError) else _reason(error, out)
        weights = f"the weights after step {num_steps}"
        if self._folder.weights.is_dir():
            target = _unused(out.with_name(f"{out.name}.saved")) if out.exists() else out
            return StorageError(
                f"{reason}; {weights} are complete in {self._folder.weights}",
                hint=f"move them: {_move(self._folder.weights, target)}",
            )
        if is_committed:
            export = ["outsize", "checkpoint", "export", str(self._settings.checkpoint), str(out)]
            return StorageError(
                f"{reason}; {weights} are committed to {self._settings.checkpoint}",
                hint=f"free some space, then: {shlex.join(export)}",
            )
        tried = []
        for place in self._places():
            target = _unused(place / f"{out.name}.saved")
            self._say(f"{reason}; saving in {target} instead")
            try:
                self._save(target)
            except OSError as other:
                tried.append(
                    f"{target}: {other.message if isinstance(other, OutsizeError) else other.strerror}"
                )
                continue
            return StorageError(
                f"{reason}; {weights} are saved in {target} instead",
                hint=f"free some space, and move them: {_move(target, out)}",
            )
        others = f" ({'; '.join(tried)})" if tried else ""
        return StorageError(
            f"{reason}; no other place had room for {weights}, {format_bytes(self._num_bytes)}{others}",
            hint="pass --checkpoint-every 100: a commit outlives a run that cannot save",
        )

    def _places(self) -> list[Path]:
        """Folders that the weights may be saved in where OUT cannot hold them, and that have room for them."""
        disks = [disk.folder for disk in settings_of(**self._settings.place).budgets.disks]
        return [place for place in (*disks, Path.cwd(), Path.home()) if self._has_room(place)]

    def _has_room(self, place: Path) -> bool:
        try:
            is_usable = os.access(place, os.W_OK | os.X_OK) and not is_memory_backed(place)
            return is_usable and free_bytes(place) >= self._num_bytes + _BESIDE_BYTES
        except OSError:
            return False


def weights_bytes(model: nn.Module, folder: Path) -> int:
    """Bytes of `model` as an ordinary folder, with the tokenizer and all else that lies in `folder`."""
    tensors = [*model.parameters(), *model.buffers()]
    beside = [file for file in folder.iterdir() if file.is_file() and file.suffix not in _WEIGHTS]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) + sum(
        file.stat().st_size for file in beside
    )


def _reason(error: OSError, out: Path) -> str:
    return f"{error.filename or out}: {error.strerror or error}"


def _move(source: Path, target: Path) -> str:
    """The command that moves a folder."""
    return shlex.join(["mv", str(source), str(target)])


def _unused(path: Path) -> Path:
    """`path`, or the first of `path.2`, `path.3`, ... that is not there."""
    number = 1
    found = path
    while found.exists():
        number += 1
        found = path.with_name(f"{path.name}.{number}")
    return found
