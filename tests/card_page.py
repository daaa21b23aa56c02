"""A rendered card as a reader's parser sees it."""

import subprocess

from markdown_it import MarkdownIt
from ruamel.yaml import YAML

from packager.card.markdown import extract_code_blocks


def front_matter(text: str) -> dict[str, object]:
    assert text.startswith("---\n")
    read: dict[str, object] = YAML(typ="safe").load(text[4 : text.index("\n---\n")])
    return read


def body(text: str) -> str:
    return text[text.index("\n---\n") + 5 :]


def structure(text: str) -> list[str]:
    """The page's skeleton: every block, without what is written in it."""
    tokens = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(body(text))
    return [f"{token.type} {token.tag} {token.info}".strip() for token in tokens]


def tables(text: str) -> list[list[list[str]]]:
    """Every table's rows as a parser sees their cells."""
    tokens = MarkdownIt("commonmark").enable("table").parse(body(text))
    found: list[list[list[str]]] = []
    for index, token in enumerate(tokens):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open"):
            found[-1][-1].append(tokens[index + 1].content)
    return found


def headings(text: str) -> list[str]:
    tokens = MarkdownIt("commonmark").parse(body(text))
    inline = [tokens[index + 1] for index, token in enumerate(tokens) if token.type == "heading_open"]
    return ["".join(child.content for child in token.children or []) for token in inline]


def assert_code_is_valid(text: str) -> None:
    """Compile every Python block and let bash parse every shell block."""
    for block in extract_code_blocks(text):
        if block.language == "python":
            compile(block.text, f"card:{block.line}", "exec")
        if block.language == "shell":
            subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)


def assert_well_formed(text: str) -> None:
    """Check the page's white space and code."""
    assert text.endswith("\n")
    assert not text.endswith("\n\n")
    assert "\n\n\n\n" not in text
    assert not [line for line in text.split("\n") if line != line.rstrip()]
    assert_code_is_valid(text)
