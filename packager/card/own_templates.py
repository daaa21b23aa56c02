"""The templates of a recipe: files that stand in for parts of the card's own, in the same sandbox.

A recipe is not trusted with code, and its templates get none: the sandbox hides Python's attributes, a template is read
from these texts and the built-in folder alone, and the finished page must not change itself or the reader's browser.
A template that computes for ever is not stopped.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Final

from jinja2 import BytecodeCache, ChoiceLoader, FunctionLoader, TemplateSyntaxError, nodes
from jinja2.bccache import Bucket
from jinja2.sandbox import ImmutableSandboxedEnvironment

from packager.card.raw_text import MAX_CHARACTERS, TextProblem
from packager.card.sections import SECTION_FILES, SECTIONS, section_problems

_IN_BRACES: Final = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}")
_MOST_NAMED: Final = 5  # files in one message
_Source = tuple[str, str | None, Callable[[], bool] | None]


@dataclass(frozen=True, kw_only=True)
class OwnTemplates:
    """The files of the folder that a recipe names for its cards.

    Attributes:
        folder: as the recipe names it.
        texts: the templates by name.
        sections: the words of sections by name, see `sections`: never templates.
    """

    folder: str
    texts: Mapping[str, str]
    sections: Mapping[str, str] = field(default_factory=dict)

    @property
    def files(self) -> dict[str, str]:
        """The texts of all files by their names."""
        return {**self.texts, **{SECTION_FILES.get(name, name): text for name, text in self.sections.items()}}

    def path(self, name: str) -> str:
        """Return a template's path, relative to the recipe's folder."""
        return str(PurePosixPath(self.folder, name))


@dataclass(frozen=True, kw_only=True)
class TemplateProblem:
    """What is wrong in a template of a recipe, and the line, 0 for the whole file."""

    name: str
    line: int
    message: str


class CompiledTemplates(BytecodeCache):
    """Keeps what templates were compiled to in this process: an environment with a recipe's own compiles all anew.

    Jinja compares the text of a template with that of what is kept.
    """

    def __init__(self) -> None:
        self._kept: dict[str, bytes] = {}

    def load_bytecode(self, bucket: Bucket) -> None:
        """Fill a bucket with what is kept for its template, if anything is."""
        if (kept := self._kept.get(bucket.key)) is not None:
            bucket.bytecode_from_string(kept)

    def dump_bytecode(self, bucket: Bucket) -> None:
        """Keep what a template was compiled to."""
        self._kept[bucket.key] = bucket.bytecode_to_string()


def with_own(environment: ImmutableSandboxedEnvironment, own: OwnTemplates) -> ImmutableSandboxedEnvironment:
    """Return an environment that takes a recipe's templates before those of `environment`."""
    built_in = environment.loader
    assert built_in is not None  # noqa: S101 - it was made with one

    def load(name: str) -> _Source | None:
        text = own.texts.get(name)
        return None if text is None else (text, own.path(name), None)

    # A fresh cache comes with the loader: compiled templates of one recipe are no other recipe's.
    return environment.overlay(loader=ChoiceLoader([FunctionLoader(load), built_in]))


def partials(folder: Path) -> frozenset[str]:
    """Return the names of the built-in templates that a recipe may replace: the parts of the page."""
    return frozenset(path.name for path in folder.glob("_*.j2"))


def assigned_names(environment: ImmutableSandboxedEnvironment, texts: Iterable[str]) -> frozenset[str]:
    """Return the names that templates set, loop over, define or import."""
    found: set[str] = set()
    for text in texts:
        tree = environment.parse(text)
        found |= {node.name for node in tree.find_all(nodes.Name) if node.ctx != "load"}
        found |= {node.name for node in tree.find_all(nodes.Macro)}
        found |= {node.target for node in tree.find_all(nodes.Import)}
        for node in tree.find_all(nodes.FromImport):
            found |= {name if isinstance(name, str) else name[1] for name in node.names}
    return frozenset(found)


