"""The models of a recipe's tasks, and of the definitions that come with it.

A definition is YAML in lm-evaluation-harness's own words, read by our reader, which knows no tags: `!function`, by
which that program imports and runs a Python file, is refused. Only the keys below are taken; none of them names code.
"""

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from packager.recipe.fields import PATTERN_MEANINGS, TASK_NAME, LineText, RepoId, Revision, Strict
from packager.recipe.paths import RelativePath
from packager.recipe.yaml import LocatedProblem, Position, decode, parse

# The program's readers of files, by the ending of a file's name. None of them runs anything of a file.
TASK_DATA_FORMATS: Final = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_MOST_TASKS: Final = 32


def _template(value: str) -> str:
    """Refuse a text that Jinja cannot read."""
    from jinja2 import TemplateSyntaxError  # most recipes have no task
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    try:
        ImmutableSandboxedEnvironment().parse(value)
    except TemplateSyntaxError as error:
        raise ValueError(f"is not a Jinja template: {error.message}") from error
    return value


TemplateText = Annotated[str, Field(max_length=20_000), AfterValidator(_template)]
TaskName = Annotated[str, Field(pattern=TASK_NAME, description=PATTERN_MEANINGS[TASK_NAME])]


class TaskData(Strict):
    """The documents of a task: a local file, or one split of a Hub dataset at a revision."""

    path: RelativePath | None = Field(default=None, description="a local file: .jsonl, .json, .csv or .parquet")
    dataset: RepoId | None = Field(default=None, description="a Hub dataset; instead of path")
    config: LineText | None = Field(default=None, description="the dataset's configuration")
    revision: Revision | None = Field(
        default=None, description="the dataset's commit, or a branch or tag whose commit the lock holds"
    )
    split: LineText | None = Field(default=None, description="the dataset's split, e.g. test")

    @model_validator(mode="after")
    def _one_source(self) -> "TaskData":
        if problem := task_data_problem(self.given_fields()):
            raise ValueError(problem)
        return self


def task_data_problem(given: frozenset[str]) -> str:
    """Return why these fields together do not name the documents of a task, or ""."""
    if ("path" in given) == ("dataset" in given):
        return "give either path (a local file) or dataset (on the Hub)"
    if "path" in given and given & {"config", "revision", "split"}:
        return "revision, split and config belong to a Hub dataset, not to a local file"
    if "dataset" in given and not given >= {"revision", "split"}:
        return "a Hub dataset needs its revision and split"
    return ""


class Leaderboard(Strict):
    """The leaderboard on the Hub that a task's score belongs to: a dataset that the Hub lists as a benchmark."""

    dataset: RepoId
    task_id: LineText = Field(description="the task's id in the eval.yaml of that dataset")
    percent: bool = Field(default=True, description="whether that leaderboard counts in per cent, and not from 0 to 1")


class EvaluationTask(Strict):
    """A task of lm-evaluation-harness, measured on the fp16 model and on every variant."""

    name: TaskName
    definition: RelativePath | None = Field(
        default=None, description="a YAML file with the task; left out: the task of this name that lm-eval comes with"
    )
    data: TaskData = Field(description="the documents that are scored")
    fewshot: TaskData | None = Field(
        default=None, title="Fewshot", description="the documents that examples are drawn from"
    )
    num_fewshot: int | None = Field(
        default=None, ge=0, le=64, description="examples before each document; left out: the definition's, or none"
    )
    metric: TaskName = Field(default="acc", description="a metric of the task that is a mean over documents")
    filter: TaskName = Field(default="none", description="which of the task's filters reads the answers")
    limit: int | None = Field(default=None, ge=1, description="take the first documents only; left out: all")
    chat: bool = Field(default=False, description="render prompts in the model's chat template")
    leaderboard: Leaderboard | None = Field(
        default=None, title="Leaderboard", description="write the score into .eval_results, from where the Hub takes it"
    )

    @property
    def sources(self) -> "dict[str, TaskData]":
        """The files of the task by what they are for."""
        return {"test": self.data, **({"fewshot": self.fewshot} if self.fewshot is not None else {})}


