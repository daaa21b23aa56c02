"""A base model on another disk: its path is information about one machine, and no output holds it."""

import shutil
from pathlib import Path

import pytest

from packager.errors import RecipeError
from packager.inputs.base_model import open_source
from packager.pipeline.lock_recipes import lock_recipes
from packager.pipeline.plan import make_plan
from packager.recipe.file import RecipeFile, load_recipe
from tests.tiny_recipe import build, publish, write_inputs, write_recipe

ONE = {"variants": [{"branch": "main"}]}


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder with a base model, beside the recipe's folder."""
    write_inputs(tmp_path / "recipe")
    (tmp_path / "a-disk-of-mine").mkdir()
    shutil.move(tmp_path / "recipe" / "model", tmp_path / "a-disk-of-mine" / "llama")
    return tmp_path / "a-disk-of-mine"


def recipe_of(disk: Path, path: str, *, name: str = "recipe.yaml") -> Path:
    recipe = write_recipe(disk.parent / "recipe", {**ONE, "base_model.path": path}, name=name)
    list(lock_recipes([recipe], print))
    return recipe


@pytest.mark.slow
@pytest.mark.parametrize("form", ["absolute", "home"])
def test_no_output_of_a_build_and_a_release_holds_the_path(
    disk: Path, in_process: None, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(disk))
    recipe = recipe_of(disk, str(disk / "llama") if form == "absolute" else "~/llama")
    dist = disk.parent / "dist"
    build(recipe, dist)
    publish(recipe, dist)
    lock = recipe.with_name("recipe.lock.json")
    files = [lock, *(path for path in dist.rglob("*") if path.is_file())]
    assert any(path.name == "provenance.json" for path in files)
    assert any(path.name == "README.md" for path in files)
    for path in files:
        data = path.read_bytes()
        for word in (b"a-disk-of-mine", b"~/llama"):
            assert word not in data, path


@pytest.mark.slow
def test_the_path_changes_no_digest_that_is_published(disk: Path, in_process: None) -> None:
    here = recipe_of(disk, str(disk / "llama"))
    other = disk.parent / "another-disk"
    shutil.copytree(disk, other)
    there = recipe_of(disk, str(other / "llama"), name="there.yaml")
    plans = [make_plan(RecipeFile.load(recipe)) for recipe in (here, there)]
    assert plans[0].variants[0].digest == plans[1].variants[0].digest
    assert len({load_recipe(recipe).digest() for recipe in (here, there)}) == 1


@pytest.mark.slow
def test_a_snapshot_of_the_hub_s_cache_may_be_the_folder(disk: Path, in_process: None) -> None:
    model = disk / "hub" / "models--tester--tiny"
    snapshot, blobs = model / "snapshots" / ("0" * 40), model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in (disk / "llama").iterdir():
        shutil.move(path, blobs / path.name)
        (snapshot / path.name).symlink_to(blobs / path.name)
    recipe = recipe_of(disk, str(snapshot))
    assert open_source(RecipeFile.load(recipe), print).tensors


@pytest.mark.parametrize(
    ("path", "problem"),
    [
        ("/no/such/folder", "there is no folder '/no/such/folder'"),
        ("~/no-such-folder-at-home", "there is no folder '~/no-such-folder-at-home'"),
        ("/srv/../etc", "without '..'"),
        ("~root/model", "absolute, or begin with ~/"),
        ("../model", "absolute, or begin with ~/"),
    ],
)
def test_a_folder_that_cannot_be_used_is_named_with_the_way_out(tmp_path: Path, path: str, problem: str) -> None:
    write_inputs(tmp_path)
    recipe = write_recipe(tmp_path, {**ONE, "base_model.path": path})
    with pytest.raises(RecipeError) as caught:
        load_recipe(recipe)
    (found,) = caught.value.problems
    assert problem in found.message
    assert f"{recipe}:" in found.where


@pytest.mark.parametrize("key", ["calibration.path", "evaluation.path"])
def test_texts_stay_in_the_recipe_s_folder(tmp_path: Path, key: str) -> None:
    write_inputs(tmp_path)
    recipe = write_recipe(tmp_path, {**ONE, key: str(tmp_path / "calibration.txt")})
    with pytest.raises(RecipeError, match="relative to the recipe's folder"):
        load_recipe(recipe)
