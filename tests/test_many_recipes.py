"""Several recipes in one command, some branches of one, and settings for a trial."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from packager.cli.main import app
from packager.errors import PublishError, RecipeError
from packager.pipeline import flow
from packager.pipeline.build_state import BuildState
from packager.pipeline.many_recipes import recipes_among
from packager.pipeline.plan import chosen_variants
from packager.pipeline.stage_keys import STAGES
from packager.receipt import README
from packager.recipe.file import RecipeFile
from packager.system.terminal import Terminal
from tests import tiny_recipe
from tests.tiny_recipe import ACT_ORDER, BRANCHES, MAIN, THREE_BITS, options, workspace


def packager(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def tiny(builds: tiny_recipe.Builds, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the tiny recipe with its dist/, as the present folder."""
    builds.copy(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path / "tiny")
    return tmp_path / "tiny"


# Several recipes


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "key"), [("plan", "variants"), ("status", "branches"), ("card", "card")], ids=["plan", "status", "card"]
)
def test_several_recipes_have_one_answer_each_and_the_highest_exit_code(tiny: Path, command: str, key: str) -> None:
    tiny_recipe.write_recipe(tiny, {"card.titel": "x"}, name="wrong.yaml")
    done = packager(command, "wrong.yaml", "recipe.yaml", "--format", "json")
    answer = json.loads(done.stdout)
    assert (done.exit_code, answer["schema_version"]) == (2, 1)
    wrong, right = answer["recipes"]
    assert (wrong["recipe"], wrong["result"], wrong["exit_code"], wrong["answer"]) == ("wrong.yaml", "failed", 2, None)
    assert "one problem" in wrong["why"]
    assert (right["recipe"], right["result"], right["exit_code"]) == ("recipe.yaml", "done", 0)
    single = json.loads(packager(command, "recipe.yaml", "--format", "json").stdout)
    assert right["answer"] == {name: value for name, value in single.items() if name != "schema_version"} | (
        {"schema_version": 1} if command == "plan" else {}
    )
    assert right["answer"][key]
    text = packager(command, "wrong.yaml", "recipe.yaml")
    assert text.exit_code == 2
    assert "did you mean 'title'?" in text.stderr
    table = text.stdout[text.stdout.rindex("Recipe ") :].splitlines()[2:]
    assert [row.split()[0] for row in table if row.strip()] == ["wrong.yaml", "recipe.yaml"]


@pytest.mark.slow
def test_a_build_of_several_goes_on_after_a_failure(tiny: Path) -> None:
    (tiny / "bad.yaml").write_text("a: [")
    done = packager("build", "bad.yaml", "recipe.yaml", "--device", "cpu", "--format", "json")
    results = {each["recipe"]: each["result"] for each in json.loads(done.stdout)["recipes"]}
    assert (done.exit_code, results) == (2, {"bad.yaml": "failed", "recipe.yaml": "built"})


