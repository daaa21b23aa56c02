"""The models of a recipe's texts: calibration and evaluation."""

from pathlib import PurePosixPath
from typing import Literal

from pydantic import Field, model_validator

from packager.recipe.field_groups import rows_by_weight, text_source_problem
from packager.recipe.fields import LineText, RepoId, Revision, SeqLen, Strict
from packager.recipe.paths import RelativePath
from packager.recipe.task_models import Tasks

Documents = Literal["joined", "separate"]


class TextSource(Strict):
    """Text to tokenize: a local file, or one split of a Hub dataset at a revision."""

    path: RelativePath | None = Field(
        default=None, description="a local file: .txt (one document), .jsonl, .csv, .tsv or .parquet"
    )
    dataset: RepoId | None = Field(default=None, description="a Hub dataset; instead of path")
    config: LineText | None = Field(default=None, description="the dataset's configuration, e.g. wikitext-2-raw-v1")
    revision: Revision | None = Field(
        default=None, description="the dataset's commit, or a branch or tag whose commit the lock holds"
    )
    split: LineText | None = Field(default=None, description="the dataset's split, e.g. train")
    text_field: LineText | None = Field(
        default=None, description="the column or JSON key that holds the text; left out: text"
    )
    messages_field: LineText | None = Field(
        default=None,
        description="instead of text_field: the column that holds conversations, rendered in the model's chat template",
    )
    documents: Documents = Field(
        default="joined",
        description="joined: rows are parts of one text, as in wikitext; separate: each row is a document of its own, "
        "and begins with the tokens that the tokenizer puts before a text",
    )

    @model_validator(mode="after")
    def _one_source(self) -> "TextSource":
        default = {"documents"} if self.documents == "joined" else set()  # has a value where the recipe gives none
        if problem := text_source_problem(self.given_fields() - default):
            raise ValueError(problem)
        return self

    @property
    def column(self) -> str:
        """The name of the column that is read."""
        return self.messages_field or self.text_field or "text"

    @property
    def name(self) -> str:
        """The dataset's id, or the file's name."""
        return self.dataset or PurePosixPath(str(self.path)).name


class WeightedText(TextSource):
    """One of several texts of the calibration."""

    weight: float = Field(default=1.0, gt=0, le=1e6, description="its share of the rows, relative to the other weights")


class Calibration(TextSource):
    """The text that the quantizer is calibrated on, or several texts with weights."""

    sources: tuple[WeightedText, ...] | None = Field(
        default=None,
        min_length=1,
        max_length=16,
        description="several texts, each with its weight; instead of path or dataset",
    )
    num_samples: int = Field(default=128, ge=1, le=65536, description="rows of seq_len tokens")
    seq_len: SeqLen = 2048
    seed: int = Field(default=0, ge=0, description="chooses which rows are drawn from the text")

    @property
    def texts(self) -> tuple[TextSource, ...]:
        """The texts in the recipe's order."""
        return self.sources or (self,)

    @property
    def rows_of_texts(self) -> tuple[int, ...]:
        """How many rows each text gives; their sum is `num_samples`."""
        return rows_by_weight([text.weight for text in self.sources or ()] or [1.0], self.num_samples)


class Evaluation(TextSource):
    """Held-out text for perplexity, KL divergence and top-1 agreement; no variant is calibrated on it."""

    num_tokens: int = Field(default=131072, ge=64, description="rounded down to whole rows of seq_len")
    seq_len: SeqLen = 2048
    seed: int = Field(default=0, ge=0, description="chooses which rows are drawn from the text")
    questions: RelativePath | None = Field(
        default=None, description='JSONL of {"prompt": ..., "answer": ...}, answered greedily'
    )
    tasks: Tasks = Field(default=(), description="tasks of lm-evaluation-harness")

    def text(self) -> dict[str, object]:
        """Return the keys that choose the held-out text: no figure of it depends on the tasks."""
        return self.model_dump(mode="json", exclude={"tasks"})

    @property
    def num_rows(self) -> int:
        """How many rows are drawn."""
        return max(1, self.num_tokens // self.seq_len)
