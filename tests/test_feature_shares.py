"""The output features of a group of linears, shared by ranks: the bytes of one device, whatever the shares."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch import Tensor

from packager.quantize import feature_shares
from packager.quantize.feature_shares import FactoredGroup, FeatureShares, cut_features
from packager.quantize.gptq.grid import GridRules
from packager.quantize.gptq.hessian import Factor, factorize
from packager.quantize.gptq.order import ColumnOrder
from packager.quantize.gptq.solve import Solution, solve
from packager.quantize.gptq.torch_ops import TorchOps
from packager.quantize.ranks import RankGroup, SweepRank
from packager.variant import ActOrder
from tests.test_gptq import hessian, inputs

CPU = torch.device("cpu")
WIDTHS = (96, 16, 80)
FIELDS = ("q", "scales", "zeros", "g_idx", "losses", "unrefined_losses")


@pytest.mark.parametrize(
    ("features", "ranks", "expected"),
    [
        (5120, 2, [2560, 2560]),
        (5120, 3, [1664, 1664, 1792]),
        (27648, 8, [3456] * 8),
        (400, 2, [128, 272]),
        (256, 8, [0, 0, 0, 128, 0, 0, 0, 128]),
        (15360, 1, [15360]),
    ],
)
def test_features_are_cut_at_multiples_of_128(features: int, ranks: int, expected: list[int]) -> None:
    cut = cut_features(features, ranks, 0, spread=True)
    assert [len(each) for each in cut] == expected
    assert [feature for each in cut for feature in each] == list(range(features))


@pytest.mark.parametrize(("features", "spread"), [(5120, False), (5128, True), (240, True)])
def test_what_cannot_be_cut_is_the_owners(features: int, spread: bool) -> None:
    """Widths that 16 does not divide have kernels of their own; fewer than two tiles are one share."""
    assert [len(each) for each in cut_features(features, 3, 1, spread=spread)] == [0, features, 0]


def on_ranks(
    size: int, weights: list[Tensor], factored: FactoredGroup, solve_rows: Callable[..., Solution], owner: int
) -> tuple[list[Solution | None], list[list[Tensor]], list[int]]:
    """Return what each rank returns and what it makes of its weights, and the output features that each solves."""
    solved = [0] * size

    def work(rank: SweepRank) -> tuple[Solution | None, list[Tensor]]:
        def counting(rows: Sequence[Tensor], factor: Factor) -> Solution:
            solved[rank.number] += sum(map(len, rows))
            return solve_rows(rows, factor)

        with rank.ending_others():
            mine = [weight.clone() for weight in weights]
            shares = FeatureShares(rank, owner, mine, spread=True)
            found = shares.solve(factored if rank.number == owner else None, counting, TorchOps())
            rank.copy_from_owners(list(shares.owned()))
        return found, mine

    with ThreadPoolExecutor(size) as pool:
        results = [run.result() for run in [pool.submit(work, rank) for rank in RankGroup([CPU] * size).ranks()]]
    return [found for found, _ in results], [mine for _, mine in results], solved


@pytest.mark.parametrize(
    ("bits", "sym", "group_size", "order", "refined", "size"),
    [
        (4, True, 32, "full", False, 2), (4, True, 32, "none", True, 8), (3, False, 48, "group", False, 8),
        (3, False, 48, "group", True, 2), (4, True, 130, "none", False, 3), (4, True, 130, "group", True, 8),
        (3, False, 130, "static", False, 8), (4, True, 32, "static", True, 3), (3, False, -1, "none", False, 2),
        (4, True, -1, "full", True, 2),
    ],
)  # fmt: skip
def test_shares_make_the_solution_of_one_device(
    monkeypatch: pytest.MonkeyPatch, bits: int, sym: bool, group_size: int, order: ActOrder, refined: bool, size: int
) -> None:
    monkeypatch.setattr(feature_shares, "FEATURES_TOGETHER", 16)
    n = 280  # more column blocks than one, and a short last group
    weights = [torch.randn(width, n, generator=torch.Generator().manual_seed(width)) * 0.02 for width in WIDTHS]
    factor = factorize(hessian(inputs(n, 1)), ColumnOrder(act_order=order, group_size=group_size), damp_percent=0.01)
    rules = GridRules(bits=bits, sym=sym, scale_search="signed" if sym else True)
    solve_rows = partial(solve, rules=rules, refined=(refined,), ops=TorchOps())
    expected = solve_rows(weights, factor)
    dequantized = expected.dequantized(TorchOps()).split(WIDTHS)
    factored = FactoredGroup(factor=factor, targets=None, finite=factor.succeeded)
    found, made, solved = on_ranks(size, weights, factored, solve_rows, owner=1)
    assert [each is None for each in found] == [rank != 1 for rank in range(size)]
    for name in FIELDS:
        assert torch.equal(getattr(found[1], name), getattr(expected, name)), name
    assert all(
        torch.equal(mine, whole)
        for weights_of_rank in made
        for mine, whole in zip(weights_of_rank, dequantized, strict=True)
    )
    assert sum(solved) == sum(WIDTHS)
    assert min(solved) > 0, "every rank rounds"


def test_other_targets_are_cut_like_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feature_shares, "FEATURES_TOGETHER", 16)
    n = 40
    weights = [torch.randn(width, n, generator=torch.Generator().manual_seed(width)) * 0.02 for width in WIDTHS]
    targets = [weight * 1.5 for weight in weights]
    factor = factorize(hessian(inputs(n, 1)), ColumnOrder(act_order="none", group_size=20), damp_percent=0.01)
    solve_rows = partial(solve, rules=GridRules(bits=4, sym=True, scale_search=False), ops=TorchOps())
    factored = FactoredGroup(factor=factor, targets=targets, finite=factor.succeeded)
    found, _, _ = on_ranks(3, weights, factored, solve_rows, owner=0)
    assert found[0] is not None
    assert torch.equal(found[0].q, solve_rows(targets, factor).q)
    assert not torch.equal(found[0].scales, solve_rows(weights, factor).scales)
