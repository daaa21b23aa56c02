"""Samples of parametrized tests: `nox` runs some cases of a family, `nox -s tests` and CI run all."""

from collections.abc import Iterable
from typing import Any

import pytest


def sampled(cases: Iterable[Any], *fast: Any) -> list[Any]:
    """Return a test's cases for `pytest.mark.parametrize`; those that are not in `fast` are marked slow.

    A case is the value of one parameter, or the tuple of the values of several.
    """
    listed = list(cases)
    assert fast
    assert all(case in listed for case in fast), "a case of the sample is none of the family's"
    return [case if case in fast else _slow(case) for case in listed]


def _slow(case: Any) -> Any:
    values = case if isinstance(case, tuple) else (case,)
    return pytest.param(*values, marks=pytest.mark.slow)
