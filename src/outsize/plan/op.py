"""The operations of a plan: small frozen values with a text form.

`str(op)` and `Op.parse` are inverses. Slots are claimed by `read` and `claim` and given back by `free`, and by nothing
else, so that the memory a plan needs can be read off its text.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import ClassVar

from outsize.block import Plane
from outsize.errors import ConfigError
from outsize.plan.profile import Resource


@dataclass(frozen=True, slots=True)
class Op:
    """One operation on one block. After `block` an operation may have `plane` and `num_bytes`, which end its text.

    Class attributes say what an operation means to code that does not know its kind:

    - `verb` is the first word of the text.
    - `resource` is what the operation keeps busy until it is over, None if it starts nothing; a path with several legs
      keeps that of its other legs busy as well.
    - `ended_by` lists what may end the wait of an operation that computing, and whatever the plan has next, waits for; the
      first is named where the cause is unknown. Other operations have none.
    - `claims` and `frees` say that the block begins, or ceases, to hold a slot for the plane.
    - `opens_visit` and `closes_visit` tie an operation to the visit after or before it: it runs once that visit is reached,
      or as soon as it is over.
    - `computes` names the work of an operation that computes itself, outside of visits.
    """

    verb: ClassVar[str] = ""
    resource: ClassVar[Resource | None] = None
    ended_by: ClassVar[tuple[Resource, ...]] = ()
    claims: ClassVar[bool] = False
    frees: ClassVar[bool] = False
    opens_visit: ClassVar[bool] = False
    closes_visit: ClassVar[bool] = False
    computes: ClassVar[str] = ""
    block: str

    @property
    def plane(self) -> Plane | None:
        """The plane that the operation is on; None where it is on the block as a whole."""
        return None

    @property
    def num_bytes(self) -> int:
        """What is moved; 0 where nothing is."""
        return 0

    def __init_subclass__(cls) -> None:
        if cls.verb:
            _VERBS[cls.verb] = cls

    def __str__(self) -> str:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        plane = f".{values['plane']}" if "plane" in values else ""
        num_bytes = f" {values['num_bytes']}" if "num_bytes" in values else ""
        return f"{self.verb} {self.block}{plane}{num_bytes}"

    @staticmethod
    def parse(text: str) -> Op:
        """The operation whose text is `text`; raises ConfigError for anything else."""
        verb, _, rest = text.strip().partition(" ")
        kind = _VERBS.get(verb)
        words = rest.split()
        if kind is not None and words:
            block, _, plane = words[0].partition(".")
            names = {field.name for field in fields(kind)}
            if block and bool(plane) is ("plane" in names) and len(words) == 1 + ("num_bytes" in names):
                try:
                    arguments: list[str | Plane | int] = [block]
                    if plane:
                        arguments.append(Plane(plane))
                    arguments += map(int, words[1:])
                    return kind(*arguments)  # type: ignore[arg-type]
                except ValueError:
                    pass
        raise ConfigError(f"not an operation: {text!r}", hint=f"an operation starts with {', '.join(_VERBS)}")


_VERBS: dict[str, type[Op]] = {}


@dataclass(frozen=True, slots=True)
class _OnPlane(Op):
    plane: Plane = field()


@dataclass(frozen=True, slots=True)
class _Move(_OnPlane):
    num_bytes: int = field()


@dataclass(frozen=True, slots=True)
class Held(_OnPlane):
    """The weights are in a slot from an earlier call, or the input was sent away before; only at the start of a plan."""

    verb: ClassVar[str] = "held"
    claims: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class Read(_Move):
    """Claim a slot and start reading a plane into it; `wait` makes it usable."""

    verb: ClassVar[str] = "read"
    claims: ClassVar[bool] = True
    resource: ClassVar[Resource | None] = Resource.READ


@dataclass(frozen=True, slots=True)
class Hint(Op):
    """The block will be visited, and its weights are on their way: what it needs beside them can be started.

    Passes add operations here. A plan that runs holds no hints.
    """

    verb: ClassVar[str] = "hint"


@dataclass(frozen=True, slots=True)
class Update(Op):
    """Start applying the block's pending update, chunk by chunk as state arrives; `wait` makes the weights usable."""

    verb: ClassVar[str] = "update"
    computes: ClassVar[str] = "update"
    resource: ClassVar[Resource | None] = Resource.UPDATE


@dataclass(frozen=True, slots=True)
class Wait(_OnPlane):
    """Let computing wait until a plane that was read (and updated), or an input that was fetched, is usable."""

    verb: ClassVar[str] = "wait"
    ended_by: ClassVar[tuple[Resource, ...]] = (Resource.READ, Resource.UPDATE, Resource.UP)
    opens_visit: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class Claim(_OnPlane):
    """Claim a slot for a plane that starts empty: a gradient that nothing was added to yet."""

    verb: ClassVar[str] = "claim"
    claims: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class Forward(Op):
    """Run the block, all its tiles."""

    verb: ClassVar[str] = "forward"
    opens_visit: ClassVar[bool] = True
    resource: ClassVar[Resource | None] = Resource.COMPUTE


@dataclass(frozen=True, slots=True)
class Backward(Op):
    """Go back through the block, which is run again unless its activations were kept, and add to its gradient."""

    verb: ClassVar[str] = "backward"
    opens_visit: ClassVar[bool] = True
    resource: ClassVar[Resource | None] = Resource.COMPUTE


@dataclass(frozen=True, slots=True)
class Write(_Move):
    """Round a plane, take its norm, and start moving it from its slot to its home."""

    verb: ClassVar[str] = "write"
    closes_visit: ClassVar[bool] = True
    computes: ClassVar[str] = "round"
    resource: ClassVar[Resource | None] = Resource.WRITE


@dataclass(frozen=True, slots=True)
class Free(_OnPlane):
    """Give a slot, or the memory of an input, back once nothing is being written from it any more."""

    verb: ClassVar[str] = "free"
    ended_by: ClassVar[tuple[Resource, ...]] = (Resource.WRITE, Resource.DOWN, Resource.UP, Resource.UPDATE)
    frees: ClassVar[bool] = True


@dataclass(frozen=True, slots=True)
class Send(_Move):
    """Start sending what the next visit is given to where it waits for the backward; `free` gives its memory back."""

    verb: ClassVar[str] = "send"
    resource: ClassVar[Resource | None] = Resource.WRITE


@dataclass(frozen=True, slots=True)
class Fetch(_Move):
    """Start bringing the block's last input back that was sent and not fetched yet; `wait` makes it usable."""

    verb: ClassVar[str] = "fetch"
    resource: ClassVar[Resource | None] = Resource.READ


@dataclass(frozen=True, slots=True)
class Copy(Op):
    """Add the block, as it is now, to the commit under way: `num_bytes` of it live in memory and are copied to the disk."""

    verb: ClassVar[str] = "copy"
    resource: ClassVar[Resource | None] = Resource.WRITE
    num_bytes: int = field()
