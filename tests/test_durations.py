"""How long a build will take: from receipts of earlier builds, else from the reference."""

import io
import json
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from packager.cli.plan_view import durations_json, print_build_plan, time_lines
from packager.pipeline.durations import (
    CORRECTED_WORK,
    REFERENCES,
    REFINED_WORK,
    SIGNED_WORK,
    TIMED_STAGES,
    Computer,
    durations,
)
from packager.pipeline.plan import BuildPlan, make_plan
from packager.recipe.file import RecipeFile
from packager.recipe.task_models import EvaluationTask
from packager.system.text import rough_time
from tests import tiny_recipe
from tests.test_house_rules import ROOT
from tests.tiny_recipe import BRANCHES, workspace


def plan_of(name: str) -> BuildPlan:
    return make_plan(RecipeFile.load(ROOT / "recipes" / name))


@pytest.fixture
def tiny(builds: tiny_recipe.Builds, tmp_path: Path) -> Path:
    builds.copy(tmp_path)
    return tmp_path


def set_seconds(dist: Path, repository: str = tiny_recipe.REPOSITORY, **seconds: float) -> None:
    for path in (dist / "receipts" / repository).glob("*.json"):
        receipt = json.loads(path.read_text())
        receipt["seconds"] = seconds
        path.write_text(json.dumps(receipt))


def test_the_reference_is_chosen_by_size_and_scaled() -> None:
    plan = plan_of("demo-llama.yaml")
    (found,) = durations(plan, Path("nowhere"))
    demo = REFERENCES[0]
    assert (found.here, found.measured) == (False, demo)
    assert found.seconds["quantize"] == pytest.approx(4 * demo.seconds["quantize"])
    assert found.seconds["evaluate"] == pytest.approx(5 * demo.seconds["evaluate"] * 16_384 / 16_320)
    assert found.seconds["pack"] is None
    large = durations(plan_of("llama-2-13b-chat.yaml"), Path("nowhere"))
    assert [each.measured.machine for each in large] == ["one NVIDIA H200"]
    assert large[0].seconds["quantize"] == pytest.approx(84.4 * SIGNED_WORK["cuda"] * CORRECTED_WORK["cuda"], rel=0.001)
    (line,) = time_lines(large)
    assert "without evaluate and verify, not measured there" in line
    assert "a reference and not this machine" in line
    (answer,) = durations_json(large)
    assert answer["seconds"]["verify"] is None  # type: ignore[index]
    assert answer["measured_here"] is False


def test_a_tuned_variant_takes_as_long_as_several(tiny: Path) -> None:
    """On a GPU a step is of 8 rows of 13B's 128: 100 of them with their backward passes, 4 measurements, and 2 more."""
    plan = plan_of("llama-2-13b-chat.yaml")
    (first, *others) = plan.variants
    tuned = replace(first, variant=replace(first.variant, effort="high"))
    (before,), (after,) = (
        durations(each, Path("nowhere")) for each in (plan, replace(plan, variants=(tuned, *others)))
    )
    one, four = (each.seconds["quantize"] for each in (before, after))
    assert one is not None
    positive = one / 4 / SIGNED_WORK["cuda"] / CORRECTED_WORK["cuda"]
    assert four == pytest.approx(one + positive * (3 * 100 * 8 / 128 + 4 + 2) / 2.6)
    text = io.StringIO()
    print_build_plan(replace(plan, variants=(tuned, *others)), Console(file=text, width=200))
    assert "note: effort high tunes each block of main in 100 steps: on a GPU as long as 25 passes" in text.getvalue()
    # What was measured on tuned variants is divided by the same factor.
    wanted = make_plan(RecipeFile.load(tiny / "recipe.yaml"))
    set_seconds(tiny / "dist", quantize=2.0, pack=1.0, evaluate=1.0, verify=0.5)
    (plain,) = durations(wanted, tiny / "dist")
    for path in (tiny / "dist" / "receipts" / tiny_recipe.REPOSITORY).glob("*.json"):
        receipt = json.loads(path.read_text())
        receipt["provenance"]["parameters"]["effort"] = "high"
        path.write_text(json.dumps(receipt))
    (high,) = durations(wanted, tiny / "dist")
    assert plain.seconds["quantize"] is not None
    assert high.seconds["quantize"] is not None
    assert high.seconds["quantize"] < plain.seconds["quantize"] / 10


