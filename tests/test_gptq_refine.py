"""The refinement against a float64 oracle in terms of H, which it never forms, and what it may not change."""

from dataclasses import dataclass
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from packager.quantize.gptq.column_blocks import column_blocks
from packager.quantize.gptq.grid import GridRules, refitted_by
from packager.quantize.gptq.hessian import Factor, factorize
from packager.quantize.gptq.order import ColumnOrder
from packager.quantize.gptq.solve import Solution, solve
from packager.quantize.gptq.tensor_ops import TensorOps
from packager.quantize.gptq.torch_ops import TorchOps
from packager.variant import ActOrder
from tests.gptq_reference import solving_order
from tests.hypothesis_profiles import examples
from tests.samples import sampled
from tests.test_gptq import SplitTorchOps, hessian, inputs

ORDERS = get_args(ActOrder)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A linear, [in, out], with the damped Hessian in float64, before and after its refinement."""

    weight: Tensor
    damped: Tensor
    before: Solution
    after: Solution
    order: list[int]
    size: int
    act_order: str
    maxq: int

    def losses(self, solution: Solution) -> Tensor:
        """tr(R^T H R) / 2 of each output feature, from the integers."""
        R = self.weight - values(solution)
        return (R * (self.damped @ R)).sum(0) / 2


def values(solution: Solution) -> Tensor:
    groups = solution.g_idx.long()
    return (solution.q.double() - solution.zeros.double()[groups]) * solution.scales.double()[groups]


def refined_case(
    *, n: int = 96, out: int = 12, act_order: ActOrder = "none", group_size: int = 32, seed: int = 0,
    tokens: int | None = None, ops: TensorOps | None = None, weight: Tensor | None = None, **rules: Any,
) -> Case:  # fmt: skip
    H = hessian(inputs(n, seed, dead=5)[:tokens])
    if weight is None:
        weight = torch.randn(n, out, generator=torch.Generator().manual_seed(seed + 1)) * 0.02
    how = GridRules(**{"bits": 4, "sym": True, "scale_search": False, **rules})
    factor = factorize(H, ColumnOrder(act_order=act_order, group_size=group_size), damp_percent=0.01)
    before, after = (solve([weight.T], factor, how, refined=refined, ops=ops) for refined in ((), (True,)))
    exact, stored, size = H.double(), weight.double().clone(), n if group_size == -1 else group_size
    exact[5, 5], stored[5] = 1, 0
    exact += torch.eye(n, dtype=torch.float64) * 0.01 * exact.diagonal().mean()
    order = solving_order([diagonal or 1.0 for diagonal in H.diagonal().tolist()], size, act_order)
    return Case(
        weight=stored, damped=exact, before=before, after=after, order=order, size=size, act_order=act_order,
        maxq=how.maxq,
    )  # fmt: skip


def furthest_decision(case: Case) -> tuple[float, float]:
    """Walk as the refinement does, in terms of H and R, adopting its decisions.

    Returns how far a decision was from the best one in its state: an integer in steps beyond the middle between two,
    and a scale in loss, over scale^2 u H u.
    """
    order = list(range(len(case.order))) if case.act_order == "static" else case.order
    damped, q = case.damped[order][:, order], case.before.q.double()[order]
    new_q, groups = case.after.q.double()[order], case.after.g_idx.long()[order]
    zeros, scales = case.after.zeros.double(), case.before.scales.double().clone()
    R = (case.weight - values(case.before))[order]
    furthest = [0.0, 0.0]

    def refit(group: int) -> None:
        u = torch.where((groups == group)[:, None], q - zeros[groups], 0.0)
        projection, curvature = (u * (damped @ R)).sum(0), (u * (damped @ u)).sum(0)
        old, new = scales[group].clone(), case.after.scales[group].double()
        best = (old + projection / curvature).half().double()
        best = torch.where(best * old > 0, best, old)
        fall, best_fall = (d * projection - d * d * curvature / 2 for d in (new - old, best - old))
        unchanged = (new == old) | (fall > 0)
        assert unchanged.all(), "a scale that raises the loss"
        excess = ((best_fall - fall) / (old.square() * curvature)).nan_to_num()
        furthest[1] = max(furthest[1], float(excess.max()))
        scales[group] = new
        R.sub_(u * (new - old))

    inside = case.size <= 128
    if not inside:
        for group in reversed(range(len(scales))):
            refit(group)
    for begin, end in reversed(column_blocks(len(R), case.size)):
        for first in reversed(range(begin, end, case.size if inside else end - begin)):
            last = min(first + case.size, end) if inside else end
            if inside:
                refit(int(groups[first]))
            for j in reversed(range(first, last)):
                scale = scales[groups[j]]
                # In steps: where the loss is least, and by how much more it falls than it must to count, over half of
                # what a step costs.
                least = (damped[j] @ R) / (damped[j, j] * scale)
                nearest = (q[j] + least).clamp(0, case.maxq).round() - q[j]
                gain = nearest * (2 * least - nearest) - 0.1
                taken = new_q[j] - q[j]
                beyond = ((q[j] + least).clamp(0, case.maxq) - new_q[j]).abs() - 0.5
                miss = torch.where(taken == 0, gain, torch.maximum(beyond, 0.1 - taken * (2 * least - taken)))
                furthest[0] = max(furthest[0], float(miss.max()))
                R[j] -= (new_q[j] - q[j]) * scale
                q[j] = new_q[j]
    return furthest[0], furthest[1]


def assert_refined(case: Case, *, at_most: float = 0.99) -> None:
    before, after = case.losses(case.before), case.losses(case.after)
    assert (after <= before * (1 + 1e-6)).all()
    assert after.sum() <= at_most * before.sum()
    assert torch.allclose(case.after.losses.double(), after, rtol=1e-4, atol=0)
    assert torch.equal(case.after.unrefined_losses, case.before.losses)
    assert torch.equal(case.after.zeros, case.before.zeros)
    assert torch.equal(case.after.g_idx, case.before.g_idx)
    assert int(case.after.q.max()) <= case.maxq
    assert (case.after.scales.sign() == case.before.scales.sign()).all()


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize(("sym", "search"), [(True, "signed"), (False, True)])
@pytest.mark.parametrize("group_size", sampled([16, 32, 40, 136, -1], 40, 136))
def test_every_step_is_the_best_one_in_terms_of_the_hessian(group_size, sym, search, act_order):
    n = 160 if group_size == 136 else 96
    case = refined_case(n=n, act_order=act_order, group_size=group_size, sym=sym, scale_search=search)
    assert_refined(case)
    q_miss, scale_miss = furthest_decision(case)
    assert q_miss < 1e-4
    assert scale_miss < 1e-8


@pytest.mark.parametrize("bits", [2, 3, 8])
def test_every_width_is_refined(bits):
    case = refined_case(bits=bits, seed=bits)
    assert_refined(case)
    assert furthest_decision(case)[0] < 1e-4 * 2 ** (bits - 4 if bits > 4 else 0)


def test_the_oracle_sees_a_wrong_decision():
    case = refined_case()
    case.after.q[3, 3] ^= 1  # the last but two to be refined: group 0 was refitted before
    assert furthest_decision(case)[0] > 0.1
    case = refined_case()
    case.after.scales[1, 3] *= 1.002
    assert furthest_decision(case)[1] > 1e-7
    case.after.scales[1, 3] *= 1.5
    with pytest.raises(AssertionError, match="raises the loss"):
        furthest_decision(case)


@settings(max_examples=examples(25), deadline=None)
@given(
    act_order=st.sampled_from(ORDERS),
    group_size=st.sampled_from([8, 16, 24, 40, 64, 136, -1]),
    bits=st.sampled_from([2, 3, 4, 8]),
    kind=st.sampled_from([(True, False), (True, True), (True, "signed"), (False, False), (False, True)]),
    tokens=st.sampled_from([8, 40, 400]),
    outlier=st.sampled_from([0.0, 0.5, 30.0]),
    seed=st.integers(0, 99),
    split=st.booleans(),
)
def test_the_loss_of_no_output_feature_rises(act_order, group_size, bits, kind, tokens, outlier, seed, split):
    weight = torch.randn(144, 6, generator=torch.Generator().manual_seed(seed)) * 0.02
    weight[seed] += outlier
    weight[:, 1] = 0
    sym, search = kind
    case = refined_case(
        n=144, act_order=act_order, group_size=group_size, bits=bits, sym=sym, scale_search=search, tokens=tokens,
        seed=seed % 7, weight=weight, ops=SplitTorchOps() if split else TorchOps(),
    )  # fmt: skip
    # Few tokens leave H nearly singular: what damping adds is all that some changes cost.
    before, after = case.losses(case.before), case.losses(case.after)
    assert (after <= before * (1 + 1e-4) + 1e-12).all()
    assert torch.equal(values(case.after)[:, 1], torch.zeros(144, dtype=torch.float64))
    assert torch.equal(values(case.after)[5], torch.zeros(6, dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize("ops", [TorchOps(), SplitTorchOps()], ids=["float32", "split"])
@pytest.mark.parametrize(
    ("group_size", "act_order"), [(32, "full"), (48, "none"), (200, "group"), (-1, "full"), (64, "static")]
)
def test_refines_over_many_column_blocks(group_size, act_order, ops):
    """More than 512 columns: changes of four column blocks are taken off the errors together."""
    case = refined_case(n=648, out=8, act_order=act_order, group_size=group_size, scale_search="signed", ops=ops)
    assert_refined(case)
    q_miss, scale_miss = furthest_decision(case)
    assert q_miss < 1e-3
    assert scale_miss < 1e-7


def test_only_the_chosen_experts_are_refined_and_each_as_alone():
    n, experts = 150, 3
    H = torch.stack([hessian(inputs(n, seed)) for seed in range(experts)])
    weight = torch.randn(experts, 10, n, generator=torch.Generator().manual_seed(7)) * 0.02
    rules = GridRules(bits=4, sym=True, scale_search=False)
    for act_order, group_size in (("full", 32), ("static", 40), ("group", 136)):
        order = ColumnOrder(act_order=act_order, group_size=group_size)  # type: ignore[arg-type]
        chosen = (True, False, True)
        batch = solve([weight], factorize(H, order, damp_percent=0.01), rules, refined=chosen)
        for expert, refined in enumerate(chosen):
            alone = solve([weight[expert]], single(H[expert], order), rules, refined=(True,) if refined else ())
            for part in ("q", "scales", "zeros", "losses", "unrefined_losses"):
                assert torch.equal(getattr(batch.of_expert(expert), part), getattr(alone, part))


def single(H: Tensor, order: ColumnOrder) -> Factor:
    return factorize(H, order, damp_percent=0.01)


def test_linears_refined_side_by_side_equal_linears_refined_alone():
    H = hessian(inputs(64, 9))
    a, b = (torch.randn(64, out, generator=torch.Generator().manual_seed(out)) * 0.02 for out in (16, 8))
    factor = single(H, ColumnOrder(act_order="full", group_size=16))
    rules = GridRules(bits=4, sym=True, scale_search=False)
    both, alone = (
        solve(weights, factor, rules, refined=(True,)) for weights in ([a.T, b.T], [b.T])
    )  # fmt: skip
    part = both.by_linear([16, 8])[1]
    assert (part.q == alone.q).double().mean() > 0.99
    assert torch.allclose(part.losses, alone.losses, rtol=1e-3)
    assert (part.losses < part.unrefined_losses).all()


def test_a_scale_beyond_float16_stays_the_error_that_it_is():
    factor = single(hessian(inputs(64, 13)), ColumnOrder(act_order="none", group_size=32))
    found = solve(
        [torch.full((8, 64), 1e9)], factor, GridRules(bits=4, sym=True, scale_search=False), refined=(True,)
    )  # fmt: skip
    assert not bool(found.scales_are_finite())


def test_a_scale_is_refitted_only_within_float16_and_its_sign():
    scale = torch.tensor([0.5, 0.5, -0.5, 60000.0, 2.0**-24, 0.5, 0.5])
    wanted = torch.tensor([0.25, -0.25, -1.0, 1e6, 0.0, 0.5 + 1e-5, float("nan")])
    curvature = torch.ones(7)
    found = scale + refitted_by(scale, (wanted - scale) * curvature, curvature)
    assert found.tolist() == [0.25, 0.5, -1.0, 60000.0, 2.0**-24, 0.5, 0.5]
