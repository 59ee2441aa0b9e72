"""The shape of the source: import cycles, wide classes, and the size of the rooms that hold the engine.

    python -m tests.tools.shape [FOLDER ...]

Prints a column for each folder `src/outsize` (default: this checkout's), so that two checkouts can be compared. Imports
under TYPE_CHECKING count. A class counts as wide with more than 20 attributes (names assigned to `self`, or fields) or
more than 20 methods, properties included.
"""

from __future__ import annotations

import ast
import io
import sys
import tokenize
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).parents[2] / "src" / "outsize"
ROOMS = ("block.py", "plan", "store", "engine")
MOST = 20


def modules(root: Path) -> dict[str, Path]:
    """The files of a package by the names of their modules."""
    found = {}
    for path in sorted(root.rglob("*.py")):
        parts = (root.name, *path.relative_to(root).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports(root: Path) -> dict[str, set[str]]:
    """The modules of the package that each of its modules imports."""
    files = modules(root)
    found: dict[str, set[str]] = {}
    for name, path in files.items():
        targets: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                targets |= {alias.name for alias in node.names if alias.name in files}
            elif isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    targets |= {inner} if inner in files else {node.module} & files.keys()
        found[name] = targets - {name}
    return found


def cycles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """The sets of modules that import one another in a circle."""
    reach = {name: reachable(graph, name) for name in graph}
    left, found = set(graph), []
    while left:
        name = left.pop()
        circle = {other for other in reach[name] if name in reach[other]}
        if circle:
            found.append(circle | {name})
            left -= circle
    return found


def reachable(graph: Mapping[str, set[str]], start: str) -> set[str]:
    """The modules that `start` imports, directly or not; itself only if it is in a circle."""
    seen: set[str] = set()
    todo = list(graph[start])
    while todo:
        name = todo.pop()
        if name not in seen:
            seen.add(name)
            todo += graph[name]
    return seen


def wide_classes(root: Path) -> Iterator[tuple[str, int, int]]:
    """`(name, attributes, methods)` of each class that has more than MOST of one."""
    for path in modules(root).values():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ClassDef):
                attributes, methods = _width(node)
                if attributes > MOST or methods > MOST:
                    yield f"{path.relative_to(root)}:{node.name}", attributes, methods


def _width(node: ast.ClassDef) -> tuple[int, int]:
    attributes = {
        each.target.id
        for each in node.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    }
    for each in ast.walk(node):
        targets = each.targets if isinstance(each, ast.Assign) else [getattr(each, "target", None)]
        for target in targets:
            for leaf in ast.walk(target) if isinstance(each, ast.Assign | ast.AnnAssign) and target else ():
                if isinstance(leaf, ast.Attribute) and isinstance(leaf.value, ast.Name):
                    attributes |= {leaf.attr} if leaf.value.id == "self" else set()
    return len(attributes), sum(isinstance(each, ast.FunctionDef) for each in node.body)


def _files(root: Path, room: str) -> list[Path]:
    path = root / room
    return [path] if path.is_file() else sorted(path.rglob("*.py"))


def num_nodes(root: Path, room: str) -> int:
    """Nodes of the syntax trees of a room."""
    return sum(1 for path in _files(root, room) for _ in ast.walk(ast.parse(path.read_text())))


def num_lines(root: Path, room: str) -> int:
    """Lines of a room that hold code: no blanks, comments or docstrings."""
    return sum(_code_lines(path.read_text()) for path in _files(root, room))


def _code_lines(source: str) -> int:
    prose: set[int] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            prose |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped and token.type != tokenize.ENDMARKER:
            lines |= set(range(token.start[0], token.end[0] + 1))
    return len(lines - prose)


def main() -> None:
    """Print the figures of each folder side by side."""
    roots = [Path(each) for each in sys.argv[1:]] or [ROOT]
    figures: dict[str, Callable[[Path], int]] = {
        "modules in import cycles": lambda root: sum(map(len, cycles(imports(root)))),
        "classes over 20 attributes or methods": lambda root: sum(1 for _ in wide_classes(root)),
        "modules reachable from engine.api": lambda root: len(
            reachable(imports(root), f"{root.name}.engine.api")
        ),
        "syntax nodes": lambda root: sum(num_nodes(root, room) for room in ROOMS),
        "lines of code": lambda root: sum(num_lines(root, room) for room in ROOMS),
        **{f"  syntax nodes of {room}": lambda root, room=room: num_nodes(root, room) for room in ROOMS},  # type: ignore[misc]
    }
    width = max(map(len, figures))
    for what, count in figures.items():
        print(f"{what:<{width}}", *(f"{count(root):>9,}" for root in roots))
    for root in roots:
        for name, attributes, methods in wide_classes(root):
            print(f"{name}: {attributes} attributes, {methods} methods")


if __name__ == "__main__":
    main()
