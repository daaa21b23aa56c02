"""Parse strict YAML 1.2 and keep the position of every key and value.

The parser's events are composed here rather than by the library: its loaders build Python objects, resolve aliases,
and lose the positions of keys. Features that a recipe never needs but an attacker does (anchors, aliases, tags, merge
keys, directives, several documents) are refused with their position. Nothing here recurses, so nesting is harmless.
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    CollectionStartEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
)

from packager.system.text import HIDDEN, quoted

# The 13B recipe has 4 KiB, 130 values and 4 levels. The parser is pure Python and reads about 50,000 values a second.
MAX_BYTES: Final = 256 * 1024
MAX_DEPTH: Final = 16
MAX_NODES: Final = 5_000

Scalar = str | int | float | bool | None

# The core schema of YAML 1.2 (section 10.3.2). The library's own resolver also knows dates, `=`, `<<` and 1_000.
_NULL = frozenset({"", "~", "null", "Null", "NULL"})
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+\Z")
_BASED = re.compile(r"0o[0-7]+\Z|0x[0-9a-fA-F]+\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z")


class Position(NamedTuple):
    """A position in a file, counted from 1 as editors do; columns are characters.

    `source` is another file than the recipe, or an option of the command line, which has no lines: then line is 0.
    """

    line: int
    column: int
    source: str = ""


class LocatedProblem(NamedTuple):
    """A problem at a position of the file; sorts by position."""

    at: Position
    message: str
    hint: str = ""


@dataclass(kw_only=True, slots=True)
class Node:
    """A value and its position.

    Attributes:
        at: the value's own position.
        key_at: the position of its key, or of the value itself in a list.
        content: a scalar, a list of nodes, or a mapping of keys to nodes.
        usable: False when the value was refused; the problem is reported once, and checks skip the value.
    """

    at: Position
    key_at: Position
    content: "Scalar | list[Node] | dict[str, Node]" = None
    usable: bool = True

    def plain(self) -> object:
        """Return the value without positions; lists become tuples, which the strict models require."""
        if isinstance(self.content, list):
            return tuple(child.plain() for child in self.content)
        if isinstance(self.content, dict):
            return {key: child.plain() for key, child in self.content.items()}
        return self.content


def decode(data: bytes) -> tuple[str, list[LocatedProblem]]:
    """Return the text of a recipe file, and the problems of its encoding: size, UTF-8, invisible characters."""
    start = Position(1, 1)
    if len(data) > MAX_BYTES:
        return "", [LocatedProblem(start, f"the file is larger than {MAX_BYTES // 1024} KiB", "a recipe has a few KiB")]
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = error.object[: error.start]
        head = before[before.rfind(b"\n") + 1 :].decode("utf-8", "replace")
        at = Position(before.count(b"\n") + 1, len(head) + 1)
        return "", [LocatedProblem(at, f"byte 0x{data[error.start]:02x} is not UTF-8", "save the file as UTF-8")]
    return text, [
        LocatedProblem(
            Position(number, match.start() + 1), f"the invisible character U+{ord(match.group()):04X} is refused"
        )
        for number, line in enumerate(re.split(r"\r\n|\r|\n", text), start=1)
        for match in HIDDEN.finditer(line)
    ]


def parse(text: str) -> tuple[Node | None, list[LocatedProblem]]:
    """Compose one YAML document.

    Returns:
        The root, or None when the text cannot be parsed to its end; and the problems found.
    """
    composer = _Composer(text)
    try:
        for event in _events(text):
            composer.take(event)
    except _StopError as stop:
        composer.problems.append(stop.problem)
        return None, composer.problems
    if composer.root is None:
        composer.problems.append(LocatedProblem(Position(1, 1), "the recipe is empty"))
    return composer.root, composer.problems


class _StopError(Exception):
    """Parsing cannot continue."""

    def __init__(self, problem: LocatedProblem) -> None:
        super().__init__(problem.message)
        self.problem = problem


def _events(text: str) -> Iterator[Event]:
    """Yield the parser's events; raise its errors as a `_StopError` with a position."""
    last = Position(1, 1)
    try:
        for event in YAML(typ="safe", pure=True, plug_ins=[]).parse(text):
            last = _position(event.end_mark)
            yield event
    except MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        raise _StopError(LocatedProblem(_position(mark) if mark else last, *_syntax(error))) from error
    except (YAMLError, ArithmeticError, AssertionError, LookupError, TypeError, ValueError) as error:
        # The scanner raises some errors untranslated, e.g. OverflowError for "\UFFFFFFFF".
        message = "this is not valid YAML, here or a little further down"
        raise _StopError(
            LocatedProblem(last, message, f"the parser reports {type(error).__name__}: {error}")
        ) from error


