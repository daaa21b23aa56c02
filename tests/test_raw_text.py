"""Texts that a card includes as they are: what is refused, and that what is accepted changes nothing around it."""

import random
import time
from dataclasses import replace
from pathlib import Path

import pytest

from packager.card import CardTexts, render_card
from packager.card.raw_text import MAX_CHARACTERS, text_problems
from packager.errors import CardError, PlanError
from packager.pipeline.plan import make_plan
from packager.recipe.file import RecipeFile
from packager.system.text import HIDDEN, reveal
from tests import card_fixtures as fixtures
from tests.card_page import structure
from tests.recipe_fixtures import edited, write_files
from tests.samples import sampled

NAMES = ("header", "footer", "original_card")
OPEN = {
    **{
        f"block {start}": start
        for start in ("<script>", "<style>", "<pre>", "<textarea>", "<?x", "<![CDATA[", "<!X", "<!--")
    },
    **{f"upper {start}": start.upper() for start in ("<script>", "<style>", "<pre>", "<textarea>")},
    **{f"indented {start}": f"   {start}\n\nmore" for start in ("<script src=x>", "<pre>", "<?php", "<!DOCTYPE")},
    **{f"in a quote {tag}": f"> <{tag}>\n" for tag in ("script", "pre", "textarea", "details")},
    **{f"in a list {tag}": f"* <{tag}>\n" for tag in ("script", "style", "table", "div hidden")},
    **{
        f"inline {tag}": f"words <{tag}> words"
        for tag in ("script", "textarea", "details", "b", "a href='#x'", "select")
    },
    "details": "<details>\n<summary>more</summary>\n\nwords\n",
    "hidden": "<div hidden>\n\nwords\n",
    "styled": '<div style="display:none">\n',
    "crossed": "<div><details></div><details>",
    "not closed by a slash": "<details/>",
    "fence": "```\ncode",
    "tildes": "~~~ python\ncode\n```\n",
    "a tag over a blank line": "<div\n\ntitle='x'>\n</div>",
    "an attribute that does not end": '<div title="x>\n\n</div>',
    "a comment in a block": "<div>\n<!-- a\n\nb -->\n</div>",
    "plaintext": "words <plaintext>",
    "xmp": "<xmp></xmp>",
    "iframe": "<iframe src='https://example.org'></iframe>",
    "base": "<base href='https://example.org'>",
    "refresh": "<meta http-equiv=refresh content='0;url=https://example.org'>",
    "a closed script": "<script>1</script>",
    "a form": "<form action=https://example.org><input></form>",
}
SCRIPT_ADDRESSES = (
    "javascript:x", "JaVaScRiPt:x", "java&#115;cript:x", "javascript&colon;x", "vbscript:x", "data:text/html,x",
    "file:///etc/passwd", "ftp://example.org", "blob:x", "ms-settings:x", "data:image/png;base64,AA==", "view-source:x",
)  # fmt: skip
LINKS = {
    "link": "[words]({})",
    "link in brackets": "[words](<{}>)",
    "image": "![words]({})",
    "reference": "[words][r]\n\n[r]: {}",
    "unused reference": "words\n\n[r]: {}",
    "anchor": '<a href="{}">words</a>',
    "anchor in a block": "<div>\n<a\nhref='{}'>words</a></div>",
    "picture": "<img src='{}'>",
    "button": "<button formaction='{}'>words</button>",
}
HIDDEN_CHARACTERS = {
    "zero width space": "a\u200bb",
    "word joiner": "a\u2060b",
    "a joiner in Latin": "a\u200db",
    "a joiner at the end": "\u0645\u200c",
    "tags": "\U000e0041\U000e0042",
    "right-to-left override": "\u202eabc",
    "isolate": "\u2067a\u2069",
    "right-to-left mark": "\u200f",
    "byte order mark": "a\ufeffb",
    "private use": "\ue000",
    "far private use": "\U00100000",
    "a second variation selector": "\u2764\ufe0f\ufe0f",
    "a selector after a letter": "a\ufe0f",
    "selector 1": "\ufe00",
    "selector 17": "\U000e0100",
    "Hangul filler": "\u3164",
    "soft hyphen": "a\xadb",
    "Braille blank": "\u2800",
    "line separator": "a\u2028b",
    "escape": "\x1b[2J",
    "null": "\0",
    "grapheme joiner": "a\u034fb",
    "annotation": "\ufff9a\ufffa",
    "noncharacter": "\ufdd0",
    "Mongolian selector": "\u180b",
    "musical": "\U0001d173",
}
REFUSED = {
    **OPEN,
    **{f"{name}: {url}": form.format(url) for name, form in LINKS.items() for url in SCRIPT_ADDRESSES},
    **HIDDEN_CHARACTERS,
    "handler": "<img src=x onerror=alert(1)>",
    "handler in capitals": "<p ONCLICK='x'>words</p>",
    "too long": "x" * (MAX_CHARACTERS + 1),
}
GOOD = (
    "words",
    "# heading\n\n* a\n* b",
    '<p align="center"><a href="https://example.org">words &amp; words</a></p>\n<hr>',
    "<details>\n<summary>more</summary>\n\n```sh\nls\n```\n\n</details>",
    "[a](#b) [c](d/e.md) [f](mailto:a@example.org)",
    "<https://example.org>",
    "`<script>` and `javascript:x`",
    "```html\n<pre>\n<details>\n```",
    "    <textarea>",
    "\\<div>",
    "<!-- words -->",
    "a < b > c",
    "| a | b |\n| - | - |\n| <br> | <b>x</b> |",
    "<svg>" + "<path d='M0 0'/>" * 150 + "</svg>",
    "1. a\n\n   b",
    "\u2764\ufe0f \U0001f468\u200d\U0001f469\u200d\U0001f467 1\ufe0f\u20e3",
    "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645",
    "<p>one\n<p>two",
    "<table><tr><td>a<td>b</table>",
    "> a quote\n> <b>c</b>",
    "Title\n===",
    "words\n\n---",
    "</div>",
)


