"""The base of all records, and the records of tasks, which receipts hold.

A module of its own beside `receipt.py`, which imports it.
"""

from collections.abc import Mapping
from typing import Final

from pydantic import BaseModel, BeforeValidator, ConfigDict, FailFast

# More than a branch can have files. A record may be hostile, and pydantic takes 1700 bytes to report one wrong value.
_MOST_ENTRIES = 20_000


def _few(value: object) -> object:
    """Raise ValueError for a mapping of too many entries, before any of them is looked at."""
    if isinstance(value, Mapping) and len(value) > _MOST_ENTRIES:
        raise ValueError(f"it has {len(value):,} entries, and {_MOST_ENTRIES:,} are the most")
    return value


FIRST_ERROR: Final = FailFast()  # for a sequence: its validation ends with the first wrong item
FEW_ENTRIES: Final = BeforeValidator(_few)  # for a mapping


class Record(BaseModel):
    """Base of all parts of a receipt: unknown keys are refused, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class TaskDocuments(Record):
    """The documents of a task, with digests: of a file of the recipe, or of a dataset's split at a commit."""

    source: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    sha256: tuple[str, ...]


class TaskRecord(Record):
    """The score of a variant in a task of lm-evaluation-harness, and of the fp16 model on the same prompts.

    Attributes:
        name: of the task.
        metric, filter: in lm-eval's words; the score is the mean of the metric over the documents.
        definition_sha256: of the file that came with the recipe; "" for a task that lm-eval comes with.
        documents: that are scored.
        examples: that are shown before each, None where none are.
        num_documents: how many were scored, and `limit` how many at most.
        chat: whether prompts were rendered in the model's chat template.
        score, base_score: from 0 to 1; `score_error` and `base_error` are standard errors over the documents, None
            where there are too few of them, or all score the same.
        recovery: score / base_score, None where the fp16 model scores 0; its error is of both scores of each document.
        dtype, base_dtype: in which each computed.
    """

    name: str
    metric: str
    filter: str
    definition_sha256: str
    documents: TaskDocuments
    examples: TaskDocuments | None
    num_fewshot: int
    num_documents: int
    limit: int | None
    chat: bool
    score: float
    score_error: float | None
    base_score: float
    base_error: float | None
    recovery: float | None
    recovery_error: float | None
    device: str
    dtype: str
    base_dtype: str
    kernel: str
    versions: dict[str, str]
