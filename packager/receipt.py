"""Receipts: the record of one variant's build and measurements, and the names of the files of a branch.

The `provenance` of a receipt is published with the branch as provenance.json. It holds no time, path or name of this
machine, so that the same build gives the same bytes; the rest stays in `dist/`.
"""

import hashlib
import json
import math
import statistics
from collections.abc import Sequence
from typing import Annotated, Literal, Self

from pydantic import (
    Field,
    JsonValue,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from packager.records import FEW_ENTRIES, FIRST_ERROR, Record, TaskRecord
from packager.variant import Bits, Layout, Place, place_of

README, PROVENANCE = "README.md", "provenance.json"
# The signed statements: of a branch, and on main of the release.
ATTESTATION, RELEASE_ATTESTATION = "attestation.dsse.json", "release.dsse.json"
CONFIG, QUANTIZE_CONFIG, GENERATION_CONFIG = "config.json", "quantize_config.json", "generation_config.json"
TOKENIZER, TOKENIZER_MODEL, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"
# Copied into a branch as they are, where the base model has them.
TOKENIZER_FILES = (
    *(GENERATION_CONFIG, TOKENIZER, TOKENIZER_MODEL, TOKENIZER_CONFIG, "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja"),
)
SAFETENSORS, INDEX_SUFFIX = ".safetensors", ".safetensors.index.json"
GIT_ATTRIBUTES = ".gitattributes"
# The whole recipe of a branch and its lock, and the versions that AutoGPTQ ran with, for pip.
BRANCH_RECIPE, BRANCH_LOCK, AUTOGPTQ_PINS = "recipe.yaml", "recipe.lock.json", "requirements-autogptq.txt"
# The card's picture, where two branches or more were measured: it is the same in every branch.
PICTURE_FILES = ("quality-light.png", "quality-dark.png", "quality-light.svg", "quality-dark.svg")
# Files that no provenance.json lists: it is written last, then signed, and hosts add attributes.
STATEMENTS = frozenset({ATTESTATION, RELEASE_ATTESTATION})
UNLISTED_FILES = frozenset({PROVENANCE, GIT_ATTRIBUTES, ATTESTATION, RELEASE_ATTESTATION})

# Of what a quality record holds. Raise it when figures change or come to it: finished variants are measured again then.
EVALUATION_VERSION = 2
# A standard error of fewer rows says little: of 8 rows, twice the error is a 91 % interval, of 3 rows an 82 % one.
LEAST_ROWS = 8
# Rows that a record keeps: provenance.json has four numbers for each.
MOST_ROWS = 8192

# "refused": a rule says that the loader cannot load the branch, so it is not run. "not run": this machine cannot.
LoaderStatus = Literal["passed", "failed", "refused", "not run"]
# How a loader's process was kept from the network and from files: docs/reference/loaders.md.
Confinement = Literal["bubblewrap", "namespaces", "none"]


class FileRecord(Record):
    """A published file's size and digest."""

    size_bytes: int
    sha256: str


def _is_none(value: object) -> bool:
    return value is None


class SourceRecord(Record):
    """The base model of a build."""

    id: str
    revision: str | None
    digest: str
    files: Annotated[dict[str, FileRecord], FEW_ENTRIES]
    dtype: str
    num_parameters: int


class MixedText(Record):
    """One of several texts of the calibration, and how many rows it gave."""

    source: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None
    license: str | None = None
    conversations: bool = False
    text_sha256: str
    num_samples: int


class TextRecord(Record):
    """Calibration or evaluation rows: the source of the text and the digest of the token ids.

    Attributes:
        seed: of the draw; None for rows of earlier versions, which are the first of the text.
        text_sha256: of the whole text that the rows were drawn from.
        digest: of the token ids.
        license: that the dataset's page states.
        conversations: whether the text is conversations in the model's chat template.
        row_prefix: the special tokens that each row begins with.
        separate: whether each document inside a row begins with them, too.
        left_out: rows of the text's files that hold no text.
        mixed: the texts if there are several; then `source` is all their names.
    """

    source: str
    revision: str | None
    config: str | None
    split: str | None
    num_samples: int
    seq_len: int
    seed: int | None
    text_sha256: str
    digest: str
    license: str | None = None
    conversations: bool = False
    row_prefix: tuple[str, ...] = ()
    separate: bool = False
    left_out: int = 0
    mixed: tuple[MixedText, ...] = ()


class LinearRecord(Record):
    """One quantized linear: its GPTQ loss per output feature and calibration token, and the damping it needed.

    Of a variant with a target correction, the loss is that of the corrected weights, which GPTQ was given.
    `unrefined_loss` is the loss before the refinement. Of a tuned block, `block_error` is the mean squared error of its
    outputs, against the original block's for the same inputs, and `untuned_block_error` that before the tuning, as is
    `loss`. `bits` are those that were chosen in a mix. Where there was no refinement, no tuning or no mix, the record
    does not hold them.
    """

    name: str
    loss: float
    damp_percent: float
    bits: Bits | None = Field(default=None, exclude_if=_is_none)
    unrefined_loss: float | None = Field(default=None, exclude_if=_is_none)
    block_error: float | None = Field(default=None, exclude_if=_is_none)
    untuned_block_error: float | None = Field(default=None, exclude_if=_is_none)


class ExpertLinearRecord(LinearRecord):
    """A quantized linear of an expert: how many inputs it was calibrated on, and how much of H is that of all inputs.

    H = (1 - rho) H_expert + rho H_all, where rho = in_features / (in_features + tokens); without a token rho is 1.
    """

    tokens: int
    rho: float


# The more special record first: a record without `tokens` is no expert's.
AnyLinearRecord = ExpertLinearRecord | LinearRecord


class LoaderRecord(Record):
    """One runtime's verdict on the checkpoint; `confinement` is "" in older records and where no process ran.

    `rounding_error` is the relative error of our own forward in `dtype`, where it decided what passes.
    """

    loader: str
    required: bool
    status: LoaderStatus
    reason: str = ""
    device: str = ""
    dtype: str = ""
    kernel: str = ""
    confinement: Confinement | Literal[""] = ""
    versions: dict[str, str] = Field(default_factory=dict)
    relative_error: float | None = None
    rounding_error: float | None = None
    top1_agreement: float | None = None
    tokens_generated: int = 0
    tokens_equal: int = 0

    @property
    def ran(self) -> bool:
        """Whether the loader was run on the checkpoint."""
        return self.status in ("passed", "failed")


class RowQuality(Record):
    """Figures of each held-out row, in the rows' order: what the errors and comparisons of branches are computed from.

    Attributes:
        loss, base_loss: mean negative log-likelihood of the row's tokens, nats, of the branch and of the fp16 model.
        kl_divergence: mean KL(fp16 || quantized) of the row's predictions, nats.
        top1_agreement: the share of the row's predictions whose most likely token is that of the fp16 model.
    """

    loss: tuple[float, ...]
    base_loss: tuple[float, ...]
    kl_divergence: tuple[float, ...]
    top1_agreement: tuple[float, ...]


class QualityErrors(Record):
    """Standard errors over the held-out rows, in the units of the figures.

    `perplexity_change` is of perplexity / base_perplexity - 1, from each row's difference of both models. The error of
    a quantile is None where the rows are too few for one.
    """

    perplexity: float
    base_perplexity: float
    perplexity_change: float
    kl_divergence: float
    kl_median: float | None
    kl_p99: float | None
    top1_agreement: float


class QualityRecord(Record):
    """Held-out quality against the fp16 model on the same tokens (nats; KL is fp16 || quantized).

    Attributes:
        kl_divergence: the mean over all predictions; `kl_median` and `kl_p99` are quantiles over them.
        errors: None where there are fewer than LEAST_ROWS rows, and in records of earlier versions.
        rows: None where there are more than MOST_ROWS, and in records of earlier versions.
    """

    num_tokens: int
    perplexity: float
    base_perplexity: float
    kl_divergence: float
    top1_agreement: float
    questions: int = 0
    answered: int = 0
    base_answered: int = 0
    kl_median: float | None = None
    kl_p99: float | None = None
    errors: QualityErrors | None = None
    rows: RowQuality | None = None


class FloorRecord(Record):
    """The floor that the recipe sets, whether the variant misses it, and whether it is published all the same."""

    max_perplexity_increase: float | None = None
    max_kl: float | None = None
    missed: bool = False
    published_below: bool = False


class Provenance(Record):
    """The record that is published with a branch as provenance.json, for readers who want to check the branch.

    `not_quantized` gives the reason for each module of the blocks whose weights are the base model's. `model` is the
    lock's description of the base model without its config.json: an audit needs nothing else to know every tensor.
    """

    schema_version: Literal[1] = 1
    repository: str
    branch: str
    layout: Layout = "branches"
    made_with: str
    recipe_digest: str
    variant_digest: str
    parameters: Annotated[dict[str, bool | int | float | str], FEW_ENTRIES]
    effective: Annotated[dict[str, bool | int | float | str], FEW_ENTRIES]
    base_model: SourceRecord
    model: dict[str, JsonValue] = Field(default_factory=dict)
    calibration: TextRecord
    evaluation: TextRecord
    versions: dict[str, str]
    device: str
    linears: Annotated[tuple[AnyLinearRecord, ...], FIRST_ERROR]
    not_quantized: dict[str, str] = Field(default_factory=dict)
    quality: QualityRecord | None = None
    tasks: Annotated[tuple[TaskRecord, ...], FIRST_ERROR] = ()
    floor: FloorRecord | None = None
    loaders: Annotated[tuple[LoaderRecord, ...], FIRST_ERROR] = ()
    weights_bytes: int
    files: Annotated[dict[str, FileRecord], FEW_ENTRIES]

    @model_serializer(mode="wrap")
    def _without_empty(self, dump: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Leave out a floor that is none, and no tasks: a build of a recipe without them has the bytes that it had."""
        content: dict[str, object] = dump(self)
        return {key: value for key, value in content.items() if key not in ("floor", "tasks") or value}

    @property
    def weights_files(self) -> dict[str, FileRecord]:
        """The files that hold the weights, by name."""
        return {name: record for name, record in self.files.items() if name.endswith(SAFETENSORS)}

    @property
    def place(self) -> Place:
        """The repository and branch that the variant is published to."""
        return place_of(self.repository, self.layout, self.branch)


class FusedRecord(Record):
    """The number of norms, MLPs and attentions that ran fused kernels, of those that could; `missed` names the rest."""

    fused: int
    candidates: int
    missed: tuple[str, ...] = ()


class LoaderRunRecord(Record):
    """The time and memory of a loader's run, as its process measured them: one forward, without a warm-up.

    Attributes:
        loader: its name.
        device: as it reports it.
        load_s: time to load the checkpoint, imports not counted.
        forward_s: time for the logits of `num_tokens` tokens, in rows of `seq_len`.
        peak_memory_bytes: on a GPU of this checkpoint, on a CPU of the process so far.
        beside: how many loaders ran at the same time, itself counted.
        decode_tokens: tokens of answers after each answer's first one, and `decode_s` the time for them, one answer
            at a time; None where the loader does not time them.
        machine: what it computed on: the GPU's name, or the processor's with the number of its threads.
    """

    loader: str
    device: str
    load_s: float
    forward_s: float
    num_tokens: int
    seq_len: int
    peak_memory_bytes: int
    beside: int
    decode_tokens: int = 0
    decode_s: float | None = None
    machine: str = ""


class Receipt(Record):
    """A variant's provenance, and the facts that concern only this machine.

    Attributes:
        stages: for each finished stage the digest of everything that went into it ("quantize": the
            tensors, "weights": the files, "evaluate", "verify", "tasks", "picture": the card's); a stage with an
            unchanged digest need not run again.
        seconds: this variant's share of each stage's time.
        peak_memory_bytes: the largest resident size of the building processes, over all stages, without their children;
            a process that builds several recipes counts those before too.
        fused_modules: on CUDA, what ran fused kernels while quantizing; None on a CPU.
        runs: time and memory of the loaders that ran on this machine.
        trial: the settings of the command line that changed the recipe (`--set`): such a variant is never published.
    """

    provenance: Provenance
    stages: dict[str, str]
    seconds: dict[str, float]
    peak_memory_bytes: int
    fused_modules: FusedRecord | None = None
    runs: tuple[LoaderRunRecord, ...] = ()
    trial: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _has_the_results_of_its_stages(self) -> Self:
        made = self.provenance
        results = {"weights": bool(made.linears and made.weights_files), "evaluate": made.quality is not None}
        timed = {"weights": ("quantize", "pack"), "evaluate": ("evaluate",)}
        timed |= {"verify": ("verify",), "tasks": ("tasks",)}
        for stage in self.stages:
            if not results.get(stage, True):
                raise ValueError(f"the stage {stage} is done and its results are not there")
            if lacking := [name for name in timed.get(stage, ()) if name not in self.seconds]:
                raise ValueError(f"the stage {stage} is done and has no seconds for {', '.join(lacking)}")
        return self


def standard_error(rows: Sequence[float]) -> float:
    """Return the standard error of the mean of two values or more: their sample deviation / sqrt(number)."""
    return statistics.stdev(rows) / math.sqrt(len(rows))


def digest_of(value: object) -> str:
    """Return the sha256 of `value` as canonical JSON (sorted keys, no spaces, no NaN)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()
