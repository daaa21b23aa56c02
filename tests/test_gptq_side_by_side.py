"""Linears that see the same input are solved side by side, unless they are wide."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packager.quantize.gptq.side_by_side import MOST_FEATURES, solved_together


@pytest.mark.parametrize(
    ("widths", "together"),
    [
        ((5120, 5120, 5120), [3]),  # q, k, v of Llama-2-13B
        ((13824, 13824), [1, 1]),  # gate, up
        ((8192, 1024, 1024), [3]),
        ((28672, 28672), [1, 1]),
        ((MOST_FEATURES, 1), [1, 1]),
        ((MOST_FEATURES - 1, 1), [2]),
        ((30000, 100, 100, 30000, 100), [1, 2, 1, 1]),
    ],
)
def test_linears_of_models_that_people_quantize(widths: tuple[int, ...], together: list[int]) -> None:
    assert [len(widths[part]) for part in solved_together(widths)] == together


@given(st.lists(st.integers(1, 30_000), min_size=1, max_size=12))
def test_every_linear_is_solved_once_in_order_and_as_many_as_fit_together(widths: list[int]) -> None:
    parts = [widths[part] for part in solved_together(widths)]
    assert [width for part in parts for width in part] == widths
    assert all(part and (len(part) == 1 or sum(part) <= MOST_FEATURES) for part in parts)
    assert all(sum(part) + after[0] > MOST_FEATURES for part, after in pairwise(parts))
