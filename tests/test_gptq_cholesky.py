"""The factorisation of one wide matrix, whose products are split into float16 parts, against float64; on a GPU too."""

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import Tensor

from packager.quantize import solving_memory
from packager.quantize.gptq import cholesky as cholesky_module
from packager.quantize.gptq import hessian as hessian_module
from packager.quantize.gptq.cholesky import DAMPED_PANEL, SPLIT_PANEL, SPLIT_WIDTH, split_cholesky, split_solve
from packager.quantize.gptq.choose_ops import ops_for
from packager.quantize.gptq.grid import GridRules
from packager.quantize.gptq.hessian import Factor, factorize, factorize_within
from packager.quantize.gptq.order import ColumnOrder
from packager.quantize.gptq.solve import solve
from packager.quantize.gptq.torch_ops import TorchOps
from packager.variant import ActOrder

PANEL = 64
STORED = ColumnOrder(act_order="none", group_size=32)


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    assert request.param == "cpu" or torch.cuda.is_available(), "this test needs a CUDA GPU"
    return torch.device(request.param)


@pytest.fixture
def in_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `factorize` split narrow matrices, too, in narrow panels."""
    monkeypatch.setattr(hessian_module, "cholesky", lambda A: split_cholesky(A, ops_for(A.device), PANEL))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian(n: int, *, tokens: int, outliers: float = 1, damp: float = 0.01) -> Tensor:
    """Return a damped Hessian of correlated inputs; every 61st column is larger by a factor."""
    x = random(tokens, n, seed=n)
    x += x.roll(1, 1) + x[:, :1]
    x[:, 7::61] *= outliers
    H = (x.double().T @ x.double() / tokens).float()
    return H + damp * H.diagonal().mean() * torch.eye(n)


def largest_error(L: Tensor, A: Tensor) -> float:
    """Return the error of L L^T in units of sqrt(A_ii A_jj), which a backward stable factorisation bounds."""
    size = A.diagonal().double().sqrt()
    return float(((L.double() @ L.double().T - A.double()) / size / size[:, None]).abs().max())


# A panel's multiple and others; fewer tokens than columns; massive outliers; damped so little that it just succeeds.
HESSIANS: dict[str, Callable[[], Tensor]] = {
    "one panel": lambda: hessian(40, tokens=80),
    "three panels": lambda: hessian(192, tokens=400),
    "a column more": lambda: hessian(193, tokens=400),
    "few tokens": lambda: hessian(350, tokens=120),
    "outliers": lambda: hessian(350, tokens=1400, outliers=1000),
    "outliers, few tokens": lambda: hessian(350, tokens=120, outliers=1000, damp=1e-4),
    # Here the product with a block's inverse, instead of the triangular solve, makes the rest indefinite.
    "nearly singular": lambda: hessian(350, tokens=35, outliers=30, damp=2e-6),
}


@pytest.mark.parametrize("name", HESSIANS)
@pytest.mark.parametrize("update_columns", [2048, 96])
def test_the_error_is_of_the_size_of_the_library_s(device, name, update_columns, monkeypatch):
    monkeypatch.setattr(cholesky_module, "_UPDATE_COLUMNS", update_columns)
    A = HESSIANS[name]().to(device)
    L, failed = split_cholesky(A.clone(), ops_for(device), PANEL)
    assert not bool(failed)
    assert torch.equal(L, L.tril())
    assert bool((L.diagonal() > 0).all())
    library = torch.linalg.cholesky(A)
    # Where the library is better than the 22 bits of two float16 parts, these are the measure.
    assert largest_error(L, A) < 4 * max(largest_error(library, A), 2.0**-22)
    exact = torch.linalg.cholesky(A.double())
    assert (L - exact).norm() < 4 * (library - exact).norm() + 2.0**-22 * exact.norm()


def test_many_small_entries_keep_their_digits(device):
    """Without a larger scale each would lose a little the same way, as its low part is too small for 11 bits."""
    wide, narrow, shuffled = 1024, 64, torch.Generator().manual_seed(0)
    entries = 0.03 + random(2**16).abs() * 1e-4
    high, low = TorchOps().split(entries[None], None, None)
    lost = entries - (high.float() + low.float())[0]
    entries = entries[lost.argsort(descending=True)[torch.randperm(wide, generator=shuffled)]]
    A = torch.eye(wide + narrow)
    A[wide:, :wide], A[:wide, wide:] = entries, entries[:, None]
    A[wide:, wide:] = entries.double().square().sum()
    A = A.fill_diagonal_(1).to(device)
    L, failed = split_cholesky(A.clone(), ops_for(device), 512)
    assert not bool(failed)
    # Tensor cores cut sums off: an H200 missed by 1.6e-6, as it does for every matrix in panels of 512.
    assert largest_error(L, A) < (2e-6 if L.is_cuda else 1e-6)


class CutOffOps(TorchOps):
    """Sums as in tensor cores, cut off to 24 bits after every 16 products."""

    def add_product(self, total, a, b, alpha=1):
        parts = torch.zeros(a.shape[0], b.shape[1], dtype=torch.float64)
        for some in range(0, a.shape[1], 16):
            mantissa, exponent = torch.frexp(parts + a[:, some : some + 16].double() @ b[some : some + 16].double())
            parts = torch.ldexp(torch.trunc(mantissa * 2**24) / 2**24, exponent)
        return total.copy_(total.double() + alpha * parts)


def test_small_products_are_not_added_to_a_large_sum():
    """With the large products first the error is 4.0e-6, here 1.3e-6; the library has 8e-7."""
    A = hessian(640, tokens=1300)
    L, failed = split_cholesky(A.clone(), CutOffOps(), 512)
    assert not bool(failed)
    assert largest_error(L, A) < 2e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("experts", [(), (3,)], ids=["linear", "experts"])
def test_a_product_is_subtracted_from_part_of_a_matrix(device, dtype, experts):
    """Its rows are farther apart than they are long."""
    a, b = (random(*experts, *shape, seed=seed).to(device, dtype) for seed, shape in ((1, (24, 40)), (2, (40, 16))))
    whole = random(*experts, 24, 64, seed=3).to(device)
    expected = whole.double()
    expected[..., 8:24] -= a.double() @ b.double()
    part = whole[..., 8:24]
    assert ops_for(device).add_product(part, a, b, alpha=-1) is part
    torch.testing.assert_close(whole, expected.float(), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_matrices_of_any_size_are_factored(device, size):
    A = hessian(200, tokens=100, outliers=1000).to(device) * size
    L, failed = split_cholesky(A.clone(), ops_for(device), PANEL)
    assert not bool(failed)
    assert largest_error(L, A) < 1e-6


@pytest.mark.usefixtures("in_panels")
@pytest.mark.parametrize("act_order", get_args(ActOrder))
def test_the_factor_is_that_of_the_reordered_hessian(device, act_order):
    H = hessian(200, tokens=400).to(device)
    before = H.clone()
    factor = factorize(H, ColumnOrder(act_order=act_order, group_size=32), damp_percent=0)
    assert torch.equal(H, before)
    assert bool(factor.succeeded)
    order = torch.arange(200, device=device) if factor.perm is None else factor.perm
    assert torch.equal(factor.U, factor.U.triu())
    assert largest_error(factor.U, H[order][:, order]) < 1e-6


@pytest.mark.usefixtures("in_panels")
@pytest.mark.parametrize("factor", [0.5, -2.0, math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 70, 199])
def test_a_diagonal_that_is_too_small_or_not_finite_does_not_succeed(device, factor, column):
    H = hessian(200, tokens=400).to(device)
    H[column, column] *= factor
    assert not bool(factorize(H, STORED, damp_percent=0).succeeded)


@pytest.mark.usefixtures("in_panels")
@pytest.mark.parametrize("entry", [1.5, math.nan, -math.inf])
@pytest.mark.parametrize(("row", "column"), [(150, 20), (199, 190), (3, 2)])
def test_an_entry_that_is_too_large_or_not_finite_does_not_succeed(device, entry, row, column):
    H = torch.eye(200, device=device)
    H[row, column] = H[column, row] = entry
    assert not bool(factorize(H, STORED, damp_percent=0).succeeded)


@pytest.mark.usefixtures("in_panels")
def test_damping_is_doubled_as_with_the_library(device, monkeypatch):
    x = random(40, 200)
    H = (x.T @ x).to(device)
    shifted = H - 0.05 * H.diagonal().mean() * torch.eye(200, device=device)
    split = factorize_within(shifted, STORED, damp_percent=0.01, damp_percent_limit=0.5)
    monkeypatch.undo()
    library = factorize_within(shifted, STORED, damp_percent=0.01, damp_percent_limit=0.5)
    assert split.damp_percent == library.damp_percent > 0.01


def losses(weight: Tensor, factor: Factor) -> Tensor:
    return solve([weight], factor, GridRules(bits=4, sym=True, scale_search=False)).losses


@pytest.mark.parametrize("outliers", [1, 1000])
def test_losses_are_those_with_the_library_s_factor(device, outliers, monkeypatch):
    H, weight = hessian(320, tokens=640, outliers=outliers).to(device), random(48, 320).to(device)
    expected = losses(weight, factorize(H, STORED, damp_percent=0.01))
    monkeypatch.setattr(hessian_module, "cholesky", lambda A: split_cholesky(A, ops_for(A.device), PANEL))
    found = losses(weight, factorize(H, STORED, damp_percent=0.01))
    # A weight that is rounded the other way moves the loss of one output by some percent, up or down.
    assert float((found.sum() / expected.sum()).log().abs()) < 0.002


def test_what_is_beside_the_matrix_takes_no_more_than_it():
    """24 bytes for each row and column of a panel; the test on a GPU measures both."""
    assert 24 * max(SPLIT_PANEL, DAMPED_PANEL) <= 4 * SPLIT_WIDTH


def with_mean(n: int, *, tokens: int) -> Tensor:
    """Inputs that differ little from one vector: the Hessian's largest eigenvalue is nearly its trace."""
    x = random(n, seed=1) + 0.03 * random(tokens, n)
    return x.T @ x / tokens