def test_the_references_are_the_figures_of_the_measurements() -> None:
    page = (ROOT / "docs/explanation/measurements.md").read_text(encoding="utf-8")

    def figures(pattern: str) -> tuple[float, ...]:
        (found,) = re.findall(pattern, page)
        return tuple(map(float, found if isinstance(found, tuple) else (found,)))

    demo, small, large = REFERENCES
    assert [each.work for each in REFERENCES] == [SIGNED_WORK["cpu"], 1.0, 1.0]  # whose scales were positive
    (quantize,) = figures(r"quantize, four variants, 16,384 calibration tokens, .* ([\d.]+) s \|")
    (evaluate,) = figures(r"evaluate fp16 and four variants, 16,320 tokens .* ([\d.]+) s \|")
    environments, verify = figures(r"over four variants, of which (\d+) s made .* ([\d.]+) s \|")
    assert demo.seconds == pytest.approx(
        {"quantize": quantize / 4, "evaluate": evaluate / 5, "verify": (verify - environments) / 4}
    )
    quantize, pack, evaluate = figures(r"quantize (\d+) s for both variants, pack ([\d.]+) s, evaluate (\d+) s,")
    (verify,) = figures(r"verify (\d+) s \(two loads")
    assert small.seconds == pytest.approx(
        {"quantize": quantize / 2, "pack": pack / 2, "evaluate": evaluate / 3, "verify": verify / 2}
    )
    (quantize,) = figures(r"quantize: reading, computing, packing, writing 26.5 GB \| ([\d.]+) \|")
    (pack,) = figures(r"and audit, four variants in parallel \| about (\d+) \|")
    assert large.seconds == pytest.approx({"quantize": quantize / 4, "pack": pack / 4})


@pytest.mark.parametrize(("recipe", "computer"), [("demo-llama.yaml", "cpu"), ("llama-2-13b-chat.yaml", "cuda")])
def test_signed_scales_refinement_and_a_correction_take_longer(recipe: str, computer: Computer) -> None:
    def quantize_s(**settings: str | float) -> float:
        trial = [f"defaults.{key}={value}" for key, value in {"target_correction": 0, **settings}.items()]
        (found,) = durations(make_plan(RecipeFile.load(ROOT / "recipes" / recipe, trial=trial)), Path("nowhere"))
        assert found.seconds["quantize"] is not None
        return found.seconds["quantize"]

    signed, refined = SIGNED_WORK[computer], REFINED_WORK[computer]
    plain = quantize_s(scale_search="true")
    assert signed > 1
    assert quantize_s(scale_search="signed") == pytest.approx(signed * plain)
    assert quantize_s(scale_search="true", refine="true") == pytest.approx(refined * plain)
    assert quantize_s(scale_search="signed", refine="true") == pytest.approx(signed * refined * plain)
    corrected = quantize_s(scale_search="signed", target_correction=0.5)
    assert corrected == pytest.approx(signed * CORRECTED_WORK[computer] * plain)


def test_the_work_of_options_is_that_of_the_measurements() -> None:
    page = (ROOT / "docs/explanation/measurements.md").read_text(encoding="utf-8")
    options = {"scale_search: signed": SIGNED_WORK, "refine: true": REFINED_WORK, "target_correction": CORRECTED_WORK}
    for option, work in options.items():
        ((cpu, cuda),) = re.findall(rf"\| `{option}` \| ([^|]+) \| ([^|]+) \|", page)
        measured = {"cpu": cpu, "cuda": cuda}
        assert work == {on: 1.0 if figure == "not measured" else float(figure) for on, figure in measured.items()}


