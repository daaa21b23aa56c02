"""The figures of tasks: scores, what of the fp16 model's a variant keeps, and their standard errors over documents."""

from collections.abc import Sequence
from statistics import fmean

from packager.receipt import LEAST_ROWS, standard_error

# Raise it when a figure is computed otherwise: finished variants are measured again then.
TASK_FIGURES_VERSION = 1


def mean_with_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Return the mean of what documents score, and its standard error.

    There is none where the documents are fewer than LEAST_ROWS, or all score the same: a sample without a mistake does
    not say how rare mistakes are.
    """
    return fmean(values), _error(values)


def recovery_of(values: Sequence[float], base: Sequence[float]) -> tuple[float | None, float | None]:
    """Return which part of the fp16 model's score a variant keeps, and its standard error.

    Both models answer the same documents, so the error is of the ratio of two means of pairs (Cochran, Sampling
    Techniques, 3rd edition, section 2.11): that of the residuals v - r b, over the fp16 model's mean. Two scores that
    move together, document by document, leave a small error, however hard the documents are.

    Args:
        values: the score of each document, of the variant.
        base: of the fp16 model, in the same order.

    Returns:
        Two times None where the fp16 model scores 0; no error where `mean_with_error` has none of the residuals.
    """
    whole = fmean(base)
    if whole <= 0:
        return None, None
    ratio = fmean(values) / whole
    error = _error([own - ratio * other for own, other in zip(values, base, strict=True)])
    return ratio, None if error is None else error / whole


def _error(values: Sequence[float]) -> float | None:
    if len(values) < LEAST_ROWS:
        return None
    return standard_error(values) or None
