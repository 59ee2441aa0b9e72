"""Who answers when the model reaches a point: the point itself, or a dry run in its place."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol, final


class DryAnswer(Protocol):
    """Answers calls of points without computing them."""

    def answer(self, module: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The output of the point at `module`, in shape and type."""


@final
class Switch:
    """`dry_run` answers instead of the points while it is set."""

    def __init__(self) -> None:
        self.dry_run: DryAnswer | None = None

    @contextmanager
    def turned_to(self, dry_run: DryAnswer) -> Iterator[None]:
        """Inside, `dry_run` answers."""
        self.dry_run = dry_run
        try:
            yield
        finally:
            self.dry_run = None