Tasks = Annotated[tuple[EvaluationTask, ...], Field(max_length=_MOST_TASKS)]


class _Metric(Strict):
    metric: Literal["acc", "acc_norm", "exact_match"]
    aggregation: Literal["mean"] = "mean"
    higher_is_better: Literal[True] = True
    ignore_case: bool = False
    ignore_punctuation: bool = False
    ignore_numbers: bool = False
    regexes_to_ignore: tuple[str, ...] = ()


class _FilterStep(Strict):
    function: Literal["take_first", "regex", "remove_whitespace", "lowercase", "uppercase"]
    regex_pattern: str | None = None
    group_select: int | None = None


class _Filter(Strict):
    name: TaskName
    filter: Annotated[tuple[_FilterStep, ...], Field(min_length=1)]


class _Generation(Strict):
    until: tuple[str, ...]
    max_gen_toks: int = Field(default=256, ge=1, le=8192)
    do_sample: Literal[False] = False


class TaskDefinition(Strict):
    """A definition that comes with a recipe: lm-eval's keys that only say how prompts and answers are written."""

    task: TaskName
    output_type: Literal["multiple_choice", "generate_until"]
    description: TemplateText | None = None
    doc_to_text: TemplateText
    doc_to_target: TemplateText
    doc_to_choice: TemplateText | tuple[str, ...] | None = None
    target_delimiter: str | None = None
    fewshot_delimiter: str | None = None
    num_fewshot: int | None = Field(default=None, ge=0, le=64)
    metric_list: Annotated[tuple[_Metric, ...], Field(min_length=1, max_length=8)]
    generation_kwargs: _Generation | None = None
    filter_list: tuple[_Filter, ...] | None = None

    @model_validator(mode="after")
    def _answers(self) -> "TaskDefinition":
        if self.output_type == "multiple_choice" and self.doc_to_choice is None:
            raise ValueError("a multiple_choice task needs doc_to_choice")
        if self.output_type == "generate_until" and self.generation_kwargs is None:
            raise ValueError("a generate_until task needs generation_kwargs with until")
        return self

    def content(self) -> dict[str, object]:
        """Return the keys that are given, for lm-eval."""
        return self.model_dump(mode="json", exclude_none=True, exclude_unset=True)


def read_definition(path: Path, name: str) -> tuple[TaskDefinition | None, list[LocatedProblem]]:
    """Read a task's definition.

    Args:
        path: of the file.
        name: of the task in the recipe.

    Returns:
        The definition, or what is wrong with it; positions are in the file, which they name.
    """
    try:
        text, problems = decode(path.read_bytes())
    except OSError as error:
        return None, [LocatedProblem(Position(1, 1, str(path)), f"it cannot be read: {error.strerror}")]
    root, found = (None, []) if problems else parse(text)
    problems = [*problems, *found]
    if problems or root is None:
        return None, [_of_file(problem, path) for problem in problems]
    try:
        made = TaskDefinition.model_validate(root.plain())
    except ValidationError as error:
        return None, [
            LocatedProblem(
                Position(1, 1, str(path)),
                f"{'.'.join(map(str, item['loc'])) or 'the definition'}: {item['msg']}",
                "code, other metrics and other data are no part of a definition"
                if item["type"] == "extra_forbidden"
                else "",
            )
            for item in error.errors(include_url=False, include_input=False)
        ]
    if made.task != name:
        return None, [LocatedProblem(Position(1, 1, str(path)), f"its task is {made.task}, the recipe's is {name}")]
    return made, []


def _of_file(problem: LocatedProblem, path: Path) -> LocatedProblem:
    hint = problem.hint
    if "!function" in problem.message:
        hint = "a definition of a recipe names no code: write the prompt as a Jinja template"
    return LocatedProblem(problem.at._replace(source=str(path)), problem.message, hint)
