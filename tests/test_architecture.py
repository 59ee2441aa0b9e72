"""ARCHITECTURE.md names rooms, files and functions that exist, and the code keeps to what it says of them."""

import ast
import importlib
import re

import pytest

from outsize.plan import Op
from tests.documents import ROOT

TEXT = (ROOT / "ARCHITECTURE.md").read_text()
SOURCE = ROOT / "src" / "outsize"
ROOMS = [path.name for path in SOURCE.iterdir() if (path / "__init__.py").exists()]


def lives():
    """The names in the lists of functions, such as `engine.api.load`."""
    rooms = "|".join(ROOMS)
    return sorted(set(re.findall(rf"`((?:{rooms})\.[a-z_]+\.[A-Za-z_.]+)`", TEXT)))


@pytest.mark.parametrize("name", lives())
def test_each_function_in_the_life_of_a_weight_and_of_a_batch_exists(name):
    room, file, *path = name.split(".")
    found = importlib.import_module(f"outsize.{room}.{file}")
    for part in path:
        found = getattr(found, part)
    assert callable(found)


def test_the_lists_are_there():
    assert len(lives()) > 25


def test_each_file_that_is_named_exists():
    named = re.findall(r"`((?:\w+/)+\w+\.py)`", TEXT)
    assert named
    for name in named:
        assert any((folder / name).is_file() for folder in (SOURCE, SOURCE.parent, ROOT)), name


def test_the_table_of_rooms_names_all_of_them():
    table = TEXT[TEXT.index("| room") : TEXT.index("`outsize/__init__.py` is")]
    assert {room for room in ROOMS if f"`{room}`" not in table} == set()


def kinds(base):
    """All classes derived from `base`."""
    return {each for kind in base.__subclasses__() for each in (kind, *kinds(kind))}


INTERPRETERS = {
    *("plan/op.py", "plan/build.py", "plan/check.py", "plan/lower.py", "plan/timeline.py"),
    "store/blocks.py",  # the table of runners
}
OPERATIONS = {kind.__name__ for kind in kinds(Op)}
VERBS = {kind.verb for kind in kinds(Op)}


def found_in_source(find, is_allowed):
    """`file:line` of all that `find` finds in the source, but in files that are allowed to hold it."""
    return [
        f"{name}:{line}"
        for path in sorted(SOURCE.rglob("*.py"))
        if not is_allowed(name := path.relative_to(SOURCE).as_posix())
        for line in find(path.read_text())
    ]


def interpreted(source):
    """The lines of a file that ask of which kind an operation is: by class in `match`, `isinstance`, `type`; or by verb."""
    nodes = list(ast.walk(ast.parse(source)))
    ours = {
        alias.asname or alias.name
        for node in nodes
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("outsize.plan")
        for alias in node.names
        if alias.name in OPERATIONS
    }
    for node in nodes:
        if isinstance(node, ast.MatchClass):
            asked = node.cls
        elif isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            asked = node.args[1]
        elif isinstance(node, ast.Compare):
            asked = node
        else:
            continue
        parts = list(ast.walk(asked))
        names = {part.id for part in parts if isinstance(part, ast.Name)}
        names |= {part.attr for part in parts if isinstance(part, ast.Attribute)}
        texts = {part.value for part in parts if isinstance(part, ast.Constant)}
        if names & ours or (isinstance(node, ast.Compare) and "verb" in names and texts & VERBS):
            yield node.lineno


def test_operations_are_interpreted_where_plans_are_made_checked_lowered_run_and_shown_and_nowhere_else():
    assert (
        found_in_source(interpreted, lambda path: path in INTERPRETERS or path.startswith("plan/passes/"))
        == []
    )


@pytest.mark.parametrize(
    "line",
    [
        "isinstance(op, Read)",
        "isinstance(op, Wait | Read)",
        "isinstance(op, (Free, Read))",
        "type(op) is Read",
        "op.verb == 'read'",
        "op.verb in ('read', 'write')",
        "match op:\n    case Read(block):\n        pass",
    ],
)
def test_an_interpretation_of_an_operation_is_found(line):
    assert list(interpreted(f"from outsize.plan import Free, Read, Wait\n{line}"))


def test_making_an_operation_is_no_interpretation():
    assert not list(interpreted("from outsize.plan import Read\nrun(Read('L00', plane, 1))"))


ASKS_FOR_THE_HOST = {"plan/path.py", "plan/place.py", "plan/limits.py"}
PLACES = {"host", "_host", "computes_in"}


def asks_for_the_host(source):
    """The lines of a file that ask whether blocks compute in the host's memory, or on a device with memory of its own."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and node.attr == "is_host":
            yield node.lineno
        elif isinstance(node, ast.Compare):
            sides = [node.left, *node.comparators]
            names = {getattr(side, "attr", getattr(side, "id", "")) for side in sides}
            homes = any(
                isinstance(side, ast.Attribute) and ast.unparse(side.value) == "Home" for side in sides
            )
            if homes and names & PLACES:
                yield node.lineno


def test_no_room_but_tier_and_no_file_but_those_of_placements_asks_whether_the_host_computes():
    """Legs, homes and limits are data: where the host computes, there is no link, and one memory."""
    found = found_in_source(
        asks_for_the_host, lambda path: path in ASKS_FOR_THE_HOST or path.startswith("tier/")
    )
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "if model.device.is_host: pass",
        "apart = limits.computes_in is Home.DEVICE",
        "x = 1 if placement.host is not Home.HOST else 2",
        "x = Home.HOST == computes_in",
    ],
)
def test_a_question_for_the_host_is_found(line):
    assert list(asks_for_the_host(line))
