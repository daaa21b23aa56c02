"""A recipe that extends a file: what it inherits, where mistakes are reported, and what is built again."""

import json
import os
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from packager.errors import PlanError, RecipeError
from packager.pipeline.plan import chosen_variants, make_plan
from packager.pipeline.stage_keys import stage_keys
from packager.recipe import Recipe
from packager.recipe.file import RecipeFile, extended_files, load_recipe
from packager.recipe.schema import recipe_schema
from packager.recipe.yaml import MAX_BYTES, MAX_NODES
from tests import tiny_recipe
from tests.recipe_fixtures import GOOD, load_or_error, write_files

COMMON = """\
schema_version: 1
evaluation:
  path: evaluation.txt
  questions: questions.jsonl
defaults:
  bits: 4
variants:
  - branch: main
    group_size: 128
  - {group_size: 32, desc_act: true}
loaders:
  required: [autogptq]
  if_available: [transformers]
card:
  creator: demo
  quantized_by: demo
  license: {id: mit}
  prompt_template: {name: plain, template: "{prompt}"}
"""
OWN = """\
schema_version: 1
extends: defaults.yaml
repository: {id: demo/demo-GPTQ}
base_model: {id: demo/demo, path: model}
calibration: {path: calibration.txt}
card: {title: Demo}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_files(tmp_path / "recipes")
    return tmp_path / "recipes"


def load(folder: Path, own: str = OWN, common: str | bytes = COMMON, **options: Any) -> Recipe:
    (folder / "recipe.yaml").write_text(own)
    (folder / "defaults.yaml").write_bytes(common.encode() if isinstance(common, str) else common)
    return RecipeFile.load(folder / "recipe.yaml", **options).recipe


def problems(folder: Path, own: str = OWN, common: str | bytes = COMMON, **options: Any) -> list[str]:
    with pytest.raises(RecipeError) as raised:
        load(folder, own, common, **options)
    return [str(problem).replace(f"{folder}/", "") for problem in raised.value.problems]


def changed(text: str, *edits: tuple[str, str]) -> str:
    for old, new in edits:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    return text


def test_a_recipe_with_what_it_inherits_is_the_recipe_written_whole(folder: Path) -> None:
    whole = folder / "whole.yaml"
    whole.write_text(GOOD)
    (folder / "whole.lock.json").write_bytes((folder / "recipe.lock.json").read_bytes())
    assert load(folder) == RecipeFile.load(whole).recipe
    assert load(folder).digest() == RecipeFile.load(whole).recipe.digest()


def test_no_digest_depends_on_the_key_itself(folder: Path) -> None:
    recipe = load(folder)
    assert "extends" in Recipe.model_fields
    assert "extends" not in recipe.model_dump()


def test_what_a_section_of_the_other_file_lacks_is_missing_in_the_recipe(folder: Path) -> None:
    own = changed(OWN, ("card: {title: Demo}\n", ""))
    (found,) = problems(folder, own)
    assert found.startswith("recipe.yaml:1:1: card.title is missing")
    (found,) = problems(folder, own, changed(COMMON, ("  license: {id: mit}\n", "  title: Demo\n  license: {}\n")))
    assert found.startswith("defaults.yaml:18:3: card.license.id is missing")


def test_the_resolved_recipe_is_a_recipe_of_the_same_digest(folder: Path) -> None:
    from packager.cli.plan_view import resolved_json, resolved_text

    recipe = load(folder)
    text = resolved_text(recipe)
    assert "extends" not in text
    for content in (text, json.dumps(resolved_json(recipe))):
        (folder / "recipe.yaml").write_text(content)
        assert RecipeFile.load(folder / "recipe.yaml").recipe.digest() == recipe.digest()


@pytest.mark.parametrize(
    ("own", "common", "expected"),
    [
        # sections key by key
        ("loaders: {num_rows: 2}", (), {"loaders.num_rows": 2, "loaders.required": ("autogptq",)}),
        # lists whole
        ("loaders: {required: [transformers], if_available: []}", (), {"loaders.required": ("transformers",)}),
        # values inside of sections whole: no licence file of another licence
        (
            "",
            ("license: {id: mit}", "license: {id: apache-2.0, link: 'https://example.org/x'}"),
            {"card.license.id": "apache-2.0", "card.license.link": "https://example.org/x"},
        ),
        (
            "license",
            ("license: {id: mit}", "license: {id: apache-2.0, link: 'https://example.org/x'}"),
            {"card.license.id": "mit", "card.license.link": None},
        ),
        # null is a value
        ("evaluation: {questions: null}", (), {"evaluation.questions": None, "evaluation.path": "evaluation.txt"}),
        # what names one thing is inherited together or not at all
        (
            "evaluation: {dataset: a/b, revision: main, split: test}",
            (),
            {"evaluation.path": None, "evaluation.questions": "questions.jsonl"},
        ),
        (
            "defaults: {desc_act: true}",
            ("  bits: 4", "  bits: 4\n  act_order: group"),
            {"defaults.act_order": None, "defaults.bits": 4},
        ),
    ],
)
def test_sections_are_merged_key_by_key_and_values_are_not(
    folder: Path, own: str, common: tuple[str, ...], expected: dict[str, object]
) -> None:
    text = changed(OWN, ("{title: Demo}", "{title: Demo, license: {id: mit}}")) if own == "license" else OWN + own
    (folder / "recipe.yaml").write_text(text)
    (folder / "defaults.yaml").write_text(changed(COMMON, (common[0], common[1])) if common else COMMON)
    recipe = load_recipe(folder / "recipe.yaml")
    assert {key: value_at(recipe, key) for key in expected} == expected


def value_at(recipe: Recipe, key: str) -> object:
    found: Any = recipe
    for step in key.split("."):
        found = found[int(step)] if step.isdigit() else getattr(found, step)
    return found


@pytest.mark.parametrize(
    ("own", "common", "expected"),
    [
        # where the value stands
        ("", ("bits: 4", "bits: 5"), ["defaults.yaml:6:9: defaults.bits must be 2, 3, 4 or 8, got the number 5"]),
        (
            "",
            ("creator: demo", "creater: demo"),
            [
                "recipe.yaml:6:1: card.creator is missing (who made the base model)",
                "defaults.yaml:15:3: unknown key 'creater' in card (did you mean 'creator'?)",
            ],
        ),
        # also where the recipe has another value in its place
        (
            "defaults: {bits: 3}",
            ("bits: 4", "bits: 5"),
            ["defaults.yaml:6:9: defaults.bits must be 2, 3, 4 or 8, got the number 5"],
        ),
        ("evaluation: {path: nope}", ("x", "x"), ["recipe.yaml:7:20: evaluation.path: there is no file 'nope' in the"]),
        (
            "",
            ("required: [autogptq]", "required: [autogptq, autogptq]"),
            ["defaults.yaml:12:24: the loader 'autogptq'"],
        ),
        ("", ("schema_version: 1", "schema_version: 2"), ["defaults.yaml:1:17: schema_version 2 is not known"]),
        ("", ("schema_version: 1\n", ""), ["defaults.yaml:1:1: schema_version is missing"]),
        (
            "",
            ("schema_version: 1", "schema_version: 1\nextends: more.yaml"),
            ["defaults.yaml:2:1: unknown key 'extends' (one level: a file that recipes extend gives its values"],
        ),
        ("", ("creator: demo", "creator: *demo"), ["defaults.yaml:15:12: the alias *demo is refused"]),
        (
            "",
            ("creator: demo", "<<: {a: 1}"),
            ["recipe.yaml:6:1: card.creator is missing", "defaults.yaml:15:3: merge"],
        ),
        ("", ("creator: demo", "creator: [" + "[" * 20), ["defaults.yaml:15:26: values are nested more than 16"]),
    ],
)
def test_a_mistake_is_reported_in_the_file_that_has_it(
    folder: Path, own: str, common: tuple[str, str], expected: list[str]
) -> None:
    text = COMMON if common == ("x", "x") else changed(COMMON, common)
    found = problems(folder, OWN + own, text)
    assert len(found) == len(expected), found
    for problem, start in zip(found, expected, strict=True):
        assert problem.startswith(start), found


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"text",
        b"- a",
        b"a: &a [*a]",
        b"\xff",
        b"#" * (MAX_BYTES + 1),
        b"- a\n" * (MAX_NODES + 1),
        b"a: " + b"[" * 999,
    ],
)
def test_a_file_that_is_no_mapping_of_plain_yaml_is_refused(folder: Path, content: bytes) -> None:
    found = problems(folder, common=content)
    assert any(problem.startswith("defaults.yaml:") for problem in found)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("../defaults.yaml", "must be a file name without a folder, got the text '../defaults.yaml'"),
        ("/etc/passwd", "must be a file name without a folder"),
        ("[a]", "must be a file name without a folder, got a list"),
        ("12", "must be a file name without a folder, got the number 12"),
        ("default.yaml", ": there is no file 'default.yaml' in the recipe's folder (did you mean 'defaults.yaml'?)"),
        ("model", ": 'model' is not a file"),
        ("outside.yaml", ": 'outside.yaml' leaves the recipe's folder through a symbolic link"),
        ("pipe.yaml", ": 'pipe.yaml' is not a file"),
    ],
)
def test_a_file_that_cannot_be_extended_is_one_problem(folder: Path, name: str, expected: str) -> None:
    (folder.parent / "outside").write_text(COMMON)
    (folder / "outside.yaml").symlink_to(folder.parent / "outside")
    os.mkfifo(folder / "pipe.yaml")
    (found,) = problems(folder, changed(OWN, ("extends: defaults.yaml", f"extends: {name}")))
    assert found.startswith(f"recipe.yaml:2:10: extends{expected if expected[0] == ':' else ' ' + expected}")


def test_a_link_in_the_same_folder_is_read(folder: Path) -> None:
    load(folder)
    (folder / "linked.yaml").symlink_to("defaults.yaml")
    assert load(folder, changed(OWN, ("defaults.yaml", "linked.yaml"))) == load(folder)


def test_files_that_recipes_extend_are_no_recipes(folder: Path) -> None:
    load(folder)
    recipe, defaults = folder / "recipe.yaml", folder / "defaults.yaml"
    assert extended_files([defaults, recipe]) == {defaults: recipe}
    assert extended_files([folder / "model", folder / "nothere", recipe]) == {}


def test_the_schema_takes_a_recipe_that_leaves_out_what_it_inherits() -> None:
    validator = jsonschema.Draft202012Validator(recipe_schema())
    partial: dict[str, Any] = {"schema_version": 1, "extends": "defaults.yaml", "card": {"title": "Demo"}}
    validator.validate(partial)
    missing = {error.message for error in validator.iter_errors(partial | {"extends": None})}
    assert "'calibration' is a required property" in missing
    assert "'creator' is a required property" in missing
    assert list(validator.iter_errors(partial | {"extends": "../defaults.yaml"}))
    assert list(validator.iter_errors(partial | {"card": {"title": "Demo", "license": {}}}))


# What is built again


def keys_of(recipe: Path) -> dict[str, dict[str, str]]:
    file = RecipeFile.load(recipe)
    return {planned.variant.branch: stage_keys(file, planned) for planned in make_plan(file).variants}


@pytest.mark.parametrize(
    ("section", "change", "stages"),
    [
        ("loaders", {"num_rows": 2}, {"verify"}),
        ("evaluation", {"seed": 7}, {"evaluate", "verify"}),
        ("calibration", {"seed": 7}, {"quantize", "weights", "evaluate", "verify"}),
        ("card", {"creator": "somebody"}, set()),
    ],
)
def test_a_change_of_the_other_file_rebuilds_what_depends_on_it(
    tmp_path: Path, section: str, change: dict[str, object], stages: set[str]
) -> None:
    path = tiny_recipe.write_all(tmp_path)
    recipe = json.loads(path.read_text())
    common = {"schema_version": 1, **{name: recipe.pop(name) for name in ("loaders", "evaluation", "calibration")}}
    common["card"] = {"creator": recipe["card"].pop("creator")}
    path.write_text(json.dumps(recipe | {"extends": "common.yaml"}))
    (tmp_path / "common.yaml").write_text(json.dumps(common))
    before, digest = keys_of(path), RecipeFile.load(path).recipe.digest()
    common[section] |= change
    (tmp_path / "common.yaml").write_text(json.dumps(common))
    after = keys_of(path)
    for branch, keys in before.items():
        assert {stage for stage, key in keys.items() if after[branch][stage] != key} == stages
    assert RecipeFile.load(path).recipe.digest() != digest


# Trials


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (["calibration.num_samples=16"], {"calibration.num_samples": 16, "calibration.path": "calibration.txt"}),
        (["variants=[{branch: main, bits: 3}]"], {"variants.0.bits": 3}),
        (["card.license.id=apache-2.0"], {"card.license.id": "apache-2.0"}),
        (["card.title='a: b'", "card.title=c"], {"card.title": "c"}),
        (["evaluation.questions="], {"evaluation.questions": None}),
        (["calibration.path=recipe.lock.json"], {"calibration.path": "recipe.lock.json"}),
    ],
)
def test_a_setting_replaces_a_value(folder: Path, settings: list[str], expected: dict[str, object]) -> None:
    plain = load(folder)
    recipe = load(folder, trial=settings)
    assert recipe.digest() != plain.digest()
    assert {key: value_at(recipe, key) for key in expected} == expected


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("calibration.num_sample=3", "unknown key 'num_sample' in calibration (did you mean 'num_samples'?)"),
        ("calibration.num_samples=x", "calibration.num_samples must be a whole number, got the text 'x'"),
        ("calibration.num_samples", "a setting is a dotted key, =, and a value (such as calibration.num_samples=16)"),
        ("=3", "a setting is a dotted key, =, and a value (such as calibration.num_samples=16)"),
        ("card..title=3", "a setting is a dotted key, =, and a value (such as calibration.num_samples=16)"),
        ("extends=other.yaml", "extends cannot be set (set the keys that you want to try)"),
        ("card.title=&a x", "the anchor &a is refused (write every value out)"),
        ("card.title=[" + "[" * 20, "values are nested more than 16 levels deep"),
    ],
)
def test_a_wrong_setting_is_reported_as_it_was_written(folder: Path, setting: str, expected: str) -> None:
    assert problems(folder, trial=[setting]) == [f"--set {setting}: {expected}"]


def test_a_hostile_recipe_with_a_setting_is_a_recipe_error(folder: Path) -> None:
    for content in ("", "a: [", "- a", "5"):
        with pytest.raises(RecipeError):
            load(folder, content, trial=["card.title=x"])
    assert isinstance(load_or_error(folder / "recipe.yaml"), RecipeError)


def test_a_branch_that_is_not_there_has_a_hint(folder: Path) -> None:
    load(folder)
    plan = make_plan(RecipeFile.load(folder / "recipe.yaml"))
    assert [each.variant.branch for each in chosen_variants(plan.variants, ["main"], "")] == ["main"]
    with pytest.raises(PlanError, match="no branch 'mian'") as raised:
        make_plan(RecipeFile.load(folder / "recipe.yaml"), ["mian"])
    assert (raised.value.hint, raised.value.exit_code) == ("did you mean 'main'?", 2)
    only = make_plan(RecipeFile.load(folder / "recipe.yaml"), ["main"])
    assert only.disk.builds_bytes == plan.variants[0].weights_bytes
    assert only.variants == plan.variants[:1]
