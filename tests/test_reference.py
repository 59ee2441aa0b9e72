"""The reference page describes all public names, and only what is there."""

import re
from importlib import import_module

import pytest

import outsize
from outsize.errors import OutsizeError
from tests.documents import ROOT

DESCRIBED = re.findall(r"^::: (\S+)", (ROOT / "docs" / "reference.md").read_text(), flags=re.MULTILINE)


def described(name):
    if name == "outsize.errors":
        return OutsizeError  # one entry, which lists the whole tree
    module, _, attribute = name.rpartition(".")
    return getattr(import_module(module), attribute)


@pytest.mark.parametrize("name", DESCRIBED)
def test_what_the_reference_describes_is_there(name):
    assert described(name).__doc__


def test_the_reference_describes_every_public_name():
    found = {id(described(name)) for name in DESCRIBED}
    assert [name for name in outsize.__all__ if id(getattr(outsize, name)) not in found] == []
