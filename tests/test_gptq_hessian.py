"""The factorisation of the Hessian against float64, and what makes it fail; on a GPU too."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
from torch import Tensor

from packager.quantize.gptq.hessian import factorize, factorize_within
from packager.quantize.gptq.order import ColumnOrder
from packager.variant import ActOrder

STORED = ColumnOrder(act_order="none", group_size=32)
# The error of U U^T, in units of sqrt(H_ii H_jj). The widest matrix measured 1e-6 on an H100.
# Largest seen: 5e-7 on a CPU (LAPACK), 1.0e-6 on an H200 (cuSOLVER).
ERROR = 8 * 2.0**-22


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    assert request.param == "cpu" or torch.cuda.is_available(), "this test needs a CUDA GPU"
    return torch.device(request.param)


def hessian(n: int, *, orders: float, damp: float = 0.01) -> Tensor:
    """Return a damped Hessian of correlated inputs, fewer than columns; column sizes span `orders` powers of ten."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n // 2, n, generator=generator) * 10.0 ** (torch.rand(n, generator=generator) * orders)
    x += x.roll(1, 1) + x[:, :1]
    H = (x.double().T @ x.double() / n).float()
    return H + damp * H.diagonal().mean() * torch.eye(n)


def largest_error(U: Tensor, H: Tensor) -> float:
    """Return the error of U U^T in units of sqrt(H_ii H_jj), which a backward stable factorisation bounds."""
    size = H.diagonal().double().sqrt()
    return float(((U.double() @ U.double().T - H.double()) / size / size[:, None]).abs().max())


@pytest.mark.parametrize("orders", [0, 2])
@pytest.mark.parametrize("n", [40, 64, 65, 192, 200])
def test_the_square_of_the_factor_is_the_matrix(device, n, orders):
    H = hessian(n, orders=orders).to(device)
    factor = factorize(H, STORED, damp_percent=0)
    assert bool(factor.succeeded)
    assert torch.equal(factor.U, factor.U.triu())
    assert bool((factor.U.diagonal() > 0).all())
    assert largest_error(factor.U, H) < ERROR


@pytest.mark.parametrize("act_order", ["none", "group", "full"])
def test_the_factor_is_near_that_of_float64(device, act_order):
    """The outlier columns are almost linear combinations of the others."""
    H = hessian(512, orders=3, damp=1e-4).to(device)
    found = factorize(H, replace(STORED, act_order=act_order), damp_percent=0)
    assert bool(found.succeeded)
    order = torch.arange(512, device=device) if found.perm is None else found.perm
    backwards = H[order.flip(0)][:, order.flip(0)]
    library, exact = (torch.linalg.cholesky(each).flip(0, 1) for each in (backwards, backwards.double()))
    assert (found.U - exact).norm() < 3 * (library - exact).norm()


def test_the_matrix_is_not_modified(device):
    H = hessian(200, orders=1).to(device)
    before = H.clone()
    for act_order in get_args(ActOrder):
        factorize(H, replace(STORED, act_order=act_order), damp_percent=0.01)
        assert torch.equal(H, before)


@pytest.mark.parametrize("factor", [-2.0, float("nan"), float("inf")])
@pytest.mark.parametrize("column", [0, 70, 199])
@pytest.mark.parametrize("act_order", ["none", "group", "full"])
def test_a_matrix_that_is_not_positive_definite_or_not_finite_does_not_succeed(device, factor, column, act_order):
    H = hessian(200, orders=1).to(device)
    H[column, column] *= factor
    assert not bool(factorize(H, replace(STORED, act_order=act_order), damp_percent=0).succeeded)


def test_an_indefinite_matrix_with_a_positive_diagonal_does_not_succeed(device):
    H = torch.eye(200, device=device)
    H[150, 20] = H[20, 150] = 1.5
    assert not bool(factorize(H, STORED, damp_percent=0).succeeded)


def test_an_almost_singular_matrix_needs_no_more_damping_than_asked_for(device):
    """Both ways to factor are the same: what succeeds without checks succeeds with them, and the other way round."""
    x = torch.randn(40, 200, generator=torch.Generator().manual_seed(0)).to(device)
    H, damping = x.T @ x, 2e-6
    assert bool(factorize(H, STORED, damp_percent=damping).succeeded)
    checked = factorize_within(H, STORED, damp_percent=damping, damp_percent_limit=0.1)
    assert checked.damp_percent == damping


@pytest.mark.gpu
def test_a_wide_matrix_keeps_the_precision_of_a_narrow_one():
    n = 8492
    x = torch.randn(n + 1000, n, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    H = x.T @ x / x.shape[0] + 0.01 * torch.eye(n, device="cuda")
    factor = factorize(H, STORED, damp_percent=0)
    assert bool(factor.succeeded)
    assert torch.equal(factor.U, factor.U.triu())
    assert largest_error(factor.U, H) < 4e-6
