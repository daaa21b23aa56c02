"""The front matter of a card: where it ends, and what is refused of hostile YAML."""

import pytest

from packager.model.front_matter import front_matter_fields, front_matter_text, split_front_matter


def test_front_matter_is_stripped_only_when_it_is_one() -> None:
    assert split_front_matter("---\nlicense: mit\ntags:\n- a\n---\n# Title\n")[1] == "# Title\n"
    assert split_front_matter("---\r\nlicense: mit\r\n---\r\n# Title\r\n")[1] == "# Title\n"
    rules = "---\nJust a sentence.\n---\n# Title\n"
    assert split_front_matter(rules)[1] == rules
    assert split_front_matter("# Title\n---\na: b\n---\n")[1] == "# Title\n---\na: b\n---\n"


@pytest.mark.parametrize(
    ("card", "text"),
    [
        ("\ufeff---\r\nlicense: mit\r\n--- \r\n# Title", "license: mit\n"),
        ("---\rlicense: mit\r---\r# Title", "license: mit\n"),
        ("---\n---\n", ""),
        ("---\nlicense: mit\n", None),
        ("# Title\n---\na: b\n---\n", None),
    ],
)
def test_the_text_of_the_front_matter(card: str, text: str | None) -> None:
    assert front_matter_text(card) == text


def test_aliases_are_read() -> None:
    text = "a: &a {x: 1}\nb: &b [*a, *a]\nc: {<<: *a, y: '*'}\n"
    assert front_matter_fields(text) == {"a": {"x": 1}, "b": [{"x": 1}, {"x": 1}], "c": {"x": 1, "y": "*"}}


def _levels(line: str) -> str:
    """Return 5 levels of aliases, each of 10 of the level below."""
    below = (", ".join([f"*a{level}"] * 10) for level in range(5))
    return "a0: &a0 {x: 1, y: 2}\n" + "".join(line.format(level, each) for level, each in enumerate(below, 1))


@pytest.mark.parametrize(
    "text",
    [
        _levels("a{0}: &a{0} {{<<: [{1}], z{0}: 1}}\n"),
        _levels("a{0}: &a{0} [{1}]\n") + "b: *a5\nb: 1\n",
        "a: &a [*a]\n",
    ],
    ids=["merge keys", "a key twice", "a cycle"],
)
def test_aliases_of_aliases_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"^stands for more than 100000 values$"):
        front_matter_fields(text)
    assert split_front_matter(f"---\n{text}---\n# Title\n")[0] == ""
