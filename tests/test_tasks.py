"""Tasks: what a recipe may say of them, the figures, and the stage, with a toy in the place of lm-evaluation-harness.

`test_tasks_release.py` runs the program itself.
"""

import hashlib
import json
import random
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from huggingface_hub import parse_eval_result_entries
from huggingface_hub.repocard_data import model_index_to_eval_results
from ruamel.yaml import YAML

from packager.card import CardTexts, render_card
from packager.card.task_scores import leaderboard_files
from packager.errors import LoaderError, RecipeError, SourceError
from packager.pipeline import task_stage
from packager.pipeline.flow import BuildResult
from packager.prove import tasks as prove_tasks
from packager.prove.environments import RuntimeContext
from packager.prove.task_figures import mean_with_error, recovery_of
from packager.receipt import PROVENANCE, Provenance, Receipt
from packager.recipe import Recipe
from packager.recipe.file import RecipeFile
from packager.recipe.task_models import EvaluationTask, read_definition
from packager.records import TaskDocuments, TaskRecord
from tests.card_fixtures import minimal_receipts, minimal_recipe
from tests.card_page import assert_well_formed, front_matter
from tests.earlier_recipes import earlier_digest
from tests.golden_files import check_golden
from tests.tiny_recipe import MAIN, build, workspace, write_all, write_recipe

