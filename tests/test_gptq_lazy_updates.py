"""The updates of later columns, in float32 and as split float16 products, against float64; on a GPU too."""

import pytest
import torch
from torch import Tensor

from packager.quantize.gptq.choose_ops import ops_for
from packager.quantize.gptq.lazy_updates import Float32Updates, SplitUpdates
from packager.quantize.gptq.tensor_ops import LazyUpdates
from packager.quantize.gptq.torch_ops import TorchOps

N, OUT = 320, 24
# Tensor cores add exact products but do not round each sum to nearest.
TOLERANCE = {"cpu": 1e-6, "cuda": 2e-6}
KINDS = pytest.mark.parametrize("kind", [Float32Updates, SplitUpdates])


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


def filled(kind: type[Float32Updates] | type[SplitUpdates], U: Tensor, weight: Tensor, delta: Tensor) -> LazyUpdates:
    """Return updates that recorded the deltas in several calls."""
    updates = kind(U, weight, ops_for(U.device))
    for begin in range(0, N, 96):
        updates.record(begin, delta[begin : begin + 96].clone())
    return updates


def largest_error(updates: LazyUpdates, U: Tensor, delta: Tensor) -> float:
    """The error of the update of a range of columns, relative to its norm: the worst output of several ranges."""
    errors = []
    for until, begin, end in ((96, 96, 320), (192, 192, 320), (320, 0, 320)):
        exact = U[:until, begin:end].double().T @ delta[:until].double()
        wrong = updates.pending_update(until, begin, end).double() - exact
        errors.append((wrong.norm(dim=0) / exact.norm(dim=0)).max())
    return float(torch.stack(errors).max())


@KINDS
@pytest.mark.parametrize("orders", [0, 2, 6])
@pytest.mark.parametrize("step", [0.5, 0.05, 0.002])
def test_sums_are_those_of_float64(device, kind, orders, step):
    """Steps from those of 2 bits to those of 8, beside weights of about 1."""
    U, weight, delta = factor(orders=orders), random(N, OUT, seed=4), random(N, OUT, seed=5) * step
    U, weight, delta = (part.to(device) for part in (U, weight, delta))
    assert largest_error(filled(kind, U, weight, delta), U, delta) < TOLERANCE[device.type]


@KINDS
@pytest.mark.parametrize("size", [1e-12, 1e-3, 1e6])
def test_weights_of_any_size_keep_their_digits(device, kind, size):
    U, outputs = factor(orders=2).to(device), spread(OUT, 2, 6)
    weight, delta = (random(N, OUT, seed=seed) * outputs * size for seed in (4, 5))
    delta = delta.to(device) * 0.05
    assert largest_error(filled(kind, U, weight.to(device), delta), U, delta) < TOLERANCE[device.type]


@KINDS
def test_deltas_far_above_the_weights_do_not_overflow(device, kind):
    """Where errors accumulate a weight moves far from its original value."""
    U, weight = factor(orders=4).to(device), random(N, OUT, seed=4).clamp(-1, 1).to(device)
    delta = 50 * random(N, OUT, seed=5).clamp(-1, 1).to(device)
    assert largest_error(filled(kind, U, weight, delta), U, delta) < TOLERANCE[device.type]


@KINDS
def test_a_linear_of_zeros_has_no_updates(device, kind):
    U, zeros = factor(orders=2).to(device), torch.zeros(N, OUT, device=device)
    assert torch.equal(filled(kind, U, zeros, zeros).pending_update(N, 0, N), torch.zeros(N, OUT, device=device))


@KINDS
def test_a_factor_may_lie_column_by_column(device, kind):
    """As the library's Cholesky returns it."""
    U, weight, delta = factor(orders=2).to(device), random(N, OUT, seed=4).to(device), random(N, OUT, seed=5)
    U, delta = U.T.contiguous().T, delta.to(device) * 0.05
    assert U.stride() == (1, N)
    assert largest_error(filled(kind, U, weight, delta), U, delta) < TOLERANCE[device.type]


@KINDS
def test_half_precision_weights_are_recorded_in_full(device, kind):
    U, weight = factor(orders=2).to(device), random(N, OUT, seed=4).to(device, torch.float16)
    delta = random(N, OUT, seed=5).to(device) * 0.05
    assert largest_error(filled(kind, U, weight, delta), U, delta) < TOLERANCE[device.type]


def test_two_float16_numbers_hold_22_bits():
    x = torch.randn(64, 96, generator=torch.Generator().manual_seed(1))
    high, low = TorchOps().split(x, None, None)
    assert high.dtype == low.dtype == torch.float16
    assert ((high.double() + low.double() - x.double()).abs() <= 2.0**-22 * x.abs() + 2.0**-25).all()
