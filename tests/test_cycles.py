"""No file of the package imports another in a circle; imports for type checkers and inside functions count as well."""

import textwrap

from tests.tools.shape import ROOT, cycles, imports


def test_no_file_is_in_an_import_circle():
    assert cycles(imports(ROOT)) == []


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
    assert cycles(imports(root)) == [{"outsize.b", "outsize.c"}]
