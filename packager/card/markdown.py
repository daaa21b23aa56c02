"""Markdown as data: escapes for values that are put into a card, and the code blocks of a finished one.

The texts of recipes and receipts are never markup: each one that goes into a table, a heading, a link or a code block
passes one of these functions, so that a pipe, a backtick or a line break cannot change the page around it.
CommonMark 0.31 with the tables of GitHub Flavored Markdown, which is what the Hub renders.
"""

import html
import io
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import TYPE_CHECKING
from urllib.parse import quote

from ruamel.yaml import YAML
from ruamel.yaml.scalarstring import DoubleQuotedScalarString

from packager.system.text import escaped, reveal

if TYPE_CHECKING:
    from markdown_it import MarkdownIt
    from markdown_it.token import Token

_RUN_COMMENT = re.compile(r"<!-- run: ([a-z0-9_-]+) -->")
_INLINE_SPECIAL = re.compile(r"[\\`*_\[\]<|~$]|&(?=#?[0-9A-Za-z]+;)|^#|#\Z")
_BACKTICKS = re.compile(r"`+")
# Words that YAML 1.1 does not read as text; huggingface_hub reads front matter with PyYAML, which is 1.1.
_YAML_11_WORDS = frozenset({"y", "n", "yes", "no", "on", "off", "true", "false", "null"})
_MAX_BLANK = 2
_YAML_PLAIN = re.compile(r"[A-Za-z][A-Za-z0-9._/-]*\Z|[0-9]+-[A-Za-z]+\Z")


@dataclass(frozen=True, kw_only=True)
class CodeBlock:
    """A fenced code block.

    Attributes:
        language: first word of the fence's info string, "" if there is none.
        text: the content, each line ended by a line feed.
        lines: its lines in the page, the fences included, counted from 1.
        run: the environment named by a `<!-- run: ... -->` comment directly above, "" if there is none.
    """

    language: str
    text: str
    lines: range
    run: str = ""

    @property
    def line(self) -> int:
        """Return the line of the opening fence."""
        return self.lines[0]


def one_line(text: str) -> str:
    """Return `text` on one line: runs of white space become a space, hidden characters are shown as escapes."""
    return reveal(" ".join(text.split()))


def inline(text: str) -> str:
    """Escape `text` for a sentence, a heading, a link's text or a table cell; it is shown literally."""
    return _INLINE_SPECIAL.sub(lambda match: "\\" + match.group(), one_line(text))


def attribute(text: str) -> str:
    """Return `text` as the value of an HTML attribute, with its quotes; a blank line would end the HTML around it."""
    return f'"{html.escape(one_line(text))}"'


def html_text(text: str) -> str:
    """Return `text` as the content of an HTML element, on one line, where no markdown is read."""
    return html.escape(one_line(text))


def code_span(text: str) -> str:
    """Return `text` as inline code; in a table use it only for text without `|`."""
    content = one_line(text)
    fence = "`" * (_longest_run(content) + 1)
    pad = " " if content.startswith("`") or content.endswith("`") else ""
    return f"{fence}{pad}{content}{pad}{fence}"


def fence(text: str, language: str) -> str:
    """Return `text` as a fenced code block whose fence is longer than any run of backticks inside."""
    content = text.replace("\r\n", "\n").replace("\r", "\n").strip("\n")
    visible = reveal(content)
    ticks = "`" * max(3, _longest_run(visible) + 1)
    return f"{ticks}{language}\n{visible}\n{ticks}\n"


def link_target(url: str) -> str:
    """Percent-encode what would end or escape a link's address; existing escapes stay."""
    return quote(url, safe=":/?#@!$&'*+,;=%~-._[]")


def link(title: str, url: str) -> str:
    """Return a link whose text is `title`, literally."""
    return f"[{inline(title)}]({link_target(url)})"


def python_string(text: str, width: int = 96) -> str:
    """Return a Python expression equal to `text`, over several lines when it is longer than `width`."""
    pieces = [_python_literal(piece) for piece in _pieces(text, width)]
    if len(pieces) == 1:
        return pieces[0]
    return "(\n" + "".join(f"    {piece}\n" for piece in pieces) + ")"


def shell_word(text: str) -> str:
    """Quote `text` as one word of a POSIX shell."""
    return shlex.quote(text)


