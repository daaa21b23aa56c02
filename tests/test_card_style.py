"""The late-2023 style of the card, the banner of either style, and the creator for the Hub's filters."""

import re
from typing import Any

import pytest

from packager.card import render_card
from packager.card.metadata import metadata
from packager.recipe import Recipe
from tests import card_fixtures as fixtures
from tests.card_page import assert_well_formed, front_matter, headings, tables
from tests.golden_files import check_golden
from tests.test_card import ACT_ORDER, FIXTURE_TEXTS

BANNER = {
    "image": "https://example.org/banner.jpg",
    "alt": "The fixture's name in letters of fire",
    "links": (
        {"title": "Chat & support", "url": "https://example.org/chat"},
        {"title": "Want to contribute?", "url": "https://example.org/give"},
    ),
}
HOSTILE = "\"><script>alert(1)</script> onerror=x' </a></p> *bold* [a](b)"


def page(branch: str = "main", **card: Any) -> str:
    recipe = fixtures.llama_recipe(**card)
    expectations = fixtures.llama_expectations(recipe)
    return render_card(
        recipe, FIXTURE_TEXTS, fixtures.llama_receipts(recipe), "llama", branch,
        expectations=expectations, contexts=fixtures.LLAMA_CONTEXTS,
    )  # fmt: skip


@pytest.mark.parametrize("branch", ["main", ACT_ORDER])
def test_the_late_2023_page(branch: str, update_golden: bool) -> None:
    text = page(branch, style="late-2023", banner=BANNER)
    assert_well_formed(text)
    if branch == "main":
        check_golden("cards/fixture_late_2023.md", text, update=update_golden)


def test_its_order_is_that_of_the_time() -> None:
    wanted = [
        *("Description", "Repositories available", "Prompt template: Llama-2-Chat", "Provided files"),
        *("How to download from branches", "How to use this GPTQ model from Python code", "Compatibility", "Licence"),
    ]
    assert [title for title in headings(page(style="late-2023")) if title in wanted] == wanted


def test_both_styles_say_the_same_of_the_files() -> None:
    plain, late = page(), page(style="late-2023")
    assert tables(late) == sorted(tables(plain), key=[*tables(late)].index)
    assert set(headings(plain)) - set(headings(late)) == {"Meta's Llama 2 13B-chat GPTQ"}
    assert front_matter(plain) == front_matter(late)


def test_every_mark_has_its_end() -> None:
    marks = re.findall(r"<!-- ([\w.-]+) (start|end) -->", page(style="late-2023"))
    assert [edge for _, edge in marks] == ["start", "end"] * (len(marks) // 2)
    assert [name for name, edge in marks if edge == "start"] == [name for name, edge in marks if edge == "end"]
    assert {"description", "repositories-available", "README_GPTQ.md-provided-files", "footer"} < {
        name for name, _ in marks
    }


@pytest.mark.parametrize("style", ["plain", "late-2023"])
def test_a_banner_is_above_the_title_and_its_links_are_centred(style: str) -> None:
    text = page(style=style, banner=BANNER)
    top = text[: text.index("\n# ")]
    assert '<img src="https://example.org/banner.jpg"' in top
    assert top.count('<p align="center">') == 2 + FIXTURE_TEXTS.header.count('<p align="center">')
    assert '<a href="https://example.org/chat">Chat &amp; support</a> &nbsp;|&nbsp;' in top


def test_the_words_of_a_banner_are_only_words() -> None:
    banner = {**BANNER, "alt": HOSTILE, "links": ({"title": HOSTILE, "url": "https://example.org/a"},)}
    text = page(banner=banner)
    assert_well_formed(text)
    top = text[: text.index("\n# ")]
    assert "<script" not in top
    assert top.count("<a ") == 1 + FIXTURE_TEXTS.header.count("<a ")


@pytest.mark.parametrize(
    ("creator", "tag"),
    [
        ("Meta", "meta"),
        ("Mistral AI_", "mistral-ai"),
        ("01.AI", "01-ai"),
        ("智谱", None),
        ("HF & friends, Inc.", "hf-friends-inc"),
    ],
)
def test_the_creator_is_a_name_and_a_tag(creator: str, tag: str | None) -> None:
    recipe = fixtures.minimal_recipe(creator=creator, tags=("llama",))
    fields = metadata(recipe, fixtures.minimal_receipts(fixtures.minimal_recipe()), "llama")
    assert (fields["model_creator"], fields["model_name"]) == (creator, "Tiny")
    assert fields["tags"] == ["gptq", "4-bit", "llama", *([tag] if tag else [])]


def test_a_style_changes_the_digest_and_the_plain_one_does_not() -> None:
    plain = fixtures.llama_recipe()
    assert fixtures.llama_recipe(style="plain").digest() == plain.digest()
    others = {fixtures.llama_recipe(**card).digest() for card in ({"style": "late-2023"}, {"banner": BANNER})}
    assert len(others - {plain.digest()}) == 2
    assert isinstance(plain, Recipe)
