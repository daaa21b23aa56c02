"""The Triton kernels against torch and the float64 reference: in Triton's interpreter, natively under -m gpu."""

from itertools import product
from typing import get_args

import pytest
import torch
from torch import Tensor

from packager.quantize.gptq import column_blocks
from packager.quantize.gptq.cholesky import split_solve
from packager.quantize.gptq.choose_ops import ops_for
from packager.quantize.gptq.grid import GridRules
from packager.quantize.gptq.hessian import factorize
from packager.quantize.gptq.lazy_updates import Float32Updates, SplitUpdates
from packager.quantize.gptq.order import ColumnOrder
from packager.quantize.gptq.solve import solve
from packager.quantize.gptq.tensor_ops import Grids, RoundedColumns, TensorOps
from packager.quantize.gptq.torch_ops import TorchOps
from packager.variant import ActOrder, ScaleSearch
from tests.gptq_reference import assert_agrees
from tests.kernel_devices import KERNEL_DEVICES, kernel_device
from tests.test_gptq import hessian, inputs

triton = pytest.importorskip("triton", reason="Triton is not made for this system")
from packager.quantize.gptq import triton_ops as triton_ops_module  # noqa: E402 - imports Triton
from packager.quantize.gptq.triton_ops import TritonOps, features_per_program  # noqa: E402

# The interpreter computes with numpy, which warns where float32 or float16 overflows to infinity, as it should here.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
TORCH = TorchOps()
NATIVE = pytest.mark.gpu


