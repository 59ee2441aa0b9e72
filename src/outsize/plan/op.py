"""The operations of a plan: small frozen values with a text form.

`str(op)` and `Op.parse` are inverses. Slots are claimed by `read` and `claim` and given back by `free`, and by nothing
else, so that the memory a plan needs can be read off its text.
"""

from __future__ import annotations

from abc import ABC
from dataclasses import dataclass, fields
from typing import ClassVar

from outsize.block import Plane
from outsize.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Op(ABC):
    """One operation on one block; `verb` is the first word of its text."""

    verb: ClassVar[str] = ""
    block: str

    def __str__(self) -> str:
        words = [self.verb, self.block]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name == "plane":
                words[1] = f"{self.block}.{value}"
            elif field.name == "num_bytes":
                words.append(str(value))
        return " ".join(words)

    @staticmethod
    def parse(text: str) -> Op:
        """The operation whose text is `text`; raises ConfigError for anything else."""
        verb, _, rest = text.strip().partition(" ")
        kind = _VERBS.get(verb)
        words = rest.split()
        if kind is not None and words:
            block, _, plane = words[0].partition(".")
            has_plane = any(field.name == "plane" for field in fields(kind))
            has_bytes = any(field.name == "num_bytes" for field in fields(kind))
            if block and bool(plane) is has_plane and len(words) == 1 + has_bytes:
                try:
                    arguments: list[str | Plane | int] = [block]
                    if has_plane:
                        arguments.append(Plane(plane))
                    if has_bytes:
                        arguments.append(int(words[1]))
                    return kind(*arguments)  # type: ignore[arg-type]
                except ValueError:
                    pass
        raise ConfigError(f"not an operation: {text!r}", hint=f"an operation starts with {', '.join(_VERBS)}")


@dataclass(frozen=True, slots=True)
class Held(Op):
    """The block's weights are in a slot from an earlier call; only at the start of a plan."""

    verb: ClassVar[str] = "held"
    plane: Plane


@dataclass(frozen=True, slots=True)
class Read(Op):
    """Claim a slot and start reading a plane into it; `wait` makes it usable."""

    verb: ClassVar[str] = "read"
    plane: Plane
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Update(Op):
    """Start applying the block's pending update, chunk by chunk as state arrives; `wait` makes the weights usable."""

    verb: ClassVar[str] = "update"


@dataclass(frozen=True, slots=True)
class Wait(Op):
    """Let computing wait until a plane that was read (and updated) is usable."""

    verb: ClassVar[str] = "wait"
    plane: Plane


@dataclass(frozen=True, slots=True)
class Claim(Op):
    """Claim a slot for a plane that starts empty: a gradient that nothing was added to yet."""

    verb: ClassVar[str] = "claim"
    plane: Plane


@dataclass(frozen=True, slots=True)
class Forward(Op):
    """Run the block, all its tiles."""

    verb: ClassVar[str] = "forward"


@dataclass(frozen=True, slots=True)
class Backward(Op):
    """Go back through the block, which is run again unless its activations were kept, and add to its gradient."""

    verb: ClassVar[str] = "backward"


@dataclass(frozen=True, slots=True)
class Write(Op):
    """Round a plane, take its norm, and start moving it from its slot to its home."""

    verb: ClassVar[str] = "write"
    plane: Plane
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Free(Op):
    """Give a slot back once nothing is being written from it any more."""

    verb: ClassVar[str] = "free"
    plane: Plane


_VERBS: dict[str, type[Op]] = {
    kind.verb: kind for kind in (Held, Read, Update, Wait, Claim, Forward, Backward, Write, Free)
}