def test_a_measured_build_is_one_of_its_own_settings(tiny: Path) -> None:
    """What is measured here has the time of its own variants: a plan of the same takes as long."""
    dist, recipe = tiny / "dist", tiny / "recipe.yaml"
    set_seconds(dist, quantize=2.0, pack=1.0, evaluate=3.0, verify=0.5)
    for path in (dist / "receipts" / tiny_recipe.REPOSITORY).glob("*.json"):
        receipt = json.loads(path.read_text())
        receipt["provenance"]["parameters"] |= {"refine": True, "target_correction": 0.5}
        path.write_text(json.dumps(receipt))
    refined = RecipeFile.load(recipe, trial=["defaults.refine=true", "defaults.target_correction=0.5"])
    (same,) = durations(make_plan(refined), dist)
    assert same.seconds["quantize"] == pytest.approx(2.0 * 3, rel=0.02)
    (without,) = durations(make_plan(RecipeFile.load(recipe)), dist)
    assert without.seconds["quantize"] == pytest.approx(2.0 * 3 / REFINED_WORK["cpu"] / CORRECTED_WORK["cpu"], rel=0.02)


def test_a_size_far_from_all_is_not_estimated() -> None:
    plan = plan_of("llama-2-13b-chat.yaml")
    far = replace(plan, architecture=plan_of("demo-llama.yaml").architecture)
    assert [each.measured.model for each in durations(far, Path("nowhere"))] == ["the demo"]
    assert time_lines(()) == [
        "Time: not estimated, nothing of about this size was built in this output folder or measured."
    ]


def test_what_this_machine_measured_stands_before_the_reference(tiny: Path) -> None:
    dist, plan = tiny / "dist", make_plan(RecipeFile.load(tiny / "recipe.yaml"))
    set_seconds(dist, quantize=2.0, pack=1.0, evaluate=3.0, verify=0.5)
    (found,) = durations(plan, dist)
    assert (found.here, found.measured.model, found.measured.machine) == (True, tiny_recipe.REPOSITORY, "cpu")
    assert found.seconds == pytest.approx(
        {"quantize": 2.0 * 3, "pack": 1.0 * 3, "evaluate": 3.0 * 4, "verify": 0.0}, rel=0.02
    )
    assert list(found.seconds) == [stage for stage in TIMED_STAGES if stage != "tasks"], "the recipe names no task"
    (line,) = time_lines((found,))
    assert line.startswith(
        "Time: about 21 s (quantize 6 s, pack 3 s, evaluate 12 s, verify 0 s), from what tester/tiny"
    )
    twice = RecipeFile.load(tiny / "recipe.yaml", trial=["calibration.num_samples=24"])
    (longer,) = durations(make_plan(twice), dist)
    assert longer.seconds["quantize"] == pytest.approx(2 * 6.0, rel=0.02)
    (less,) = durations(make_plan(twice, ["main"]), dist)
    # Of the three that were measured, the one of 3 bits is asymmetric, so its scales are positive.
    signed = SIGNED_WORK["cpu"]
    assert less.seconds["quantize"] == pytest.approx(4.0 * 3 * signed / (2 * signed + 1), rel=0.02)


def with_tasks(plan: BuildPlan, *tasks: Mapping[str, object]) -> BuildPlan:
    asked = tuple(EvaluationTask.model_validate({"data": {"path": "tasks/birds.jsonl"}, **task}) for task in tasks)
    evaluation = plan.recipe.evaluation.model_copy(update={"tasks": asked})
    return replace(plan, recipe=plan.recipe.model_copy(update={"evaluation": evaluation}))


def measured_task(name: str, **values: object) -> dict[str, object]:
    known = {"num_documents": 50, "limit": None, "num_fewshot": 0, "score_error": None, "base_error": None}
    rest = {"metric": "acc", "filter": "none", "definition_sha256": "", "documents": BIRDS, "examples": None}
    computed = {"device": "cpu", "dtype": "float32", "base_dtype": "float32", "kernel": "", "versions": {}}
    scores = {"chat": False, "score": 0.5, "base_score": 0.5, "recovery": 1.0, "recovery_error": None}
    return {"name": name, **known, **rest, **computed, **scores, **values}


BIRDS: dict[str, object] = {"source": "birds.jsonl", "sha256": ["0" * 64]}
ALL: Mapping[str, object] = {"name": "birds"}
LIMITED: Mapping[str, object] = {"name": "birds", "limit": 10}
SHOT: Mapping[str, object] = {"name": "nests", "limit": 5, "num_fewshot": 3}


