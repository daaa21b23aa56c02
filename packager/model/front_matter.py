"""The front matter of a model card: the YAML between the first two lines of dashes, which anybody may have written."""

import re

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from packager.system.python_warnings import without_warnings
from packager.system.text import shown

_BETWEEN_DASHES = re.compile(r"---[ \t]*\n((?:.*\n)*?)---[ \t]*(?:\n|\Z)")
# The safe loader lets errors of its own constructors escape, e.g. ValueError for a 13th month.
_YAML_ERRORS = (YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)


def split_front_matter(card: str) -> tuple[str, str]:
    """Return the YAML of a card's front matter, "" if it has none, and the page below it.

    Text between two horizontal rules that is no mapping is part of the page.

    Args:
        card: with line breaks of any kind.
    """
    text = card.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")
    match = _BETWEEN_DASHES.match(text)
    if match is None:
        return "", text
    try:
        front_matter_fields(match[1])
    except ValueError:
        return "", text
    return match[1], text[match.end() :]


def front_matter_fields(text: str, *, most_characters: int | None = None) -> dict[str, object]:
    """Parse the YAML of a front matter.

    Args:
        text: what is between the two lines of dashes.
        most_characters: of a text that is not trusted; the parser reads about 50,000 values a second.

    Raises:
        ValueError: it is too long, no YAML, or not keys and values; the text completes "the front matter ...".
    """
    if most_characters is not None and len(text) > most_characters:
        raise ValueError(f"has {len(text)} characters")
    with without_warnings():  # a warning of ruamel.yaml is an error here or nothing
        try:
            value = YAML(typ="safe", pure=True).load(text)
        except _YAML_ERRORS as error:
            problem = getattr(error, "problem", None) or type(error).__name__
            raise ValueError(f"is not YAML: {problem}") from error
    if not isinstance(value, dict):
        raise ValueError(f"is {shown(value)}, not keys and values")
    return value
