"""The sections of a card: places for words that people write by hand, between two comments that no reader sees.

The words of a section are a file of the recipe (`SECTION_FILES`), so a card follows from the recipe alone. The markers
are the way in for words that were written on the page itself: `split_page` takes them out of an edited page, whose text
is anybody's until it is checked.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from types import MappingProxyType

from packager.card.markdown import tidy
from packager.card.raw_text import TextProblem, text_problems
from packager.errors import CardError
from packager.model.front_matter import split_front_matter
from packager.receipt import FileRecord
from packager.system.files import bytes_record

# By name, where a section stands in the page. Nothing is above the choice of a branch: the first screen answers.
SECTIONS: Mapping[str, str] = MappingProxyType(
    {
        "introduction": "after the choice of a branch; after the description in style late-2023",
        "files": "before the provided files",
        "closing": "after the licence, before the footer",
    }
)
SECTION_FILES: Mapping[str, str] = MappingProxyType({name: f"section-{name}.md" for name in SECTIONS})
MAX_SECTION_CHARACTERS = 20_000
# Of a page, which is compared line by line; cards have some hundred.
MAX_LINES = 20_000
_MARKER = re.compile(rf"<!--[ \t]*(begin|end):[ \t]*({'|'.join(SECTIONS)})[ \t]*-->")
# Comments that mean something to us: a marker, and the environment in which our tests run the code block below.
_RESERVED = re.compile(r"<!--\s*(?:begin|end|run)\s*:")


@dataclass(frozen=True, kw_only=True)
class SplitPage:
    """A page taken apart.

    Attributes:
        sections: the words of every section by name, without blank lines around them; "" for an empty one.
        outside: all other lines, markers included.
    """

    sections: Mapping[str, str]
    outside: tuple[str, ...]

    def has_same_outside(self, other: "SplitPage") -> bool:
        """Return whether two pages have the same lines outside of their sections, but for spaces at a line's end."""
        return not differing_lines(self, other)

    def joined(self, sections: Mapping[str, str]) -> str:
        """Return the page with other words in its sections, as it is rendered."""
        begin = {f"<!-- begin: {name} -->": text for name, text in sections.items()}
        lines = (f"{line}\n\n{begin[line]}\n" if begin.get(line) else line for line in self.outside)
        return "\n".join(lines) + "\n"

    def as_rendered(self, record: FileRecord, guesses: Iterable[Mapping[str, str]]) -> Mapping[str, str] | None:
        """Return the words that the sections had when packager rendered the page that `record` describes.

        None if no combination of the guesses gives that page: they are wrong, or a line outside was edited.
        """
        texts = {name: {"": None, **{guess.get(name, ""): None for guess in guesses}} for name in SECTIONS}
        for choice in product(*texts.values()):
            sections = dict(zip(SECTIONS, choice, strict=True))
            if bytes_record(self.joined(sections).encode()) == record:
                return sections
        return None


def section_block(name: str, text: str) -> str:
    """Return a section of a page: its markers, and its words between them."""
    inside = f"\n{text}\n\n" if text else ""
    return f"<!-- begin: {name} -->\n{inside}<!-- end: {name} -->"


def section_text(text: str) -> str:
    """Return the words of a section as a page has them: line ends, blank lines and spaces without meaning are gone."""
    return tidy(text).strip("\n")


def has_section_marker(data: bytes) -> bool:
    """Return whether a page in any encoding, of which the beginning is enough, has a marker of a section."""
    return _MARKER.search(data.replace(b"\0", b"").decode("ascii", "replace")) is not None


def split_page(page: str, where: str) -> SplitPage:
    """Take a page apart.

    Args:
        page: a card.
        where: it is, for errors.

    Raises:
        CardError: a marker is missing, doubled, inside another section, or not alone on its line; a section or the
            page is too long.
    """
    lines = page.replace("\r\n", "\n").replace("\r", "\n").strip("\n").split("\n")
    if len(lines) > MAX_LINES:
        raise CardError("the card is too large", where=where, why=f"it has more than {MAX_LINES:,} lines")
    outside: list[str] = []
    found: dict[str, list[str]] = {}
    name = ""
    for number, line in enumerate(lines, start=1):
        marker = _MARKER.search(line)
        if marker is None:
            (found[name] if name else outside).append(line)
            continue
        edge, marked = marker[1], marker[2]
        if problem := _marker_problem(line, marker[0], edge, marked, name, found):
            raise CardError("the markers of a card's sections are damaged", where=f"{where}:{number}", why=problem)
        outside.append(f"<!-- {edge}: {marked} -->")  # other spaces in a marker are no edit
        if edge == "begin":
            found[marked] = []
        name = marked if edge == "begin" else ""
    lacking = [f"<!-- end: {name} -->"] if name else []
    lacking += [f"<!-- begin: {each} -->" for each in SECTIONS if each not in found]
    if lacking:
        raise CardError(
            "the markers of a card's sections are missing",
            where=where,
            why=", ".join(lacking),
            hint="put each pair of markers back, each on a line of its own; packager card prints a page that has them",
        )
    texts = {each: "\n".join(found[each]) for each in SECTIONS}
    for each, text in texts.items():
        if len(text) > MAX_SECTION_CHARACTERS:
            why = f"it has {len(text)} characters, at most {MAX_SECTION_CHARACTERS} are read"
            hint = "shorten the text, and link to the rest"
            raise CardError(f"the section {each} is too long", where=where, why=why, hint=hint)
    return SplitPage(
        sections=MappingProxyType({each: section_text(text) for each, text in texts.items()}),
        outside=tuple(outside),
    )


def _marker_problem(line: str, marker: str, edge: str, marked: str, inside: str, found: Mapping[str, object]) -> str:
    """Return why a marker cannot stand where it is, or ""; `inside` is the section that is open."""
    if line.strip() != marker:
        return "the marker is not alone on its line"
    if edge == "begin":
        if inside:
            return f"{marked} begins inside {inside}"
        return f"{marked} begins twice" if marked in found else ""
    return "" if marked == inside else f"{marked} ends, and {inside or 'no section'} is open"


def marker_problems(text: str) -> Iterator[TextProblem]:
    """Yield the markers in a text of the card that is no section: the page would have them twice."""
    for match in _MARKER.finditer(text):
        message = f"{match[0]} marks a section of the card"
        yield TextProblem(line=text.count("\n", 0, match.start()) + 1, message=message, hint="delete it")


def section_problems(text: str) -> Iterator[TextProblem]:
    """Yield why a text cannot be a section of a card."""
    if len(text) > MAX_SECTION_CHARACTERS:
        message = f"{len(text)} characters are too many for a section, at most {MAX_SECTION_CHARACTERS} are read"
        yield TextProblem(line=1, message=message, hint="shorten the text, and link to the rest")
        return
    if split_front_matter(text)[0]:
        yield TextProblem(line=1, message="it has front matter", hint="the recipe makes the card's: write only text")
    for match in _RESERVED.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield TextProblem(line=line, message="a comment begin:, end: or run: means something else", hint="delete it")
    yield from text_problems(text)


def differing_lines(rendered: SplitPage, edited: SplitPage) -> list[str]:
    """Return the lines outside of the sections that differ, "+" of the edited page alone and "-" of the rendered."""
    before, after = ([line.rstrip() for line in page.outside] for page in (rendered, edited))
    lines = difflib.unified_diff(before, after, n=0, lineterm="")
    return [line for line in list(lines)[2:] if not line.startswith("@@")]
