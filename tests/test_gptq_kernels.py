"""The Triton kernels against torch and the float64 reference: in Triton's interpreter, natively under -m gpu."""

from itertools import product

import pytest
import torch
from torch import Tensor

from packager.quantize.gptq import columns, grid, solving_order, split_float16
from packager.quantize.gptq.columns import Columns, Grids
from packager.quantize.gptq.grid import GridRules
from packager.quantize.gptq.hessian import factorize
from packager.quantize.gptq.lazy_updates import SplitCarry
from packager.quantize.gptq.solve import TORCH, backend_for, solve
from tests.gptq_reference import assert_agrees
from tests.test_gptq import hessian, inputs

triton = pytest.importorskip("triton", reason="Triton is not made for this system")
from packager.quantize.gptq import kernels  # noqa: E402 - imports Triton

# The interpreter computes with numpy, which warns where float32 or float16 overflows to infinity, as it should here.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
BACKEND = backend_for(torch.device("cuda"))  # its kernels, wherever they run
NATIVE = pytest.mark.gpu


@pytest.fixture(params=[pytest.param("cpu", marks=pytest.mark.interpreter), pytest.param("cuda", marks=NATIVE)])
def device(request: pytest.FixtureRequest) -> torch.device:
    if request.param == "cuda":
        assert torch.cuda.is_available(), "this test needs a CUDA GPU"
    elif not triton.knobs.runtime.interpret:
        pytest.skip("kernels take CPU tensors in the interpreter only, which -m gpu leaves out")
    return torch.device(request.param)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# Columns for each group size so that its last group is shorter, and one of exactly a column block.
COLUMNS_OF = {16: 40, 32: 80, 40: 136, 48: 64, 128: 144, 200: 216, -1: 72}
ORDERS = ((False, False), (True, False), (True, True))
CASES = list(product((2, 3, 4, 8), (True, False), COLUMNS_OF, ORDERS))
# The interpreter takes seconds for a case, and a GPU's compiler too; every fifth still has nearly every pair of values.
SOME_CASES = CASES[::5]


def solves_like_the_reference(
    device: torch.device, n: int, out: int, *, search: bool, sym: bool, bits: int, group_size: int,
    order: tuple[bool, bool],
) -> None:  # fmt: skip
    """Check a solution of the kernels; some weights are zero: a column's input, a group, an output feature."""
    desc_act, static = order
    H, weight = hessian(inputs(n, bits, dead=5)), random(n, out, seed=7) * 0.02
    weight[:32, 1], weight[:, 2] = 0, 0
    factor = factorize(H.to(device), desc_act=desc_act, damp_percent=0.01)
    rules = GridRules(bits=bits, sym=sym, scale_search=search)
    found = solve(
        [weight.to(device, torch.float16).T],
        factor,
        rules,
        group_size=group_size,
        static_groups=static,
        backend=BACKEND,
    )
    how = {"bits": bits, "sym": sym, "group_size": group_size, "desc_act": desc_act, "static_groups": static}
    assert_agrees(found, weight.half(), H, scale_search=search, **how)


@pytest.mark.parametrize(("bits", "sym", "group_size", "order"), SOME_CASES)
def test_solves_like_the_reference(device, bits, sym, group_size, order):
    n = COLUMNS_OF[group_size]
    solves_like_the_reference(device, n, 5, search=False, sym=sym, bits=bits, group_size=group_size, order=order)


@pytest.mark.parametrize(("group_size", "sym"), [(32, True), (48, False), (128, True), (200, True), (200, False)])
def test_searches_scales_like_the_reference(device, group_size, sym):
    n, order = COLUMNS_OF[group_size], ORDERS[group_size % 3]
    solves_like_the_reference(device, n, 5, search=True, sym=sym, bits=4, group_size=group_size, order=order)


@pytest.mark.parametrize(("group_size", "order"), [(32, ORDERS[1]), (200, ORDERS[0]), (48, ORDERS[2])])
def test_solves_many_column_blocks(device, group_size, order):
    """More than 512 columns: what column blocks owe each other goes through the carry as well."""
    solves_like_the_reference(device, 536, 5, search=False, sym=True, bits=4, group_size=group_size, order=order)


