"""No file of the package imports another in a circle; imports for type checkers and inside functions count as well."""

import ast
import textwrap
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import outsize

ROOT = Path(outsize.__file__).parent


def module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(tree: ast.Module, modules: Set[str]) -> Iterator[str]:
    """The modules that a file imports from; a name of a package is taken from the package itself."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module in modules:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in modules else node.module


def imports_of(root: Path) -> dict[str, set[str]]:
    files = {module_of(path, root): path for path in root.rglob("*.py")}
    return {name: set(imported(ast.parse(path.read_text()), files.keys())) for name, path in files.items()}


def in_circles(imports: Mapping[str, Set[str]]) -> set[str]:
    """Modules that reach themselves through what they import."""
    reached = {name: set(direct) for name, direct in imports.items()}
    has_grown = True
    while has_grown:
        has_grown = False
        for found in reached.values():
            more = set().union(*(reached[name] for name in found)) - found
            found |= more
            has_grown |= bool(more)
    return {name for name, found in reached.items() if name in found}


def test_no_file_is_in_an_import_circle():
    assert not in_circles(imports_of(ROOT))


def test_circles_are_found(tmp_path):
    root = tmp_path / "outsize"
    root.mkdir()
    sources = {
        "__init__": "from outsize.a import thing",
        "a": "from outsize import b",
        "b": """
            from typing import TYPE_CHECKING
            if TYPE_CHECKING:
                from outsize.c import Other
        """,
        "c": """
            def late():
                import outsize.b
        """,
        "d": "from outsize.c import Other",
    }
    for name, source in sources.items():
        (root / f"{name}.py").write_text(textwrap.dedent(source))
    assert in_circles(imports_of(root)) == {"outsize.b", "outsize.c"}