def twin_outliers(n: int, *, tokens: int) -> Tensor:
    """Two massive inputs that are nearly equal: scaled, the matrix has a small eigenvalue all the same."""
    x = random(tokens, n, seed=2)
    x[:, 7] *= 1000
    x[:, 9] = x[:, 7] * (1 + 1e-3 * random(tokens, seed=3))
    return x.T @ x / tokens


# What `split_solve` is for: damped by the mean of their diagonals, so that the condition is at most n + 1.
DAMPED: dict[str, Callable[[], Tensor]] = {
    "one panel": lambda: hessian(40, tokens=80, damp=1),
    "a column more": lambda: hessian(193, tokens=400, damp=1),
    "few tokens": lambda: hessian(350, tokens=20, damp=1),
    "an outlier": lambda: hessian(60, tokens=1400, outliers=1000, damp=1),
    "outliers": lambda: hessian(350, tokens=1400, outliers=1000, damp=1),
    "a mean": lambda: damped(with_mean(350, tokens=1400)),
    "twin outliers": lambda: damped(twin_outliers(350, tokens=1400)),
}


def damped(H: Tensor) -> Tensor:
    return H + H.diagonal().mean() * torch.eye(len(H))


def row_errors(R: Tensor, P: Tensor, A: Tensor) -> Tensor:
    """Return the errors of R = P A^-1, each row's relative to its norm; columns in units of sqrt(A_ii)."""
    size = A.diagonal().double().sqrt()
    exact = torch.linalg.solve(A.double(), P.double().T).T
    errors: Tensor = ((R.double() - exact) * size).norm(dim=1) / (exact * size).norm(dim=1)
    return errors