def card(**texts: str) -> str:
    recipe = fixtures.minimal_recipe()
    return render_card(recipe, CardTexts(**texts), fixtures.minimal_receipts(recipe), "llama", "main")


@pytest.mark.parametrize("text", REFUSED.values(), ids=[name[:40] for name in REFUSED])
def test_a_hostile_text_is_refused_wherever_it_stands(text: str) -> None:
    for name in NAMES:
        for words in (text, f"good words\n\n{text}"):
            with pytest.raises(CardError, match=rf"card\.{name}, line \d+: "):
                card(**{name: words})


def test_there_are_enough_hostile_texts() -> None:
    assert len(REFUSED) * len(NAMES) * 2 > 1000


@pytest.mark.parametrize("text", GOOD)
def test_a_good_text_is_accepted_and_changes_nothing_around_it(text: str) -> None:
    assert text_problems(text) == ()
    added = [structure(f"---\n---\n{text}\n")] if text.strip() else []
    for name in ("header", "footer"):
        assert sorted(structure(card(**{name: text}))) == sorted([*structure(card()), *added[0]])


@pytest.mark.slow
def test_what_is_accepted_changes_nothing_around_it() -> None:
    # 600 texts put together from good and bad pieces: the parser's tokens are the oracle.
    draw = random.Random(11)
    pieces = [
        *GOOD,
        *OPEN.values(),
        "-->",
        "</pre>",
        "</script>",
        "</details>",
        "```",
        "]]>",
        "?>",
        ">",
        "\n",
        "> ",
        "* ",
    ]
    plain, accepted = structure(card()), 0
    for _ in range(600):
        text = draw.choice(("\n", "\n\n", "", " ")).join(draw.choices(pieces, k=draw.randint(1, 4)))
        if text_problems(text):
            continue
        accepted += 1
        assert structure(card(header=text))[-len(plain) :] == plain, text
    assert accepted > 50


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\n\nb\n<script>\nc", None),
        ("a\nb <b>\nc\n", 2),
        ("a\n\n\n<div>\n<a href=javascript:x>\n</a></div>", 5),
        ("a\n\n* b\n* c\n  [d](data:x)\n", 5),
        ("a\n\n[r]: file:///x\n", 3),
        ("a\nb\n\u200b", 3),
        ("a\n\n<pre>\nb\n", 3),
        ("a\n\n```\nb\n", 3),
        ("a\n\nb <!-- c\n", 3),
    ],
)
def test_a_problem_names_its_line(text: str, line: int | None) -> None:
    problem = text_problems(text)[0]
    assert problem.line == (line or 4)
    assert problem.hint


def test_front_matter_of_the_original_card_counts_as_lines_and_is_not_judged() -> None:
    front = "---\nlicense: mit\nlink: <details>\n---\n"
    assert card(original_card=f"{front}words")
    with pytest.raises(CardError, match=r"card\.original_card, line 5: "):
        card(original_card=f"{front}<pre>")


