"""Scores of tasks for readers and for the Hub: the card's figures, `.eval_results` and the front matter's model-index.

The Hub reads `.eval_results/*.yaml` for the leaderboards of datasets that it lists as benchmarks
(https://huggingface.co/docs/hub/eval-results, read on 2026-11-30), and `model-index` of the front matter for the rest
(`EvalResult` of huggingface_hub 2.4.0). Neither has a time: the same build gives the same bytes.
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from ruamel.yaml import YAML

from packager.card.facts import BranchFacts, Shared, shared
from packager.card.mixed_bits import bits_in_words
from packager.card.numbers import measured_percent
from packager.receipt import Provenance
from packager.recipe import Recipe
from packager.records import TaskRecord

EVAL_RESULTS = ".eval_results"
_DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class TaskSetting:
    """How the tasks of a branch were computed."""

    device: str
    dtype: str
    base_dtype: str
    kernel: str
    versions: MappingProxyType[str, str]


def task_figure(record: TaskRecord, name: str) -> str:
    """Return a score, or the recovery, in per cent with twice its standard error; the heading has the unit."""
    value = getattr(record, name)
    if value is None:
        return "none: fp16 scores 0"
    error = {"score": record.score_error, "base_score": record.base_error, "recovery": record.recovery_error}[name]
    return measured_percent(value, error, unit="")


def by_task_setting(branches: Sequence[BranchFacts]) -> tuple[Shared, ...]:
    """Group the branches whose tasks were measured by how they were computed."""
    return shared(branches, lambda facts: _setting(facts.provenance.tasks[0]))


def _setting(record: TaskRecord) -> TaskSetting:
    return TaskSetting(
        device=record.device,
        dtype=record.dtype,
        base_dtype=record.base_dtype,
        kernel=record.kernel,
        versions=MappingProxyType(dict(sorted(record.versions.items()))),
    )


def leaderboard_files(recipe: Recipe, provenance: Provenance) -> dict[str, bytes]:
    """Return the files of a branch with its scores for leaderboards, by name: one file per task that names one."""
    boards = {task.name: task.leaderboard for task in recipe.evaluation.tasks}
    found = {}
    for record in provenance.tasks:
        board = boards.get(record.name)
        if board is None:
            continue
        dataset: dict[str, Any] = {"id": board.dataset, "task_id": board.task_id}
        if record.documents.source == board.dataset:
            dataset["revision"] = record.documents.revision
        value = round(record.score * (100 if board.percent else 1), _DIGITS)
        entry = {"dataset": dataset, "value": value, "notes": _notes(record, provenance)}
        found[f"{EVAL_RESULTS}/{record.name}.yaml"] = _yaml([entry])
    return found


def _notes(record: TaskRecord, provenance: Provenance) -> str:
    """Return how a score was measured: readers of a leaderboard see nothing else of it."""
    used = provenance.parameters
    group = "whole rows" if used["group_size"] == -1 else f"groups of {used['group_size']}"
    parts = [
        f"GPTQ {bits_in_words(used)}, {group}",
        f"lm-evaluation-harness {record.versions.get('lm-eval', '')}".strip(),
        f"{record.metric}, {record.num_fewshot}-shot",
    ]
    if record.limit is not None:
        parts.append(f"the first {record.num_documents} documents only")
    return "; ".join(parts)


def _yaml(value: object) -> bytes:
    yaml, stream = YAML(), io.BytesIO()
    yaml.default_flow_style = False
    yaml.width = 4096
    yaml.dump(value, stream)
    return stream.getvalue()


def model_index(recipe: Recipe, provenance: Provenance) -> list[dict[str, Any]]:
    """Return the front matter's model-index of a branch: the scores on datasets of the Hub that no leaderboard takes.

    A file that comes with the recipe is no dataset of the Hub, whose page would lead nowhere.
    """
    boards = {task.name for task in recipe.evaluation.tasks if task.leaderboard is not None}
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {
                "type": record.documents.source,
                "name": record.name,
                **({"config": record.documents.config} if record.documents.config is not None else {}),
                "split": record.documents.split,
                "revision": record.documents.revision,
            },
            "metrics": [
                {
                    "type": record.metric,
                    "value": round(record.score, _DIGITS),
                    "name": f"{record.metric}, {record.num_fewshot}-shot"
                    + (f", the first {record.num_documents} documents" if record.limit is not None else ""),
                }
            ],
        }
        for record in provenance.tasks
        if record.name not in boards and record.documents.revision is not None
    ]
    return [{"name": provenance.repository.partition("/")[2], "results": results}] if results else []