def _syntax(error: MarkedYAMLError) -> tuple[str, str]:
    """Return the parser's error as a message and a hint."""
    problem = str(error.problem or error.context or "unreadable").replace("'\\x00'", "the end of the file")
    problem = problem.replace("<stream end>", "the end of the file").replace("<block end>", "the end of the block")
    hint = ""
    if "'\\t'" in problem:
        hint = "indent with spaces"
    elif "mapping values are not allowed" in problem:
        hint = "a text that contains ': ' needs quotes, and keys of one mapping start in one column"
    elif "cannot start any token" in problem:
        hint = "put the text in quotes"
    elif "the end of the block" in problem:
        hint = "entries of one mapping or list start in one column"
    return f"this is not valid YAML: {problem}", hint


def _position(mark: Any) -> Position:
    return Position(mark.line + 1, mark.column + 1)


@dataclass(kw_only=True, slots=True)
class _Open:
    """A mapping or list under construction; in a mapping `key` is None while a key is expected."""

    node: Node
    key: "_Key | None" = None
    is_key: bool = False


@dataclass(kw_only=True, slots=True)
class _Key:
    """A key whose value is expected; without a name the value is read and dropped."""

    at: Position
    name: str | None


@dataclass(slots=True)
class _Composer:
    """Build nodes from events and collect the problems."""

    text: str
    root: Node | None = None
    problems: list[LocatedProblem] = field(default_factory=list)
    stack: list[_Open] = field(default_factory=list)
    num_nodes: int = 0
    num_documents: int = 0

    def take(self, event: Event) -> None:
        """Handle one event."""
        if isinstance(event, DocumentStartEvent):
            self._document(event)
        elif isinstance(event, MappingEndEvent | SequenceEndEvent):
            closed = self.stack.pop()
            if not closed.is_key:
                self._add(closed.node)
        elif isinstance(event, AliasEvent | CollectionStartEvent | ScalarEvent):
            self.num_nodes += 1
            if self.num_nodes > MAX_NODES:
                raise _StopError(
                    LocatedProblem(_position(event.start_mark), f"the recipe has more than {MAX_NODES} values")
                )
            self._value(event)

    def _document(self, event: DocumentStartEvent) -> None:
        at = _position(event.start_mark)
        self.num_documents += 1
        if self.num_documents > 1:
            raise _StopError(LocatedProblem(at, "a second document starts here", "a recipe is one YAML document"))
        for number, line in enumerate(self.text.splitlines()[: at.line - 1], start=1):
            if line.startswith("%"):
                self.problems.append(
                    LocatedProblem(Position(number, 1), "YAML directives are refused", "delete this line")
                )

    def _value(self, event: AliasEvent | CollectionStartEvent | ScalarEvent) -> None:
        """Start or finish the value of `event`."""
        parent = self.stack[-1] if self.stack else None
        pending = parent.key if parent else None
        at = _position(event.start_mark)
        if pending and isinstance(event, ScalarEvent) and event.end_mark.index == event.start_mark.index:
            at = pending.at  # the parser puts an absent value at the next token, which may be lines away
        node = Node(at=at, key_at=pending.at if pending else at)
        self._refuse(event, node)
        siblings = parent.node.content if parent and not pending else None
        if isinstance(event, CollectionStartEvent):
            self._open(event, node, is_key=isinstance(siblings, dict))
            return
        if isinstance(event, ScalarEvent):
            self._scalar(event, node)
        if parent and isinstance(siblings, dict):
            parent.key = self._key(event, node, siblings)
        else:
            self._add(node)

    def _refuse(self, event: AliasEvent | CollectionStartEvent | ScalarEvent, node: Node) -> None:
        """Report YAML features that a recipe may not use."""
        if isinstance(event, AliasEvent):
            self.problems.append(
                LocatedProblem(node.at, f"the alias *{event.anchor} is refused", "write the value out")
            )
            node.usable = False
            return
        if event.anchor is not None:
            self.problems.append(
                LocatedProblem(node.at, f"the anchor &{event.anchor} is refused", "write every value out")
            )
        if event.tag is not None:
            tag = str(event.tag).replace("tag:yaml.org,2002:", "!!")
            self.problems.append(LocatedProblem(node.at, f"the tag {quoted(tag)} is refused", "write the plain value"))
            node.usable = False

    def _open(self, event: CollectionStartEvent, node: Node, *, is_key: bool) -> None:
        if len(self.stack) >= MAX_DEPTH:
            raise _StopError(LocatedProblem(node.at, f"values are nested more than {MAX_DEPTH} levels deep"))
        if is_key:
            self.problems.append(LocatedProblem(node.at, "a key must be text, got a list or a mapping"))
            self.stack[-1].key = _Key(at=node.at, name=None)
        node.content = {} if isinstance(event, MappingStartEvent) else []
        self.stack.append(_Open(node=node, is_key=is_key))

    def _scalar(self, event: ScalarEvent, node: Node) -> None:
        """Set the content of `node`; a value that no recipe can use is reported and marked as unusable."""
        text, plain = str(event.value), event.style is None
        hidden = HIDDEN.search(text)
        if hidden:
            message, hint = f"the invisible character U+{ord(hidden.group()):04X} is refused", ""
        elif plain and _NOT_FINITE.match(text):
            message, hint = f"{text} is refused: numbers here are finite", "quote it if it is text"
        else:
            node.content = _resolve(text) if plain else text
            if not isinstance(node.content, float) or math.isfinite(node.content):
                return
            message, hint = f"the number {quoted(text)} is too large", "quote it if it is text"
        node.content, node.usable = None, False
        self.problems.append(LocatedProblem(node.at, message, hint))

    def _key(self, event: AliasEvent | ScalarEvent, node: Node, siblings: dict[str, Node]) -> _Key:
        """Return `node` as a key, without a name when the key is refused."""
        key = _Key(at=node.at, name=None)
        if not node.usable:
            return key
        name = node.content
        if not isinstance(name, str):
            got = quoted(str(event.value)) if isinstance(event, ScalarEvent) and event.value else "nothing"
            self.problems.append(LocatedProblem(node.at, f"a key must be text, got {got}"))
        elif name == "<<":
            self.problems.append(LocatedProblem(node.at, "merge keys (<<) are refused", "write every value out"))
        elif name in siblings:
            first = siblings[name].key_at
            message = f"the key {quoted(name)} is given twice"
            self.problems.append(LocatedProblem(node.at, message, f"it is first given at line {first.line}"))
        else:
            key.name = name
        return key

    def _add(self, node: Node) -> None:
        """Add a finished value to its parent."""
        if not self.stack:
            self.root = node
            return
        parent = self.stack[-1]
        if isinstance(parent.node.content, list):
            parent.node.content.append(node)
        elif isinstance(parent.node.content, dict) and parent.key is not None:
            node.key_at = parent.key.at
            if parent.key.name is not None:
                parent.node.content[parent.key.name] = node
            parent.key = None


def _resolve(text: str) -> Scalar:
    """Return the value of a plain scalar; integers of more than 18 characters come back as infinity."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.match(text) or _BASED.match(text):
        if len(text) > 18:
            return math.inf
        return int(text) if _INT.match(text) else int(text, 0)
    return float(text) if _FLOAT.match(text) else text
