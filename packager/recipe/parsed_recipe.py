"""Validate a recipe's nodes against the models; report every problem with its position.

Good values stay readable, so that the checks across fields run even when other values are wrong.
"""

import difflib
import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from packager.recipe import Recipe
from packager.recipe.fields import PATTERN_MEANINGS
from packager.recipe.yaml import LocatedProblem, Node, Position, Scalar
from packager.system.text import quoted

Loc = tuple[str | int, ...]

SCHEMA_VERSION: Final = 1
_SECTION_KEY: Final = 2  # the length of the location of a key in a section


class Unreadable(enum.Enum):
    """Why a value cannot be read: it is absent (or null), or it is wrong."""

    ABSENT = enum.auto()
    WRONG = enum.auto()


@dataclass(frozen=True, kw_only=True)
class ParsedRecipe:
    """The nodes of a recipe, and the result of validating them against the models.

    Attributes:
        root: the document.
        recipe: the model; None when a field is wrong.
        problems: those that the models found.
        wrong: the locations whose values were refused.
    """

    root: Node
    recipe: Recipe | None
    problems: tuple[LocatedProblem, ...]
    wrong: frozenset[Loc]

    def node(self, *loc: str | int) -> Node | Unreadable:
        """Return the node at `loc`, or why it cannot be used."""
        found = _nodes_to(self.root, loc)
        if any(loc[:depth] in self.wrong or not node.usable for depth, node in enumerate(found)):
            return Unreadable.WRONG
        if len(found) == len(loc) + 1:
            return found[-1]
        return Unreadable.ABSENT if isinstance(found[-1].content, dict) else Unreadable.WRONG

    def get(self, *loc: str | int) -> Scalar | Unreadable:
        """Return the scalar at `loc`, or why there is none."""
        node = self.node(*loc)
        if isinstance(node, Unreadable):
            return node
        if isinstance(node.content, list | dict):
            return Unreadable.WRONG
        return Unreadable.ABSENT if node.content is None else node.content

    def number(self, section: str, name: str) -> int | None:
        """Return a whole number of an existing section, or its default; None when it is wrong."""
        value = self.get(section, name)
        if value is Unreadable.ABSENT and isinstance(self.node(section), Node):
            value = _model_at((section,)).model_fields[name].default
        return value if isinstance(value, int) else None

    def text(self, *loc: str | int) -> str | None:
        """Return the good text at `loc`, if there is one."""
        value = self.get(*loc)
        return value if isinstance(value, str) else None

    def keys(self, *loc: str | int) -> frozenset[str] | None:
        """Return the keys of the mapping at `loc` that have a value; None when it is not a mapping."""
        node = self.node(*loc)
        if isinstance(node, Unreadable) or not isinstance(node.content, dict):
            return None
        return frozenset(key for key, child in node.content.items() if child.content is not None or not child.usable)

    def count(self, *loc: str | int) -> int:
        """Return the length of the list at `loc`; 0 when it is not a list."""
        node = self.node(*loc)
        return len(node.content) if isinstance(node, Node) and isinstance(node.content, list) else 0

    def at(self, *loc: str | int) -> Position:
        """Return the position of the value at `loc`, or of its deepest parent that exists."""
        found = _nodes_to(self.root, loc)
        return found[-1].at if len(found) == len(loc) + 1 else found[-1].key_at

    def key_at(self, *loc: str | int) -> Position:
        """Return the position of the key at `loc`, or of its deepest parent that exists."""
        return _nodes_to(self.root, loc)[-1].key_at


def read(root: Node, *, partial: bool = False) -> ParsedRecipe:
    """Validate a document against the models.

    Args:
        root: the document.
        partial: it is what recipes extend: sections, and keys of sections, may be missing.
    """
    if not isinstance(root.content, dict):
        problem = LocatedProblem(root.at, f"a recipe is a mapping of keys to values, got {got(root)}")
        return ParsedRecipe(root=root, recipe=None, problems=(problem,) if root.usable else (), wrong=frozenset({()}))
    if other_version := _version_problem(root.content.get("schema_version")):
        # Another version may well have other keys: complaints about them would mislead.
        return ParsedRecipe(root=root, recipe=None, problems=(other_version,), wrong=frozenset({()}))
    try:
        recipe = Recipe.model_validate(root.plain())
    except ValidationError as error:
        found = error.errors(include_url=False)
        errors = [item for item in found if _concerns_a_field(root, item) and not (partial and _may_be_missing(item))]
        wrong = frozenset(item["loc"] for item in errors if item["type"] not in {"missing", "extra_forbidden"})
        problems = tuple(_located(root, item) for item in errors)
        return ParsedRecipe(root=root, recipe=None, problems=problems, wrong=wrong)
    return ParsedRecipe(root=root, recipe=recipe, problems=(), wrong=frozenset())


