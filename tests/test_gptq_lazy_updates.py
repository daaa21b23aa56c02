"""What columns owe to later ones, in float32 and as split float16 products, against float64; on a GPU too."""

import pytest
import torch
from torch import Tensor

from packager.quantize.gptq.lazy_updates import Carry, Float32Carry, SplitCarry
from packager.quantize.gptq.split_float16 import split

N, OUT = 320, 24
# Tensor cores add exact products but do not round each sum to nearest.
TOLERANCE = {"cpu": 1e-6, "cuda": 2e-6}
CARRIES = pytest.mark.parametrize("kind", [Float32Carry, SplitCarry])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    assert request.param == "cpu" or torch.cuda.is_available(), "this test needs a CUDA GPU"
    return torch.device(request.param)


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread(n: int, orders: float, seed: int) -> Tensor:
    """Factors [n] over so many orders of magnitude, half of them above 1."""
    return 10.0 ** ((torch.rand(n, generator=torch.Generator().manual_seed(seed)) - 0.5) * orders)


def factor(*, orders: float) -> Tensor:
    """Upper triangular, its rows over so many orders of magnitude: those of a Hessian with outlier channels."""
    return random(N, N, seed=1).triu() * spread(N, orders, 2)[:, None]


def filled(kind: type[Float32Carry] | type[SplitCarry], M: Tensor, weight: Tensor, change: Tensor) -> Carry:
    """A carry that was told of the changes in several calls."""
    carry = kind(M, weight)
    for begin in range(0, N, 96):
        carry.record(begin, change[begin : begin + 96].clone())
    return carry


def largest_error(carry: Carry, M: Tensor, change: Tensor) -> float:
    """The error of what is owed to a range of columns, relative to its norm: the worst output of several ranges."""
    errors = []
    for until, begin, end in ((96, 96, 320), (192, 192, 320), (320, 0, 320)):
        exact = M[:until, begin:end].double().T @ change[:until].double()
        wrong = carry.owed(until, begin, end).double() - exact
        errors.append((wrong.norm(dim=0) / exact.norm(dim=0)).max())
    return float(torch.stack(errors).max())


@CARRIES
@pytest.mark.parametrize("orders", [0, 2, 6])
@pytest.mark.parametrize("step", [0.5, 0.05, 0.002])
def test_sums_are_those_of_float64(device, kind, orders, step):
    """Steps from those of 2 bits to those of 8, beside weights of about 1."""
    M, weight, change = factor(orders=orders), random(N, OUT, seed=4), random(N, OUT, seed=5) * step
    M, weight, change = (part.to(device) for part in (M, weight, change))
    assert largest_error(filled(kind, M, weight, change), M, change) < TOLERANCE[device.type]


@CARRIES
@pytest.mark.parametrize("size", [1e-12, 1e-3, 1e6])
def test_weights_of_any_size_keep_their_digits(device, kind, size):
    M, outputs = factor(orders=2).to(device), spread(OUT, 2, 6)
    weight, change = (random(N, OUT, seed=seed) * outputs * size for seed in (4, 5))
    change = change.to(device) * 0.05
    assert largest_error(filled(kind, M, weight.to(device), change), M, change) < TOLERANCE[device.type]


@CARRIES
def test_changes_far_above_the_weights_do_not_overflow(device, kind):
    """Where errors pile up a weight is moved far away from what it was."""
    M, weight = factor(orders=4).to(device), random(N, OUT, seed=4).clamp(-1, 1).to(device)
    change = 50 * random(N, OUT, seed=5).clamp(-1, 1).to(device)
    assert largest_error(filled(kind, M, weight, change), M, change) < TOLERANCE[device.type]


@CARRIES
def test_nothing_is_owed_in_a_linear_of_zeros(device, kind):
    M, zeros = factor(orders=2).to(device), torch.zeros(N, OUT, device=device)
    assert torch.equal(filled(kind, M, zeros, zeros).owed(N, 0, N), torch.zeros(N, OUT, device=device))


@CARRIES
def test_a_factor_may_lie_column_by_column(device, kind):
    """As the library's Cholesky returns it."""
    M, weight, change = factor(orders=2).to(device), random(N, OUT, seed=4).to(device), random(N, OUT, seed=5)
    M, change = M.T.contiguous().T, change.to(device) * 0.05
    assert M.stride() == (1, N)
    assert largest_error(filled(kind, M, weight, change), M, change) < TOLERANCE[device.type]


@CARRIES
def test_half_precision_weights_are_recorded_in_full(device, kind):
    M, weight = factor(orders=2).to(device), random(N, OUT, seed=4).to(device, torch.float16)
    change = random(N, OUT, seed=5).to(device) * 0.05
    assert largest_error(filled(kind, M, weight, change), M, change) < TOLERANCE[device.type]


def test_two_float16_numbers_hold_22_bits():
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    high, low = split(x)
    assert high.dtype == low.dtype == torch.float16
    assert ((high.double() + low.double() - x.double()).abs() <= 2.0**-22 * x.abs() + 2.0**-25).all()
