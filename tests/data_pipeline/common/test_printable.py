"""Names from outside, as they are shown."""

import pytest

from data_pipeline.common.errors import printable, printable_lines


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain it's é 猫 👩\u200d🚀", "plain it's é 猫 👩\u200d🚀"),  # joiners are letters' own
        ("\x1b]0;title\x07\x1b[2J", "\\x1b]0;title\\x07\\x1b[2J"),
        ("two\nlines\r\t", "two\\nlines\\r\\t"),
        ("\x9b31m", "\\x9b31m"),
        ("gpj.\u202egnp", "gpj.\\u202egnp"),
        ("\u2028", "\\u2028"),
        ("bytes \udcff", "bytes \\udcff"),
    ],
)
def test_what_a_terminal_would_obey_is_escaped(text: str, shown: str) -> None:
    assert printable(text) == shown
    shown.encode()


def test_lines_of_a_table_stay_lines() -> None:
    assert printable_lines("a\n\x1bb") == "a\n\\x1bb"
