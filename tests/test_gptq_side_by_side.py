"""Linears that see the same input are solved side by side, unless they are wide."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from packager.quantize import block as block_module
from packager.quantize.gptq import side_by_side
from packager.quantize.gptq.side_by_side import MOST_FEATURES, solved_together
from packager.quantize.gptq.solve import solve
from packager.quantize.job import QuantizeJob
from packager.quantize.sweep import quantize
from packager.quantize.worker import _solved_shapes
from tests.sources import open_folder
from tests.tiny_models import open_store, save_model, token_rows, variant


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


@pytest.mark.parametrize("corrected", [False, True])
def test_kernels_are_compiled_for_what_is_solved_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, corrected: bool
) -> None:
    """With a target correction, linears of any width are solved together."""
    solved: set[tuple[int, int, int]] = set()

    def recorded(weights: Any, *args: Any, **kwargs: Any) -> Any:
        solved.add((weights[0].shape[1], sum(len(weight) for weight in weights), 0))
        return solve(weights, *args, **kwargs)

    monkeypatch.setattr(side_by_side, "MOST_FEATURES", 70)  # q of 64, k and v of 32 each, gate and up of 96 each
    monkeypatch.setattr(block_module, "solve", recorded)
    source = open_folder(save_model(tmp_path / "model", "llama"))
    v = variant(group_size=16, target_correction=0.5 if corrected else 0)
    store = open_store(source, tmp_path, v)
    quantize(
        QuantizeJob(source=source, rows=token_rows(), stores={v: store}, devices=(torch.device("cpu"),)), lambda _: None
    )
    groups = [group for kind in source.architecture.kinds for group in kind.groups]
    assert solved == {shape for group in groups for shape in _solved_shapes(group, corrected=corrected)}
    assert solved == {(64, 64, 0), (96, 64, 0)} | ({(64, 128, 0), (64, 192, 0)} if corrected else {(64, 96, 0)})
