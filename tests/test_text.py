"""Sizes with their units, and text of untrusted files."""

import pytest

from packager.system.text import format_bytes, gibibytes, gigabytes, printable, printable_lines, quoted


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (8_120_000, "8.12 MB"),
        (999_999_999, "1000.00 MB"),
        (10**9, "1.00 GB"),
        (7_255_009_280, "7.26 GB"),
        (2**30, "1.07 GB"),
    ],
)
def test_a_size_has_decimal_units(size_bytes: int, text: str) -> None:
    assert format_bytes(size_bytes) == text


def test_gb_are_decimal_and_gib_binary() -> None:
    assert gigabytes(24 * 10**9) == "24.00"
    assert gibibytes(24 * 2**30) == "24.0"
    assert gibibytes(24 * 10**9) == "22.4"


def test_untrusted_text_is_one_line_or_keeps_its_lines() -> None:
    assert printable("a\n\x1b[2Jb\u202e") == "a\\n\\x1b[2Jb\\u202e"
    assert printable_lines("a\n\x1b[2J\tb") == "a\n\\x1b[2J    b"
    assert printable("x" * 601) == "x" * 600 + "..."


def test_quoted_text_is_escaped_and_cut() -> None:
    assert quoted("it's\n") == '"it\'s\\n"'
    assert quoted("x" * 60) == f"'{'x' * 60}'"
    assert quoted("x" * 61) == f"'{'x' * 57}...'"
