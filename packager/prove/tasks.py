"""Stage 8, verify, tasks: lm-evaluation-harness in an environment of its own, on the fp16 model and on each variant.

The program reads the model, the documents and nothing else; what it writes is checked as if others had written it. No
code of a dataset or a definition runs: documents are files of plain formats, definitions are data (recipe/task_models).
"""

import json
import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from packager.errors import LoaderError
from packager.prove.environments import RuntimeContext, ensure_environment, environment_in_use
from packager.prove.loaders import LOADERS, LoaderSpec
from packager.prove.probes import TAIL_LINES, probe_environ, runtime_view
from packager.prove.task_figures import mean_with_error, recovery_of
from packager.recipe.task_models import TASK_DATA_FORMATS, EvaluationTask, TaskDefinition
from packager.records import Record, TaskDocuments, TaskRecord
from packager.system.confinement import confined_command, private_folder
from packager.system.files import disk_errors, open_regular
from packager.system.processes import ending, tail

_HERE = Path(__file__).parent / "loaders"
TASKS_SPEC = LoaderSpec(
    name="lm-eval",
    script=_HERE / "lm_eval_script.py",
    requirements=_HERE / "requirements" / "lm-eval.txt",
    devices=frozenset({"cpu", "cuda"}),
    requires_python=LOADERS["transformers"].requires_python,
    description="lm-evaluation-harness 0.4.13 with transformers 5.23 and GPTQModel 7.7",
)
# Longest time without a line of progress: reading a 13B model from a cold disk, or one batch of long documents.
TASK_SILENCE_S = 3600.0
_MOST_RESULT_BYTES = 200_000_000
_MOST_DOCUMENTS = 1_000_000
# lm-eval adds the same numbers in another order.
_SAME = 1e-9

_Text = Annotated[str, Field(max_length=1000)]


class TaskScores(Record):
    """What a model scores in a task.

    Attributes:
        values: of each document.
        prompts_sha256: of all prompts and answers, so that two models were asked the same.
        score: lm-eval's own mean.
        num_fewshot: examples before each document.
        version: of the task.
    """

    values: Annotated[tuple[float, ...], Field(min_length=1, max_length=_MOST_DOCUMENTS)]
    prompts_sha256: _Text
    score: float
    num_fewshot: int
    version: _Text


class ModelScores(Record):
    """What a model scores in every task of a recipe, and how it was computed."""

    tasks: dict[_Text, TaskScores]
    versions: dict[_Text, _Text]
    device: _Text
    dtype: _Text
    kernel: _Text
    weights_sha256: Annotated[dict[_Text, _Text], Field(max_length=10_000)]


class _Success(ModelScores):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    status: Literal["ok"]


class _Failure(BaseModel):
    status: Literal["error"]
    type: _Text
    message: str
    traceback: str = ""


_WRITTEN: TypeAdapter[_Success | _Failure] = TypeAdapter(Annotated[_Success | _Failure, Field(discriminator="status")])


@dataclass(frozen=True, kw_only=True)
class TaskInput:
    """A task, its definition if one came with the recipe, and the files of its documents by what they are for.

    Attributes:
        task: as the recipe names it.
        definition: the content of its file.
        definition_sha256: of that file; "" without one.
        files: by "test" and "fewshot".
        documents: the same for the record.
    """

    task: EvaluationTask
    definition: TaskDefinition | None
    definition_sha256: str
    files: Mapping[str, Sequence[Path]]
    documents: Mapping[str, TaskDocuments]

    def request(self) -> dict[str, object]:
        """Return the task as the script reads it."""
        task = self.task
        return {
            "name": task.name,
            "definition": None if self.definition is None else self.definition.content(),
            "builder": _builder(self.files["test"][0]),
            "data": {key: [str(path.resolve()) for path in paths] for key, paths in self.files.items()},
            "metric": task.metric,
            "filter": task.filter,
            "num_fewshot": task.num_fewshot,
            "limit": task.limit,
            "chat": task.chat,
        }


@dataclass(frozen=True, kw_only=True)
class TasksModel:
    """A model to measure.

    Attributes:
        name: a branch, or what the fp16 model is called in messages.
        folder: with its files.
        is_quantized: whether it is a checkpoint of ours.
        weights_sha256: of its weights files, by name.
    """

    name: str
    folder: Path
    is_quantized: bool
    weights_sha256: Mapping[str, str]


def measure_tasks(
    model: TasksModel, inputs: Sequence[TaskInput], device: str, context: RuntimeContext, spec: LoaderSpec = TASKS_SPEC
) -> ModelScores:
    """Run every task on one model, in a confined process of its own.

    Args:
        model: what is measured.
        inputs: the tasks.
        device: "cpu" or "cuda".
        context: `scratch` gets the job and its result.
        spec: the environment and the script; tests replace it.

    Raises:
        LoaderUnavailableError: the environment cannot be made on this machine.
        LoaderError: the program failed, or wrote something that cannot be used.
    """
    if context.confinement == "none":
        context.log(f"{spec.name}: runs unconfined, with this machine's network and files")
    python = ensure_environment(spec, context)
    output = context.scratch / spec.name / model.name
    with disk_errors(output):
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir(parents=True)
        request = {
            "model_dir": str(model.folder.absolute()),
            "is_quantized": model.is_quantized,
            "device": spec.device_on(device),
            "output_dir": str(output.absolute()),
            "tasks": [each.request() for each in inputs],
        }
        (output / "job.json").write_text(json.dumps(request), encoding="utf-8")
    with environment_in_use(python):
        failure = _run(model, inputs, python, output, spec, spec.device_on(device), context)
    return _read(output / "result.json", model, inputs, failure)


