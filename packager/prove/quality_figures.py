"""The figures of held-out quality and their standard errors over rows, from the figures of every prediction.

A row is one draw of the text, and predictions of one row resemble each other: errors are computed over rows, not over
predictions.
"""

import math

import numpy
from numpy.typing import NDArray

from packager.receipt import LEAST_ROWS, MOST_ROWS, QualityErrors, QualityRecord, RowQuality, standard_error

_MEDIAN, _P99 = 0.5, 0.99

Figures = NDArray[numpy.float64]


def quality_record(loss: Figures, base_loss: Figures, kl: Figures, equal: Figures) -> QualityRecord:
    """Return the record of a variant, without questions.

    Args:
        loss: negative log-likelihood of each token by the quantized model, nats, float64 [rows, predictions of a row].
        base_loss: the same by the fp16 model.
        kl: KL(fp16 || quantized) of each prediction, nats, likewise.
        equal: 1 where both models find the same token most likely, else 0, likewise.
    """
    num_rows = len(loss)
    rows = RowQuality(
        loss=_means(loss), base_loss=_means(base_loss), kl_divergence=_means(kl), top1_agreement=_means(equal)
    )
    median, p99 = (float(value) for value in numpy.quantile(kl, (_MEDIAN, _P99)))
    record = QualityRecord(
        num_tokens=loss.size,
        perplexity=_exp(loss.mean()),
        base_perplexity=_exp(base_loss.mean()),
        kl_divergence=float(kl.mean()),
        top1_agreement=float(equal.mean()),
        kl_median=median,
        kl_p99=p99,
        rows=rows if num_rows <= MOST_ROWS else None,
    )
    if num_rows < LEAST_ROWS or not math.isfinite(record.kl_divergence):
        return record
    return record.model_copy(update={"errors": _errors(record, rows, kl)})


def _errors(record: QualityRecord, rows: RowQuality, kl: Figures) -> QualityErrors:
    """Return standard errors; those of functions of a mean by their derivative at the mean."""
    change = [own - base for own, base in zip(rows.loss, rows.base_loss, strict=True)]
    assert record.kl_median is not None  # noqa: S101 - quality_record has just set both
    assert record.kl_p99 is not None  # noqa: S101
    return QualityErrors(
        perplexity=record.perplexity * standard_error(rows.loss),
        base_perplexity=record.base_perplexity * standard_error(rows.base_loss),
        perplexity_change=record.perplexity / record.base_perplexity * standard_error(change),
        kl_divergence=standard_error(rows.kl_divergence),
        kl_median=_quantile_error(kl, _MEDIAN, record.kl_median),
        kl_p99=_quantile_error(kl, _P99, record.kl_p99),
        top1_agreement=standard_error(rows.top1_agreement),
    )


def _quantile_error(kl: Figures, share: float, quantile: float) -> float | None:
    """Return the standard error of a quantile of all predictions, or None where it would leave the distribution.

    Woodruff, Confidence intervals for medians and other position measures, 1952: the error of the share below the
    quantile, over rows, is mapped back to values by the distribution itself.
    """
    error = standard_error((kl <= quantile).mean(axis=1).tolist())
    if not 0 <= share - error <= share + error <= 1:
        return None
    low, high = numpy.quantile(kl, (share - error, share + error))
    return float(high - low) / 2


def _means(figures: Figures) -> tuple[float, ...]:
    """Return the mean of each row, with nine digits: more would only make provenance.json longer."""
    return tuple(float(f"{mean:.9g}") for mean in figures.mean(axis=1))


def _exp(value: float) -> float:
    return math.inf if value > 700 else math.exp(value)
