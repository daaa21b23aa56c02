"""Figures in place of those that a build measures, to render a page that is never shown: see `predicted_card`.

Each fact that a plan does not know differs here from what stands in its place in the record of what the plan knows.
"""

from collections.abc import Sequence
from typing import Final

from packager.card.floor import floor_record
from packager.receipt import (
    LEAST_ROWS,
    SAFETENSORS,
    FileRecord,
    LinearRecord,
    LoaderRunRecord,
    Provenance,
    QualityErrors,
    QualityRecord,
    RowQuality,
    TextRecord,
)
from packager.recipe import Recipe
from packager.records import TaskDocuments, TaskRecord

_DIGEST: Final = "0" * 64
_DEVICE: Final = "NVIDIA H200"
_VERSIONS: Final = {"torch": "2.13.0", "transformers": "5.23.0", "safetensors": "0.8.0"}
_MOST_LINEARS: Final = 1000  # a mixture of experts has tens of thousands, of which a page shows none by itself


def with_made_up_figures(record: Provenance, recipe: Recipe, linears: Sequence[str], place: int) -> Provenance:
    """Return a predicted record as a build might complete it.

    Args:
        record: of what the plan knows.
        recipe: it is of.
        linears: the names of all linears that are quantized.
        place: of the variant in the recipe; later ones get worse figures.
    """
    file = FileRecord(size_bytes=record.weights_bytes, sha256=_DIGEST)
    loaders = tuple(
        loader.model_copy(
            update={
                "status": "passed", "reason": "", "device": _DEVICE, "dtype": "float16", "kernel": "MarlinLinear",
                "confinement": "bubblewrap", "versions": _VERSIONS, "relative_error": 0.001, "top1_agreement": 0.99,
                "tokens_generated": 64, "tokens_equal": 63,
            }
        )
        for loader in record.loaders
    )  # fmt: skip
    base = {"digest": _DIGEST, "files": {f"model{SAFETENSORS}": file}}
    built = record.model_copy(
        update={
            "effective": {"damp_percent_max": 0.01, "linears_damped_further": 1},
            "base_model": record.base_model.model_copy(update=base),
            "model": {"blocks": 1},
            "calibration": _read(record.calibration),
            "evaluation": _read(record.evaluation),
            "versions": _VERSIONS,
            "device": _DEVICE,
            "linears": tuple(
                LinearRecord(name=name, loss=0.001, damp_percent=0.01) for name in linears[:_MOST_LINEARS]
            ),
            "quality": _quality(0.01 * (place + 1)),
            "tasks": _tasks(recipe),
            "loaders": loaders,
            "files": {f"{recipe.checkpoint.weights_name}{SAFETENSORS}": file, "config.json": file},
        }
    )
    return built.model_copy(update={"floor": floor_record(recipe, built)})


def made_up_runs(record: Provenance) -> tuple[LoaderRunRecord, ...]:
    """Return a run of each loader that passed on a variant; there is none before figures are made up."""
    return tuple(
        LoaderRunRecord(
            loader=loader.loader, device=_DEVICE, load_s=1.0, forward_s=1.0, num_tokens=1024, seq_len=256,
            peak_memory_bytes=record.weights_bytes, beside=1, decode_tokens=64, decode_s=1.0, machine=_DEVICE,
        )
        for loader in record.loaders
        if loader.ran
    )  # fmt: skip


def _read(text: TextRecord) -> TextRecord:
    """Return the record of a text as if it was read and its rows were drawn."""
    return text.model_copy(
        update={
            "text_sha256": _DIGEST, "digest": _DIGEST, "license": "mit", "conversations": True, "row_prefix": ("<s>",),
            "separate": True, "left_out": 1,
            "mixed": tuple(each.model_copy(update={"text_sha256": _DIGEST, "license": "mit"}) for each in text.mixed),
        }
    )  # fmt: skip


def _quality(kl_divergence: float) -> QualityRecord:
    """Return figures of as many rows as give errors."""
    rows = range(1, LEAST_ROWS + 1)
    errors = QualityErrors(
        perplexity=0.1, base_perplexity=0.1, perplexity_change=0.001, kl_divergence=kl_divergence / 10,
        kl_median=kl_divergence / 20, kl_p99=kl_divergence, top1_agreement=0.001,
    )  # fmt: skip
    return QualityRecord(
        num_tokens=65536, perplexity=6.1, base_perplexity=6.0, kl_divergence=kl_divergence, top1_agreement=0.98,
        questions=100, answered=80, base_answered=81, kl_median=kl_divergence / 2, kl_p99=kl_divergence * 10,
        errors=errors,
        rows=RowQuality(
            loss=tuple(1.8 + row / 100 for row in rows),
            base_loss=tuple(1.79 + row / 100 for row in rows),
            kl_divergence=tuple(kl_divergence * (1 + row / 1000) for row in rows),
            top1_agreement=tuple(0.98 - row / 1000 for row in rows),
        ),
    )  # fmt: skip


def _tasks(recipe: Recipe) -> tuple[TaskRecord, ...]:
    return tuple(
        TaskRecord(
            name=task.name, metric=task.metric, filter=task.filter,
            definition_sha256=_DIGEST if task.definition is not None else "",
            documents=TaskDocuments(source=task.name, sha256=(_DIGEST,)),
            examples=TaskDocuments(source=task.name, sha256=(_DIGEST,)) if task.fewshot is not None else None,
            num_fewshot=task.num_fewshot or 0, num_documents=1000, limit=task.limit, chat=task.chat, score=0.6,
            score_error=0.01, base_score=0.61, base_error=0.01, recovery=0.98, recovery_error=0.01, device=_DEVICE,
            dtype="float16", base_dtype="float16", kernel="MarlinLinear", versions=_VERSIONS,
        )
        for task in recipe.evaluation.tasks
    )  # fmt: skip
