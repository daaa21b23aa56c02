"""Patterns stand for exactly the names that they were made of, and a hostile one is refused at once."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packager.model.name_patterns import (
    MOST_NAMES,
    names_of,
    natural_key,
    patterns_of,
    read_numbers,
    write_numbers,
)

PARTS = st.one_of(
    st.integers(0, 12).map(str),
    st.sampled_from(["model", "layers", "experts", "w1", "", "01", "-1", "1_2", "²", "%s", "1000000000", "999999999"]),
    st.text(st.characters(exclude_characters="{}", exclude_categories=["Cs"]), max_size=3),
)
NAMES = st.lists(PARTS, min_size=1, max_size=5).map(".".join)


@given(names=st.lists(NAMES, unique=True, max_size=40))
def test_patterns_stand_for_exactly_the_names(names):
    found = [name for pattern in patterns_of(names) for name in names_of(pattern)]
    assert sorted(found) == sorted(names)


@given(names=st.lists(NAMES, unique=True, max_size=20), dice=st.randoms(use_true_random=False))
def test_the_order_of_the_names_does_not_matter(names, dice):
    shuffled = dice.sample(names, len(names))
    assert sorted(patterns_of(shuffled)) == sorted(patterns_of(names))


@pytest.mark.parametrize(
    ("names", "patterns"),
    [
        ([f"layers.{block}.up" for block in range(48)], ["layers.{0..47}.up"]),
        ([f"h.{b}.e.{e}.w" for b in range(3) for e in range(128)], ["h.{0..2}.e.{0..127}.w"]),
        (["h.0.w", "h.1.w", "h.2.w", "h.5.w"], ["h.{0..2,5}.w"]),
        (["h.7.w"], ["h.7.w"]),
        (["h.0.e.0", "h.0.e.1", "h.1.e.0"], ["h.0.e.{0..1}", "h.1.e.0"]),
        (["0", "1"], ["{0..1}"]),
        (["h.00.w", "h.1a.w"], ["h.00.w", "h.1a.w"]),
        ([], []),
    ],
)
def test_there_are_few_patterns(names, patterns):
    assert patterns_of(names) == patterns


def test_a_name_with_a_brace_has_no_pattern():
    with pytest.raises(ValueError, match="holds a brace"):
        patterns_of(["a.{0}"])


@given(numbers=st.sets(st.integers(0, 999_999_999), min_size=1, max_size=50).map(sorted))
def test_numbers_are_read_as_they_were_written(numbers):
    assert list(read_numbers(write_numbers(numbers))) == numbers


@pytest.mark.parametrize(
    "text",
    ["", ",", "1,", "2..1", "1,1", "2,1", "0..3,3", "00", "01", "-1", "+1", "1...3", "1..", " 1", "1 ", "1\n", "٣",
     "1..2..3", "0..1000000000", f"0..{MOST_NAMES}", "9999999999", "1e3", "0x1"],
)  # fmt: skip
def test_what_is_no_list_of_rising_numbers_is_refused(text):
    with pytest.raises(ValueError, match="is not"):
        read_numbers(text)


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("a.{", "has a brace that no numbers stand in"),
        ("a.}", "has a brace"),
        ("a.{}.b", "has a brace"),
        ("a.{x}.b", "has a brace"),
        ("a.{0.__class__}", "has a brace"),
        ("{0}{", "has a brace"),
        ("a.{2..1}", "is not in rising order"),
        ("a.{0..399999}.{0..1}", f"stands for more than {MOST_NAMES} names"),
        (".".join(["{0..9999}"] * 3), f"stands for more than {MOST_NAMES} names"),
        (".".join(["{0..1}"] * 200), f"stands for more than {MOST_NAMES} names"),
        ("{0..399999,400000}", "or too long"),
        ("{" + ",".join(f"{n * 400_000}..{n * 400_000 + 399_999}" for n in range(2000)) + "}", "or too long"),
        (".".join(["{0..399999}"] * 2000), f"stands for more than {MOST_NAMES} names"),
    ],
)
def test_a_hostile_pattern_is_refused_at_once(pattern, message):
    started = time.process_time()
    with pytest.raises(ValueError, match=message):
        next(names_of(pattern))
    assert time.process_time() - started < 1


@given(pattern=st.text(alphabet="{}0123456789.,ab", max_size=40))
def test_any_text_gives_names_or_a_refusal(pattern):
    try:
        found = [name for name, _ in zip(names_of(pattern), range(1000), strict=False)]
    except ValueError:
        return
    assert len(set(found)) == len(found) or "{" in pattern
    assert all("{" not in name and "}" not in name for name in found)


def test_block_2_comes_before_block_10():
    assert sorted(["h.10.b", "h.2.b", "h.2.a", "a"], key=natural_key) == ["a", "h.2.a", "h.2.b", "h.10.b"]
