"""Stage 8, verify, tasks: the scores of every variant, and of the fp16 model, in the recipe's tasks.

The fp16 model is measured once for all variants; its scores are kept in the output folder, and read as if others had
written them: a file of other inputs, or a damaged one, is not used.
"""

import json
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from pydantic import ValidationError

from packager.errors import CalibrationError, MachineError, RecipeError
from packager.inputs.base_model import SourceModel
from packager.inputs.dataset_files import download_split
from packager.inputs.linked_weights import link_weights
from packager.pipeline.build_extra import require_build_extra
from packager.pipeline.build_state import BuildState
from packager.pipeline.variant_plan import VariantPlan
from packager.prove.environments import environment_name
from packager.prove.tasks import TASKS_SPEC, ModelScores, TaskInput, TasksModel, measure_tasks, task_records
from packager.receipt import CONFIG, TOKENIZER_FILES, digest_of
from packager.recipe.file import RecipeFile
from packager.recipe.task_models import TASK_DATA_FORMATS, EvaluationTask, TaskData, read_definition
from packager.records import Record, TaskDocuments
from packager.system.files import disk_errors, open_regular, sha256_file, write_atomic

_BASE = "fp16 base model"
_MOST_KEPT_BYTES = 200_000_000


class _KeptScores(Record):
    """The file of the fp16 model's scores; `key` is of everything that determines them."""

    key: str
    scores: ModelScores


def run_tasks(run: BuildState) -> tuple[str, ...]:
    """Measure the variants whose scores in the recipe's tasks are not known.

    Raises:
        LoaderError: the program failed on a model; variants that were measured before are kept.
        LoaderUnavailableError: its environment cannot be made on this machine.
    """
    missing = run.missing("tasks")
    if not missing:
        return ()
    require_build_extra()
    inputs = task_inputs(run.recipe_file)
    context = run.runtime_context(run.workspace.work / "tasks")
    with run.terminal.stage("tasks"), run.terminal.bar(len(missing) + 1) as bar:
        base = _base_scores(run, missing[0], inputs)
        bar.step(_BASE)
        for variant_plan in missing:
            branch, started = variant_plan.variant.branch, time.monotonic()
            if refusal := _refusal(variant_plan):
                run.terminal.log(f"{branch}: its tasks are not measured: {refusal}")
                run.update_receipt(branch, "tasks", 0.0, {"tasks": ()})
                bar.step(branch)
                continue
            receipt = run.receipts[branch]
            model = TasksModel(
                name=branch,
                folder=run.workspace.folder(branch),
                is_quantized=True,
                weights_sha256={name: record.sha256 for name, record in receipt.provenance.weights_files.items()},
            )
            records = task_records(inputs, measure_tasks(model, inputs, run.device.type, context), base, branch)
            run.update_receipt(branch, "tasks", time.monotonic() - started, {"tasks": records})
            bar.step(f"{branch} {', '.join(f'{record.name} {record.score:.4f}' for record in records)}")
    return tuple(variant_plan.variant.branch for variant_plan in missing)


def check_task_files(run: BuildState) -> None:
    """Read the definitions and fetch the documents of tasks that will be measured: before hours of quantizing.

    Raises:
        CalibrationError, RecipeError, SourceError: see `task_inputs`.
    """
    if run.missing("tasks"):
        task_inputs(run.recipe_file)


def _refusal(variant_plan: VariantPlan) -> str:
    """Return why transformers, in which the tasks are measured, does not open a variant, or ""."""
    verdicts = [verdict for verdict in variant_plan.verdicts if verdict.loader == "transformers"]
    return next((f"transformers: {verdict.reason}" for verdict in verdicts if not verdict.can_load), "")


def task_inputs(recipe_file: RecipeFile) -> tuple[TaskInput, ...]:
    """Return the tasks of a recipe with their definitions and the files of their documents.

    Raises:
        CalibrationError: a dataset's files are of a format that is not read.
        RecipeError: a definition was changed since the recipe was checked, and is none any more.
        SourceError: the Hub refused a dataset.
    """
    return tuple(_input(recipe_file, task) for task in recipe_file.recipe.evaluation.tasks)