def test_cuda_is_given_the_kernels():
    assert backend_for(torch.device("cpu")) == TORCH
    for name in ("in_order", "find_grids", "round_columns", "dequantize"):
        assert getattr(BACKEND, name) is getattr(kernels, name)
    assert BACKEND.carry is SplitCarry


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
def test_a_range_gives_the_grid_that_torch_gives(device, bits, sym):
    w, rules = edge_groups(), GridRules(bits=bits, sym=sym, scale_search=False)
    expected = grid.find_grids(w, 16, rules, torch.ones(16))
    found = kernels.find_grids(w.to(device), 16, rules, torch.ones(16, device=device))
    assert [part.cpu().tolist() for part in found] == [part.tolist() for part in expected]


@pytest.mark.parametrize(
    ("n", "group_size", "sym"), [(70, 32, True), (7, 16, False), (60, 60, True), (210, 200, False), (56, 48, False)]
)
def test_grids_of_groups_that_divide_nothing(device, n, group_size, sym):
    w, price = random(n, 33, seed=n) * 0.02, random(n, seed=1).square()
    for search in (False, True):
        rules = GridRules(bits=4, sym=sym, scale_search=search)
        expected = grid.find_grids(w, group_size, rules, price)
        found = kernels.find_grids(w.to(device), group_size, rules, price.to(device))
        # Sums of errors are taken in another order; two scales may be equally good to float32.
        same = [(part.cpu() == torch_part).double().mean() for part, torch_part in zip(found, expected, strict=True)]
        assert min(same) >= (0.98 if search else 1.0)