def _run(
    model: TasksModel,
    inputs: Sequence[TaskInput],
    python: Path,
    output: Path,
    spec: LoaderSpec,
    device: str,
    context: RuntimeContext,
) -> str:
    """Run the script; return how it ended, and its last lines."""
    files = [path.resolve() for each in inputs for paths in each.files.values() for path in paths]
    # Of a snapshot of the Hub's cache, the files themselves are elsewhere.
    own = [model.folder, *(path.resolve() for path in model.folder.iterdir())]
    command = [str(python), "-I", str(spec.script.absolute()), str((output / "job.json").absolute())]
    with private_folder() as private:
        log = private / "stderr.txt"
        view = runtime_view(
            spec, python, private, context, device=device, readable=[*own, *files], writable=[output]
        )  # fmt: skip
        with (private / "stdout.txt").open("wb") as out, log.open("wb") as err:
            status = context.processes.run(
                confined_command(command, view, context.confinement),
                folder=output,
                environ=probe_environ(python, context.environ, device, private),
                out=out,
                err=err,
                timeout_s=TASK_SILENCE_S,
                progress=lambda: log.stat().st_size,  # a line for each batch
            )
        how = f"it wrote nothing for {TASK_SILENCE_S:g} s and was killed" if status is None else ending(status)
        return f"{how}\n{tail(log, TAIL_LINES)}"


def _read(path: Path, model: TasksModel, inputs: Sequence[TaskInput], failure: str) -> ModelScores:
    """Return what the script wrote, after checking it."""
    what, where = "lm-eval did not measure the tasks", model.name
    try:
        with open_regular(path) as stream:
            text = stream.read(_MOST_RESULT_BYTES + 1)
        if len(text) > _MOST_RESULT_BYTES:
            raise ValueError(f"result.json has over {_MOST_RESULT_BYTES} bytes")
        written = _WRITTEN.validate_json(text)
    except FileNotFoundError as error:
        raise LoaderError(what, where=where, why=failure) from error
    except (OSError, ValidationError, ValueError) as error:
        raise LoaderError(what, where=where, why=f"its result cannot be used: {str(error)[:400]}") from error
    if isinstance(written, _Failure):
        lines = written.traceback[-4000:].rstrip().splitlines()[-TAIL_LINES:]
        raise LoaderError(what, where=where, why="\n".join([f"{written.type}: {written.message[:2000]}", *lines]))
    if problem := _problem(written, model, inputs):
        raise LoaderError(what, where=where, why=problem)
    return ModelScores(**written.model_dump(exclude={"status"}))


def _problem(scores: ModelScores, model: TasksModel, inputs: Sequence[TaskInput]) -> str:
    """Return why scores cannot be those of this model in these tasks, or ""."""
    if dict(scores.weights_sha256) != dict(model.weights_sha256):
        return "it read other weights than were packed (sha256)"
    if set(scores.tasks) != {each.task.name for each in inputs}:
        return f"it has results of {', '.join(scores.tasks) or 'no task'}"
    for name, found in scores.tasks.items():
        mean, _ = mean_with_error(found.values)
        if not math.isclose(mean, found.score, abs_tol=_SAME):
            return f"{name}: its score {found.score} is not the mean {mean} of its documents"
        if not all(0 <= value <= 1 for value in found.values):
            return f"{name}: a document scores less than 0 or more than 1"
    return ""


def task_records(
    inputs: Sequence[TaskInput], scores: ModelScores, base: ModelScores, branch: str
) -> tuple[TaskRecord, ...]:
    """Return the records of a variant, in the recipe's order.

    Raises:
        LoaderError: the two models were not asked the same, so that their scores cannot be compared.
    """
    records = []
    for each in inputs:
        task, own, other = each.task, scores.tasks[each.task.name], base.tasks[each.task.name]
        asked = {(found.prompts_sha256, len(found.values), found.num_fewshot) for found in (own, other)}
        if len(asked) > 1:
            raise LoaderError(
                "the variant and the fp16 model were not asked the same", where=f"{branch}, task {task.name}",
                why="their prompts differ: the tokenizer's chat template, or the documents, are others",
            )  # fmt: skip
        score, score_error = mean_with_error(own.values)
        base_score, base_error = mean_with_error(other.values)
        recovery, recovery_error = recovery_of(own.values, other.values)
        records.append(
            TaskRecord(
                name=task.name,
                metric=task.metric,
                filter=task.filter,
                definition_sha256=each.definition_sha256,
                documents=each.documents["test"],
                examples=each.documents.get("fewshot"),
                num_fewshot=own.num_fewshot,
                num_documents=len(own.values),
                limit=task.limit,
                chat=task.chat,
                score=score,
                score_error=score_error,
                base_score=base_score,
                base_error=base_error,
                recovery=recovery,
                recovery_error=recovery_error,
                device=scores.device,
                dtype=scores.dtype,
                base_dtype=base.dtype,
                kernel=scores.kernel,
                versions=scores.versions,
            )
        )
    return tuple(records)


def _builder(path: Path) -> str:
    return TASK_DATA_FORMATS[path.suffix.lower()]
