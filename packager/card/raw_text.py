"""Check a markdown text that a card includes as it is: header, footer, the base model's card.

The page around the text must stay as it is for a reader. The Hub and git hosts remove scripts from a page, but a tag
that is never closed, an address such as `javascript:` or a hidden character is the publisher's own mistake or another
person's trap, and is refused here with its line. Blocks are judged by the parser's own tokens (CommonMark 0.31, section
4.6); HTML by the standard's rules for start and end tags (https://html.spec.whatwg.org/multipage/syntax.html).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from html.parser import HTMLParser
from typing import TYPE_CHECKING

from packager.card.markdown import unclosed
from packager.system.text import HIDDEN, quoted

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

# The parser takes 7 s for the worst text of this size; the cards of known models have 5 to 30 thousand characters.
MAX_CHARACTERS = 100_000
_MAX_PROBLEMS = 10
_MAX_DEPTH = 100  # open elements at one place; browsers stop at 512
_SENTINEL = "what follows"
_SCHEMES = frozenset({"http", "https", "mailto"})
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
# A browser drops these before it looks for the scheme: https://url.spec.whatwg.org/#url-parsing.
_DROPPED_IN_URLS = re.compile(r"[\t\n\r]|^[\x00-\x20]+")
_ADDRESSES = frozenset(
    {"href", "src", "action", "formaction", "xlink:href", "poster", "data", "background", "cite", "longdesc", "srcset"}
)
_OPENS = re.compile(r"`{3,}|~{3,}|<!--|<[?!]?[A-Za-z][A-Za-z0-9-]*")  # a block of a page, where it begins
_VOID_NAMES = "area base br col embed hr img input link meta param source track wbr"
_VOID = frozenset(_VOID_NAMES.split())
# Their end tags may be left out: the next heading or paragraph of the page closes them, or nothing is hidden by them.
_OPTIONAL_NAMES = "p li dt dd option optgroup tr td th thead tbody tfoot colgroup caption rt rp html head body"
_END_MAY_BE_LEFT_OUT = frozenset(_OPTIONAL_NAMES.split())
# They run or load something in the reader's browser, or turn the rest of a page into text.
_ACTIVE_NAMES = "script iframe frame frameset object embed applet base meta link form plaintext noembed noframes xmp"
_ACTIVE = frozenset(_ACTIVE_NAMES.split())


@dataclass(frozen=True, kw_only=True)
class TextProblem:
    """One reason not to put a text into a card, with the line of the text, counted from 1.

    Attributes:
        words: what of the text is refused, to find where it comes from; "" if that is the line as a whole.
    """

    line: int
    message: str
    hint: str
    words: str = ""


def text_problems(text: str) -> tuple[TextProblem, ...]:
    """Return why a markdown text cannot be part of a card, in the order of its lines; at most ten reasons."""
    if len(text) > MAX_CHARACTERS:
        message = f"{len(text)} characters are too many, at most {MAX_CHARACTERS} are read"
        return (TextProblem(line=1, message=message, hint="shorten the text, and link to the rest"),)
    unix = text.replace("\r\n", "\n").replace("\r", "\n")
    found = [*_hidden(unix), *_open_block(unix)]
    if not found:  # what the parser sees in a text with an open block misleads
        found = [*_markup(unix)]
    return tuple(sorted(dict.fromkeys(found), key=lambda problem: problem.line)[:_MAX_PROBLEMS])


def _hidden(text: str) -> Iterator[TextProblem]:
    for number, line in enumerate(text.split("\n"), start=1):
        for match in HIDDEN.finditer(line):
            message = f"the invisible character U+{ord(match.group()):04X} at column {match.start() + 1} is refused"
            yield TextProblem(line=number, message=message, hint="delete it", words=match.group())


def _open_block(text: str) -> Iterator[TextProblem]:
    """Judge by a paragraph after the text: it must stay a paragraph of its own."""
    tokens = _parser().parse(f"{text}\n\n{_SENTINEL}\n")
    last = [(token.type, token.level, token.content) for token in tokens[-3:]]
    own = [("paragraph_open", 0, ""), ("inline", 1, _SENTINEL), ("paragraph_close", 0, "")]
    problem = unclosed(text)
    if last == own and not problem:
        return
    line = (tokens[-1].map or [0])[0] + 1 if last != own else text[: text.rfind("<!--")].count("\n") + 1
    hint = "close it in the file that the recipe names"
    message = f"it leaves {problem or 'a block'} open: what follows becomes part of it"
    opens = _OPENS.search(text.split("\n")[line - 1])
    words = opens[0] if opens else ""
    yield TextProblem(line=line, message=message, hint=hint, words=words)


def _markup(text: str) -> Iterator[TextProblem]:
    """Judge the tags and the addresses of a text."""
    environment: dict[str, dict[str, dict[str, str]]] = {}
    tokens = _parser().parse(text + "\n", environment)
    tags = _Tags()
    for token in tokens:
        start = (token.map or [0])[0] + 1
        if token.type == "html_block":
            tags.read(token.content, start)
        elif token.type == "inline":
            yield from _inline(token.children or (), start, tags)
    for reference in environment.get("references", {}).values():
        yield from _address(reference["href"], _line_of(text, reference["href"]))
    yield from tags.found
    for name, line in tags.open:
        hint = f"write </{name}> where the element ends"
        message = f"it leaves <{name}> open: what follows becomes part of it"
        yield TextProblem(line=line, message=message, hint=hint, words=f"<{name}")


def _inline(children: "Sequence[Token]", line: int, tags: "_Tags") -> Iterator[TextProblem]:
    for token in children:
        if token.type in ("softbreak", "hardbreak"):
            line += 1
        elif token.type == "html_inline":
            tags.read(token.content, line)
            line += token.content.count("\n")
        elif token.type in ("link_open", "image"):
            yield from _address(str(token.attrs.get("href") or token.attrs.get("src") or ""), line)
            yield from _inline(token.children or (), line, tags)


def _address(address: str, line: int) -> Iterator[TextProblem]:
    scheme = _SCHEME.match(_DROPPED_IN_URLS.sub("", address))
    if scheme and scheme[1].lower() not in _SCHEMES:
        message = f"the address {quoted(address)} has the scheme {quoted(scheme[1].lower())}"
        hint = "use http:, https:, mailto:, a relative address or #heading"
        yield TextProblem(line=line, message=message, hint=hint, words=address)


def _line_of(text: str, words: str) -> int:
    """Return the line of the first occurrence of a reference's address, which the parser does not give."""
    return text.count("\n", 0, max(0, text.find(words))) + 1


