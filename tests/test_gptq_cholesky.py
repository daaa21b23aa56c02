"""The Cholesky factorisation in panels, against float64; on a GPU too, where it is used."""

import pytest
import torch
from torch import Tensor

from packager.quantize.gptq import hessian as hessian_module
from packager.quantize.gptq.cholesky import _DIRECT, cholesky, in_panels
from packager.quantize.gptq.split_float16 import split


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    assert request.param == "cpu" or torch.cuda.is_available(), "this test needs a CUDA GPU"
    return torch.device(request.param)


def hessian(n: int, *, orders: float, damp: float = 0.01) -> Tensor:
    """A damped Hessian of correlated inputs with fewer rows than columns, their sizes over so many orders."""
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n // 2, n, generator=generator) * 10.0 ** (torch.rand(n, generator=generator) * orders)
    x += x.roll(1, 1) + x[:, :1]
    A = (x.double().T @ x.double() / n).float()
    return A + damp * A.diagonal().mean() * torch.eye(n)


def largest_error(L: Tensor, A: Tensor) -> float:
    """Return that of L L^T, in units of sqrt(A_ii A_jj), which is what a backward stable factorisation bounds."""
    size = A.diagonal().double().sqrt()
    return float(((L.double() @ L.double().T - A.double()) / size / size[:, None]).abs().max())


@pytest.mark.parametrize("orders", [0, 2])
@pytest.mark.parametrize(("n", "width"), [(192, 64), (200, 64), (64, 64), (65, 64), (40, 64)])
def test_its_square_is_the_matrix(device, n, width, orders):
    A = hessian(n, orders=orders).to(device)
    lower = A.tril() + torch.randn_like(A).triu(1)  # what is above the diagonal is nobody's business
    L, succeeded = in_panels(lower, width)
    assert bool(succeeded)
    assert torch.equal(L, L.tril())
    assert bool((L.diagonal() > 0).all())
    assert largest_error(L, A) < 4 * max(largest_error(torch.linalg.cholesky(A), A), 2.0**-22)


def test_it_is_about_as_near_as_the_library(device):
    """The outliers are all but given by the other columns."""
    A = hessian(512, orders=3, damp=1e-4).to(device)
    direct = torch.linalg.cholesky(A)
    exact = torch.linalg.cholesky(A.double())
    found, succeeded = in_panels(A.clone(), 64)
    assert bool(succeeded)
    assert (found - exact).norm() < 3 * (direct - exact).norm()


@pytest.mark.parametrize("change", [-2.0, float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 70, 199])
def test_what_is_not_positive_definite_or_finite_did_not_succeed(device, change, where):
    A = hessian(200, orders=1).to(device)
    A[where, where] *= change
    assert not bool(in_panels(A, 64)[1])


def test_an_indefinite_matrix_with_a_positive_diagonal_did_not_succeed(device):
    A = torch.eye(200, device=device)
    A[150, 20] = A[20, 150] = 1.5
    assert not bool(in_panels(A, 64)[1])


def test_a_careful_factorisation_takes_the_library_s_way(monkeypatch):
    """Of an all but singular matrix it needs less damping."""
    monkeypatch.setattr(hessian_module, "cholesky", lambda A: in_panels(A, 64))
    x = torch.randn(40, 200, generator=torch.Generator().manual_seed(0))
    H = x.T @ x
    damping = 2e-6
    assert not bool(hessian_module.factorize(H, desc_act=False, damp_percent=damping).succeeded)
    careful = hessian_module.factorize_within(H, desc_act=False, damp_percent=damping, damp_percent_limit=0.1)
    assert careful.damp_percent == damping


@pytest.mark.gpu
def test_a_wide_matrix_takes_this_way_on_a_gpu():
    n = _DIRECT + 300
    x = torch.randn(n + 1000, n, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    A = x.T @ x / x.shape[0] + 0.01 * torch.eye(n, device="cuda")
    L, succeeded = cholesky(A.clone())
    assert bool(succeeded)
    assert torch.equal(L, L.tril())
    assert largest_error(L, A) < 1e-5  # tensor cores cut off where they should round; measured: 5e-6


def test_halves_hold_22_bits():
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    high, low = split(x)
    assert high.dtype == low.dtype == torch.float16
    assert ((high.double() + low.double() - x.double()).abs() <= 2.0**-22 * x.abs() + 2.0**-25).all()
