"""The plans in `golden/` are what is built today, to the letter."""

import pytest

from outsize.plan import Plan
from tests.plan.golden_plans import FOLDER, GOLDEN


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.name)
def test_a_plan_is_its_golden_text(golden):
    expected = (FOLDER / f"{golden.name}.txt").read_text()
    assert golden.text() == expected, "if this is meant: python -m tests.plan.golden_plans"


@pytest.mark.parametrize("golden", GOLDEN, ids=lambda golden: golden.name)
def test_a_golden_text_can_be_parsed(golden):
    text = (FOLDER / f"{golden.name}.txt").read_text()
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    assert str(Plan.parse("\n".join(lines))) == "\n".join(lines).strip()


def test_every_golden_text_has_its_plan():
    assert {path.stem for path in FOLDER.glob("*.txt")} == {golden.name for golden in GOLDEN}
