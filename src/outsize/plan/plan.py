"""A plan is a value: the list of operations of one call of the model, which can be printed, read back and compared."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from outsize.plan.op import Op


@dataclass(frozen=True, slots=True)
class Plan:
    """Operations in the order in which they are started."""

    ops: tuple[Op, ...]

    def __iter__(self) -> Iterator[Op]:
        return iter(self.ops)

    def __len__(self) -> int:
        return len(self.ops)

    def __str__(self) -> str:
        return "\n".join(map(str, self.ops))

    @classmethod
    def parse(cls, text: str) -> Plan:
        """The plan whose text is `text`, one operation a line; blank lines are passed over."""
        return cls(tuple(Op.parse(line) for line in text.splitlines() if line.strip()))

    def expanded(self, replace: Callable[[Op], Iterable[Op]]) -> Plan:
        """The plan with what `replace` gives in the place of each operation, which it is asked for in order."""
        return Plan(tuple(new for op in self.ops for new in replace(op)))

    def excerpt(self, index: int, around: int = 3) -> str:
        """The lines around operation `index`, marked, for an error message."""
        first = max(0, index - around)
        return "\n".join(
            f"  {op}{'  <-- ERROR HERE' if first + i == index else ''}"
            for i, op in enumerate(self.ops[first : index + around + 1])
        )
