"""The recipe and the lock that each branch holds: whole, of the digest that its record states, and of no machine."""

from pathlib import Path

import pytest

from packager.receipt import BRANCH_LOCK, BRANCH_RECIPE, PROVENANCE, Provenance
from packager.recipe import Recipe
from packager.recipe.draft import branch_recipe
from packager.recipe.file import RecipeFile, load_recipe
from packager.recipe.lock_file import lock_text, read_recipe_lock
from packager.recipe.parsed_recipe import read
from packager.recipe.yaml import parse
from tests.tiny_recipe import BRANCHES, Builds, workspace, write_all

RECIPES = sorted(Path(__file__).resolve().parents[1].glob("recipes/**/*.yaml"))


def read_back(text: str) -> Recipe:
    root, problems = parse(text)
    assert root is not None
    parsed = read(root)
    assert (problems, parsed.problems) == ([], ())
    assert parsed.recipe is not None
    return parsed.recipe


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipe_of_a_branch_has_the_digest_of_the_recipe(path: Path) -> None:
    recipe = load_recipe(path)
    assert read_back(branch_recipe(recipe)).digest() == recipe.digest()


def test_every_branch_holds_the_recipe_and_its_lock(builds: Builds) -> None:
    folder = builds.built()
    lock = RecipeFile.load(folder / "recipe.yaml").lock
    for branch in BRANCHES:
        built = workspace(folder / "dist").folder(branch)
        made = Provenance.model_validate_json((built / PROVENANCE).read_text())
        assert read_back((built / BRANCH_RECIPE).read_text()).digest() == made.recipe_digest
        assert read_recipe_lock(built / BRANCH_LOCK, folder / "recipe.yaml") == lock
        assert {BRANCH_RECIPE, BRANCH_LOCK} < made.files.keys()


def test_paths_of_the_machine_are_not_published(tmp_path: Path) -> None:
    recipe = load_recipe(write_all(tmp_path))
    repository = recipe.repository.model_copy(update={"target": "git", "url": "file:///home/somebody/models"})
    base_model = recipe.base_model.model_copy(update={"path": "/home/somebody/tiny"})
    recipe = recipe.model_copy(update={"repository": repository, "base_model": base_model})
    text = branch_recipe(recipe)
    assert "somebody" not in text
    assert "path: elsewhere" in text


def test_a_lock_has_the_same_bytes_in_every_branch(builds: Builds) -> None:
    folder = builds.built()
    texts = {(workspace(folder / "dist").folder(branch) / BRANCH_LOCK).read_text() for branch in BRANCHES}
    assert texts == {lock_text(RecipeFile.load(folder / "recipe.yaml").lock)}
