"""The front matter of a model card: the YAML between the first two lines of dashes, which anybody may have written."""

import re

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError
from ruamel.yaml.nodes import MappingNode, Node, SequenceNode

from packager.system.python_warnings import without_warnings
from packager.system.text import shown

_BETWEEN_DASHES = re.compile(r"---[ \t]*\n((?:.*\n)*?)---[ \t]*(?:\n|\Z)")
# The safe loader lets errors of its own constructors escape, e.g. ValueError for a 13th month.
_YAML_ERRORS = (YAMLError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError, ValueError)
_MOST_VALUES = 100_000


def front_matter_text(card: str) -> str | None:
    """Return what stands between a card's first two lines of dashes; None if it does not begin with such lines.

    Args:
        card: with line breaks of any kind.
    """
    match = _BETWEEN_DASHES.match(_unix(card))
    return None if match is None else match[1]


def split_front_matter(card: str) -> tuple[str, str]:
    """Return the YAML of a card's front matter, "" if it has none, and the page below it.

    Text between two horizontal rules that is no mapping is part of the page.

    Args:
        card: with line breaks of any kind.
    """
    text = _unix(card)
    match = _BETWEEN_DASHES.match(text)
    if match is None:
        return "", text
    try:
        front_matter_fields(match[1])
    except ValueError:
        return "", text
    return match[1], text[match.end() :]


def _unix(card: str) -> str:
    return card.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def front_matter_fields(text: str, *, most_characters: int | None = None) -> dict[str, object]:
    """Parse the YAML of a front matter.

    Args:
        text: what is between the two lines of dashes.
        most_characters: of a text that is not trusted; the parser reads about 50,000 values a second.

    Raises:
        ValueError: it is too long, no YAML, stands for too many values, or is not keys and values; the text completes
            "the front matter ...".
    """
    if most_characters is not None and len(text) > most_characters:
        raise ValueError(f"has {len(text)} characters")
    with without_warnings():  # a warning of ruamel.yaml is an error here or nothing
        try:
            problem = _alias_problem(YAML(typ="safe", pure=True).compose(text)) if "*" in text else ""
            value = None if problem else YAML(typ="safe", pure=True).load(text)
        except _YAML_ERRORS as error:
            problem = getattr(error, "problem", None) or type(error).__name__
            raise ValueError(f"is not YAML: {problem}") from error
    if problem:
        raise ValueError(problem)
    if not isinstance(value, dict):
        raise ValueError(f"is {shown(value)}, not keys and values")
    return value


def _alias_problem(root: Node | None) -> str:
    """Return why the aliases of a YAML document are too many to read, or "".

    The parser copies what a merge key (`<<`) names, and prints the value of a key that is there twice: with 500
    characters of aliases of aliases it would take hours.
    """
    counts: dict[int, int] = {}

    def count(node: Node) -> int:
        """Return how many values a node stands for with its aliases written out, `_MOST_VALUES + 1` for more."""
        if id(node) not in counts:
            counts[id(node)] = _MOST_VALUES + 1  # of a node that contains itself
            counts[id(node)] = min(_MOST_VALUES + 1, 1 + sum(map(count, _parts(node))))
        return counts[id(node)]

    return f"stands for more than {_MOST_VALUES} values" if root is not None and count(root) > _MOST_VALUES else ""


def _parts(node: Node) -> list[Node]:
    if isinstance(node, MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, SequenceNode) else []
