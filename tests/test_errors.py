import pytest

from outsize.errors import in_short


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            "backend='inductor' raised:\nNo compiler\n\nSet TORCH_LOGS",
            "backend='inductor' raised: No compiler",
        ),
        ("\n  one reason  \nand advice", "one reason"),
        ("it ends so:", "it ends so:"),
        ("", "RuntimeError"),
    ],
)
def test_an_error_in_a_line(text, said):
    assert in_short(RuntimeError(text)) == said
