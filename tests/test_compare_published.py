"""`packager diff`: a build against what is published."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from packager.cli.main import app
from packager.pipeline import compare_published as compared
from packager.pipeline.compare_published import quality_lines
from packager.publish.targets import StoredFile
from packager.publish.targets.resolve_target import target_of
from packager.receipt import PROVENANCE, QualityRecord
from packager.recipe.file import RecipeFile
from packager.system.terminal import Terminal
from tests import tiny_recipe
from tests.tiny_recipe import ACT_ORDER, BRANCHES, MAIN, THREE_BITS, hub_folder, options


@pytest.fixture
def published(builds: tiny_recipe.Builds, tmp_path: Path) -> Path:
    """A recipe that is built and published."""
    return builds.copy(tmp_path, published=True)


def differences(recipe: Path) -> dict[str, compared.BranchDifference]:
    found = compared.compare_published(RecipeFile.load(recipe), options(recipe.parent / "dist"), Terminal(quiet=True))
    return {each.branch: each for each in found}


def text_of(recipe: Path, *more: str) -> str:
    done = CliRunner().invoke(app, ["diff", str(recipe), "--dist", str(recipe.parent / "dist"), *more])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_what_is_published_as_it_is_built_is_the_same(published: Path) -> None:
    assert {name: each.standing for name, each in differences(published).items()} == dict.fromkeys(BRANCHES, "same")
    assert text_of(published) == "".join(f"{branch}: same\n" for branch in BRANCHES)


def test_a_changed_card_is_shown_by_its_lines(published: Path) -> None:
    tiny_recipe.write_recipe(published.parent, {"card.title": "Other title"})
    tiny_recipe.build(published, published.parent / "dist")
    found = differences(published)[MAIN]
    assert (found.standing, found.weights, found.values) == ("changed", False, ())
    assert set(found.files) == {"README.md", PROVENANCE, "recipe.yaml"}
    assert any(line.startswith("+") and "Other title" in line for line in found.texts["README.md"])
    text = text_of(published)
    assert f"{MAIN}: changed, the same weights, 3 other files: README.md, provenance.json, recipe.yaml" in text
    assert "Other title" not in text
    assert "+# Other title" in text_of(published, "--texts")


@pytest.mark.slow
def test_other_weights_are_explained_by_the_records(published: Path) -> None:
    tiny_recipe.write_recipe(published.parent, {"calibration.num_samples": 6})
    tiny_recipe.build(published, published.parent / "dist")
    found = differences(published)[MAIN]
    assert found.weights
    changes = {change.key: (change.published, change.built) for change in found.values}
    assert changes["calibration.num_samples"] == ("12", "6")
    assert not [key for key in changes if key.startswith(("parameters.", "base_model."))]
    text = text_of(published)
    assert "  calibration.num_samples: 12 -> 6\n" in text
    assert "other weights" in text
    assert "  KL divergence: 0." in text
    answer = json.loads(text_of(published, "--format", "json"))
    assert answer["branches"][0]["quality"]["built"] != answer["branches"][0]["quality"]["published"]
    assert answer["branches"][0]["weights_differ"] is True


def test_branches_on_one_side_only_are_named(builds: tiny_recipe.Builds, published: Path) -> None:
    content = json.loads(published.read_text())
    content["variants"] = [content["variants"][0], {"branch": "fresh", "bits": 3, "sym": False}]
    published.write_text(json.dumps(content))
    found = {name: each.standing for name, each in differences(published).items()}
    assert found == {MAIN: "same", "fresh": "not built", ACT_ORDER: "only published", THREE_BITS: "only published"}


def test_a_build_that_is_not_published_is_new(builds: tiny_recipe.Builds, tmp_path: Path) -> None:
    recipe = builds.copy(tmp_path)
    assert {each.standing for each in differences(recipe).values()} == {"new"}
    assert not hub_folder(tmp_path / "dist").exists()


@pytest.mark.parametrize(
    ("record", "why"),
    [
        (b"", "has 0 bytes"),
        (b"{}", "is not valid: repository: Field required"),
        (b"\xff\x00", "is not valid"),
        (b"[" * 100_000, "is not valid"),
        (b'{"repository": "\\u001b[2J"}', "is not valid: branch"),
        (None, "it has no provenance.json"),
    ],
)
def test_a_published_record_that_is_none_is_said(
    published: Path, monkeypatch: pytest.MonkeyPatch, record: bytes | None, why: str
) -> None:
    found = differences_with(published, monkeypatch, record)[MAIN]
    assert found.standing == "unreadable"
    assert why in found.why
    assert found.why.isprintable()
    assert found.texts == {}


def differences_with(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, record: bytes | None
) -> dict[str, compared.BranchDifference]:
    """Compare with a repository whose branches have this record."""
    real = target_of

    def target(*arguments: Any) -> Any:
        made = real(*arguments)
        branches = {}
        for name, state in made.read_branches().items():
            files = {file: stored for file, stored in state.files.items() if file != PROVENANCE}
            if record is not None:
                files[PROVENANCE] = StoredFile(size_bytes=len(record), sha256="0" * 64)
            branches[name] = replace(state, files=files)
        monkeypatch.setattr(made, "read_branches", lambda: branches)
        monkeypatch.setattr(made, "read_bytes", lambda *_, **__: record)
        return made

    monkeypatch.setattr(compared, "target_of", target)
    return differences(recipe)


def test_only_figures_that_differ_are_listed() -> None:
    old = QualityRecord(num_tokens=1, perplexity=5.0, base_perplexity=4.0, kl_divergence=0.03, top1_agreement=0.9)
    new = old.model_copy(update={"kl_divergence": 0.02})
    assert quality_lines(old, new) == ["KL divergence: 0.0300 -> 0.0200"]
    assert quality_lines(None, new) == []
