"""No file of the package imports another in a circle, and no class has more attributes or methods than one can follow.

Imports for type checkers and inside functions count as well.
"""

import textwrap

from tests.tools.shape import ROOT, cycles, imports, wide_classes


def test_no_file_is_in_an_import_circle():
    assert cycles(imports(ROOT)) == []


def test_no_class_is_wide():
    assert list(wide_classes(ROOT)) == []


def test_wide_classes_are_found(tmp_path):
    methods = "".join(f"    def m{index}(self): ...\n" for index in range(21))
    (tmp_path / "a.py").write_text(f"class Wide:\n{methods}")
    assert [name for name, *_ in wide_classes(tmp_path)] == ["a.py:Wide"]


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