def rounded_by(
    round_columns, w: Tensor, Hinv: Tensor, rules: GridRules, find_every: int, device: torch.device
) -> tuple[Columns, Grids]:
    n, features = w.shape
    size = find_every or 16
    scales = torch.full((-(-n // size), features), 0.004, device=device)
    grids = Grids(
        scales=scales,
        zeros=torch.full_like(scales, 2 ** (rules.bits - 1)),
        groups=torch.arange(n, device=device) // size,
    )
    result = Columns(
        q=torch.empty(n, features, dtype=torch.uint8, device=device),
        change=torch.empty(n, features, device=device),
        squared_errors=torch.full((features,), 0.5, device=device),
    )
    Hinv = Hinv.to(device)
    round_columns(
        w.to(device, copy=True), (w * 1.01).to(device, torch.float16), Hinv, Hinv.diagonal().reciprocal(), grids, rules,
        find_every, result,
    )  # fmt: skip
    return result, grids


@pytest.mark.parametrize("features", [3, 13, *(pytest.param(many, marks=NATIVE) for many in (20_011,))])
@pytest.mark.parametrize(("n", "find_every"), [(128, 0), (128, 16), (128, 128), (96, 48), (72, 128), (1, 32), (80, 40)])
def test_a_column_block_is_rounded_as_torch_rounds_it(device, n, find_every, features):
    w = random(n, features, seed=n) * 0.02
    Hinv = (torch.eye(n) + 0.05 * random(n, n, seed=2)).triu()
    Hinv.diagonal().abs_().clamp_(min=0.5)
    rules = GridRules(bits=4, sym=find_every != 48, scale_search=find_every == 40)
    expected, expected_grids = rounded_by(columns.round_columns, w, Hinv, rules, find_every, torch.device("cpu"))
    found, grids = rounded_by(kernels.round_columns, w, Hinv, rules, find_every, device)
    same = (found.q.cpu() == expected.q).all(0) & (grids.scales.cpu() == expected_grids.scales).all(0)
    assert same.double().mean() >= 0.95  # of a feature that meets no tie nothing differs
    assert torch.equal(grids.zeros.cpu()[:, same], expected_grids.zeros[:, same])
    assert torch.allclose(found.change.cpu()[:, same], expected.change[:, same], rtol=1e-5, atol=1e-7)
    assert torch.allclose(found.squared_errors.cpu()[same], expected.squared_errors[same], rtol=1e-5)


@pytest.mark.parametrize("at_once", [8, 32])
def test_it_does_not_matter_how_many_features_a_program_takes(monkeypatch, device, at_once):
    w, Hinv = random(96, 50, seed=1) * 0.02, torch.eye(96) + 0.05 * random(96, 96, seed=2).triu(1)
    rules = GridRules(bits=4, sym=True, scale_search=True)
    expected, expected_grids = rounded_by(kernels.round_columns, w, Hinv, rules, 32, device)
    monkeypatch.setattr(kernels, "_ROUND_FEATURES", (at_once,))
    monkeypatch.setattr(kernels, "_ROUND_MANY", (0,))
    found, grids = rounded_by(kernels.round_columns, w, Hinv, rules, 32, device)
    assert kernels.features_at_once(50) == at_once
    assert torch.equal(found.q, expected.q)
    assert torch.equal(grids.scales, expected_grids.scales)
    assert torch.allclose(found.change, expected.change, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("widths", [(70,), (64, 1, 33)])
@pytest.mark.parametrize("ordered", [False, True])
def test_linears_come_into_order_as_by_torch(device, dtype, widths, ordered):
    n = 150
    weights = [random(width, n, seed=width).to(device, dtype) for width in widths]
    weights[0] = weights[0].T.contiguous().T  # not dense
    dead, place = torch.zeros(n, dtype=torch.bool), torch.randperm(n, generator=torch.Generator().manual_seed(1))
    dead[[0, 64, 149]] = True
    weights[0][:, 64] = torch.nan  # a weight that no input reaches may be anything
    dead, where = dead.to(device), place.to(device) if ordered else None
    expected = solving_order.in_order(weights, dead, where)
    assert torch.equal(kernels.in_order(weights, dead, where), expected)
    assert not expected.isnan().any()
    column = int(place[10]) if ordered else 10
    assert torch.equal(expected[column], torch.cat([weight[:, 10] for weight in weights]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("n", "out"), [(150, 70), (64, 64), (1, 3)])
def test_dequantizes_as_torch(device, dtype, n, out):
    """Codes and grids are parts of those of several linears, as after `by_linear`."""
    groups = 5
    q = torch.randint(0, 16, (n, out + 9), dtype=torch.uint8)[:, 4 : out + 4].to(device)
    zeros = torch.randint(1, 16, (groups, out + 9), dtype=torch.uint8)[:, 4 : out + 4].to(device)
    scales = (random(groups, out + 9) * 0.01).half()[:, 4 : out + 4].to(device)
    g_idx = torch.randint(0, groups, (n,), dtype=torch.int32).to(device)
    expected, found = (torch.full((out, n), torch.nan, dtype=dtype, device=device) for _ in range(2))
    solving_order.dequantize(expected, q, zeros, scales, g_idx)
    kernels.dequantize(found, q, zeros, scales, g_idx)
    assert torch.equal(found, expected)
    assert not found.isnan().any()


@pytest.mark.parametrize("scaled", [(False, False), (True, False), (True, True)])
@pytest.mark.parametrize("width", [7, 2500])
@pytest.mark.parametrize("by_columns", [False, True])
def test_splits_as_torch(device, scaled, width, by_columns):
    """Rows are part of wider ones, or not dense: the library's Cholesky factors lie column by column."""
    x = random(width + 6, 5).T[:, 3 : width + 3] if by_columns else random(5, width + 6)[:, 3 : width + 3]
    rows, features = (2.0 ** torch.arange(-count, count + 1)[:count] for count in (5, width))
    factors = [
        part if wanted else None for part, wanted in zip((rows, features.clamp(2**-9, 2**9)), scaled, strict=True)
    ]
    expected = split_float16.split(x, *factors)
    found = tuple(torch.zeros(5, width + 4, dtype=torch.float16, device=device)[:, 2 : width + 2] for _ in range(2))
    given = [None if part is None else part.to(device) for part in factors]
    kernels.split(x.to(device), *given, *found)
    assert all(torch.equal(mine.cpu(), plain) for mine, plain in zip(found, expected, strict=True))
    assert expected[1].any()