@pytest.mark.parametrize("name", DAMPED)
@pytest.mark.parametrize("columns", [1024, 96])
def test_rows_are_solved_for_as_exactly_as_by_the_library(device, name, columns, monkeypatch):
    monkeypatch.setattr(cholesky_module, "_SOLVE_COLUMNS", columns)
    A = DAMPED[name]().to(device)
    n = len(A)
    # Right-hand sides as S has them: products with the inputs, other ones for each row, of very different sizes.
    P = (random(48, n, seed=5) * 10.0 ** torch.linspace(-6, 6, 48)[:, None]).to(device) @ A
    L = torch.linalg.cholesky(A)
    library = torch.cholesky_solve(P.T, L).T
    found = split_solve(P.clone(), L.clone(), ops_for(device), PANEL)
    errors = row_errors(found, P, A)
    assert float(errors.max()) < 8 * max(float(row_errors(library, P, A).max()), 2.0**-22)
    assert float(errors.max()) < 2 * n * 2.0**-22


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_rows_are_solved_for_with_matrices_of_any_size(device, size):
    A = DAMPED["outliers"]().to(device) * size
    P = random(16, len(A), seed=5).to(device) @ A
    found = split_solve(P.clone(), torch.linalg.cholesky(A), ops_for(device), PANEL)
    assert float(row_errors(found, P, A).max()) < 2e-5


def test_a_solution_for_zeros_is_zero_and_one_for_what_is_not_finite_is_not(device):
    A = DAMPED["outliers"]().to(device)
    P = random(4, len(A)).to(device)
    P[0], P[1, 3], P[2, 340] = 0, math.nan, math.inf
    found = split_solve(P, torch.linalg.cholesky(A), ops_for(device), PANEL)
    assert found.isfinite().all(dim=1).tolist() == [True, False, False, True]
    assert not bool(found[0].any())


def test_no_part_exceeds_float16_where_solutions_are_as_large_as_they_can_be(device):
    """Two equal outliers of half of the trace each: their difference is damped least, by 2 / n of their size."""
    n = 4096 if device.type == "cuda" else 512
    A = torch.eye(n, device=device)
    A[:2, :2] += n / 2
    P = torch.zeros(1, n, device=device)
    P[0, :2] = torch.tensor([1.0, -1.0])
    L = torch.linalg.cholesky(A)
    found = split_solve(P.clone(), L, ops_for(device), PANEL)
    assert torch.allclose(found, P, atol=1e-3)


@pytest.mark.gpu
def test_a_wide_hessian_is_split_on_cuda_within_the_planned_memory():
    n = SPLIT_WIDTH + 40
    x = torch.randn(n + 1000, n, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    x[:, ::500] *= 1000
    H = x.T @ x / x.shape[0]
    del x
    H.diagonal().add_(0.01 * H.diagonal().mean())
    backwards = H.flip(0, 1)
    expected, failed = split_cholesky(backwards, ops_for(H.device))
    assert not bool(failed)
    assert largest_error(expected, H.flip(0, 1)) < 4e-6
    del backwards
    expected = expected.flip(0, 1)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    factor = factorize(H, STORED, damp_percent=0)
    beside = torch.cuda.max_memory_allocated() - before
    assert bool(factor.succeeded)
    assert torch.equal(factor.U, expected)
    vectors = 64 * n  # diagonals, scales, the order
    assert beside <= (solving_memory._FACTORING_SQUARES - 1) * 4 * n**2 + vectors
