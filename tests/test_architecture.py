"""ARCHITECTURE.md names rooms, files and functions that exist."""

import importlib
import re

import pytest

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
