"""Standard errors of quality against the spread of repeated draws: rows that were drawn anew, figures computed anew."""

import numpy
import pytest
from numpy.typing import NDArray

from packager.prove import quality_figures
from packager.prove.quality_figures import quality_record
from packager.receipt import QualityRecord, RowQuality

ROWS, PREDICTIONS = 64, 60


def draw(dice: numpy.random.Generator, rows: int = ROWS) -> QualityRecord:
    """Return the record of rows whose predictions resemble each other more than those of other rows."""
    shape = (rows, PREDICTIONS)
    topic = dice.normal(size=(rows, 1))
    base_loss = numpy.exp(0.5 * topic + 0.3 * dice.normal(size=shape))
    loss = base_loss + 0.02 + 0.01 * dice.normal(size=(rows, 1)) + 0.02 * dice.normal(size=shape)
    kl = numpy.exp(-4 + 0.6 * topic + dice.normal(size=shape))
    equal = (dice.uniform(size=shape) < 0.9 + 0.05 * numpy.tanh(topic)).astype(float)
    return quality_record(loss, base_loss, kl, equal)


def figures_of(record: QualityRecord) -> dict[str, float]:
    median, p99 = record.kl_median, record.kl_p99
    assert median is not None
    assert p99 is not None
    return {
        "perplexity": record.perplexity,
        "base_perplexity": record.base_perplexity,
        "perplexity_change": record.perplexity / record.base_perplexity - 1,
        "kl_divergence": record.kl_divergence,
        "kl_median": median,
        "kl_p99": p99,
        "top1_agreement": record.top1_agreement,
    }


def test_an_error_is_the_spread_of_repeated_draws() -> None:
    """240 draws know a spread to 5 %."""
    dice = numpy.random.default_rng(0)
    records = [draw(dice) for _ in range(240)]
    errors = [record.errors.model_dump() for record in records if record.errors]
    assert len(errors) == len(records)
    drawn = [figures_of(record) for record in records]
    for name in drawn[0]:
        spread = numpy.std([each[name] for each in drawn], ddof=1)
        assert float(numpy.mean([each[name] for each in errors])) == pytest.approx(spread, rel=0.15), name


def test_the_error_of_the_change_is_of_pairs() -> None:
    """Both models find the same rows hard: what they differ by is known far better than either."""
    errors = draw(numpy.random.default_rng(1)).errors
    assert errors is not None
    assert errors.perplexity_change < 0.05 * errors.perplexity


def test_few_rows_have_no_error() -> None:
    dice = numpy.random.default_rng(2)
    assert draw(dice, rows=7).errors is None
    kl = ones(8)
    kl[0, 0] = 5
    known = quality_record(ones(8), ones(8), kl, ones(8)).errors
    assert known is not None
    assert known.kl_p99 is None, "99 % and the error of the share are more than all"
    assert known.kl_median == 0


def test_a_record_keeps_the_figures_of_its_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality_figures, "MOST_ROWS", 9)
    dice = numpy.random.default_rng(3)
    assert draw(dice, rows=10).rows is None
    assert draw(dice, rows=10).errors is not None
    rows = draw(dice, rows=9).rows
    assert rows is not None
    assert {name: len(values) for name, values in rows.model_dump().items()} == dict.fromkeys(
        RowQuality.model_fields, 9
    )


def ones(rows: int) -> NDArray[numpy.float64]:
    return numpy.ones((rows, 4))


def test_rows_are_kept_with_nine_digits() -> None:
    kl = numpy.full((9, 4), 1.23456789012e-7)
    rows = quality_record(ones(9), ones(9), kl, ones(9)).rows
    assert rows is not None
    assert rows.kl_divergence == (1.23456789e-7,) * 9
