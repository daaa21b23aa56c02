"""Complete a recipe from the file that it extends, and apply the settings of a trial: docs/decisions/0025.

What several recipes have in common is written once. One level, and explicit: the recipe names the file, and the file
extends no other.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from packager.recipe.fields import FILE_NAME, PATTERN_MEANINGS
from packager.recipe.parsed_recipe import Loc, got, read
from packager.recipe.paths import locate, path_problem
from packager.recipe.yaml import MAX_BYTES, LocatedProblem, Node, Position, decode, parse
from packager.system.files import open_regular
from packager.system.text import quoted

EXTENDS: Final = "extends"


class _OneThing(NamedTuple):
    """Keys of a section that name one thing together: who gives one of `heads` inherits none of `keys`."""

    heads: frozenset[str]
    keys: frozenset[str]


def _one_thing(heads: str, more: str = "") -> _OneThing:
    return _OneThing(frozenset(heads.split()), frozenset(f"{heads} {more}".split()))


_TEXT: Final = _one_thing("path dataset sources", "config revision split text_field messages_field documents")
_TOGETHER: Final[Mapping[str, _OneThing]] = {
    "repository": _one_thing("target", "url plugin"),
    "base_model": _one_thing("id path revision"),
    "calibration": _TEXT,
    "evaluation": _TEXT,
    "defaults": _one_thing("act_order desc_act"),
}


class Completed(NamedTuple):
    """A document with what it inherits, None if the other file cannot be read, and what is wrong in that file."""

    root: Node | None
    problems: list[LocatedProblem]


def complete(root: Node, folder: Path) -> Completed:
    """Return a recipe's document with what the file that it extends gives; one that extends none stays as it is.

    Args:
        root: the recipe's document.
        folder: the recipe's own, which holds the other file.
    """
    if not isinstance(root.content, dict) or (named := root.content.get(EXTENDS)) is None or named.content is None:
        return Completed(root, [])
    if not named.usable:  # reported already
        return Completed(None, [])
    name = named.content
    if not isinstance(name, str) or not re.fullmatch(FILE_NAME, name):
        message = f"{EXTENDS} must be {PATTERN_MEANINGS[FILE_NAME]}, got {got(named)}"
        return Completed(None, [LocatedProblem(named.at, message, "the file is in the recipe's folder")])
    inherited, problems = _read_extended(folder, name, named.at)
    if inherited is None:
        return Completed(None, problems)
    own = {key: node for key, node in root.content.items() if key != EXTENDS}
    return Completed(replace(root, content=_merged(own, inherited)), problems)


def extended_name(root: Node) -> str:
    """Return the name of the file that a recipe extends, "" for none."""
    node = root.content.get(EXTENDS) if isinstance(root.content, dict) else None
    return node.content if node is not None and isinstance(node.content, str) else ""


def without_inherited(
    content: Mapping[str, Any], folder: Path, name: str, *, kept: Collection[str] = (), left_out: Collection[str] = ()
) -> dict[str, Any]:
    """Return a recipe's values without those that the file gives which it is to extend, and with the key for it.

    Where that file cannot be read, or has mistakes, the values stay: reading the recipe reports them.

    Args:
        content: the recipe's sections.
        folder: of the recipe.
        name: of the file.
        kept: sections that the recipe has itself, whatever the file gives.
        left_out: sections that the recipe does not have where the file gives a part of them.
    """
    begin = {"schema_version": content["schema_version"], EXTENDS: name}
    inherited, problems = _read_extended(folder, name, Position(0, 0)) if re.fullmatch(FILE_NAME, name) else (None, [])
    if inherited is None or problems:
        return {**begin, **content}
    left: dict[str, Any] = {}
    for section, value in content.items():
        given = inherited.get(section)
        if given is None or section in kept:
            left[section] = value
        elif section not in left_out and isinstance(value, Mapping) and isinstance(given.content, dict):
            together = _TOGETHER.get(section)
            replaced = together.keys if together is not None and together.heads & given.content.keys() else frozenset()
            own = {key: each for key, each in value.items() if key not in given.content and key not in replaced}
            if own:
                left[section] = own
    return {**begin, **left}


def _read_extended(folder: Path, name: str, at: Position) -> tuple[Mapping[str, Node] | None, list[LocatedProblem]]:
    """Return the sections of the file that a recipe extends, and everything that is wrong in it by itself."""
    where = str(folder / name)
    message, hint = path_problem(folder, name)
    if message:
        return None, [LocatedProblem(at, f"{EXTENDS}: {message}", hint)]
    try:
        with open_regular(locate(folder, name) or folder / name) as stream:
            data = stream.read(MAX_BYTES + 1)
    except OSError as error:
        return None, [LocatedProblem(at, f"{EXTENDS}: {quoted(name)} cannot be read: {error.strerror}")]
    text, problems = decode(data)
    root, found = parse(text) if not problems else (None, [])
    problems += found
    if root is not None:
        _name_source(root, where)
        if isinstance(root.content, dict) and (further := root.content.pop(EXTENDS, None)):
            hint = "one level: a file that recipes extend gives its values itself"
            problems.append(LocatedProblem(further.key_at, f"unknown key {quoted(EXTENDS)}", hint))
        problems += read(root, partial=True).problems
    content = root.content if root is not None and isinstance(root.content, dict) else None
    return content, [_in_source(problem, where) for problem in problems]


def _merged(own: Mapping[str, Node], inherited: Mapping[str, Node]) -> dict[str, Node]:
    """Return the recipe's keys, and those that it leaves out: of sections key by key, everything else whole."""
    merged = dict(own)
    for section, node in inherited.items():
        mine = own.get(section)
        if mine is None:
            merged[section] = node
        elif isinstance(mine.content, dict) and isinstance(node.content, dict):
            kept = _without_replaced(section, node.content, mine.content)
            merged[section] = replace(mine, content={**kept, **mine.content})
    return merged