def _input(recipe_file: RecipeFile, task: EvaluationTask) -> TaskInput:
    found = {key: _files(recipe_file, task, data) for key, data in task.sources.items()}
    formats = {TASK_DATA_FORMATS[path.suffix.lower()] for paths in found.values() for path in paths}
    if len(formats) > 1:
        raise CalibrationError(
            "the files of a task are of several formats", where=task.name, why=", ".join(sorted(formats)),
            hint="give documents and examples of one format",
        )  # fmt: skip
    definition, sha256 = None, ""
    if task.definition is not None:
        path = recipe_file.resolve(task.definition)
        sha256 = sha256_file(path)
        definition, problems = read_definition(path, task.name)
        if definition is None:
            raise RecipeError(f"{path}: {'; '.join(problem.message for problem in problems)}")
    documents = {
        key: TaskDocuments(
            source=data.dataset or Path(str(data.path)).name, revision=data.revision, config=data.config,
            split=data.split, sha256=tuple(map(sha256_file, found[key])),
        )
        for key, data in task.sources.items()
    }  # fmt: skip
    return TaskInput(
        task=task, definition=definition, definition_sha256=sha256, files=found, documents=documents
    )  # fmt: skip


def _files(recipe_file: RecipeFile, task: EvaluationTask, data: TaskData) -> list[Path]:
    if data.path is not None:
        return [recipe_file.resolve(data.path)]
    split = download_split(str(data.dataset), str(data.revision), data.config, str(data.split))
    paths = [file.path for file in split.files]
    if other := [path.name for path in paths if path.suffix.lower() not in TASK_DATA_FORMATS]:
        raise CalibrationError(
            "a file of a task is of a format that is not read", where=f"{task.name}: {other[0]}",
            why=f"read are {', '.join(TASK_DATA_FORMATS)}",
        )  # fmt: skip
    return paths


def _base_scores(run: BuildState, variant_plan: VariantPlan, inputs: Sequence[TaskInput]) -> ModelScores:
    """Return what the fp16 model scores: as an earlier run kept it, or measured now."""
    asked = [[each.request() | {"data": None}, each.definition_sha256] for each in inputs]
    documents = [{key: each.documents[key].sha256 for key in each.documents} for each in inputs]
    made = [run.source.record.digest, environment_name(TASKS_SPEC), sha256_file(TASKS_SPEC.script), run.device.type]
    prompts = {name: sha256_file(path) for name, path in _tokenizer_files(run, variant_plan).items()}
    key, path = digest_of([asked, documents, made, prompts]), run.workspace.base_scores
    if (kept := _kept(path, key)) is not None:
        run.terminal.log(f"the fp16 model's scores are those that an earlier run measured: {path}")
        return kept
    folder = run.workspace.work / "tasks" / "base"
    weights = _stage_base(run.source, folder, _tokenizer_files(run, variant_plan))
    model = TasksModel(name="base", folder=folder, is_quantized=False, weights_sha256=weights)
    context = run.runtime_context(run.workspace.work / "tasks")
    scores = measure_tasks(model, inputs, run.device.type, context)
    try:
        write_atomic(path, _KeptScores(key=key, scores=scores).model_dump_json().encode())
    except (MachineError, OSError) as error:
        run.terminal.log(f"the fp16 model's scores are not kept for the next run: {error}")
    return scores


def _kept(path: Path, key: str) -> ModelScores | None:
    try:
        with open_regular(path) as stream:
            kept = _KeptScores.model_validate_json(stream.read(_MOST_KEPT_BYTES))
    except (OSError, ValidationError):
        return None
    return kept.scores if kept.key == key else None


def _tokenizer_files(run: BuildState, variant_plan: VariantPlan) -> dict[str, Path]:
    """Return the tokenizer's files of a variant: both models are asked in the same tokens."""
    folder = run.workspace.folder(variant_plan.variant.branch)
    return {name: folder / name for name in TOKENIZER_FILES if (folder / name).is_file()}


def _stage_base(source: SourceModel, folder: Path, tokenizer: Mapping[str, Path]) -> dict[str, str]:
    """Make a folder that transformers opens as the fp16 model: configs and tokenizer as a branch has them, and links.

    Returns:
        The sha256 of each weights file by its name in the folder.
    """
    with disk_errors(folder):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        (folder / CONFIG).write_text(json.dumps(source.config), encoding="utf-8")
        for name, path in tokenizer.items():
            shutil.copyfile(path, folder / name)
        names = link_weights(source, folder)
    return {name: source.record.files[path.name].sha256 for path, name in names.items()}