@pytest.fixture(params=KERNEL_DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return kernel_device(request.param)


class InterpretedOps(TritonOps):
    """The kernels on the CPU, which has no float16 products with float32 results."""

    def add_product(self, total, a, b, alpha=1):
        return TORCH.add_product(total, a, b, alpha)


@pytest.fixture
def kernels(device: torch.device) -> TensorOps:
    return TritonOps() if device.type == "cuda" else InterpretedOps()


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Columns for each group size so that its last group is shorter, and one of exactly a column block.
COLUMNS_OF = {16: 40, 32: 80, 40: 136, 48: 64, 128: 144, 200: 216, -1: 72}
ORDERS = get_args(ActOrder)
CASES = list(product((2, 3, 4, 8), (True, False), COLUMNS_OF, ORDERS))
# The interpreter takes seconds for a case, and a GPU's compiler too; every fifth still has nearly every pair of values.
SOME_CASES = CASES[::5]


def solves_like_the_reference(
    kernels: TensorOps, device: torch.device, n: int, out: int, *, search: ScaleSearch, sym: bool, bits: int,
    group_size: int, act_order: ActOrder,
) -> None:  # fmt: skip
    """Check a solution of the kernels; some weights are zero: a column's input, a group, an output feature."""
    H, weight = hessian(inputs(n, bits, dead=5)), random(n, out, seed=7) * 0.02
    weight[:32, 1], weight[:, 2] = 0, 0
    order = ColumnOrder(act_order=act_order, group_size=group_size)
    factor = factorize(H.to(device), order, damp_percent=0.01)
    rules = GridRules(bits=bits, sym=sym, scale_search=search)
    found = solve([weight.to(device, torch.float16).T], factor, rules, ops=kernels)
    assert_agrees(
        found, weight.half(), H, bits=bits, sym=sym, group_size=group_size, act_order=act_order,
        scale_search=search,
    )  # fmt: skip


@pytest.mark.parametrize(("bits", "sym", "group_size", "act_order"), SOME_CASES)
def test_solves_like_the_reference(kernels, device, bits, sym, group_size, act_order):
    n = COLUMNS_OF[group_size]
    solves_like_the_reference(
        kernels, device, n, 5, search=False, sym=sym, bits=bits, group_size=group_size, act_order=act_order
    )


@pytest.mark.parametrize(
    ("group_size", "sym", "search"),
    [
        (32, True, True), (48, False, True), (128, True, True), (200, True, True), (200, False, True),
        (32, True, "signed"), (128, True, "signed"), (200, True, "signed"),
    ],
)  # fmt: skip
def test_searches_scales_like_the_reference(kernels, device, group_size, sym, search):
    n, act_order = COLUMNS_OF[group_size], ORDERS[(group_size + sym) % 4]
    solves_like_the_reference(
        kernels, device, n, 5, search=search, sym=sym, bits=4, group_size=group_size, act_order=act_order
    )


@pytest.mark.parametrize(
    ("group_size", "act_order"), [(32, "full"), (200, "none"), (48, "static"), (40, "group"), (160, "group")]
)
def test_solves_many_column_blocks(monkeypatch, kernels, device, group_size, act_order):
    """More column blocks than are updated one by one: some updates of later columns go through `LazyUpdates`."""
    columns = 536
    if device.type == "cpu":  # the interpreter takes a second for 50 columns
        monkeypatch.setattr(column_blocks, "BLOCKS_AT_ONCE", 2)
        columns = 300
    solves_like_the_reference(
        kernels, device, columns, 5, search=False, sym=True, bits=4, group_size=group_size, act_order=act_order
    )


def test_cuda_uses_the_kernels():
    assert type(ops_for(torch.device("cpu"))) is TorchOps
    assert type(ops_for(torch.device("cuda"))) is TritonOps
    U, weight = torch.eye(4), torch.ones(4, 2)
    assert type(TORCH.lazy_updates(U, weight)) is Float32Updates


def test_kernels_keep_deltas_in_float16_parts(kernels, device):
    U, weight = torch.eye(4, device=device), torch.ones(4, 2, device=device)
    assert type(kernels.lazy_updates(U, weight)) is SplitUpdates


@NATIVE
@pytest.mark.parametrize(("group_size", "act_order"), [(32, "full"), (200, "none"), (200, "group")])
def test_the_torch_operations_solve_on_cuda_too(group_size, act_order):
    """They are what the kernels are compared with, so both must be able to run there."""
    solves_like_the_reference(
        TORCH, torch.device("cuda"), 536, 5, search=True, sym=True, bits=4, group_size=group_size, act_order=act_order
    )


def edge_groups() -> Tensor:
    """Groups of 16 columns: zeros, one sign only, one value only, tiny, beyond float16, with and without outliers."""
    w = random(16, 8, seed=3) * 0.02
    ones = torch.ones(16, 8)
    several = (
        w,
        w * 0,
        w.abs(),
        -w.abs(),
        w.abs() + 1,
        ones,
        -ones,
        w * 1e-4,
        w * 1e9,
        w.index_fill(0, torch.tensor([3]), 2.0),
    )
    return torch.cat(several, 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("sym", [True, False])
def test_a_range_gives_the_grid_that_torch_gives(kernels, device, bits, sym):
    w, rules = edge_groups(), GridRules(bits=bits, sym=sym, scale_search=False)
    expected = TORCH.find_grids(w, 16, rules, torch.ones(16))
    found = kernels.find_grids(w.to(device), 16, rules, torch.ones(16, device=device))
    assert [part.cpu().tolist() for part in found] == [part.tolist() for part in expected]


@pytest.mark.parametrize(
    ("n", "group_size", "sym"), [(70, 32, True), (7, 16, False), (60, 60, True), (210, 200, False), (56, 48, False)]
)
def test_grids_of_groups_that_divide_nothing(kernels, device, n, group_size, sym):
    w, column_weight = random(n, 33, seed=n) * 0.02, random(n, seed=1).square()
    searches: tuple[ScaleSearch, ...] = (False, True, "signed") if sym else (False, True)
    for search in searches:
        rules = GridRules(bits=4, sym=sym, scale_search=search)
        expected = TORCH.find_grids(w, group_size, rules, column_weight)
        found = kernels.find_grids(w.to(device), group_size, rules, column_weight.to(device))
        # Sums of errors are taken in another order; two scales may be equally good to float32.
        same = [(part.cpu() == torch_part).double().mean() for part, torch_part in zip(found, expected, strict=True)]
        assert min(same) >= (0.98 if search else 1.0)


def rounded_by(
    ops: TensorOps, w: Tensor, Hinv: Tensor, rules: GridRules, inline_group_size: int, device: torch.device
) -> tuple[RoundedColumns, Grids]:
    n, features = w.shape
    size = inline_group_size or 16
    scales = torch.full((-(-n // size), features), 0.004, device=device)
    grids = Grids(
        scales=scales,
        zeros=torch.full_like(scales, 2 ** (rules.bits - 1)),
        groups=torch.arange(n, device=device) // size,
    )
    result = RoundedColumns(
        q=torch.empty(n, features, dtype=torch.uint8, device=device),
        delta=torch.empty(n, features, device=device),
        squared_errors=torch.full((features,), 0.5, device=device),
    )
    Hinv = Hinv.to(device)
    ops.round_columns(
        w.to(device, copy=True), (w * 1.01).to(device, torch.float16), Hinv, Hinv.diagonal().reciprocal(), grids, rules,
        inline_group_size, result,
    )  # fmt: skip
    return result, grids


@pytest.mark.parametrize("features", [3, 13, *(pytest.param(many, marks=NATIVE) for many in (20_011,))])
@pytest.mark.parametrize(
    ("n", "inline_group_size"), [(128, 0), (128, 16), (128, 128), (96, 48), (72, 128), (1, 32), (80, 40)]
)
def test_a_column_block_is_rounded_as_torch_rounds_it(kernels, device, n, inline_group_size, features):
    w = random(n, features, seed=n) * 0.02
    Hinv = (torch.eye(n) + 0.05 * random(n, n, seed=2)).triu()
    Hinv.diagonal().abs_().clamp_(min=0.5)
    rules = GridRules(bits=4, sym=inline_group_size != 48, scale_search=inline_group_size == 40)
    expected, expected_grids = rounded_by(TORCH, w, Hinv, rules, inline_group_size, torch.device("cpu"))
    found, grids = rounded_by(kernels, w, Hinv, rules, inline_group_size, device)
    same = (found.q.cpu() == expected.q).all(0) & (grids.scales.cpu() == expected_grids.scales).all(0)
    assert same.double().mean() >= 0.95  # of a feature that meets no tie nothing differs
    assert torch.equal(grids.zeros.cpu()[:, same], expected_grids.zeros[:, same])
    assert torch.allclose(found.delta.cpu()[:, same], expected.delta[:, same], rtol=1e-5, atol=1e-7)
    assert torch.allclose(found.squared_errors.cpu()[same], expected.squared_errors[same], rtol=1e-5)


@pytest.mark.parametrize("at_once", [8, 32])
def test_the_number_of_features_per_program_changes_nothing(monkeypatch, kernels, device, at_once):
    n, features, group_size = 40, 2 * at_once - 3, 16  # the last program is not full, nor is the last group
    w, Hinv = random(n, features, seed=1) * 0.02, torch.eye(n) + 0.05 * random(n, n, seed=2).triu(1)
    rules = GridRules(bits=4, sym=True, scale_search=True)
    expected, expected_grids = rounded_by(kernels, w, Hinv, rules, group_size, device)
    monkeypatch.setattr(triton_ops_module, "_ROUND_FEATURES", (at_once,))
    monkeypatch.setattr(triton_ops_module, "_ROUND_MANY", (0,))
    found, grids = rounded_by(kernels, w, Hinv, rules, group_size, device)
    assert features_per_program(features) == at_once
    assert torch.equal(found.q, expected.q)
    assert torch.equal(grids.scales, expected_grids.scales)
    assert torch.allclose(found.delta, expected.delta, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("bits", "sym", "group_size", "act_order"),
    [
        (4, True, 40, "none"), (3, False, 32, "full"), (4, True, 48, "static"), (8, False, -1, "group"),
        (4, True, 200, "none"),
    ],
)  # fmt: skip
def test_refines_as_torch(kernels, device, bits, sym, group_size, act_order):
    n = COLUMNS_OF[group_size]
    H, weight = hessian(inputs(n, bits, dead=5)), random(n, 5, seed=7) * 0.02
    weight[:, 2] = 0
    factor = factorize(H.to(device), ColumnOrder(act_order=act_order, group_size=group_size), damp_percent=0.01)
    rules = GridRules(bits=bits, sym=sym, scale_search="signed" if sym else False)
    expected, found = (
        solve([weight.to(device, torch.float16).T], factor, rules, refined=(True,), ops=ops) for ops in (TORCH, kernels)
    )
    assert (found.q == expected.q).double().mean() > 0.98
    assert (found.scales == expected.scales).double().mean() > 0.9
    assert torch.allclose(found.losses, expected.losses, rtol=1e-2)
    # An integer changed and changed back leaves the rounding of two float32 updates of E.
    assert (found.losses <= found.unrefined_losses * (1 + 1e-5)).all()
    assert found.losses.sum() < 0.99 * found.unrefined_losses.sum()


@pytest.mark.parametrize("inline_group_size", [0, 16])
def test_a_column_block_of_chosen_experts_is_refined_as_torch_refines_it(kernels, device, inline_group_size):
    experts, n, features, size = 3, 40, 19, inline_group_size or 40
    x = random(experts, 3 * n, n, seed=1)
    H, R = x.mT @ x / n, random(experts, n, features, seed=2) * 0.01
    q = torch.randint(0, 16, (experts, n, features), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    allowed = torch.tensor([True, False, True])
    rules, results = GridRules(bits=4, sym=True, scale_search=False), []
    for ops, where in ((TORCH, torch.device("cpu")), (kernels, device)):
        scales = torch.full((experts, -(-n // size), features), 0.0078125, device=where)
        groups = (torch.arange(n, device=where) // size).expand(experts, n).contiguous()
        grids = Grids(scales=scales, zeros=torch.full_like(scales, 8), groups=groups)
        mine, change = q.to(where, copy=True), torch.full((experts, n, features), torch.nan, device=where)
        G = (H @ R).to(where, copy=True)
        ops.refine_columns(G, H.to(where), mine, grids, rules, inline_group_size, allowed.to(where), change)
        results.append([part.cpu() for part in (mine, scales, change)])
    (expected_q, expected_scales, expected_change), (found_q, found_scales, change) = results
    assert (found_q == expected_q).double().mean() > 0.98
    assert (found_scales == expected_scales).double().mean() > 0.98
    assert ((change - expected_change).abs() < 1e-6).double().mean() > 0.98
    assert torch.equal(found_q[1], q[1])
    assert not change[1].any()
    assert (found_q[0] != q[0]).any()
    assert (found_scales != 0.0078125).any() == (inline_group_size > 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("widths", [(70,), (64, 1, 33)])
@pytest.mark.parametrize("ordered", [False, True])
def test_linears_are_permuted_as_by_torch(kernels, device, dtype, widths, ordered):
    n = 150
    weights = [random(width, n, seed=width).to(device, dtype) for width in widths]
    weights[0] = weights[0].T.contiguous().T  # not dense
    dead, inverse_perm = torch.zeros(n, dtype=torch.bool), torch.randperm(n, generator=torch.Generator().manual_seed(1))
    dead[[0, 64, 149]] = True
    weights[0][:, 64] = torch.nan  # a weight that no input reaches may be anything
    dead, where = dead.to(device), inverse_perm.to(device) if ordered else None
    expected = TORCH.permute_columns(weights, dead, where)
    assert torch.equal(kernels.permute_columns(weights, dead, where), expected)
    assert not expected.isnan().any()
    column = int(inverse_perm[10]) if ordered else 10
    assert torch.equal(expected[column], torch.cat([weight[:, 10] for weight in weights]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "out"), [(150, 70), (64, 64), (1, 3)])
def test_dequantizes_as_torch(kernels, device, dtype, n, out):
    """Codes and grids are parts of those of several linears, as after `by_linear`."""
    groups = 5
    q = torch.randint(0, 16, (n, out + 9), dtype=torch.uint8)[:, 4 : out + 4].to(device)
    zeros = torch.randint(1, 16, (groups, out + 9), dtype=torch.uint8)[:, 4 : out + 4].to(device)
    scales = (random(groups, out + 9) * 0.01).half()[:, 4 : out + 4].to(device)
    g_idx = torch.randint(0, groups, (n,), dtype=torch.int32).to(device)
    expected, found = (torch.full((out, n), torch.nan, dtype=dtype, device=device) for _ in range(2))
    TORCH.dequantize(expected, q, zeros, scales, g_idx)
    kernels.dequantize(found, q, zeros, scales, g_idx)
    assert torch.equal(found, expected)
    assert not found.isnan().any()


@pytest.mark.parametrize("scaled", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("width", [7, 2500])
@pytest.mark.parametrize("by_columns", [False, True])
def test_splits_as_torch(kernels, device, scaled, width, by_columns):
    """Rows are part of wider ones, or not dense: the library's Cholesky factors lie column by column."""
    x = random(width + 6, 5).T[:, 3 : width + 3] if by_columns else random(5, width + 6)[:, 3 : width + 3]
    rows, features = (2.0 ** torch.arange(-count, count + 1)[:count] for count in (5, width))
    by_row, by_column = (
        part if wanted else None for part, wanted in zip((rows, features.clamp(2**-9, 2**9)), scaled, strict=True)
    )
    expected = TORCH.split(x, by_row, by_column)
    found = tuple(torch.zeros(5, width + 4, dtype=torch.float16, device=device)[:, 2 : width + 2] for _ in range(2))
    given = [None if part is None else part.to(device) for part in (by_row, by_column)]
    kernels.split(x.to(device), *given, found)
    assert all(torch.equal(mine.cpu(), plain) for mine, plain in zip(found, expected, strict=True))
    assert expected[1].any()


def test_rows_are_solved_for_with_parts_as_torch_splits_them(kernels, device):
    """The parts lie side by side in memory, and those of L are read along its columns."""
    x, P = random(80, 40), random(3, 40, seed=1)
    A = x.T @ x / 80 + torch.eye(40)
    L = torch.linalg.cholesky(A)
    expected = split_solve(P.clone(), L.clone(), TORCH, 16)
    found = split_solve(P.to(device, copy=True), L.to(device, copy=True), kernels, 16).cpu()
    assert torch.allclose(found, expected, rtol=0, atol=0 if device.type == "cpu" else 1e-5)
    assert torch.allclose(found @ A, P, atol=1e-5)
