"""Templates of a recipe in place of parts of the card: in the sandbox, with file and line of each mistake."""

import json
from pathlib import Path

import pytest

from packager.card import CardTexts, own_template_problems, render_card
from packager.card.own_templates import OwnTemplates
from packager.errors import CardError, PlanError, RecipeError
from packager.pipeline import flow
from packager.pipeline.plan import make_plan
from packager.pipeline.preview import preview_card
from packager.recipe.file import RecipeFile
from packager.system.terminal import Terminal
from tests import card_fixtures as fixtures
from tests import tiny_recipe
from tests.card_page import assert_well_formed
from tests.tiny_recipe import MAIN, Builds

LICENSE = "_license.md.j2"


def page(own: OwnTemplates | None = None) -> str:
    recipe = fixtures.minimal_recipe()
    return render_card(recipe, CardTexts(), fixtures.minimal_receipts(recipe), "llama", "main", own=own)


def own(text: str, name: str = LICENSE) -> OwnTemplates:
    return OwnTemplates(folder="card", texts={name: text})


def test_a_template_stands_in_for_its_part_alone() -> None:
    usual = page()
    changed = page(own("## Terms\n\nOf {{ card.license.id | inline }}, {{ branches | length }} branch.\n"))
    assert_well_formed(changed)
    before, _, after = usual.partition("## Licence\n")
    assert changed.startswith(before + "## Terms\n\nOf apache-2.0, 1 branch.\n")
    assert "## Licence" not in changed
    assert "original model's licence" in after
    assert page() == usual, "what is compiled for one recipe is no other recipe's"


@pytest.mark.parametrize(
    ("line", "where"),
    [
        ("{{ card.titel }}", "card/_license.md.j2:2: .*\n  why: .*titel"),
        ("{{ card.__class__.__mro__ }}", "card/_license.md.j2:2: "),
        ("{{ ''.__class__.__base__.__subclasses__() }}", "card/_license.md.j2:2: "),
        ("{{ recipe.model_copy.__globals__ }}", "card/_license.md.j2:2: "),
        ("{% for i in range(10 ** 9) %}x{% endfor %}", "card/_license.md.j2:2: .*\n  why: Range too big"),
        ('{% include "../recipe.yaml" %}', "a template is missing"),
        ('{% include "/etc/passwd" %}', "a template is missing"),
        ("{{ branches[0].provenance.quality | figure('perplexity') }}", "card/_license.md.j2:2: "),
    ],
)
def test_a_mistake_names_file_and_line_and_the_sandbox_holds(line: str, where: str) -> None:
    with pytest.raises(CardError, match=where):
        page(own(f"## Licence\n{line}\n"))


@pytest.mark.parametrize(
    "text",
    [
        "<script>alert(1)</script>",
        "<div>",
        "```\nnever closed",
        "[a](javascript:alert(1))",
        "hid\u202eden",
        "<form>x</form>",
    ],
)
def test_a_page_that_changes_itself_or_the_browser_is_refused(text: str) -> None:
    with pytest.raises(CardError, match="the recipe's templates make a page that cannot be published"):
        page(own(f"## Licence\n\n{text}\n"))


@pytest.mark.parametrize(
    ("name", "text", "line", "message"),
    [
        (LICENSE, "a\n{% if %}", 2, "Expected an expression"),
        (LICENSE, "x" * 100_001, 0, "more than 100000 characters"),
        ("_licence.md.j2", "", 0, "no part of the card has this name; they are _about.md.j2"),
        ("model_card.md.j2", "", 0, "no part of the card has this name"),
    ],
)
def test_what_is_wrong_is_seen_before_anything_is_rendered(name: str, text: str, line: int, message: str) -> None:
    (found,) = own_template_problems(own(text, name))
    assert (found.name, found.line) == (name, line)
    assert message in found.message


def with_templates(recipe: Path, text: str, name: str = LICENSE, folder: str = "card") -> RecipeFile:
    content = json.loads(recipe.read_text())
    content["card"]["templates"] = folder
    recipe.write_text(json.dumps(content))
    (recipe.parent / "card").mkdir(exist_ok=True)
    (recipe.parent / "card" / name).write_text(text, encoding="utf-8")
    return RecipeFile.load(recipe)


def test_a_recipes_folder_makes_its_cards_and_previews(tmp_path: Path, builds: Builds) -> None:
    recipe, dist = builds.copy(tmp_path), tmp_path / "dist"
    readme = tiny_recipe.workspace(dist).folder(MAIN) / "README.md"
    before = readme.read_text()
    recipe_file = with_templates(recipe, "## Terms\n\nFirst.\n")
    (tmp_path / "card" / "notes.txt").write_text("{% not a template")
    assert "## Terms\n\nFirst.\n" in preview_card(recipe_file, MAIN)
    flow.render(recipe_file, tiny_recipe.options(dist), Terminal(quiet=True), branch=MAIN)
    assert "## Terms\n\nFirst.\n" in readme.read_text()
    tiny_recipe.publish(with_templates(recipe, "## Terms\n\nFirst.\n"), dist)
    content = json.loads(recipe.read_text())
    del content["card"]["templates"]
    recipe.write_text(json.dumps(content))
    flow.render(RecipeFile.load(recipe), tiny_recipe.options(dist), Terminal(quiet=True), branch=MAIN)
    assert readme.read_text() == before


def test_a_malformed_template_is_an_error_of_the_plan(tmp_path: Path, builds: Builds) -> None:
    recipe_file = with_templates(builds.copy(tmp_path), "a\n\n{% endfor %}\n")
    with pytest.raises(PlanError) as caught:
        make_plan(recipe_file)
    assert f"{tmp_path / 'card' / LICENSE}:3: card.templates: " in caught.value.why


@pytest.mark.parametrize("folder", ["nowhere", "recipe.yaml", "../card", "/usr", "link"])
def test_the_folder_is_one_inside_that_of_the_recipe(folder: str, tmp_path: Path, builds: Builds) -> None:
    recipe = builds.copy(tmp_path / "recipe")
    (tmp_path / "outside").mkdir()
    (recipe.parent / "link").symlink_to(tmp_path / "outside")
    with pytest.raises(RecipeError, match=r"card\.templates"):
        with_templates(recipe, "", folder=folder)


def test_a_template_that_leads_out_of_the_folder_is_refused(tmp_path: Path, builds: Builds) -> None:
    recipe_file = with_templates(builds.copy(tmp_path / "recipe"), "")
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "recipe" / "card" / "_webui.md.j2").symlink_to(tmp_path / "secret")
    with pytest.raises(RecipeError, match="_webui"):
        make_plan(recipe_file)