@pytest.mark.slow
@pytest.mark.parametrize(
    "piece", ["[", "![a](", "<a ", "`a``b", "*a _b", "> ", "<!--", "&amp;", "<b>", "</b>", "[a](b"]
)
def test_a_text_is_judged_within_seconds(piece: str) -> None:
    started = time.monotonic()
    text_problems(piece * (MAX_CHARACTERS // len(piece)))
    assert time.monotonic() - started < 45


SLOTS = ("title", "creator", "quantized_by", "system_prompt", "example_prompt")


@pytest.mark.parametrize(
    "text", sampled(HIDDEN_CHARACTERS.values(), *list(HIDDEN_CHARACTERS.values())[::5]), ids=HIDDEN_CHARACTERS
)
def test_hidden_characters_of_recipes_and_receipts_are_shown(text: str) -> None:
    usual = structure(card())
    for slot in SLOTS:
        recipe = fixtures.minimal_recipe()
        changed = recipe.model_copy(update={"card": recipe.card.model_copy(update={slot: text})})
        page = render_card(changed, CardTexts(), fixtures.minimal_receipts(recipe), "llama", "main")
        assert not HIDDEN.search(page), slot
        assert structure(page) == usual
    recipe = fixtures.minimal_recipe(prompt_template={"name": "Plain", "template": f"{text}{{prompt}}{text}"})
    page = render_card(recipe, CardTexts(), fixtures.minimal_receipts(recipe), "llama", "main")
    assert not HIDDEN.search(page)
    assert structure(page) == usual
    for slot in ("made_with", "device"):
        recipe = fixtures.minimal_recipe()
        receipts = [receipt.model_copy(update={slot: text}) for receipt in fixtures.minimal_receipts(recipe)]
        page = render_card(recipe, CardTexts(), receipts, "llama", "main")
        assert not HIDDEN.search(page), slot
        assert structure(page) == usual
    assert reveal(text).isprintable() or "\n" in text


@pytest.mark.parametrize("text", ["<details>", "a\u200bb", "[a](javascript:b)"])
def test_a_plan_refuses_a_text_with_its_file_and_line(tmp_path: Path, text: str) -> None:
    write_files(tmp_path)
    (tmp_path / "recipe.yaml").write_text(edited(("  title: Demo", "  header: header.md\n  title: Demo")))
    (tmp_path / "header.md").write_text(f"good\n\n{text}\n", encoding="utf-8")
    recipe_file = RecipeFile.load(tmp_path / "recipe.yaml")
    with pytest.raises(PlanError) as raised:
        make_plan(recipe_file)
    assert f"{tmp_path}/header.md:3: card.header: " in str(raised.value)
    (tmp_path / "header.md").write_bytes("\ufeffgood\r\n".encode())
    assert make_plan(replace(recipe_file))


@pytest.mark.parametrize(
    "text",
    ["{{ model }}", "{% if a %}", "run huggingface-cli login", "```python\nprint(\n```", "set trust_remote_code=True",
     "read /home/anna/notes", "copy it to anna@nas:/srv", "log in with hf_abcdefghijklmnopqrstuvwx"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["header", "footer", "original_card"])
def test_a_plan_refuses_what_the_audit_of_the_finished_card_will(tmp_path: Path, name: str, text: str) -> None:
    """After the build it would be too late."""
    write_files(tmp_path)
    (tmp_path / "recipe.yaml").write_text(edited(("  title: Demo", f"  {name}: text.md\n  title: Demo")))
    front = "---\nlicense: mit\n---\n" if name == "original_card" else ""
    (tmp_path / "text.md").write_text(f"{front}good\n\n{text}\n")
    recipe_file = RecipeFile.load(tmp_path / "recipe.yaml")
    with pytest.raises(PlanError) as raised:
        make_plan(recipe_file)
    assert f"{tmp_path}/text.md:{6 if front else 3}: card.{name}: " in str(raised.value)
    (tmp_path / "text.md").write_text(f"{front}good\n\n`{{{{ model }}}}` and\n\n    {{% if a %}}\n")
    assert make_plan(recipe_file)


@pytest.mark.parametrize(
    ("old", "new", "place"),
    [
        ("  title: Demo", "  title: Demo {{ model }}", "card.title"),
        ("  title: Demo", "  title: Demo\n  system_prompt: '{{ a }}'\n  example_prompt: '{{ b }}'", ""),
        ("{name: plain,", "{name: 'copy to anna@nas:/srv',", "card.prompt_template.name"),
        ("  title: Demo", "  title: Demo\n  related_repositories:\n  - {title: see huggingface-cli, url: 'https://a.org'}",
         "card.related_repositories[0].title"),
        ("  - branch: main", "  - description: of /home/anna/notes\n    branch: main", "variants[0].description"),
    ],
)  # fmt: skip
def test_a_plan_refuses_words_of_the_recipe_that_the_audit_of_the_finished_card_will(
    tmp_path: Path, old: str, new: str, place: str
) -> None:
    write_files(tmp_path)
    (tmp_path / "recipe.yaml").write_text(edited((old, new)))
    recipe_file = RecipeFile.load(tmp_path / "recipe.yaml")
    if not place:
        assert make_plan(recipe_file), "the card shows prompts as code"
        return
    with pytest.raises(PlanError) as raised:
        make_plan(recipe_file)
    assert f"{tmp_path}/recipe.yaml: {place}: " in str(raised.value)


def test_a_huge_text_is_read_in_part(tmp_path: Path) -> None:
    write_files(tmp_path)
    (tmp_path / "recipe.yaml").write_text(edited(("  title: Demo", "  footer: footer.md\n  title: Demo")))
    with (tmp_path / "footer.md").open("wb") as stream:
        stream.truncate(10**10)
    with pytest.raises(PlanError, match="characters are too many"):
        make_plan(RecipeFile.load(tmp_path / "recipe.yaml"))
