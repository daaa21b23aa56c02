"""Samples of parametrized tests: which cases `nox` runs."""

import pytest

from tests.samples import sampled


def test_every_case_stays_and_those_outside_the_sample_are_slow() -> None:
    kept, single, pair = sampled([(1, "a"), "b", (2, "c")], (1, "a"))
    assert kept == (1, "a")
    assert (single.values, pair.values) == (("b",), (2, "c"))
    assert [[mark.name for mark in case.marks] for case in (single, pair)] == [["slow"], ["slow"]]


@pytest.mark.parametrize("fast", [(), ("a", "c")])
def test_a_sample_that_is_empty_or_has_foreign_cases_is_refused(fast: tuple[str, ...]) -> None:
    with pytest.raises(AssertionError):
        sampled(["a", "b"], *fast)