@dataclass(kw_only=True)
class _Tags:
    """The open elements of a text, and what is wrong with its tags."""

    open: list[tuple[str, int]] = field(default_factory=list)
    found: list[TextProblem] = field(default_factory=list)

    def read(self, html: str, line: int) -> None:
        """Read one piece of raw HTML of the page; outside such pieces `<` is text."""
        reader = _Reader(self, line)
        reader.feed(html)
        rest = reader.rawdata
        if rest.startswith("<"):
            message = "it has a tag or a comment that does not end before its block does"
            hint = "write the tag without a blank line inside, and end it with >"
            self.found.append(
                TextProblem(line=line + html.count("\n", 0, html.rfind(rest)), message=message, hint=hint)
            )

    def start(self, name: str, attributes: Sequence[tuple[str, str | None]], line: int, *, closed: bool) -> None:
        """Take a start tag; `closed` is `<name/>`, which HTML reads as `<name>` outside drawings and formulas."""
        if name in _ACTIVE:
            hint = "delete it: hosts remove it, and the card must not depend on it"
            message = f"the element <{name}> is refused in a card"
            self.found.append(TextProblem(line=line, message=message, hint=hint, words=f"<{name}"))
            return
        for key, value in attributes:
            if key.startswith("on"):
                message = f"the attribute {quoted(key)} of <{name}> runs a script"
                self.found.append(TextProblem(line=line, message=message, hint="delete it", words=key))
            elif key in _ADDRESSES:
                self.found.extend(_address(value or "", line))
        drawing = any(other in ("svg", "math") for other, _ in self.open) or name in ("svg", "math")
        if name in _VOID | _END_MAY_BE_LEFT_OUT or (closed and drawing):
            return
        if len(self.open) == _MAX_DEPTH:
            message, hint = f"more than {_MAX_DEPTH} elements are open", "close them"
            self.found.append(TextProblem(line=line, message=message, hint=hint))
        else:
            self.open.append((name, line))

    def end(self, name: str) -> None:
        """Take an end tag: it closes the innermost element of its name and what is open inside; others do nothing."""
        for index in range(len(self.open) - 1, -1, -1):
            if self.open[index][0] == name:
                del self.open[index:]
                return


class _Reader(HTMLParser):
    """Give the tags of one piece of HTML to `_Tags`, with their lines."""

    def __init__(self, tags: _Tags, line: int) -> None:
        super().__init__()
        self._tags = tags
        self._first = line

    @property
    def _line(self) -> int:
        return self._first + self.getpos()[0] - 1

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tags.start(tag, attrs, self._line, closed=False)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._tags.start(tag, attrs, self._line, closed=True)

    def handle_endtag(self, tag: str) -> None:
        self._tags.end(tag)


def _accept(url: str) -> bool:  # noqa: ARG001 - the parser's own name
    return True


@cache
def _parser() -> "MarkdownIt":
    # Imported here, as in `markdown`. Addresses that this parser would not make links of are links for others.
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark").enable("table")
    parser.validateLink = _accept  # type: ignore[method-assign]
    parser.parse("x")
    return parser