def name_of(loc: Sequence[str | int]) -> str:
    """Return a location the way a person writes it: `variants[1].group_size`."""
    return "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in loc).removeprefix(".")


def text_places(parsed: ParsedRecipe) -> tuple[Loc, ...]:
    """Return where a recipe names texts: the calibration or each of its sources, and the evaluation."""
    sources = [("calibration", "sources", index) for index in range(parsed.count("calibration", "sources"))]
    return ("calibration",), *sources, ("evaluation",)


def task_data_places(parsed: ParsedRecipe) -> tuple[Loc, ...]:
    """Return where a recipe names the documents of tasks."""
    tasks = range(parsed.count("evaluation", "tasks"))
    found: list[Loc] = [("evaluation", "tasks", index, key) for index in tasks for key in ("data", "fewshot")]
    return tuple(loc for loc in found if parsed.keys(*loc) is not None)


def got(node: Node) -> str:
    """Return a value's kind and text, fit for a message."""
    match node.content:
        case None:
            return "nothing"
        case bool():
            return "true" if node.content else "false"
        case int() | float():
            return f"the number {node.content}"
        case str():
            return f"the text {quoted(node.content)}"
        case list():
            return "a list"
        case _:
            return "a mapping"


def suggestion(word: str, known: Sequence[str]) -> str:
    """Return a "did you mean" for `word`, or the known words when none is close."""
    close = difflib.get_close_matches(word.lower()[:80], known, n=1)
    if close:
        return f"did you mean {close[0]!r}?"
    return f"known here: {', '.join(known)}" if len(known) <= 20 else ""


def _nodes_to(root: Node, loc: Loc) -> list[Node]:
    """Return the nodes from the root down to `loc`, as far as they exist."""
    found = [root]
    for step in loc:
        content = found[-1].content
        if isinstance(content, dict) and step in content:
            found.append(content[str(step)])
        elif isinstance(content, list) and isinstance(step, int) and step < len(content):
            found.append(content[step])
        else:
            break
    return found


def _version_problem(node: Node | None) -> LocatedProblem | None:
    if node is None or not isinstance(node.content, int) or isinstance(node.content, bool):
        return None
    if node.content == SCHEMA_VERSION:
        return None
    return LocatedProblem(
        node.at,
        f"schema_version {node.content} is not known: this packager reads schema_version {SCHEMA_VERSION}",
        "use a packager of that version, or bring the recipe to this one",
    )


def _concerns_a_field(root: Node, error: ErrorDetails) -> bool:
    """Return False for values that were refused before, and for rules across fields, which `checks.py` repeats.

    A list whose entries were all refused is too short for pydantic alone: that is no problem of its own.
    """
    found = _nodes_to(root, error["loc"])
    if not all(node.usable for node in found):
        return False
    entries = found[-1].content
    if error["type"] == "too_short" and isinstance(entries, list) and len(entries) >= error["ctx"]["min_length"]:
        return False
    return error["type"] != "value_error" or not isinstance(found[-1].content, dict)


def _may_be_missing(error: ErrorDetails) -> bool:
    """Return whether an error is a section or a key of a section that each recipe may give itself."""
    loc = error["loc"]
    return error["type"] == "missing" and len(loc) <= _SECTION_KEY and loc != ("schema_version",)