def test_of_two_recipes_of_one_repository_one_is_built(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    monkeypatch.setattr("packager.pipeline.flow.build", lambda file, *_, **__: built.append(file.path.name))
    tiny_recipe.write_recipe(tiny, {"repository.id": tiny_recipe.REPOSITORY.upper()}, name="same.yaml")
    done = packager("build", "recipe.yaml", "same.yaml", "--format", "json")
    first, second = json.loads(done.stdout)["recipes"]
    assert (first["result"], second["result"], done.exit_code) == ("built", "failed", 2)
    assert "recipe.yaml builds TESTER/TINY-GPTQ, too" in second["why"]
    assert built == ["recipe.yaml"]
    assert packager("status", "recipe.yaml", "same.yaml").exit_code == 0


def test_a_pattern_always_gives_a_list(tiny: Path) -> None:
    (answer,) = json.loads(packager("plan", "--recipes", "rec*.yaml", "--format", "json").stdout)["recipes"]
    assert answer["recipe"] == "recipe.yaml"


def test_recipes_are_named_once_and_files_that_they_extend_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in/deep").mkdir(parents=True)
    for name, text in {
        "a.yaml": "extends: base.yaml",
        "base.yaml": "{}",
        "b.yaml": "a: [",
        "in/deep/c.yaml": "",
    }.items():
        Path(name).write_text(text)
    said: list[str] = []
    found = recipes_among([Path("b.yaml")], ["*.yaml", "in/**/*.yaml"], said.append)
    assert found == [Path("b.yaml"), Path("a.yaml"), Path("in/deep/c.yaml")]
    assert said == ["base.yaml is no recipe: a.yaml extends it"]
    assert recipes_among([Path("base.yaml")], [], said.append) == [Path("base.yaml")]
    with pytest.raises(RecipeError, match=r"no file fits x\*"):
        recipes_among([], ["x*"], said.append)


# Some branches


def build(recipe: Path, dist: Path, *only: str) -> list[str]:
    """Build some branches and return what the log says."""
    said: list[str] = []
    terminal = Terminal(quiet=True)
    terminal.log = said.append  # type: ignore[method-assign, assignment]
    flow.build(RecipeFile.load(recipe), options(dist), terminal, only=only)
    return said


def missing(recipe: Path, dist: Path) -> dict[str, set[str]]:
    run = BuildState(RecipeFile.load(recipe), options(dist), Terminal(quiet=True))
    run.read_receipts()
    return {stage: {each.variant.branch for each in run.missing(stage)} for stage in STAGES}


@pytest.mark.slow
def test_a_partial_build_is_never_complete_and_the_rest_completes_it(
    tmp_path: Path, builds: tiny_recipe.Builds
) -> None:
    recipe, dist = tiny_recipe.write_all(tmp_path), tmp_path / "dist"
    # The blocks of another variant, as a killed run leaves them.
    left = workspace(dist).work / THREE_BITS / "block-0.json"
    left.parent.mkdir(parents=True)
    left.write_text("{}")
    said = build(recipe, dist, MAIN)
    rest = {ACT_ORDER, THREE_BITS}
    assert missing(recipe, dist) == dict.fromkeys(STAGES, rest) | {"tasks": set()}
    assert f"no cards and nothing to publish until these are built: {ACT_ORDER}, {THREE_BITS}" in said
    assert left.exists()
    assert not (workspace(dist).folder(MAIN) / README).exists()
    assert not (workspace(dist).work / MAIN).exists()
    with pytest.raises(PublishError, match="not every variant is ready"):
        tiny_recipe.publish(recipe, dist)
    left.unlink()
    build(recipe, dist, THREE_BITS)
    with pytest.raises(PublishError, match=f"not every variant is ready: {ACT_ORDER}\n"):
        tiny_recipe.publish(recipe, dist)
    build(recipe, dist, ACT_ORDER)
    assert missing(recipe, dist) == {stage: set() for stage in STAGES}
    assert tiny_recipe.publish(recipe, dist).outcomes
    # The same bytes as of one build of all, but for the times of the records.
    whole = builds.built() / "dist"
    for branch in BRANCHES:
        for path in workspace(whole).folder(branch).glob("*.safetensors"):
            assert (workspace(dist).folder(branch) / path.name).read_bytes() == path.read_bytes()


def test_the_rest_of_a_build_is_not_part_of_a_partial_one(tiny: Path) -> None:
    file = RecipeFile.load(tiny / "recipe.yaml")
    shutil.rmtree(workspace(tiny / "dist").folder(THREE_BITS))
    run = BuildState(file, options(tiny / "dist"), Terminal(quiet=True), [MAIN])
    run.read_receipts()
    assert [run.missing(stage) for stage in STAGES] == [()] * len(STAGES)
    assert [each.variant.branch for each in run.missing("weights", anywhere=True)] == [THREE_BITS]
    assert [receipt.provenance.branch for receipt in run.ordered_receipts()] == [MAIN]
    assert chosen_variants(run.plan.variants, [MAIN], "") == run.wanted


def test_a_partial_build_of_a_finished_recipe_renders_the_cards(tiny: Path) -> None:
    card = workspace(tiny / "dist").folder(ACT_ORDER) / README
    before = card.read_bytes()
    tiny_recipe.write_recipe(tiny, {"card.title": "Other"})
    build(tiny / "recipe.yaml", tiny / "dist", MAIN)
    assert card.read_bytes() != before


# Trials


def receipt(dist: Path, branch: str = MAIN) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(workspace(dist).receipt_path(branch).read_text())
    return content


@pytest.mark.slow
def test_a_trial_is_recorded_lies_apart_and_is_never_published(tiny: Path) -> None:
    before = tiny_recipe.built_files(tiny / "dist")
    setting = "card.title=Trial"
    done = packager("build", "recipe.yaml", "--set", setting, "--device", "cpu")
    assert done.exit_code == 0, done.stderr
    trial = Path("dist/trial")
    assert receipt(trial)["trial"] == [setting]
    assert tiny_recipe.built_files(tiny / "dist") == before
    assert receipt(tiny / "dist")["trial"] == []
    # By the plain recipe.
    refused = packager("publish", "recipe.yaml", "--dist", trial)
    assert (refused.exit_code, "built for a trial" in refused.stderr) == (10, True)
    # By a recipe that says now what the trial said: nothing but the record differs.
    tiny_recipe.write_recipe(tiny, {"card.title": "Trial"}, name="same.yaml")
    refused = packager("publish", "same.yaml", "--dist", trial)
    assert (refused.exit_code, refused.stderr.splitlines()[:2]) == (
        10,
        [f"error: built for a trial: {', '.join(BRANCHES)}", f"  why: --set {setting}"],
    )
    # Until it is built as a recipe: then every stage has the keys of the recipe alone.
    assert packager("build", "same.yaml", "--dist", trial, "--device", "cpu").exit_code == 0
    assert receipt(trial)["trial"] == []
    assert packager("publish", "same.yaml", "--dist", trial).exit_code == 0


@pytest.mark.slow
def test_a_release_that_does_not_publish_builds_and_asks_nobody(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flow, "publish", lambda *_, **__: pytest.fail("published"))
    monkeypatch.setattr("packager.pipeline.release.publish", lambda *_, **__: pytest.fail("published"))
    tiny_recipe.write_recipe(tiny, {"repository.target": "hub"})
    done = packager("release", "recipe.yaml", "--no-publish", "--format", "json")
    (result,) = json.loads(done.stdout)["recipes"]
    assert (done.exit_code, result["result"]) == (0, "built"), done.stderr
    refused = packager("release", "recipe.yaml", "--format", "json")
    assert refused.exit_code == PublishError.exit_code
    assert "run again with --yes" in refused.stderr + refused.stdout


@pytest.mark.parametrize("command", ["publish", "release", "verify", "lock"])
def test_what_publishes_takes_no_settings(command: str) -> None:
    refused = packager(command, "recipe.yaml", "--set", "card.title=x")
    assert (refused.exit_code, "there is no option --set" in refused.stderr) == (2, True)


def test_a_plan_for_a_trial_and_some_branches(tiny: Path) -> None:
    done = packager("plan", "recipe.yaml", "--set", "calibration.num_samples=3", "--only", MAIN, "--format", "json")
    answer = json.loads(done.stdout)
    assert answer["calibration_tokens"] == 3 * 32
    assert [each["branch"] for each in answer["variants"]] == [MAIN]


def test_the_resolved_recipe_is_printed_whole(tiny: Path) -> None:
    path = tiny / "recipe.yaml"
    content = json.loads(path.read_text())
    Path("common.yaml").write_text(json.dumps({"schema_version": 1, "loaders": content.pop("loaders")}))
    path.write_text(json.dumps(content | {"extends": "common.yaml"}))
    digest = RecipeFile.load(path).recipe.digest()
    for format_ in ("text", "json"):
        printed = packager("plan", "recipe.yaml", "--resolved", "--format", format_).stdout
        assert "extends" not in printed
        Path("resolved.yaml").write_text(printed)
        shutil.copyfile("recipe.lock.json", "resolved.lock.json")
        assert RecipeFile.load(Path("resolved.yaml")).recipe.digest() == digest