def front_matter(fields: Mapping[str, str | list[str]], nested: Mapping[str, object] = MappingProxyType({})) -> str:
    """Return the YAML front matter of a card; every value reads as text in YAML 1.1 and 1.2.

    Args:
        fields: the keys with a text or a list of texts.
        nested: keys after them, whose values are lists, mappings, texts and numbers.
    """
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 4096
    stream = io.StringIO()
    whole = {key: _yaml_value(value) for key, value in fields.items()} | {k: _nested(v) for k, v in nested.items()}
    yaml.dump(whole, stream)
    return f"---\n{stream.getvalue()}---\n"


def extract_code_blocks(markdown: str) -> list[CodeBlock]:
    """Return the fenced code blocks of a page in order, those in lists and quotes too.

    A block that is never closed ends with the list item or the quote around it, or with the page.
    """
    blocks = []
    above = ""
    for token in _blocks(markdown):
        if token.type == "fence" and token.map:
            run = _RUN_COMMENT.fullmatch(above)
            language = token.info.split(maxsplit=1)[0] if token.info.strip() else ""
            first, end = token.map
            lines = range(first + 1, end + 1)
            blocks.append(CodeBlock(language=language, text=token.content, lines=lines, run=run[1] if run else ""))
        above = token.content.rstrip().rpartition("\n")[2].strip() if token.type == "html_block" else ""
    return blocks


def unclosed(markdown: str) -> str:
    """Return what `markdown` opens and never closes ("a code fence", "an HTML comment", "an HTML block"), or ""."""
    text = _unix(markdown)
    last = _blocks(f"{text}\n\nwhat follows\n")[-1]
    if last.type == "fence":
        return "a code fence"
    if last.type == "html_block":
        return "an HTML comment" if last.content.lstrip().startswith("<!--") else "an HTML block"
    fenced = _fenced_lines(text)
    prose = "\n".join(line for number, line in enumerate(text.split("\n"), start=1) if number not in fenced)
    return "an HTML comment" if prose.rfind("<!--") > prose.rfind("-->") else ""


def tidy(markdown: str) -> str:
    """Return a page with one line feed at its end, no spaces without meaning, and at most two blank lines in a row.

    Nothing changes in fenced code blocks. Two spaces at the end of a line stay where they are a line break.
    """
    text = _unix(markdown)
    fenced = _fenced_lines(text)
    lines = text.split("\n")
    kept: list[str] = []
    blank = 0
    for number, (line, following) in enumerate(zip(lines, [*lines[1:], ""], strict=True), start=1):
        in_code = number in fenced
        blank = 0 if line.strip() or in_code else blank + 1
        if blank <= _MAX_BLANK:
            kept.append(line if in_code else _without_trailing(line, following))
    return "\n".join(kept).strip("\n") + "\n"


def _without_trailing(text: str, following: str) -> str:
    bare = text.rstrip()
    is_break = bare and text.endswith("  ") and following.strip()
    return text if is_break else bare


def _unix(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


@cache
def _parser() -> "MarkdownIt":
    # Imported here: the parser takes 50 ms to import, and most commands render and check no page.
    from markdown_it import MarkdownIt

    parser = MarkdownIt("commonmark").disable(["inline", "text_join"])
    parser.parse("x")  # compiles its rules: the parser is shared by threads, and compiling is not safe there
    return parser


def _blocks(markdown: str) -> "list[Token]":
    """Parse the blocks of a page; what is inside paragraphs is not parsed."""
    return _parser().parse(_unix(markdown).removesuffix("\n") + "\n")


def _fenced_lines(markdown: str) -> frozenset[int]:
    return frozenset(number for block in extract_code_blocks(markdown) for number in block.lines)


def _longest_run(text: str) -> int:
    return max((len(run) for run in _BACKTICKS.findall(text)), default=0)


def _pieces(text: str, width: int) -> Iterator[str]:
    rest = text
    while len(rest) > width:
        cut = rest.rfind(" ", 0, width) + 1 or width
        yield rest[:cut]
        rest = rest[cut:]
    yield rest


def _python_literal(text: str) -> str:
    literal = json.dumps(text, ensure_ascii=False)
    return reveal("".join(char if char.isprintable() else escaped(char) for char in literal))


def _yaml_value(value: str | list[str]) -> str | list[str]:
    return [_yaml_text(item) for item in value] if isinstance(value, list) else _yaml_text(value)


def _nested(value: object) -> object:
    match value:
        case dict():
            return {key: _nested(item) for key, item in value.items()}
        case list():
            return [_nested(item) for item in value]
        case str():
            return _yaml_text(value)
    return value


def _yaml_text(value: str) -> str:
    plain = _YAML_PLAIN.match(value) and value.lower() not in _YAML_11_WORDS
    return value if plain else DoubleQuotedScalarString(one_line(value))
