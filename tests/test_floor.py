"""The floor of a recipe's quality: what misses it is built and reported, and published only if the recipe says so."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from packager.card.floor import far_lines, floor_problems, is_far
from packager.cli.main import app
from packager.errors import PublishError
from packager.pipeline import flow
from packager.receipt import Provenance, QualityErrors, QualityRecord
from packager.recipe import QualityFloor
from packager.recipe.file import RecipeFile
from packager.system.terminal import Terminal
from tests import card_fixtures as fixtures
from tests import tiny_recipe
from tests.earlier_recipes import earlier_digest
from tests.test_card_figures import render
from tests.tiny_recipe import ACT_ORDER, Builds

MAIN = "main"


def quality(*, perplexity: float = 2.2, kl: float = 0.1) -> QualityRecord:
    return fixtures.fixture_quality(0, perplexity=perplexity, base_perplexity=2.0, kl_divergence=kl, top1_agreement=0.9)


@pytest.mark.parametrize(
    ("measured", "increase", "kl", "missed"),
    [
        (quality(perplexity=2.25), 0.125, 0.1, []),
        (quality(perplexity=2.2501), 0.125, None, ["perplexity +12.51 %, at most +12.5 %"]),
        (quality(kl=0.1001), None, 0.1, ["KL divergence 0.1001, at most 0.1"]),
        (
            quality(perplexity=3.0, kl=0.2), 0.1, 0.1,
            ["perplexity +50 %, at most +10 %", "KL divergence 0.2, at most 0.1"],
        ),
        (quality(perplexity=3.0, kl=0.2), None, None, []),
        (
            quality().model_copy(update={"perplexity": math.inf, "kl_divergence": math.nan}), 0.1, 0.1,
            ["perplexity that is no number, at most +10 %", "KL divergence inf, at most 0.1"],
        ),
    ],
)  # fmt: skip
def test_a_limit_is_missed_from_the_next_number_on(
    measured: QualityRecord, increase: float | None, kl: float | None, missed: list[str]
) -> None:
    floor = QualityFloor(max_perplexity_increase=increase, max_kl=kl)
    assert list(floor_problems(measured, floor)) == missed


def test_a_recipe_without_a_floor_keeps_its_digest() -> None:
    recipe = fixtures.llama_recipe()
    assert recipe.digest() == earlier_digest(recipe)
    assert recipe.model_copy(update={"quality": QualityFloor(max_kl=1.0)}).digest() != recipe.digest()
    (receipt,) = fixtures.minimal_receipts(fixtures.minimal_recipe())
    assert "floor" not in receipt.model_dump()
    assert "floor" not in json.loads(receipt.model_dump_json())


def with_floor(recipe: Path, kl: float, *, publish: bool = False) -> RecipeFile:
    """Write a floor between the KL divergences of both variants; `publish`: publish the worse one all the same."""
    content = json.loads(recipe.read_text())
    content["quality"] = {"max_kl": kl}
    for variant in content["variants"]:
        variant["publish_below_floor"] = publish
    recipe.write_text(json.dumps(content))
    return RecipeFile.load(recipe)


def record_of(dist: Path, branch: str) -> Provenance:
    path = dist / "builds" / tiny_recipe.REPOSITORY / branch / "provenance.json"
    return Provenance.model_validate_json(path.read_bytes())


def test_what_misses_the_floor_is_published_only_if_the_recipe_says_so(
    tmp_path: Path, builds: Builds, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, dist = builds.copy(tmp_path), tmp_path / "dist"
    divergences = {branch: record_of(dist, branch).quality for branch in (MAIN, ACT_ORDER)}
    ordered = sorted((made.kl_divergence, branch) for branch, made in divergences.items() if made is not None)
    (least, better), (most, worse) = ordered
    limit = (least + most) / 2
    recipe_file = with_floor(recipe, limit)
    flow.build(recipe_file, tiny_recipe.options(dist), Terminal())
    assert f"{worse} misses the floor, not published: KL divergence" in capsys.readouterr().err
    with pytest.raises(PublishError, match="misses the floor") as caught:
        tiny_recipe.publish(recipe_file, dist)
    assert worse in caught.value.why
    assert better not in caught.value.why
    assert not tiny_recipe.hub_folder(dist).exists()
    for command, heading in (("plan", "Floor: KL divergence"), ("status", tiny_recipe.REPOSITORY)):
        shown = CliRunner().invoke(app, [command, str(recipe), "--dist", str(dist)], prog_name="packager").stdout
        assert heading in shown
        assert f"{worse} misses the floor, not published" in shown
        assert f"{better} misses" not in shown
    result = CliRunner().invoke(app, ["plan", str(recipe), "--dist", str(dist), "--format", "json"])
    assert any(worse in text for text in json.loads(result.stdout)["warnings"])

    recipe_file = with_floor(recipe, limit, publish=True)
    flow.render(recipe_file, tiny_recipe.options(dist), Terminal(quiet=True), branch=MAIN)
    tiny_recipe.publish(recipe_file, dist)
    floors = {branch: record_of(dist, branch).floor for branch in (better, worse)}
    assert all(floor is not None and floor.max_kl == limit for floor in floors.values())
    assert [floor is not None and floor.missed for floor in floors.values()] == [False, True]
    assert [floor is not None and floor.published_below for floor in floors.values()] == [False, True]
    card = (dist / "builds" / tiny_recipe.REPOSITORY / MAIN / "README.md").read_text()
    assert f"* `{worse}` misses it and is published by the maintainer's choice: KL divergence" in card
    missing = [branch for branch in tiny_recipe.BRANCHES if (made := record_of(dist, branch).floor) and made.missed]
    assert worse in missing
    assert better not in missing
    assert card.count("Below the maintainer's floor of quality.") == len(missing)


@pytest.mark.parametrize(("perplexity", "warned"), [(4.9812 * 1.09, False), (4.9812 * 1.2, True)])
def test_a_main_far_from_fp16_is_warned_of(perplexity: float, warned: bool) -> None:
    recipe = fixtures.llama_recipe()
    receipts = list(fixtures.llama_receipts(recipe))
    figures: dict[str, Any] = {"base_perplexity": 4.9812, "kl_divergence": 0.02, "top1_agreement": 0.9}
    far = fixtures.fixture_quality(0, perplexity=perplexity, **figures)
    receipts[0] = receipts[0].model_copy(update={"quality": far})
    assert is_far(receipts[0]) is warned
    lines = [line.split(",")[0] for line in far_lines(receipts, MAIN)]
    assert lines == ["warning: readers who name no branch get main"] * warned
    text = render(recipe, receipts)
    assert text.count("against fp16: take another branch if you can.**") == int(warned)


@pytest.mark.parametrize(("error", "far"), [(0.024, True), (0.026, False)])
def test_an_increase_within_twice_its_error_of_the_limit_is_not_called_far(error: float, far: bool) -> None:
    """The perplexity is 15 % above that of fp16, and the limit is 10 %: 0.025 is half of the distance."""
    receipt = fixtures.llama_receipts(fixtures.llama_recipe())[0]
    errors = QualityErrors(
        perplexity=0.1, base_perplexity=0.1, perplexity_change=error, kl_divergence=0.1, kl_median=None, kl_p99=None,
        top1_agreement=0.1,
    )  # fmt: skip
    measured = quality(perplexity=2.3).model_copy(update={"errors": errors})
    assert is_far(receipt.model_copy(update={"quality": measured})) is far
