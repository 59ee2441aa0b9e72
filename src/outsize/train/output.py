"""The folder a run leaves behind, complete or not at all.

While a run goes on, everything it writes lies in `OUT.partial`: `metrics.jsonl`, `report.html`, `timeline.json` (one step
in time), `best/` (the weights that were best in an evaluation), and at the end `weights/`.
When the weights are complete, the metrics join them and the folder is renamed to `OUT`. An earlier run that
is to be overwritten stays until that moment. A run that fails leaves `OUT.partial` with its metrics, and no
`OUT`.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from outsize.errors import ConfigError, StorageError

METRICS = "metrics.jsonl"
REPORT = "report.html"
TIMELINE = "timeline.json"
KEPT = (METRICS, REPORT, TIMELINE, "tensorboard")
"""What lies beside the weights when all is complete."""
BEST = "best"


@dataclass(frozen=True, slots=True)
class OutputFolder:
    """A claim on `out`; make one with `claim`. `replaces`: something of ours is there, and is to be replaced."""

    out: Path
    replaces: bool = False

    @classmethod
    def claim(
        cls, out: Path, *, overwrite: bool, inputs: Sequence[Path], goes_on: bool = False
    ) -> OutputFolder:
        """Make `OUT.partial`, or raise ConfigError where `out` holds something that is not ours to replace.

        With `overwrite` an earlier model or run may be replaced; a folder that is neither, or that holds one
        of `inputs`, never is. A run that `goes_on` keeps what it left in `OUT.partial`, and replaces the `OUT` that it made
        when it was shorter, whose metrics it takes over.
        """
        place = Path(os.path.abspath(out))
        folder = cls(place, place.is_dir() and any(place.iterdir()))
        folder._check(overwrite or goes_on, inputs, () if goes_on else (folder.partial,))
        try:
            if folder.partial.exists() and not goes_on:
                shutil.rmtree(folder.partial)
            folder.partial.mkdir(parents=True, exist_ok=goes_on)
            if goes_on and not folder.metrics.exists() and (folder.out / METRICS).exists():
                shutil.copyfile(folder.out / METRICS, folder.metrics)
        except OSError as error:
            raise StorageError(
                f"{folder.partial}: {error.strerror}", hint="pass --out in a folder you own"
            ) from error
        return folder

    @property
    def partial(self) -> Path:
        """Where the run writes while it goes on."""
        return self.out.with_name(f"{self.out.name}.partial")

    @property
    def metrics(self) -> Path:
        """The file of measurements, while the run goes on."""
        return self.partial / METRICS

    @property
    def report(self) -> Path:
        """The page that says what the run did."""
        return self.partial / REPORT

    @property
    def timeline(self) -> Path:
        """One step in time, predicted and measured."""
        return self.partial / TIMELINE

    @property
    def best(self) -> Path:
        """Where the best weights lie, while the run goes on."""
        return self.partial / BEST

    @property
    def weights(self) -> Path:
        """Where the last weights lie, complete, before they become `out`."""
        return self.partial / "weights"

    @property
    def published_best(self) -> Path | None:
        """The folder of the best weights, once published, if they are not the last."""
        folder = self.out / BEST
        return folder if folder.is_dir() else None

    def publish(self, write_weights: Callable[[Path], None], *, keep_best: bool = True) -> None:
        """Let `write_weights` fill a new folder, and make it `out`, together with metrics and the best weights."""
        weights = self.weights
        shutil.rmtree(weights, ignore_errors=True)
        write_weights(weights)
        for name in KEPT:
            if (self.partial / name).exists():
                (self.partial / name).replace(weights / name)
        if self.best.exists() and keep_best:
            self.best.replace(weights / BEST)
        if self.replaces and self.out.exists():
            self.out.rename(self.partial / "earlier")
        # What was put there meanwhile is not ours: only an empty folder gives way.
        weights.rename(self.out)
        shutil.rmtree(self.partial, ignore_errors=True)  # the run is complete, whatever stays behind

    def replace_best(self, write_weights: Callable[[Path], None]) -> None:
        """Let `write_weights` fill a new folder, and make it `best`; the best weights before stay until it is complete."""
        fresh = self.best.with_name(f"{BEST}.new")
        shutil.rmtree(fresh, ignore_errors=True)
        write_weights(fresh)
        shutil.rmtree(self.best, ignore_errors=True)
        fresh.rename(self.best)

    def give_up(self) -> None:
        """Remove `OUT.partial` where it holds neither measurements nor weights."""
        has_weights = self.weights.exists() or self.best.exists()
        if not has_weights and (not self.metrics.exists() or self.metrics.stat().st_size == 0):
            shutil.rmtree(self.partial, ignore_errors=True)

    def _check(self, overwrite: bool, inputs: Sequence[Path], others: Sequence[Path]) -> None:
        if self.out.exists() and not self.out.is_dir():
            raise ConfigError(f"--out {self.out} is a file", hint="pass a folder that does not exist yet")
        for path in inputs:
            if Path(os.path.abspath(path)).is_relative_to(self.out):
                raise ConfigError(f"--out {self.out} holds {path}, which is read", hint="pass another --out")
        for folder in (self.out, *others):
            if folder.exists() and any(folder.iterdir()):
                self._check_overwrite(folder, overwrite)

    def _check_overwrite(self, folder: Path, overwrite: bool) -> None:
        if not overwrite:
            raise ConfigError(
                f"--out: {folder} is not empty",
                hint="pass another --out, or --overwrite to replace what is there",
            )
        if not any((folder / name).exists() for name in ("config.json", METRICS, BEST, "weights")):
            raise ConfigError(
                f"--overwrite: {folder} holds no earlier run",
                hint="pass another --out, or empty the folder yourself",
            )
