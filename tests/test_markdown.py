import ast
import shlex

import pytest
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from markdown_it.token import Token
from ruamel.yaml import YAML

from packager.card import markdown
from packager.system.text import reveal

ANY_TEXT = st.text(max_size=300)
HOSTILE_TEXT = st.text(alphabet="ab1 |`*_[]()<>&;#~$\\\n\t{}%!-+.\"'\u2028\x07", max_size=80)


def page(text: str) -> list[Token]:
    return MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(text)


def shown(tokens: list[Token]) -> str:
    """The prose of a page as its reader sees it."""
    children = [child for token in tokens for child in token.children or []]
    assert {child.type for child in children} <= {"text", "text_special", "code_inline"}, "markup came out of a value"
    return "".join(child.content for child in children)


@given(HOSTILE_TEXT)
def test_inline_text_is_shown_as_written_and_marks_nothing_up(text: str) -> None:
    assert shown(page(f"# Title {markdown.inline(text)} end")) == f"Title {markdown.one_line(text)} end"


@given(HOSTILE_TEXT)
def test_inline_text_stays_in_its_table_cell(text: str) -> None:
    tokens = page(f"| a | b |\n| - | - |\n| x{markdown.inline(text)}x | y |\n")
    cells = [tokens[index + 1] for index, token in enumerate(tokens) if token.type == "td_open"]
    assert len(cells) == 2
    assert shown(cells[:1]) == f"x{markdown.one_line(text)}x"
    assert shown(cells[1:]) == "y"


@given(HOSTILE_TEXT)
def test_code_span_holds_any_text(text: str) -> None:
    content = markdown.one_line(text)
    if content:
        assert shown(page(f"Before {markdown.code_span(text)} after")) == f"Before {content} after"


@given(HOSTILE_TEXT, HOSTILE_TEXT)
def test_a_link_stays_one_link(title: str, path: str) -> None:
    (paragraph,) = [
        token for token in page(f"* {markdown.link('t' + title, 'https://e.org/' + path)}") if token.children
    ]
    kinds = [child.type for child in paragraph.children or [] if child.type not in ("text", "text_special")]
    assert kinds == ["link_open", "link_close"]


@given(HOSTILE_TEXT)
def test_a_fence_holds_any_text(text: str) -> None:
    (block,) = markdown.extract_code_blocks(markdown.fence(f"a{text}a", "text") + "\nafter\n")
    (token,) = [token for token in page(markdown.fence(f"a{text}a", "text") + "\nafter\n") if token.type == "fence"]
    assert block.text == token.content == reveal(f"a{text}a\n")


@given(ANY_TEXT)
def test_python_string_is_the_text(text: str) -> None:
    expression = markdown.python_string(text, width=20)
    assert ast.literal_eval(expression) == text
    assert all(line.isprintable() for line in expression.split("\n"))


@given(ANY_TEXT.filter(lambda text: "\x00" not in text))
def test_shell_word_is_one_word(text: str) -> None:
    assert shlex.split(markdown.shell_word(text)) == [text]


@pytest.mark.parametrize("version", [(1, 1), (1, 2)])
@pytest.mark.parametrize(
    "text", ["no", "on", "null", "1e3", "0x1F", "1_000", "12:30:45", "~", "a: b", "# x", "- x", "4-bit"]
)
def test_front_matter_values_are_text_in_every_yaml(text: str, version: tuple[int, int]) -> None:
    yaml = YAML(typ="safe")
    yaml.version = version
    front = markdown.front_matter({"key": text, "list": [text, "x"]})
    assert yaml.load(front.removesuffix("---\n")) == {"key": text, "list": [text, "x"]}


def test_code_blocks_are_found_as_commonmark_does() -> None:
    text = """<!-- run: shell -->

```shell
echo "`tick`"
```

````python extra words
```
inner
```
````
not `inline ```code``` here`
~~~
tilde ``` inside
~~~
  ```text
  indented
    more
  ```
    ```
    an indented block is no fence
``` not`a fence
<!-- run: transformers -->
some words
```python
open to the end
"""
    blocks = markdown.extract_code_blocks(text)
    assert [(block.language, block.line, block.run) for block in blocks] == [
        ("shell", 3, "shell"),
        ("python", 7, ""),
        ("", 13, ""),
        ("text", 16, ""),
        ("python", 25, ""),
    ]
    fences = [token for token in page(text) if token.type == "fence"]
    assert [block.text for block in blocks] == [token.content for token in fences]