TOY = Path(__file__).with_name("toy_lm_eval.py")
DEFINITION = """
task: birds
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
DOCUMENTS = 20
BIRDS = {"name": "birds", "definition": "birds.yaml", "data": {"path": "birds.jsonl"}}


def write_tasks(folder: Path, definition: str = DEFINITION, count: int = DOCUMENTS) -> None:
    (folder / "birds.yaml").write_text(definition)
    rows = [{"question": "old bird", "choices": ["sings", "walks"], "answer": n % 2} for n in range(count)]
    (folder / "birds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def jackknife(values: list[float], base: list[float]) -> float:
    """Return the standard error of mean(values) / mean(base) by leaving out one document after the other."""
    count = len(values)
    left = [
        (sum(values) - own) / (sum(base) - other) for own, other in zip(values, base, strict=True)
    ]  # fmt: skip
    mean = fmean(left)
    return float(((count - 1) / count * sum((each - mean) ** 2 for each in left)) ** 0.5)


@pytest.mark.parametrize("seed", range(5))
def test_the_error_of_a_recovery_is_that_of_the_jackknife(seed: int) -> None:
    dice = random.Random(seed)
    base = [float(dice.random() < 0.7) for _ in range(2000)]
    values = [float(dice.random() < (0.9 if known else 0.1)) for known in base]
    ratio, error = recovery_of(values, base)
    assert ratio == pytest.approx(float(Fraction(int(sum(values)), int(sum(base)))), abs=1e-12)
    assert error == pytest.approx(jackknife(values, base), rel=2e-3)


def test_scores_that_move_together_leave_a_small_error() -> None:
    dice = random.Random(0)
    base = [float(dice.random() < 0.5) for _ in range(1000)]
    _, single = mean_with_error(base)
    flipped = [1 - value if number == 7 else value for number, value in enumerate(base)]
    _, error = recovery_of(flipped, base)
    assert single is not None
    assert error is not None
    assert error < single / 5


@pytest.mark.parametrize(
    ("values", "base", "expected"),
    [
        ([0.0] * 10, [0.0] * 10, (None, None)),
        ([1.0] * 10, [1.0] * 10, (1.0, None)),
        ([1.0, 0.0], [1.0, 1.0], (0.5, None)),
    ],
)
def test_what_has_no_recovery_or_no_error(values: list[float], base: list[float], expected: tuple[Any, Any]) -> None:
    assert recovery_of(values, base) == expected


def test_a_sample_without_a_mistake_has_no_error() -> None:
    assert mean_with_error([1.0] * 50) == (1.0, None)
    assert mean_with_error([1.0] * 49 + [0.0])[1] == pytest.approx(0.02)
    assert mean_with_error([1.0, 0.0])[1] is None


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    """The toy in the place of the program, in this Python."""
    spec = replace(prove_tasks.TASKS_SPEC, script=TOY)
    monkeypatch.setattr(prove_tasks, "ensure_environment", lambda *_: Path(sys.executable))

    def measure(
        model: prove_tasks.TasksModel, inputs: Sequence[prove_tasks.TaskInput], device: str, context: RuntimeContext
    ) -> prove_tasks.ModelScores:
        return prove_tasks.measure_tasks(model, inputs, device, replace(context, confinement="none"), spec)

    monkeypatch.setattr(task_stage, "measure_tasks", measure)


def asked(dist: Path) -> list[str]:
    """Return which models were measured since the last call, in order."""
    path = workspace(dist).work.parent / "asked.txt"
    found = path.read_text().split() if path.exists() else []
    path.unlink(missing_ok=True)
    return found


@pytest.fixture
def recipe(tmp_path: Path, toy: None) -> Path:
    write_all(tmp_path, TWO)
    write_tasks(tmp_path)
    return write_recipe(tmp_path, {**TWO, "evaluation.tasks": [BIRDS]})


TWO: dict[str, Any] = {"variants": [{"branch": MAIN}, {"branch": "three-bits", "bits": 3}]}


def changed(recipe: Path, *tasks: Mapping[str, Any]) -> BuildResult:
    return build(write_recipe(recipe.parent, {**TWO, "evaluation.tasks": list(tasks)}), recipe.parent / "dist")


def receipt(dist: Path, branch: str = MAIN) -> Receipt:
    found = workspace(dist).read_receipt(branch)
    assert found is not None
    return found


def record(dist: Path, branch: str = MAIN) -> TaskRecord:
    (found,) = receipt(dist, branch).provenance.tasks
    return found


def test_a_build_measures_the_base_once_and_each_variant(recipe: Path) -> None:
    dist = recipe.parent / "dist"
    assert build(recipe, dist).scored == (MAIN, "three-bits")
    assert asked(dist) == ["base", MAIN, "three-bits"]
    found = record(dist)
    # 15 of 20 documents are known to the base model, 8 of these to a checkpoint.
    assert (found.num_documents, found.base_score, found.score) == (20, 0.75, 0.4)
    assert found.recovery == pytest.approx(8 / 15)
    assert found.documents.source == "birds.jsonl"
    assert found.definition_sha256
    published = json.loads((workspace(dist).folder(MAIN) / PROVENANCE).read_text())
    assert published["tasks"] == [found.model_dump(mode="json")]
    page = (workspace(dist).folder(MAIN) / "README.md").read_text().replace("\u00a0", " ")
    assert "| birds | acc | `main` | 75 ± 20 | 40 ± 22 | 53 ± 26 |" in page
    again = build(recipe, dist)
    assert again.nothing_to_do
    assert asked(dist) == []


@pytest.mark.slow
def test_what_changes_a_score_is_measured_again_and_nothing_else_is(recipe: Path) -> None:
    dist = recipe.parent / "dist"
    build(recipe, dist)
    asked(dist)
    board = {"leaderboard": {"dataset": "nobody/birds", "task_id": "default"}}
    assert not changed(recipe, BIRDS | board).scored
    assert asked(dist) == []
    limited = changed(recipe, BIRDS | {"limit": 12})
    assert (limited.quantized, limited.measured, limited.verified) == ((), (), ())
    assert limited.scored == (MAIN, "three-bits")
    assert asked(dist) == ["base", MAIN, "three-bits"]
    assert record(dist).num_documents == 12
    write_tasks(recipe.parent, DEFINITION.replace("{{question}}", "Q: {{question}}"))
    assert changed(recipe, BIRDS | {"limit": 12}).scored
    assert asked(dist) == ["base", MAIN, "three-bits"]


@pytest.mark.slow
def test_a_damaged_file_of_base_scores_is_not_used(recipe: Path) -> None:
    dist = recipe.parent / "dist"
    build(recipe, dist)
    kept = workspace(dist).base_scores
    right = kept.read_text()
    asked(dist)
    kept.write_text(right.replace('"dtype":"float32"', '"dtype":1'))
    workspace(dist).receipt_path(MAIN).write_text(
        receipt(dist).model_copy(update={"stages": {**receipt(dist).stages, "tasks": "other"}}).model_dump_json()
    )  # fmt: skip
    assert build(recipe, dist).scored == (MAIN,)
    assert asked(dist) == ["base", MAIN]
    assert kept.read_text() == right


@pytest.mark.slow
def test_a_recipe_without_tasks_has_no_trace_of_them(recipe: Path) -> None:
    dist = recipe.parent / "dist"
    build(recipe, dist)
    assert changed(recipe).scored == ()
    found = receipt(dist)
    assert "tasks" not in found.stages
    assert "tasks" not in json.loads((workspace(dist).folder(MAIN) / PROVENANCE).read_text())
    assert "### Tasks" not in (workspace(dist).folder(MAIN) / "README.md").read_text()
    changed(recipe, BIRDS)
    assert record(dist).num_documents == 20


def measure_toy(folder: Path, name: str, *, is_quantized: bool, defect: str = "") -> prove_tasks.ModelScores:
    """Let the toy measure a model whose only weights file is one byte."""
    (folder / "toy").mkdir(exist_ok=True)
    (folder / "toy" / "model.safetensors").write_bytes(b"w")
    (folder / "defect.txt").write_text(defect)
    model = prove_tasks.TasksModel(
        name=name,
        folder=folder / "toy",
        is_quantized=is_quantized,
        weights_sha256={"model.safetensors": hashlib.sha256(b"w").hexdigest()},
    )
    context = RuntimeContext(
        cache=folder, scratch=folder / "work" / "tasks", environ={}, log=print, confinement="none"
    )  # fmt: skip
    return prove_tasks.measure_tasks(
        model, toy_inputs(folder), "cpu", context, replace(prove_tasks.TASKS_SPEC, script=TOY)
    )


def toy_inputs(folder: Path) -> tuple[prove_tasks.TaskInput, ...]:
    write_tasks(folder)
    definition, _ = read_definition(folder / "birds.yaml", "birds")
    documents = TaskDocuments(source="birds.jsonl", sha256=("0" * 64,))
    return (
        prove_tasks.TaskInput(
            task=EvaluationTask.model_validate(BIRDS), definition=definition, definition_sha256="1" * 64,
            files={"test": [folder / "birds.jsonl"]}, documents={"test": documents},
        ),
    )  # fmt: skip


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("defect", "why"),
    [
        ("fails", "ValueError: no such metric"),
        ("dies", "a line of its own"),
        ("damaged", "its result cannot be used"),
        ("forgets", "it has results of no task"),
        ("another mean", "is not the mean"),
        ("scores two", "a document scores less than 0 or more than 1"),
        ("reads otherwise", "it read other weights than were packed"),
    ],
)
def test_results_that_cannot_be_right_are_refused(tmp_path: Path, defect: str, why: str) -> None:
    with pytest.raises(LoaderError) as caught:
        measure_toy(tmp_path, MAIN, is_quantized=True, defect=defect)
    assert why in str(caught.value)


@pytest.mark.usefixtures("toy")
def test_scores_of_other_prompts_are_not_compared(tmp_path: Path) -> None:
    base = measure_toy(tmp_path, "base", is_quantized=False)
    own = measure_toy(tmp_path, MAIN, is_quantized=True)
    inputs = toy_inputs(tmp_path)
    (found,) = prove_tasks.task_records(inputs, own, base, MAIN)
    assert (found.score, found.base_score) == (0.4, 0.75)
    other = measure_toy(tmp_path, MAIN, is_quantized=True, defect="asks otherwise")
    with pytest.raises(LoaderError, match="were not asked the same"):
        prove_tasks.task_records(inputs, other, base, MAIN)


@pytest.mark.slow
def test_a_program_that_fails_leaves_the_other_results(recipe: Path) -> None:
    dist = recipe.parent / "dist"
    marks = workspace(dist).work.parent
    marks.mkdir(parents=True, exist_ok=True)
    (marks / "defect.txt").write_text("fails")
    with pytest.raises(LoaderError):
        build(recipe, dist)
    assert receipt(dist).provenance.quality is not None
    assert receipt(dist).provenance.tasks == ()
    (marks / "defect.txt").unlink()
    assert build(recipe, dist).scored == (MAIN, "three-bits")


def with_records(path: Path, *tasks: Mapping[str, Any]) -> tuple[Recipe, Provenance]:
    """Return a recipe with tasks, and an invented receipt of its only variant with a score of 0.4 in each."""
    given = minimal_recipe().model_dump()
    given["evaluation"]["tasks"] = tasks
    recipe = Recipe.model_validate(given)
    base, own = (measure_toy(path, name, is_quantized=name == MAIN) for name in ("base", MAIN))
    (record,) = prove_tasks.task_records(toy_inputs(path), own, base, MAIN)
    made = []
    for task in recipe.evaluation.tasks:
        data = task.data
        documents = TaskDocuments(
            source=data.dataset or str(data.path), revision=data.revision, config=data.config, split=data.split,
            sha256=("0" * 64,),
        )  # fmt: skip
        made.append(record.model_copy(update={"name": task.name, "documents": documents, "limit": task.limit}))
    (common,) = minimal_receipts(minimal_recipe())
    return recipe, common.model_copy(update={"tasks": tuple(made)})


DATASET = {"dataset": "nobody/birds", "revision": "0" * 40, "split": "test", "config": "small"}
ON_THE_HUB = (
    {"name": "birds", "data": DATASET, "limit": 20},
    {"name": "songs", "data": DATASET, "leaderboard": {"dataset": "nobody/birds", "task_id": "sing"}},
    {
        "name": "nests",
        "data": {"path": "nests.jsonl"},
        "leaderboard": {"dataset": "nobody/nests", "task_id": "default", "percent": False},
    },
    {"name": "eggs", "data": {"path": "eggs.jsonl"}},
)


@pytest.mark.usefixtures("toy")
def test_the_hub_s_client_reads_the_leaderboard_files(tmp_path: Path) -> None:
    recipe, provenance = with_records(tmp_path, *ON_THE_HUB)
    files = leaderboard_files(recipe, provenance)
    assert list(files) == [".eval_results/songs.yaml", ".eval_results/nests.yaml"]
    songs, nests = (parse_eval_result_entries(YAML(typ="safe").load(data))[0] for data in files.values())
    assert (songs.dataset_id, songs.task_id, songs.dataset_revision, songs.value) == (
        "nobody/birds", "sing", "0" * 40, 40.0,
    )  # fmt: skip
    assert songs.notes == "GPTQ 4-bit, whole rows; lm-evaluation-harness 0.4.13; acc, 0-shot"
    # Documents of a file are no revision of that dataset, and this leaderboard counts from 0 to 1.
    assert (nests.dataset_id, nests.value) == ("nobody/nests", 0.4)
    assert b"revision" not in files[".eval_results/nests.yaml"]


@pytest.mark.usefixtures("toy")
def test_the_hub_s_client_reads_the_model_index(tmp_path: Path) -> None:
    recipe, provenance = with_records(tmp_path, *ON_THE_HUB)
    page = render_card(recipe, CardTexts(), [provenance], "llama", MAIN)
    index: Any = front_matter(page)["model-index"]
    name, (result,) = model_index_to_eval_results(index)
    assert name == "tiny-GPTQ"
    assert (result.dataset_type, result.dataset_config, result.dataset_split, result.dataset_revision) == (
        "nobody/birds", "small", "test", "0" * 40,
    )  # fmt: skip
    assert (result.metric_type, result.metric_value) == ("acc", 0.4)
    assert result.metric_name == "acc, 0-shot, the first 20 documents"


@pytest.mark.usefixtures("toy")
def test_the_card_has_a_row_for_each_task(tmp_path: Path, update_golden: bool) -> None:
    recipe, provenance = with_records(tmp_path, *ON_THE_HUB)
    page = render_card(recipe, CardTexts(), [provenance], "llama", MAIN)
    assert_well_formed(page)
    section = page[page.index("### Tasks") : page.index("## Repositories available")]
    check_golden("cards/tasks.md", section, update=update_golden)
    none = render_card(recipe, CardTexts(), [provenance.model_copy(update={"tasks": ()})], "llama", MAIN)
    assert "birds, songs, nests, eggs: not measured." in none


def test_documents_are_fetched_before_anything_is_quantized(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise SourceError("the Hub has no such dataset")

    monkeypatch.setattr(task_stage, "download_split", refuse)
    data = {"dataset": "nobody/birds", "revision": "0" * 40, "split": "test"}
    with pytest.raises(SourceError, match="no such dataset"):
        changed(recipe, {**BIRDS, "data": data})
    assert not workspace(recipe.parent / "dist").folder(MAIN).exists()
    assert not list(workspace(recipe.parent / "dist").work.rglob("*.safetensors"))


def problems(folder: Path, *tasks: Mapping[str, Any]) -> str:
    with pytest.raises(RecipeError) as caught:
        RecipeFile.load(write_recipe(folder, {**TWO, "evaluation.tasks": list(tasks)}))
    return str(caught.value)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_all(folder, TWO)
    return folder


@pytest.mark.parametrize(
    ("definition", "message"),
    [
        (DEFINITION + "process_docs: !function utils.process\n", "birds.yaml:8:15: the tag '!function' is refused"),
        (DEFINITION + "process_results: os.system\n", "process_results: Extra inputs are not permitted"),
        (DEFINITION + "dataset_path: nobody/other\n", "dataset_path: Extra inputs are not permitted"),
        (DEFINITION + "include: ../../other.yaml\n", "include: Extra inputs are not permitted"),
        (DEFINITION.replace("{metric: acc}", "{metric: perplexity}"), "metric_list.0.metric"),
        (DEFINITION.replace("{metric: acc}", "{metric: acc, hf_evaluate: true}"), "hf_evaluate"),
        (DEFINITION.replace("{{question}}", "{% if %}"), "is not a Jinja template"),
        (DEFINITION.replace("task: birds", "task: fish"), "its task is fish, the recipe's is birds"),
        (DEFINITION.replace('doc_to_choice: "{{choices}}"\n', ""), "a multiple_choice task needs doc_to_choice"),
        ("- a list\n", "valid dictionary"),
        ("task: *birds\n", "the alias *birds is refused"),
    ],
)
def test_a_definition_is_data(inputs: Path, definition: str, message: str) -> None:
    write_tasks(inputs, definition)
    assert message in problems(inputs, BIRDS)


def test_the_refusal_of_a_function_says_what_to_write(inputs: Path) -> None:
    write_tasks(inputs, DEFINITION + "doc_to_text_2: !function utils.text\n")
    assert "a definition of a recipe names no code: write the prompt as a Jinja template" in problems(inputs, BIRDS)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data": {"path": "fish.jsonl"}}, "evaluation.tasks[0].data.path: there is no file 'fish.jsonl'"),
        ({"data": {"path": "calibration.txt"}}, "'calibration.txt' is of a format that is not read"),
        ({"data": {}}, "evaluation.tasks[0].data: give either path (a local file) or dataset (on the Hub)"),
        ({"data": {"dataset": "a/b", "split": "test"}}, "a Hub dataset needs its revision and split"),
        ({"definition": "fish.yaml"}, "evaluation.tasks[0].definition: there is no file 'fish.yaml'"),
        ({"fewshot": {"path": "birds.jsonl"}}, "the examples are the documents that are scored"),
        ({"fewshot": {"path": "birds.csv"}}, "the examples are of another format than the documents"),
        ({"metric": "acc norm"}, "evaluation.tasks[0].metric must be a name of letters"),
        ({"name": "../birds"}, "evaluation.tasks[0].name must be a name of letters"),
        ({"limit": 0}, "evaluation.tasks[0].limit must be at least 1"),
        ({"seed": 1}, "unknown key 'seed' in evaluation.tasks[0]"),
    ],
)
def test_a_task_that_cannot_be_measured_is_refused(inputs: Path, changes: Mapping[str, Any], message: str) -> None:
    write_tasks(inputs)
    (inputs / "birds.csv").write_text("question\n")
    assert message in problems(inputs, {**BIRDS, **changes})


def test_two_tasks_have_two_names(inputs: Path) -> None:
    write_tasks(inputs)
    assert "the task 'birds' is listed twice" in problems(inputs, BIRDS, BIRDS)


def test_documents_are_no_calibration_text(inputs: Path) -> None:
    write_tasks(inputs)
    with pytest.raises(RecipeError, match="the documents that are scored are a calibration text"):
        RecipeFile.load(
            write_recipe(
                inputs,
                {"calibration": {"path": "birds.jsonl", "text_field": "question"}, "evaluation.tasks": [BIRDS]},
            )
        )


def test_a_dataset_s_branch_is_pinned_by_the_lock(inputs: Path) -> None:
    data = {"dataset": "nobody/birds", "revision": "main", "split": "test"}
    message = problems(inputs, {"name": "birds", "data": data})
    assert "evaluation.tasks[0].data.revision is 'main', the lock recipe.lock.json has no commit of it" in message


def test_tasks_do_not_change_the_digests_of_recipes_without_them(inputs: Path) -> None:
    loaded = RecipeFile.load(write_recipe(inputs, TWO))
    assert "tasks" not in json.dumps(loaded.recipe.evaluation.text())
    assert loaded.recipe.digest() == earlier_digest(loaded.recipe)


@pytest.mark.slow
def test_a_record_without_tasks_has_the_bytes_that_it_had(recipe: Path) -> None:
    made = build(write_recipe(recipe.parent, TWO), recipe.parent / "dist").receipts[0].provenance
    assert "tasks" not in made.model_dump(mode="json")
    assert Provenance.model_validate_json(made.model_dump_json()) == made
