"""A card in a browser at the width that the Hub gives it: no table is too wide, and the first screen has the choice."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from packager.card.choice import CachedContext
from packager.card.hub_page import CARD_WIDTH, hub_page
from packager.recipe import Recipe
from tests import card_fixtures as fixtures
from tests.test_card_figures import render

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
LONG = CachedContext(tokens=32768, cache_bytes=26_843_545_600)
# What a browser's window shows of a page on a display of 1080 lines.
FIRST_SCREEN = 940
# Each table's own width and that of what holds it, and where it ends below the page's top, in pixels.
MEASURE = """<script>
const found = [...document.querySelectorAll("table")].map((table) => [
  table.scrollWidth, table.parentElement.clientWidth, table.rows[0].innerText,
  Math.ceil(table.getBoundingClientRect().bottom + window.scrollY)]);
document.title = JSON.stringify([document.documentElement.scrollWidth, ...found]);
</script>"""


def in_browser(text: str, folder: Path) -> tuple[int, list[tuple[int, int, str, int]]]:
    """Return the page's width, and of each table what `MEASURE` does, with folded parts open."""
    assert BROWSER is not None
    page = hub_page(text, {}).replace("<details>", "<details open>").replace("</body>", f"{MEASURE}</body>")
    page = page.replace("style-src", "script-src 'unsafe-inline'; style-src")
    (folder / "card.html").write_text(page, encoding="utf-8")
    command = [BROWSER, "--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={CARD_WIDTH},1200"]
    address = (folder / "card.html").as_uri()
    shown = subprocess.run([*command, "--dump-dom", address], capture_output=True, text=True, check=True).stdout
    (title,) = re.findall(r"<title>(.*?)</title>", shown, re.DOTALL)
    width, *tables = json.loads(title.replace("&amp;", "&"))
    return width, [tuple(each) for each in tables]


def widest_recipe() -> Recipe:
    """Return a recipe with the longest of the branch names that recipes make themselves."""
    recipe = fixtures.llama_recipe().model_dump()
    recipe["variants"] = (
        {"branch": "main"},
        {"group_size": 128, "desc_act": True, "bits": 8},
        {"group_size": 1024, "act_order": "static"},
        {"group_size": 128, "act_order": "group"},
    )
    return Recipe.model_validate(recipe)


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is on the PATH")
@pytest.mark.parametrize("branch", ["main", "gptq-4bit-1024g-actorder_static"])
def test_no_table_is_wider_than_the_hubs_page(branch: str, tmp_path: Path) -> None:
    recipe = widest_recipe()
    made = fixtures.llama_receipts(fixtures.llama_recipe())
    receipts = [
        receipt.model_copy(update={"branch": variant.branch, "parameters": variant.parameters()})
        for receipt, variant in zip(made, recipe.expanded_variants(), strict=True)
    ]
    text = render(recipe, receipts, branch, contexts=(*fixtures.LLAMA_CONTEXTS, LONG))
    width, tables = in_browser(text, tmp_path)
    (chosen,) = [heading for _, _, heading, _ in tables if "Proven in" in heading]
    assert "VRAM at 4k / 32k, GB" in re.sub(r"\s+", " ", chosen)
    assert len(tables) >= 5
    assert [(heading, own, room) for own, room, heading, _ in tables if own > room] == []
    assert width <= CARD_WIDTH


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is on the PATH")
def test_a_table_that_is_too_wide_is_found(tmp_path: Path) -> None:
    row = "| " + " | ".join(["`a_name_that_no_browser_breaks`"] * 5) + " |"
    _, tables = in_browser("\n".join([row, "| ---" * 5 + " |", row]), tmp_path)
    assert [own > room for own, room, *_ in tables] == [True]


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="neither chromium nor google-chrome is on the PATH")
def test_the_choice_is_in_the_first_screen(tmp_path: Path) -> None:
    """The tallest choice of the fixtures: five sizes of cards, the CPU, three questions."""
    recipe = fixtures.llama_recipe()
    text = render(
        recipe,
        fixtures.llama_receipts(recipe),
        "gptq-4bit-64g-actorder_True",
        contexts=(*fixtures.LLAMA_CONTEXTS, CachedContext(tokens=32768, cache_bytes=15_200_000_000)),
        expectations=fixtures.llama_expectations(recipe),
    )
    _, tables = in_browser(text, tmp_path)
    _, _, heading, end = tables[0]
    assert "Best quality" in heading
    assert end <= FIRST_SCREEN
