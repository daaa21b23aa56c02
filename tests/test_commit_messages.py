"""The messages of commits and tags: what changed, why, and the quality before and after."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from typer.testing import CliRunner

from packager.cli.main import app
from packager.cli.publish_markdown import publish_report_markdown
from packager.pipeline.commit_messages import change_lines_of, change_title, message_text
from packager.pipeline.compare_published import BranchDifference, ValueChange
from packager.publish.after_publish import release_notes
from packager.publish.branches import PublishReport
from packager.publish.plan import PublishPlan
from packager.publish.targets.local import LocalTarget
from packager.receipt import PROVENANCE, QualityRecord
from tests import tiny_recipe
from tests.publish_fixtures import REPOSITORY, git
from tests.publish_fixtures import hub_folder as hub_of
from tests.tiny_recipe import MAIN, THREE_BITS, hub_folder

OLD = QualityRecord(num_tokens=1, perplexity=5.0, base_perplexity=4.0, kl_divergence=0.03, top1_agreement=0.9)
NEW = OLD.model_copy(update={"kl_divergence": 0.02})
CHANGE = ValueChange(key="calibration.num_samples", published="12", built="6")
OTHER_WEIGHTS = BranchDifference(
    branch=MAIN, standing="changed", weights=True, values=(CHANGE, replace(CHANGE, key="device")), quality=(OLD, NEW),
    files=("README.md", "config.json", "model.safetensors", PROVENANCE),
)  # fmt: skip


def messages(repository: Path, branch: str) -> str:
    return git("log", "-1", "--format=%B", branch, cwd=repository)


def publish(recipe: Path, *more: str) -> str:
    done = CliRunner().invoke(app, ["publish", str(recipe), "--dist", str(recipe.parent / "dist"), *more])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_title_says_what_changed_and_the_first_reason() -> None:
    assert change_title(OTHER_WEIGHTS) == (
        "other weights, card and config.json (calibration.num_samples: 12 -> 6, and 1 more)"
    )
    same = replace(OTHER_WEIGHTS, weights=False, values=())
    assert change_title(replace(same, files=("README.md", PROVENANCE))) == "card; the same weights"
    assert change_title(replace(same, files=("a.json", "b.json"))) == "2 other files; the same weights"
    assert change_title(replace(same, files=(PROVENANCE,))) == "records; the same weights"
    assert change_title(replace(same, files=())) == "signatures; the same weights"


def test_the_lines_have_the_reasons_and_the_quality_before_and_after() -> None:
    loaders = (ValueChange(key="vllm", published=None, built="passed"),)
    lines = change_lines_of(replace(OTHER_WEIGHTS, loaders=loaders), "packager 1")
    assert "  calibration.num_samples: 12 -> 6" in lines
    assert "  KL divergence: 0.0300 -> 0.0200" in lines
    assert "  vllm: nothing -> passed" in lines
    assert lines[-1] == "Made with: packager 1"
    unmoved = change_lines_of(replace(OTHER_WEIGHTS, quality=(OLD, OLD)), "packager 1")
    assert unmoved[unmoved.index("Quality:") + 1] == "  the same figures"


def test_a_hostile_record_makes_no_trailer_and_no_endless_message() -> None:
    forged = f"x\n\nRollback-to: {'0' * 40}"
    values = tuple(ValueChange(key=f"versions.{n}", published=forged[:100], built="2") for n in range(5000))
    hostile = replace(OTHER_WEIGHTS, standing="unreadable", why="\u202e" * 5000, files=("a" * 5000,) * 5000)
    for found in (hostile, replace(hostile, standing="changed", values=())):
        text = message_text(f"{MAIN}: {change_title(found)}", change_lines_of(found, "packager 1"))
        assert len(text) < 10_000
        assert max(len(line) for line in text.splitlines()) == 300
    lines = change_lines_of(replace(OTHER_WEIGHTS, values=values), "packager 1")
    assert "  and 4980 more" in lines
    assert all(line.startswith("  ") or line.endswith(":") for line in lines[:-1])


def test_a_first_commit_says_what_the_branch_is(builds: tiny_recipe.Builds) -> None:
    text = messages(hub_folder(builds.built(published=True) / "dist"), THREE_BITS)
    title, _, body = text.partition("\n\n")
    assert title.startswith(f"{THREE_BITS}: GPTQ 3-bit, made with ")
    assert "  bits: 3\n" in body
    assert "  KL divergence: " in body


def test_a_changed_card_is_one_commit_that_says_so(builds: tiny_recipe.Builds, tmp_path: Path) -> None:
    recipe = builds.copy(tmp_path, published=True)
    tiny_recipe.write_recipe(tmp_path, {"card.title": "Other title"})
    tiny_recipe.build(recipe, tmp_path / "dist")
    shown = publish(recipe, "--dry-run", "--diff")
    assert "+# Other title" in shown
    answer = json.loads(publish(recipe, "--dry-run", "--diff", "--format", "json"))
    assert answer["differences"][0]["branch"] == MAIN
    planned = {entry["branch"]: entry["message"] for entry in answer["branches"]}
    assert "<pre>\n" in publish(recipe, "--dry-run", "--diff", "--format", "markdown")
    assert "+# Other title" not in publish(recipe, "--dry-run")
    publish(recipe, "--tag", "v2")
    repository = hub_folder(tmp_path / "dist")
    assert messages(repository, MAIN).startswith(f"{MAIN}: card; the same weights\n\nFiles:\n  README.md\n")
    assert messages(repository, MAIN).rstrip("\n") == planned[MAIN]
    assert git("cat-file", "-t", "refs/tags/v2", cwd=repository).strip() == "tag"
    notes = git("for-each-ref", "--format=%(contents)", "refs/tags/v2", cwd=repository)
    assert notes.startswith(f"Release v2\n\n{MAIN} at ")
    assert f"{THREE_BITS} at " in notes
    answer = json.loads(publish(recipe, "--dry-run", "--diff", "--format", "json"))
    assert {entry["message"] for entry in answer["branches"]} == {""}


@pytest.mark.slow
def test_other_weights_are_one_commit_that_says_why(builds: tiny_recipe.Builds, tmp_path: Path) -> None:
    recipe = builds.copy(tmp_path, published=True)
    tiny_recipe.write_recipe(tmp_path, {"calibration.num_samples": 6})
    tiny_recipe.build(recipe, tmp_path / "dist")
    publish(recipe)
    text = messages(hub_folder(tmp_path / "dist"), MAIN)
    assert text.startswith(f"{MAIN}: other weights, card")
    assert "\n  calibration.num_samples: 12 -> 6\n" in text
    assert "\n  KL divergence: 0." in text


def test_a_diff_without_a_dry_run_is_refused(builds: tiny_recipe.Builds, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["publish", str(tmp_path / "recipe.yaml"), "--diff"])
    assert done.exit_code == 2
    assert "--diff is for --dry-run" in done.stderr


def test_long_notes_have_the_titles_alone_and_say_so(tmp_path: Path) -> None:
    repository = hub_of(tmp_path / "hub")
    repository.mkdir(parents=True)
    git("init", "--quiet", "--initial-branch=main", cwd=repository)
    git("commit", "--quiet", "--allow-empty", "-m", "main: card\n\nall of it \x1b[2J", cwd=repository)
    commit = git("rev-parse", "main", cwd=repository).strip()
    target = LocalTarget(tmp_path / "hub", REPOSITORY)
    short = release_notes("v1", target, {MAIN: commit})
    assert short.startswith(f"Release v1\n\n{MAIN} at {commit[:12]} of 20")
    assert ": card\n\nall of it " in short
    assert "\x1b" not in short
    git("commit", "--quiet", "--allow-empty", "-m", "main: card" + "\n\nx" * 20_000, cwd=repository)
    long = release_notes("v1", target, {MAIN: git("rev-parse", "main", cwd=repository).strip()})
    assert len(long) < 200
    assert long.endswith(": card\n\nThe messages of the commits say more of each branch.")
    assert release_notes("v1", target, {MAIN: "0" * 40}) == f"Release v1\n\n{MAIN} at {'0' * 12}"


def test_a_hostile_diff_is_text_in_a_summary() -> None:
    lines = ("+</pre><script>x</script>", "+```", "+# heading", "+", "+\u202e") * 100
    found = BranchDifference(branch="<b>", standing="changed", texts={"</summary>.json": lines})
    plan = PublishPlan(where="x", branches=(), left_alone=())
    report = PublishReport(plan=plan, outcomes=(), notes=(), dry_run=True)
    text = publish_report_markdown(report, None, [found])
    page = MarkdownIt("commonmark", {"html": True}).render(text)
    for forbidden in ("<script", "<b>", "<code>", "<h1", "\u202e", "</summary>."):
        assert forbidden not in page
    assert "... and 440 more lines" in page