def test_tasks_take_a_time_for_each_document_where_their_number_is_known(tiny: Path) -> None:
    """100 s for 50 documents and for 25 with one example each: one second for each of these texts."""
    dist, plan = tiny / "dist", make_plan(RecipeFile.load(tiny / "recipe.yaml"))
    set_seconds(dist, quantize=2.0, pack=1.0, evaluate=3.0, verify=0.5, tasks=100.0)

    def seconds(*tasks: Mapping[str, object]) -> float | None:
        (found,) = durations(with_tasks(plan, *tasks), dist)
        return found.seconds["tasks"]

    assert seconds(ALL) is None, "nobody measured tasks"
    paths = sorted((dist / "receipts" / tiny_recipe.REPOSITORY).glob("*.json"))
    for number, path in enumerate(paths):
        receipt = json.loads(path.read_text())
        songs = measured_task("songs", num_documents=25, num_fewshot=1, limit=25)
        # The last variant is one that transformers refused: it has no tasks, and no time was spent on them.
        receipt["provenance"]["tasks"] = [measured_task("birds"), songs] if number < len(paths) - 1 else []
        receipt["seconds"]["tasks"] = 100.0 if number < len(paths) - 1 else 0.0
        path.write_text(json.dumps(receipt))
    models = len(BRANCHES) + 1
    known: tuple[tuple[tuple[Mapping[str, object], ...], int], ...] = (
        ((ALL,), 50),
        ((LIMITED,), 10),
        (({"name": "birds", "limit": 400},), 50),
        ((ALL, SHOT), 50 + 5 * 4),
        (({"name": "songs", "limit": 5},), 5 * 2),
        # A limit that was reached says nothing of a larger one; the recipe's own limit is the most that can be asked.
        (({"name": "songs", "limit": 400},), 400 * 2),
    )
    for tasks, texts in known:
        assert seconds(*tasks) == pytest.approx(models * texts, rel=0.02), tasks
    unknown: tuple[Mapping[str, object], ...] = (
        {"name": "nests"},
        {"name": "nests", "limit": 5},
        {"name": "songs"},
        {"name": "birds", "data": {"path": "tasks/others.jsonl"}},
    )
    assert [task for task in unknown if seconds(ALL, task) is not None] == []
    refused = tuple(replace(verdict, can_load=False) for verdict in plan.variants[0].verdicts)
    some = replace(plan, variants=(replace(plan.variants[0], verdicts=refused), *plan.variants[1:]))
    (found,) = durations(with_tasks(some, ALL), dist)
    assert found.seconds["tasks"] == pytest.approx((models - 1) * 50, rel=0.02)
    (line,) = time_lines(durations(with_tasks(plan, ALL), dist))
    assert "verify 0 s, tasks 3 min 17 s)" in line
    (line,) = time_lines(durations(with_tasks(plan, {"name": "nests"}), dist))
    assert "without tasks, not measured there" in line


def test_the_references_have_no_time_of_tasks() -> None:
    plan = with_tasks(plan_of("demo-llama.yaml"), ALL)
    found = durations(plan, Path("nowhere"))
    assert [each.seconds["tasks"] for each in found] == [None]
    assert "without pack and tasks, not measured there" in time_lines(found)[0]


def test_receipts_that_cannot_be_read_are_left_out(tiny: Path) -> None:
    dist, plan = tiny / "dist", make_plan(RecipeFile.load(tiny / "recipe.yaml"))
    set_seconds(dist, quantize=2.0, pack=1.0, evaluate=3.0, verify=0.5)
    first, second, third = (workspace(dist).receipt_path(branch) for branch in BRANCHES)
    first.write_text("{")
    second.unlink()
    os.mkfifo(second)
    (found,) = durations(plan, dist)
    assert found.here
    assert found.measured.seconds["quantize"] == 2.0
    third.unlink()
    third.symlink_to("/etc/passwd")
    assert not any(each.here for each in durations(plan, dist))


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (18_600, "5 h 10 min"), (-1, "0 s")]
)
def test_a_time_in_words(seconds: float, text: str) -> None:
    assert rough_time(seconds) == text
