"""Examples in docstrings keep their lines on the page: `Pins(tile_rows=4)    rows of a batch`, and sessions with `>>>`."""

from __future__ import annotations

import re
from typing import Any

import griffe

_EXAMPLE = re.compile(r"[\w.]+\(.*\)(\s{2,}\S.*)?")


class Examples(griffe.Extension):
    """Turns runs of example lines into code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of `obj`, if it has one."""
        if obj.docstring is not None:
            obj.docstring.value = as_code(obj.docstring.value)


def as_code(docstring: str) -> str:
    """`docstring` with each line that is an example and nothing else indented by four, as Markdown writes code."""
    lines: list[str] = []
    was_example = in_session = False
    for line in docstring.splitlines():
        in_session = bool(line) and (in_session or line.startswith(">>> "))
        is_example = in_session or _EXAMPLE.fullmatch(line) is not None
        if is_example != was_example and lines and lines[-1]:
            lines.append("")
        lines.append(f"    {line}" if is_example else line)
        was_example = is_example
    return "\n".join(lines)