def template_problems(
    environment: ImmutableSandboxedEnvironment, own: OwnTemplates, known: frozenset[str]
) -> Iterator[TemplateProblem]:
    """Yield which of a recipe's templates and sections are no parts of the page, are too long or are malformed."""
    for name, text in own.sections.items():
        if name not in SECTIONS:
            known_files = ", ".join(SECTION_FILES.values())
            yield TemplateProblem(
                name=name, line=0, message=f"no section of the card has this name; they are {known_files}"
            )
            continue
        for problem in section_problems(text):
            message = f"{problem.message} ({problem.hint})"
            yield TemplateProblem(name=SECTION_FILES[name], line=problem.line, message=message)
    for name, text in own.texts.items():
        if name not in known:
            yield TemplateProblem(
                name=name, line=0, message=f"no part of the card has this name; they are {', '.join(sorted(known))}"
            )
        elif len(text) > MAX_CHARACTERS:
            yield TemplateProblem(name=name, line=0, message=f"it has more than {MAX_CHARACTERS} characters")
        else:
            yield from _compile_problems(environment, name, text)


def _compile_problems(environment: ImmutableSandboxedEnvironment, name: str, text: str) -> Iterator[TemplateProblem]:
    """Yield why a template cannot be compiled, and each filter and test that does not exist.

    In a branch of an `if` Jinja looks for a filter when the branch is rendered. A template may ask whether there is one
    (`is filter`), then nothing is said of those that are missing.
    """
    try:
        environment.compile(text, name)
    except TemplateSyntaxError as error:
        yield TemplateProblem(name=name, line=error.lineno, message=str(error.message))
    except (SyntaxError, RecursionError, MemoryError) as error:  # of the Python code that Jinja makes
        message = error.msg if isinstance(error, SyntaxError) else "its parts are nested too deeply"
        yield TemplateProblem(name=name, line=0, message=message)
    else:
        used = list(environment.parse(text).find_all((nodes.Filter, nodes.Test)))
        if any(isinstance(node, nodes.Test) and node.name in ("filter", "test") for node in used):
            return
        for node in used:
            kind, known = (
                ("filter", environment.filters) if isinstance(node, nodes.Filter) else ("test", environment.tests)
            )
            if node.name not in known:
                yield TemplateProblem(name=name, line=node.lineno, message=f"No {kind} named {node.name!r} found.")


def names_read(environment: ImmutableSandboxedEnvironment, text: str, line: int) -> frozenset[str]:
    """Return the names whose values the statements and expressions of a template's line read."""
    found: set[str] = set()
    for node in environment.parse(text).find_all(nodes.Node):
        if node.lineno == line:
            read = [node] if isinstance(node, nodes.Expr) else list(node.iter_child_nodes())
            for each in read:
                if isinstance(each, nodes.Name):
                    found.add(each.name)
                elif isinstance(each, nodes.Expr):
                    found |= {name.name for name in each.find_all(nodes.Name)}
    return frozenset(found)


def place_of_problem(own: OwnTemplates, problem: TextProblem, page: str) -> tuple[str, str]:
    """Return where a problem of a page comes from, and its message.

    The place is file and line if one line of the templates has what is refused, else the file if there is one, else
    the folder; then the message names the files. No line is shown: it may have a secret.
    """
    of_page = page.replace("\r\n", "\n").replace("\r", "\n").split("\n")[problem.line - 1].strip()
    lines = [
        (own.path(name), number, line)
        for name, text in own.texts.items()
        for number, line in enumerate(text.split("\n"), start=1)
    ]
    for words in (of_page, problem.words):
        found = [(path, number) for path, number, line in lines if words and _writes(line, words, of_page)]
        if len(found) == 1:
            return f"{found[0][0]}:{found[0][1]}", problem.message
    files = {path for path, _ in found} or {own.path(name) for name in own.texts}
    if len(files) == 1:
        return files.pop(), problem.message
    more = f" or {len(own.texts) - _MOST_NAMED} more" if len(own.texts) > _MOST_NAMED else ""
    names = ", ".join(sorted(own.texts)[:_MOST_NAMED])
    return own.folder, f"{problem.message}; it comes from one of {names}{more}"


def _writes(line: str, words: str, of_page: str) -> bool:
    """Return whether a line of a template has words, and what stands around them is on the line of the page."""
    words = words.lower()
    parts = [part for part in _IN_BRACES.split(line) if words in part.lower()]
    return words in line.lower() and all(part.strip() in of_page for part in parts)
