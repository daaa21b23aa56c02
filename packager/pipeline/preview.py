"""The card of a recipe before anything is built: sizes as planned, everything else marked as not measured and not run.

It is a page to look at, not a README.md, and it lies outside the folders that `publish` reads: no preview is published.
No torch, no network.
"""

from pathlib import Path

from packager.card.hub_page import hub_page
from packager.errors import RecipeError
from packager.pipeline.card_texts import read_own_templates
from packager.pipeline.plan import make_plan
from packager.pipeline.predicted_card import PredictedCards
from packager.recipe.file import RecipeFile
from packager.system.files import write_atomic


def write_preview(recipe_file: RecipeFile, dist: Path, branch: str) -> Path:
    """Write the preview of a branch's card as an HTML page, and return where it is.

    Raises:
        RecipeError: there is no such branch.
        PlanError: the recipe cannot be built.
        CardError: the card cannot be rendered.
        MachineError: the output folder cannot be written.
    """
    path = dist / "previews" / recipe_file.recipe.repository.id / f"{branch}.html"
    page = hub_page(preview_card(recipe_file, branch), {})
    write_atomic(path, page.encode())
    return path


def preview_card(recipe_file: RecipeFile, branch: str) -> str:
    """Return the card of a branch as far as it is known before a build; raises as `write_preview`."""
    plan = make_plan(recipe_file)
    branches = [variant_plan.variant.branch for variant_plan in plan.variants]
    if branch not in branches:
        raise RecipeError(f"the recipe has no branch {branch!r}", hint=f"it has {', '.join(branches)}")
    cards = PredictedCards(recipe_file=recipe_file, architecture=plan.architecture, variants=plan.variants)
    return cards.page(branch, read_own_templates(recipe_file))