def _located(root: Node, error: ErrorDetails) -> LocatedProblem:
    """Reword one of the models' errors."""
    loc, context = error["loc"], error.get("ctx", {})
    found = _nodes_to(root, loc)
    if error["type"] == "missing":
        field = _model_at(loc[:-1]).model_fields[str(loc[-1])]
        # A key that a section of an extended file lacks is missing in the recipe.
        at = found[-1].key_at if len(loc) > _SECTION_KEY else _own(found).key_at
        return LocatedProblem(at, f"{name_of(loc)} is missing", field.description or "")
    if error["type"] == "extra_forbidden":
        return _unknown_key(found[-1], loc)
    node = found[-1]
    rule = _rule(error["type"], context)
    message = f"{name_of(loc)} {rule}" if rule else f"{name_of(loc)}: {error['msg']}"
    if not isinstance(node.content, str) or len(node.content) <= 60:
        message += f", got {got(node)}"
    return LocatedProblem(node.at, message, _hint(error["type"], node, context))


def _own(found: Sequence[Node]) -> Node:
    """Return the deepest of these nodes that the recipe's own file holds."""
    return next((node for node in reversed(found) if not node.key_at.source), found[0])


def _unknown_key(node: Node, loc: Loc) -> LocatedProblem:
    """Report an unknown key, with the section that has it or a similar known key."""
    key, inside = str(loc[-1]), name_of(loc[:-1])
    message = f"unknown key {quoted(key)}" + (f" in {inside}" if inside else "")
    if key in _REPLACED_KEYS:
        return LocatedProblem(node.key_at, message, _REPLACED_KEYS[key])
    sections = [
        name
        for name in Recipe.model_fields
        if name != loc[0] and key in getattr(_model_at((name,)), "model_fields", ())
    ]
    if sections and len(sections) <= 2:
        return LocatedProblem(node.key_at, message, f"it belongs in {' or '.join(sections)}")
    return LocatedProblem(node.key_at, message, suggestion(key, tuple(_model_at(loc[:-1]).model_fields)))


def _model_at(loc: Loc) -> type[BaseModel]:
    """Return the model that describes the mapping at `loc`."""
    model: type[BaseModel] = Recipe
    for step in loc:
        if isinstance(step, str):
            annotation = model.model_fields[step].annotation
            inner = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, type)]
            model = next((kind for kind in inner if issubclass(kind, BaseModel)), BaseModel)
    return model


_RULES: Final = {
    "bool_type": "must be true or false",
    "float_type": "must be a number",
    "greater_than": "must be greater than {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_type": "must be a whole number",
    "less_than": "must be less than {lt}",
    "less_than_equal": "must be at most {le}",
    "literal_error": "must be {expected}",
    "model_type": "must be a mapping (indented `key: value` lines)",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must not be empty",
    "string_type": "must be text",
    "too_long": "may have at most {max_length} entries",
    "too_short": "must have at least {min_length} entry",
    "tuple_type": "must be a list ([a, b] or one `- ` line per entry)",
    "value_error": "{error}",
}
# Keys of earlier versions, and what to write now.
_REPLACED_KEYS: Final = {
    "static_groups": "write act_order: static in the place of desc_act: true with static_groups: true; "
    "else leave it out, as grids are fixed before in static order only",
}
_BOOLEAN_WORDS: Final = frozenset({"yes", "no", "on", "off", "true", "false"})


def _rule(kind: str, context: dict[str, Any]) -> str:
    """Return the rule that a value breaks, to follow its name; "" for an unknown kind of error."""
    if kind == "string_pattern_mismatch":
        pattern = context["pattern"]
        return f"must be {PATTERN_MEANINGS.get(pattern, pattern)}"
    return _RULES.get(kind, "").format(**context).removesuffix(".0")


def _hint(kind: str, node: Node, context: dict[str, Any]) -> str:
    """Return the likely repair of a wrong value."""
    match kind, node.content:
        case "string_type", int() | float():
            return "put it in quotes"
        case "bool_type", str(text) if text.lower() in _BOOLEAN_WORDS:
            return "write true or false, without quotes"
        case "int_type" | "float_type", str(text) if text.replace("_", "").replace(".", "").isdecimal():
            return f"write {text.replace('_', '')}, without quotes"
        case "int_type", float(number) if number.is_integer():
            return f"write {int(number)}"
        case "literal_error", str(text):
            known = [word.strip(" '") for part in context["expected"].split(" or ") for word in part.split(",")]
            close = difflib.get_close_matches(text.lower()[:80], known, n=1)
            return f"did you mean {close[0]!r}?" if close else ""
    return ""