# Expected values are written by hand, from CommonMark 0.31: 2.2 (tabs), 4.5 (fences), 5.1 (quotes), 5.2 (list items).
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        pytest.param("```sh\n\tmake\n  ```\nend", [("sh", "\tmake\n", 1, 3)], id="a tab inside stays"),
        pytest.param("\t```\n\tcode\n\t```\n", [], id="a tab before is indented code"),
        pytest.param("```\nx\n\t```\n```\n", [("", "x\n\t```\n", 1, 4)], id="a tab before does not close"),
        pytest.param("> ```sh\n> ls\n> ```\nend", [("sh", "ls\n", 1, 3)], id="in a quote"),
        pytest.param("> ```sh\n> ls\n\n```\nx\n```", [("sh", "ls\n", 1, 2), ("", "x\n", 4, 6)], id="a quote ends it"),
        pytest.param("* a\n\n  ```sh\n  ls\n    -l\n  ```\n", [("sh", "ls\n  -l\n", 3, 6)], id="in a list item"),
        pytest.param("1. ```sh\n   ls\n\nend\n", [("sh", "ls\n\n", 1, 3)], id="a list item ends it"),
        pytest.param("- > - ```sh\n  >   ls\n  >   ```\n", [("sh", "ls\n", 1, 3)], id="in nested lists and quotes"),
        pytest.param("a\n\n```sh\nls\n\nend", [("sh", "ls\n\nend\n", 3, 6)], id="unclosed"),
        pytest.param("```sh", [("sh", "", 1, 1)], id="unclosed at the end"),
        pytest.param("~~~ sh `x` ~~\n```\n~~~\n", [("sh", "```\n", 1, 3)], id="tildes"),
        pytest.param("~~~\n~~~~ x\n~~~~\nend", [("", "~~~~ x\n", 1, 3)], id="words after do not close"),
        pytest.param("`````sh\n````\n``````\nend", [("sh", "````\n", 1, 3)], id="a longer fence closes"),
        pytest.param("   ```sh\n     a\n  b\n c\n ```\n", [("sh", "  a\nb\nc\n", 1, 5)], id="indented by three"),
        pytest.param("a\n```sh\nls\n```\nb", [("sh", "ls\n", 2, 4)], id="it interrupts a paragraph"),
        pytest.param("```sh\r\nls\r\n```\r\n", [("sh", "ls\n", 1, 3)], id="lines of Windows"),
        pytest.param("```sh\u2028x\nls\u2028\n```", [("sh", "ls\u2028\n", 1, 3)], id="other line separators"),
        pytest.param("``` \\sh&amp; x\n```", [("\\sh&amp;", "", 1, 2)], id="an escape in the info string"),
        pytest.param("<div>\n```sh\nls\n```\n</div>", [], id="in an HTML block it is text"),
        pytest.param("<!-- \n```sh\nls\n```\n-->", [], id="in a comment it is text"),
    ],
)  # fmt: skip
def test_fences_in_hostile_positions(text: str, expected: list[tuple[str, str, int, int]]) -> None:
    blocks = markdown.extract_code_blocks(text)
    assert [(block.language, block.text, block.lines[0], block.lines[-1]) for block in blocks] == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<!-- run: shell -->\n\n\n```\n```", "shell"),
        ("<details>\n<!-- run: shell -->\n\n```\n```", "shell"),
        ("* <!-- run: shell -->\n  ```\n  ```", "shell"),
        ("<!-- run: shell -->\nwords\n```\n```", ""),
        ("`<!-- run: shell -->`\n\n```\n```", ""),
        ("    <!-- run: shell -->\n\n```\n```", ""),
        ("<!-- run: shell -->\n```\n```\n```\n```", ""),
    ],
)
def test_a_run_comment_belongs_to_the_block_below_it(text: str, expected: str) -> None:
    assert markdown.extract_code_blocks(text)[-1].run == expected


@pytest.mark.parametrize("text", ["- ```\n  x", "> ```\n> x", "1. a\n\n   ~~~\n"])
def test_a_fence_in_a_list_or_a_quote_ends_with_it(text: str) -> None:
    assert markdown.unclosed(text) == ""


@given(HOSTILE_TEXT)
def test_a_page_without_open_blocks_is_accepted(text: str) -> None:
    if not markdown.unclosed(text):
        (heading,) = [token for token in page(f"{text}\n\n# After\n\nend\n")[-6:] if token.type == "heading_open"]
        assert heading.level == 0


def test_tidy_keeps_code_in_lists_and_quotes() -> None:
    text = "* a\n\n  ```\n  x  \n\n\n\n  y\n  ```\n\n> ```\n> x  \n> ```\n"
    assert markdown.tidy(text) == text


def test_an_open_block_is_named() -> None:
    assert markdown.unclosed("# ok\n```\ncode <!--\n```\n<!-- a --> b\n") == ""
    assert markdown.unclosed("text\n```\ncode\n") == "a code fence"
    assert markdown.unclosed("text <!-- never closed\n") == "an HTML comment"
    assert markdown.unclosed("<!-- never\n\n# closed\n") == "an HTML comment"
    assert markdown.unclosed("<pre>\n\n# never closed\n") == "an HTML block"
    assert markdown.unclosed("<pre>\n# closed</pre>\n<details>\n") == ""


def test_tidy_keeps_code_and_line_breaks() -> None:
    text = "\n\na  \nb \n\n\n\n\nc\t\n```\ncode  \n\n\n\n\nend\n```\nd  \n\n"
    assert markdown.tidy(text) == "a  \nb\n\n\nc\n```\ncode  \n\n\n\n\nend\n```\nd\n"