def _without_replaced(section: str, inherited: Mapping[str, Node], own: Mapping[str, Node]) -> dict[str, Node]:
    together = _TOGETHER.get(section)
    replaced = together.keys if together is not None and together.heads & own.keys() else frozenset()
    return {key: node for key, node in inherited.items() if key not in replaced}


def with_settings(root: Node, settings: Sequence[str]) -> Completed:
    """Return a document with the settings of a trial, `KEY=VALUE`: a dotted key and a value in YAML."""
    problems: list[LocatedProblem] = []
    for setting in settings:
        at = Position(0, 0, f"--set {setting}")
        key, equals, value = setting.partition("=")
        keys = tuple(key.split("."))
        if not equals or not all(keys):
            hint = "such as calibration.num_samples=16"
            problems.append(LocatedProblem(at, "a setting is a dotted key, =, and a value", hint))
        elif keys == (EXTENDS,):
            problems.append(LocatedProblem(at, f"{EXTENDS} cannot be set", "set the keys that you want to try"))
        else:
            root = _with_setting(root, keys, value, at, problems)
    return Completed(root, problems)


def _with_setting(root: Node, keys: Loc, text: str, at: Position, problems: list[LocatedProblem]) -> Node:
    """Return the document with one value in the place of another; what cannot be read is added to the problems."""
    value, found = parse(text) if text.strip() else (Node(at=at, key_at=at), [])
    problems += [problem._replace(at=at) for problem in found]
    if value is None or found:
        return root
    for node in _nodes(value):
        node.at = node.key_at = at
    for key in reversed(keys[1:]):
        value = Node(at=at, key_at=at, content={str(key): value})
    return _with_value(root, keys, value, at)


def _with_value(root: Node, keys: Loc, value: Node, at: Position) -> Node:
    """Return a mapping in which `value`, itself nested in mappings for the further keys, has the place of another."""
    content = dict(root.content) if isinstance(root.content, dict) else {}
    key, further = str(keys[0]), keys[1:]
    present = content.get(key)
    if further and present is not None and isinstance(present.content, dict) and isinstance(value.content, dict):
        inner = value.content[str(further[0])]
        kept = replace(present, content=_without_replaced(key, present.content, value.content))
        content[key] = _with_value(kept, further, inner, at)
    else:
        content[key] = value
    return replace(root, content=content)


def _nodes(root: Node) -> list[Node]:
    """Return a document's nodes."""
    found = [root]
    for node in found:  # which grows
        children = node.content.values() if isinstance(node.content, dict) else node.content
        if isinstance(node.content, dict | list) and children is not None:
            found += list(children)  # type: ignore[arg-type]
    return found


def _name_source(root: Node, source: str) -> None:
    """Let every position of a document name the file that it is in."""
    for node in _nodes(root):
        node.at, node.key_at = (at._replace(source=source) for at in (node.at, node.key_at))


def _in_source(problem: LocatedProblem, source: str) -> LocatedProblem:
    return problem._replace(at=problem.at._replace(source=source))
