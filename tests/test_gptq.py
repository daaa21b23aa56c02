"""The solver against an independent float64 reference."""

from dataclasses import replace
from itertools import product
from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packager.errors import QuantizeError
from packager.quantize.gptq.grid import GridRules, find_grids
from packager.quantize.gptq.hessian import Hessian, factorize, factorize_within
from packager.quantize.gptq.lazy_updates import SplitUpdates
from packager.quantize.gptq.order import ColumnOrder
from packager.quantize.gptq.solve import Solution, solve
from packager.quantize.gptq.torch_ops import TorchOps
from packager.variant import ActOrder
from tests.gptq_reference import LOSS_TOLERANCE, TIE, assert_agrees, gptq
from tests.hypothesis_profiles import examples
from tests.samples import sampled

CPU = torch.device("cpu")


class SplitTorchOps(TorchOps):
    """Lazy updates from float16 parts, as on CUDA, without its kernels."""

    def lazy_updates(self, U, weight):
        return SplitUpdates(U, weight, self)


OPS = pytest.mark.parametrize("ops", [TorchOps(), SplitTorchOps()], ids=["float32", "split"])


def inputs(n: int, seed: int, *, dead: int | None = None) -> torch.Tensor:
    """Correlated inputs with very different column sizes, like activations."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8 * n, n, generator=generator) * torch.rand(n, generator=generator).mul(3)
    x = x @ (torch.eye(n) + 0.1 * torch.randn(n, n, generator=generator))
    if dead is not None:
        x[:, dead] = 0
    return x


def hessian(x: torch.Tensor) -> torch.Tensor:
    accumulated = Hessian(x.shape[1], CPU)
    for part in x.split(37):
        accumulated.add(part)
    return accumulated.matrix()


STORED = ColumnOrder(act_order="none", group_size=32)


def solved(weight: torch.Tensor, H: torch.Tensor, *, damp: float = 0.01, ops: Any = None, **rules) -> Solution:
    order = replace(STORED, **{name: rules.pop(name) for name in ("act_order", "group_size") if name in rules})
    factor = factorize_within(H, order, damp_percent=damp, damp_percent_limit=0.5)
    found = solve([weight.T], factor, GridRules(**{"bits": 4, "sym": True, "scale_search": False, **rules}), ops=ops)
    assert bool(found.scales_are_finite())
    return found


def test_hessian_is_twice_the_mean_outer_product():
    x = inputs(24, 0)
    expected = 2 * x.double().T @ x.double() / x.shape[0]
    assert torch.allclose(hessian(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_factor_is_upper_and_its_square_is_the_damped_hessian():
    H = hessian(inputs(48, 1))
    factor = factorize(H, STORED, damp_percent=0.02)
    damped = H.double() + torch.eye(48) * 0.02 * H.double().diagonal().mean()
    U = factor.U.double()
    assert torch.equal(U, U.triu())
    assert torch.allclose(U @ U.T, damped, rtol=1e-5, atol=1e-5)


ORDERS = get_args(ActOrder)


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize("sym", [True, False], ids=["sym", "asym"])
@pytest.mark.parametrize("group_size", sampled([16, 32, 40, 48, -1], 40, -1))
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_decision_is_the_float64_reference_s_but_for_ties(bits, group_size, sym, act_order):
    H = hessian(inputs(96, bits, dead=5))
    weight = torch.randn(96, 24, generator=torch.Generator().manual_seed(7)) * 0.02
    how: dict[str, Any] = {"bits": bits, "group_size": group_size, "sym": sym, "act_order": act_order}
    assert_agrees(solved(weight, H, **how), weight, H, **how)


@pytest.mark.parametrize("act_order", ORDERS)
@pytest.mark.parametrize(("sym", "search"), [(True, True), (False, True), (True, "signed")])
@pytest.mark.parametrize("group_size", sampled([32, 40, -1], 40))
def test_the_scale_search_agrees_with_the_reference(group_size, sym, search, act_order):
    H = hessian(inputs(96, 2, dead=5))
    weight = torch.randn(96, 24, generator=torch.Generator().manual_seed(7)) * 0.02
    how: dict[str, Any] = {"bits": 4, "group_size": group_size, "sym": sym, "act_order": act_order}
    how["scale_search"] = search
    found = solved(weight, H, **how)
    assert_agrees(found, weight, H, **how)
    negative = float((found.scales < 0).double().mean())
    assert 0.3 < negative < 0.8 if search == "signed" else negative == 0


def test_the_largest_weight_of_a_group_lies_on_the_end_that_has_a_step_more():
    w = torch.tensor([[0.8, -0.8], [-0.1, 0.1], [0.3, -0.3]])
    scales, zeros = find_grids(w, 3, GridRules(bits=4, sym=True, scale_search="signed"), torch.tensor([1e9, 1.0, 1.0]))
    q = torch.round(w / scales) + zeros
    assert scales[0, 0] == torch.tensor(-0.1).half()
    assert q[0, 0] == 0


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_signed_scales_never_raise_the_rounding_error_of_a_group(bits):
    w, weight = inputs(96, 8)[:, :64] * 0.02, torch.rand(768, generator=torch.Generator().manual_seed(1))
    errors = {}
    for search in (True, "signed"):
        rules = GridRules(bits=bits, sym=True, scale_search=search)
        scales, zeros = (each.repeat_interleave(32, 0) for each in find_grids(w, 32, rules, weight))
        q = torch.clamp(torch.round(w / scales) + zeros, 0, rules.maxq)
        errors[search] = ((w - (q - zeros) * scales).square() * weight[:, None]).unflatten(0, (-1, 32)).sum(1)
    assert (errors["signed"] <= errors[True] * (1 + 1e-5)).all()
    assert errors["signed"].sum() < 0.97 * errors[True].sum()


def test_signed_scales_are_for_symmetric_grids():
    with pytest.raises(ValueError, match="symmetric"):
        GridRules(bits=4, sym=False, scale_search="signed")


def test_group_aware_order_is_inside_groups_then_groups_by_their_largest():
    diagonal = torch.tensor([1.0, 4, 2, 9, 9, 3, 5, 5, 5, 10, 11])

    def order(**how: Any) -> list[int]:
        found = ColumnOrder(**how).permutation(diagonal)
        assert found is not None
        return found.tolist()

    # The groups' largest are 4, 9, 5; the short one stays last, although it has the largest of all.
    assert order(act_order="group", group_size=3) == [3, 4, 5, 6, 7, 8, 1, 2, 0, 10, 9]
    whole, wide = (order(act_order="group", group_size=size) for size in (-1, 16))
    full = order(act_order="full", group_size=3)
    assert whole == wide == full == order(act_order="static", group_size=3) == [10, 9, 3, 4, 6, 7, 8, 1, 5, 2, 0]


@pytest.mark.parametrize("act_order", ["none", "group", "static"])
@pytest.mark.parametrize("group_size", [16, 40, 136, -1])
def test_only_full_order_needs_g_idx(group_size, act_order):
    H, weight = hessian(inputs(152, 4)), torch.randn(152, 8, generator=torch.Generator().manual_seed(9)) * 0.02
    size = 152 if group_size == -1 else group_size
    found = solved(weight, H, group_size=group_size, act_order=act_order)
    assert found.g_idx.tolist() == [column // size for column in range(152)]
    if group_size != -1:
        assert solved(weight, H, group_size=group_size, act_order="full").g_idx.tolist() != found.g_idx.tolist()


def test_with_one_group_per_row_every_act_order_solves_alike():
    H, weight = hessian(inputs(96, 4)), torch.randn(96, 8, generator=torch.Generator().manual_seed(9)) * 0.02
    found = [solved(weight, H, group_size=-1, act_order=order, scale_search=True) for order in ORDERS[1:]]
    for other in found[1:]:
        assert torch.equal(other.q, found[0].q)
        assert torch.equal(other.scales, found[0].scales)


def column_block_cases():
    """Yield group sizes and orders, half of them with each pair of a dtype and a kind of products; the rest is long."""
    groups = [
        *((32, "full"), (48, "none"), (128, "none"), (160, "full"), (200, "none"), (256, "full"), (-1, "full")),
        *((40, "group"), (160, "group"), (256, "group"), (48, "static"), (200, "static")),
    ]
    pairs = list(product((torch.float32, torch.float16), (TorchOps(), SplitTorchOps())))
    for number, group in enumerate(groups):
        for pair, (dtype, ops) in enumerate(pairs):
            words = (*group, str(dtype).removeprefix("torch."), "split" if isinstance(ops, SplitTorchOps) else "whole")
            marks = () if number % 2 == (pair in (1, 2)) else pytest.mark.long
            yield pytest.param(*group, dtype, ops, marks=marks, id="-".join(map(str, words)))


@pytest.mark.slow
@pytest.mark.parametrize(("group_size", "act_order", "dtype", "ops"), list(column_block_cases()))
def test_agrees_over_many_column_blocks(group_size, act_order, dtype, ops):
    """More than 512 columns: some updates of later columns go through `LazyUpdates`."""
    n, out = 648, 8
    H = hessian(inputs(n, 4, dead=5))
    weight = (torch.randn(n, out, generator=torch.Generator().manual_seed(8)) * 0.02).to(dtype)
    how = {"bits": 4, "group_size": group_size, "sym": True, "act_order": act_order}
    assert_agrees(solved(weight, H, ops=ops, **how), weight, H, **how)


def test_agrees_where_the_hessian_is_nearly_singular():
    """Fewer tokens than columns: damping alone makes it positive definite, and float32 has fewer digits to spare."""
    H = hessian(inputs(160, 14)[:48])
    weight = torch.randn(160, 16, generator=torch.Generator().manual_seed(9)) * 0.02
    how: dict[str, Any] = {"bits": 4, "group_size": 32, "sym": True, "act_order": "full"}
    assert_agrees(solved(weight, H, **how), weight, H, tie=10 * TIE, **how)


def test_alone_the_reference_gets_the_same_q_and_losses():
    """Ties are so rare that a reference that follows no other solution has 99 % of all q, and the loss to 0.1 %."""
    H = hessian(inputs(256, 3))
    weight = torch.randn(256, 1024, generator=torch.Generator().manual_seed(8)) * 0.02
    for act_order, group_size in (("none", 128), ("full", 32), ("group", 64), ("static", 64)):
        how: dict[str, Any] = {"bits": 4, "group_size": group_size, "sym": True, "act_order": act_order}
        expected, found = gptq(weight, H, damp=0.01, **how), solved(weight, H, **how)
        assert (found.q.double() == expected.q).double().mean() >= 0.99
        assert float(found.losses.sum()) == pytest.approx(float(expected.losses.sum()), rel=LOSS_TOLERANCE)


def test_the_reference_distinguishes_a_tie_from_a_mistake():
    H = hessian(inputs(96, 4))
    weight = torch.randn(96, 256, generator=torch.Generator().manual_seed(10)) * 0.02
    how: dict[str, Any] = {"bits": 4, "group_size": 32, "sym": True, "act_order": "full"}
    # Weights that differ in their fifth digit are rounded otherwise where they are within about 1e-4 of a tie, and what
    # comes after becomes something else: the reference judges each decision by those before it.
    noise = 1 + 3e-5 * torch.randn(96, 256, generator=torch.Generator().manual_seed(11))
    other = solved(weight * noise, H, **how)
    changed = (other.q.double() != gptq(weight, H, damp=0.01, **how).q).sum()
    expected = assert_agrees(other, weight, H, tie=1e-5, **how)
    assert 0 < (expected.q_misses > 0).sum() < changed / 5
    assert (expected.grid_misses > 0).any()
    found = solved(weight, H, **how)
    found.q[40, 3] ^= 1
    with pytest.raises(AssertionError, match="'q': "):
        assert_agrees(found, weight, H, tie=1e-3, **how)
    found = solved(weight, H, **how)
    found.scales[1, 3] *= 1.002
    with pytest.raises(AssertionError, match=r"'grid': 0\.00"):
        assert_agrees(found, weight, H, **how)


def test_losses_are_the_squared_output_error():
    """The losses are tr(dW H dW^T) / 2 with the damped H, computed here from the result only."""
    H = hessian(inputs(64, 4))
    weight = torch.randn(64, 16) * 0.02
    for act_order in ORDERS:
        found = solved(weight, H, act_order=act_order)
        delta = (found.dequantized().T - weight).double()
        damped = H.double() + torch.eye(64) * 0.01 * H.double().diagonal().mean()
        expected = (delta * (damped @ delta)).sum(0) / 2
        assert torch.allclose(found.losses.double(), expected, rtol=1e-4)


def nearest_values(w: torch.Tensor, *, bits: int, sym: bool) -> torch.Tensor:
    """One group, rounded to the nearest values of its grid."""
    rules = GridRules(bits=bits, sym=sym, scale_search=False)
    scales, zeros = find_grids(w, len(w), rules, torch.ones(len(w)))
    return (torch.clamp(torch.round(w / scales) + zeros, 0, rules.maxq) - zeros) * scales


def test_better_than_rounding_to_nearest():
    H = hessian(inputs(64, 5))
    weight = torch.randn(64, 32) * 0.02
    nearest = torch.cat([nearest_values(w, bits=4, sym=True) for w in weight.split(32)])

    def error(w: torch.Tensor) -> float:
        return float(((w - weight) * (H @ (w - weight))).sum())

    assert error(solved(weight, H).dequantized().T) < 0.8 * error(nearest)


def test_scale_search_lowers_the_loss_of_every_permutation():
    H = hessian(inputs(128, 6))
    weight = torch.randn(128, 256, generator=torch.Generator().manual_seed(6)) * 0.02
    for act_order in ORDERS:
        # With static order the search sees the columns as stored, not as they are rounded: it gains less, or loses.
        for sym, most in ((True, 0.99), (False, 1.1)) if act_order == "static" else ((True, 0.95), (False, 1.0)):
            plain = solved(weight, H, act_order=act_order, sym=sym).losses.sum()
            searched = solved(weight, H, act_order=act_order, sym=sym, scale_search=True).losses.sum()
            assert searched < most * plain


def test_linears_solved_side_by_side_equal_linears_solved_alone():
    H = hessian(inputs(64, 9))
    a, b = torch.randn(64, 16) * 0.02, torch.randn(64, 8) * 0.05
    both = solved(torch.cat([a, b], 1), H, act_order="full")
    for part, alone in zip(both.by_linear([16, 8]), [solved(w, H, act_order="full") for w in (a, b)], strict=True):
        assert (part.q == alone.q).double().mean() > 0.99
        assert torch.equal(part.g_idx, alone.g_idx)


def test_dead_columns_become_zero_and_disturb_nothing():
    x = inputs(64, 10, dead=3)
    weight = torch.randn(64, 16) * 0.02
    weight[3] = 100.0
    found = solved(weight, hessian(x))
    assert torch.equal(found.dequantized().T[3], torch.zeros(16))
    assert found.dequantized().T.abs().max() < 1


@OPS
def test_a_linear_of_zeros_stays_zero(ops):
    weight, H = torch.zeros(552, 8), hessian(inputs(552, 11))
    for sym in (True, False):
        found = solved(weight, H, sym=sym, ops=ops)
        assert torch.equal(found.dequantized().T, weight)


@settings(max_examples=examples(60))
@given(low=st.floats(-4, 4), high=st.floats(-4, 4), bits=st.sampled_from([2, 3, 4, 8]))
def test_asymmetric_zero_is_never_zero_and_the_grid_covers_the_group(low, high, bits):
    low, high = sorted((low, high))
    w = torch.linspace(low, high, 16)[:, None]
    rules = GridRules(bits=bits, sym=False, scale_search=False)
    scales, zeros = find_grids(w, 16, rules, torch.ones(16))
    assert 1 <= int(zeros) <= rules.maxq
    # A scale is stored as float16, whose steps under 2^-14 are 2^-24 wide: then the grid may end below the group.
    rounding = rules.maxq * 2**-25
    assert (w - nearest_values(w, bits=bits, sym=False)).abs().max() <= float(scales) * 1.001 + rounding


def test_damping_is_raised_only_to_the_limit_and_recorded():
    H = hessian(inputs(32, 12))
    # Shift the spectrum so that the smallest eigenvalue is -3 % of the mean diagonal: indefinite until damped by more
    # than that.
    smallest = torch.linalg.eigvalsh(H)[0]
    mean = H.diagonal().mean()
    shift = (smallest + 0.03 * mean) / 1.03
    H = H - shift * torch.eye(32)
    assert not bool(factorize(H, STORED, damp_percent=0.01).succeeded)
    factor = factorize_within(H, STORED, damp_percent=0.01, damp_percent_limit=0.5)
    assert factor.damp_percent == pytest.approx(0.04)
    with pytest.raises(QuantizeError, match="cannot be factored"):
        factorize_within(H, STORED, damp_percent=0.01, damp_percent_limit=0.02)


def test_nan_in_activations_is_an_error():
    accumulated = Hessian(4, CPU)
    accumulated.add(torch.tensor([[1.0, float("nan"), 0, 0]]))
    with pytest.raises(QuantizeError, match="NaN or Inf"):
        factorize_within(accumulated.matrix(), STORED, damp_percent=0.01, damp_percent_limit=0.1)


def test_a_scale_beyond_float16_does_not_fit():
    factor = factorize(hessian(inputs(64, 13)), STORED, damp_percent=0.01)
    rules = GridRules(bits=4, sym=True, scale_search=False)
    found = solve([torch.full((8, 64), 1e9)], factor, rules)
    assert not bool(found.scales_are_finite())
