"""Experts as one batch: against the float64 reference, against each expert alone, and the kernels against torch."""

from itertools import pairwise
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from packager.errors import QuantizeError
from packager.quantize.gptq.cholesky import blocked_cholesky
from packager.quantize.gptq.expert_hessians import ExpertHessians, expert_hessians, pooled_hessian
from packager.quantize.gptq.grid import GridRules
from packager.quantize.gptq.hessian import Hessian, factorize, factorize_within
from packager.quantize.gptq.lazy_updates import SplitUpdates
from packager.quantize.gptq.order import ColumnOrder
from packager.quantize.gptq.routing import RoutedInputs, Routing, route
from packager.quantize.gptq.solve import Solution, solve
from packager.quantize.gptq.torch_ops import TorchOps
from packager.variant import ActOrder
from tests.gptq_reference import TIE, assert_agrees
from tests.kernel_devices import KERNEL_DEVICES, kernel_device
from tests.samples import sampled

CPU = torch.device("cpu")
FULL = ColumnOrder(act_order="full", group_size=32)


class SplitTorchOps(TorchOps):
    """Lazy updates from float16 parts, as on CUDA, without its kernels."""

    def lazy_updates(self, U, weight):
        return SplitUpdates(U, weight, self)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tokens(count: int, n: int, seed: int = 0) -> Tensor:
    """Correlated inputs with very different column sizes; column 5 is always zero."""
    draw = generator(seed)
    x = torch.randn(count, n, generator=draw) * torch.rand(n, generator=draw).mul(3)
    x = x @ (torch.eye(n) + 0.1 * torch.randn(n, n, generator=draw))
    x[:, 5] = 0
    return x


def choices(count: int, experts: int, top_k: int, seed: int = 0) -> Tensor:
    """Different experts for each token, the first ones far more often."""
    popular = torch.linspace(2, 0, experts)
    return (popular + torch.randn(count, experts, generator=generator(seed))).topk(top_k).indices


def routed(n: int, index: Tensor, experts: int, *, batches: int = 3) -> list[RoutedInputs]:
    x = tokens(index.shape[0], n)
    size = -(-index.shape[0] // batches)
    return [
        RoutedInputs(rows=rows, routing=route(part, experts), per_token=True)
        for rows, part in zip(x.split(size), index.split(size), strict=True)
    ]


def hessians(inputs: list[RoutedInputs], ops: Any = None) -> ExpertHessians:
    return expert_hessians(inputs, range(inputs[0].routing.num_experts), pooled_hessian(inputs, ops), ops)


def exact(inputs: list[RoutedInputs]) -> tuple[Tensor, list[Tensor]]:
    """H_all and each expert's own H in float64, pair by pair from the routing's definition."""
    experts = inputs[0].routing.num_experts
    seen: list[list[Tensor]] = [[] for _ in range(experts)]
    for batch in inputs:
        for expert, (begin, end) in enumerate(pairwise(batch.routing.ends)):
            for pair in batch.routing.pairs[begin:end].tolist():
                seen[expert].append(batch.rows[pair // batch.routing.top_k].double())
    n = inputs[0].rows.shape[1]
    each = [torch.stack(rows) if rows else torch.zeros(0, n, dtype=torch.float64) for rows in seen]
    every = torch.cat(each)
    return 2 * every.T @ every / len(every), [2 * x.T @ x / max(len(x), 1) for x in each]


def weights(experts: int, out: int, n: int) -> Tensor:
    return torch.randn(experts, out, n, generator=generator(7)) * 0.02


def solved(weight: Tensor, H: Tensor, how: dict[str, Any], ops: Any = None) -> Solution:
    order = ColumnOrder(act_order=how["act_order"], group_size=how["group_size"])
    factor = factorize_within(H, order, damp_percent=0.01, damp_percent_limit=0.5)
    rules = GridRules(bits=how["bits"], sym=how["sym"], scale_search=how.get("scale_search", False))
    return solve([weight], factor, rules, ops=ops)


def same(one: Solution, other: Solution) -> bool:
    parts = ("q", "scales", "zeros", "g_idx", "losses")
    return all(torch.equal(getattr(one, part), getattr(other, part)) for part in parts)


def test_routing_sorts_pairs_by_expert_and_leaves_out_what_goes_nowhere():
    index = torch.tensor([[2, 0], [4, 2], [0, 4], [-1, 2]])
    routing = route(index, 4)
    assert routing.pairs.tolist() == [1, 4, 0, 3, 7]
    assert list(routing.ends) == routing.bounds.tolist() == [0, 2, 2, 5, 5]
    assert routing.tokens().tolist() == [0, 2, 0, 1, 3]
    shares = routing.shares()
    assert shares is not None
    assert shares.tolist() == [1, 0.5, 0.5, 0.5]
    assert route(index[:1], 4).shares() is None


@pytest.mark.parametrize("index", [torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64), torch.ones(3, 2).bool()])
def test_a_routing_that_is_no_table_of_experts_is_refused(index):
    with pytest.raises(QuantizeError, match="the routing is not understood"):
        route(index, 4)


@pytest.mark.parametrize("nowhere", [False, True])
def test_hessians_are_drawn_towards_the_pooled_one_by_tokens(nowhere):
    n, experts = 40, 6
    index = choices(90, experts, 2)
    index[index == 4] = 0  # expert 4 sees nothing
    if nowhere:
        index[::3, 1] = experts
    inputs = routed(n, index, experts)
    found = hessians(inputs)
    pooled, own = exact(inputs)
    assert found.tokens == tuple(int((index == expert).sum()) for expert in range(experts))
    assert found.tokens[4] == 0
    assert found.rhos[4] == 1.0
    assert torch.equal(found.H[4], pooled_hessian(inputs))
    for expert, seen in enumerate(found.tokens):
        rho = n / (n + seen)
        assert found.rhos[expert] == rho
        expected = (1 - rho) * own[expert] + rho * pooled
        assert torch.allclose(found.H[expert].double(), expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(found.H[expert], found.H[expert].T)


def test_rows_in_the_order_of_pairs_are_the_same_inputs():
    inputs = routed(40, choices(70, 4, 2), 4)
    gathered = [
        RoutedInputs(rows=batch.rows[batch.routing.tokens()], routing=batch.routing, per_token=False)
        for batch in inputs
    ]
    one, other = hessians(inputs), hessians(gathered)
    assert torch.allclose(one.H, other.H, rtol=1e-5, atol=1e-5)
    assert one.tokens == other.tokens


def test_slices_of_experts_are_the_same_bits():
    inputs = routed(136, choices(90, 5, 2), 5)
    whole, pooled = hessians(inputs), pooled_hessian(inputs)
    parts = [expert_hessians(inputs, experts, pooled) for experts in (range(2), range(2, 5))]
    assert torch.equal(torch.cat([part.H for part in parts]), whole.H)
    assert (*parts[0].rhos, *parts[1].rhos) == whole.rhos


def test_no_routed_token_at_all_is_an_error():
    with pytest.raises(QuantizeError, match="no token was routed to any expert"):
        pooled_hessian(routed(8, torch.full((9, 2), 4), 4))


def test_a_layer_with_one_expert_is_a_linear_of_its_own():
    n = 200
    inputs = routed(n, torch.zeros(300, 1, dtype=torch.int64), 1)
    dense = Hessian(n, CPU)
    for batch in inputs:
        dense.add(batch.rows)
    alone, found = dense.matrix(), hessians(inputs).H
    assert torch.equal(found[0], alone)
    how = {"bits": 4, "group_size": 32, "sym": True, "act_order": "full", "scale_search": True}
    weight = weights(1, 16, n)
    assert same(solved(weight, found, how).of_expert(0), solved(weight[0], alone, how))


@pytest.mark.parametrize("act_order", get_args(ActOrder))
@pytest.mark.parametrize(  # test_gptq has the search of a scale in the fast loop
    ("group_size", "sym", "search", "bits"),
    sampled(
        [(16, True, False, 4), (32, False, True, 4), (40, True, True, 3), (-1, False, False, 8), (130, True, True, 2)],
        (16, True, False, 4),
        (-1, False, False, 8),
    ),
)
def test_every_expert_is_the_float64_reference_s_and_what_it_is_alone(group_size, sym, search, bits, act_order):
    n, experts = 150, 4
    found = hessians(routed(n, choices(260, experts, 2), experts))
    weight = weights(experts, 12, n)
    how: dict[str, Any] = {
        "bits": bits,
        "group_size": group_size,
        "sym": sym,
        "scale_search": search,
        "act_order": act_order,
    }
    batch = solved(weight, found.H, how)
    for expert in range(experts):
        alone = batch.of_expert(expert)
        # Some saw fewer tokens than columns.
        assert_agrees(alone, weight[expert].T, found.H[expert], tie=10 * TIE, **how)
        assert same(alone, solved(weight[expert], found.H[expert], how))
    values = batch.dequantized()
    assert torch.equal(values[1], batch.of_expert(1).dequantized())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group_size", "act_order", "ops"),
    [
        (32, "full", TorchOps()),
        (200, "none", SplitTorchOps()),
        (-1, "full", SplitTorchOps()),
        (200, "group", TorchOps()),
    ],
)
def test_experts_of_many_column_blocks_agree_with_the_reference(group_size, act_order, ops):
    """More than 512 columns: some updates of later columns go through `LazyUpdates`."""
    n = 648
    found = hessians(routed(n, choices(900, 3, 2), 3))
    weight = weights(3, 6, n)
    how: dict[str, Any] = {"bits": 4, "group_size": group_size, "sym": True, "act_order": act_order}
    batch = solved(weight, found.H, how, ops)
    for expert in range(3):
        assert_agrees(batch.of_expert(expert), weight[expert].T, found.H[expert], tie=10 * TIE, **how)


def indefinite(n: int, by: float) -> Tensor:
    """A matrix whose smallest eigenvalue is about -`by` of its mean diagonal."""
    x = tokens(4 * n, n, 3)
    x[:, 5] = 1e-3
    H = x.T @ x / n
    mean = H.diagonal().mean()
    shifted: Tensor = H - (torch.linalg.eigvalsh(H)[0] + by * mean) / (1 + by) * torch.eye(n)
    return shifted


def test_damping_is_raised_for_the_experts_that_fail_alone():
    H = torch.stack([indefinite(32, -0.05), indefinite(32, 0.03), indefinite(32, -0.02), indefinite(32, 0.015)])
    first = factorize(H, FULL, damp_percent=0.01)
    assert first.succeeded.tolist() == [True, False, True, False]
    found = factorize_within(H, FULL, damp_percent=0.01, damp_percent_limit=0.5)
    assert found.damp_percents == (0.01, 0.04, 0.01, 0.02)
    assert found.succeeded.all()
    for expert, alone in enumerate(H):
        other = factorize_within(alone, FULL, damp_percent=0.01, damp_percent_limit=0.5)
        assert torch.equal(found.U[expert], other.U)
        assert other.damp_percent == found.damp_percents[expert]
    with pytest.raises(QuantizeError, match="the Hessian of experts 1 cannot be factored"):
        factorize_within(H, FULL, damp_percent=0.01, damp_percent_limit=0.02)
    H[2, 3, 3] = torch.nan
    with pytest.raises(QuantizeError, match="the activations of experts 2 contain NaN or Inf"):
        factorize_within(H, FULL, damp_percent=0.01, damp_percent_limit=0.02)


@pytest.mark.parametrize("n", [96, 128, 200, 333])
def test_the_blocked_cholesky_is_as_near_to_float64_as_the_library_s(n):
    x = torch.randn(3, 2 * n, n, generator=generator(n))
    H = x.mT @ x / n + 0.01 * torch.eye(n)
    L, failed = blocked_cholesky(H.clone())
    assert not failed.any()
    assert torch.equal(L, L.tril())
    expected, library = torch.linalg.cholesky(H.double()), torch.linalg.cholesky(H)
    assert (L - expected).norm() < 3 * (library - expected).norm() + 1e-6
    H[1, n - 3, n - 3] = -1
    assert blocked_cholesky(H)[1].tolist() == [False, True, False]


triton = pytest.importorskip("triton", reason="Triton is not made for this system")
from packager.quantize.gptq.triton_ops import TritonOps  # noqa: E402 - imports Triton


class InterpretedOps(TritonOps):
    """The kernels on the CPU, which has no float16 products with float32 results."""

    def add_product(self, total, a, b, alpha=1):
        return TorchOps().add_product(total, a, b, alpha)


@pytest.fixture(params=KERNEL_DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return kernel_device(request.param)


def on(device: torch.device, inputs: list[RoutedInputs], dtype: torch.dtype) -> list[RoutedInputs]:
    return [
        RoutedInputs(
            rows=batch.rows.to(device, dtype),
            routing=Routing(
                pairs=batch.routing.pairs.to(device), ends=batch.routing.ends, bounds=batch.routing.bounds.to(device),
                num_tokens=batch.routing.num_tokens, top_k=batch.routing.top_k,
            ),
            per_token=batch.per_token,
        )
        for batch in inputs
    ]  # fmt: skip


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("gathered", [True, False])
def test_the_kernel_adds_the_products_that_torch_adds(device, dtype, gathered):
    n, experts = 200, 4
    inputs = routed(n, choices(150, experts, 2).where(choices(150, experts, 2) != 3, 0), experts, batches=2)
    if not gathered:
        inputs = [
            RoutedInputs(rows=batch.rows[batch.routing.tokens()], routing=batch.routing, per_token=False)
            for batch in inputs
        ]
    ops = TritonOps() if device.type == "cuda" else InterpretedOps()
    pooled = pooled_hessian(on(CPU, inputs, dtype))
    expected = expert_hessians(on(CPU, inputs, dtype), range(1, 4), pooled)
    found = expert_hessians(on(device, inputs, dtype), range(1, 4), pooled.to(device), ops)
    assert torch.allclose(found.H.cpu(), expected.H, rtol=1e-4, atol=1e-4)
    assert found.tokens == expected.tokens


@pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
@pytest.mark.parametrize(
    ("n", "group_size", "act_order", "sym"),
    [
        (72, 32, "full", True),
        (136, 40, "static", False),
        (136, 40, "group", True),
        (150, 130, "none", True),
        (270, 130, "group", False),
        pytest.param(536, 48, "full", True, marks=pytest.mark.gpu),
    ],
)
def test_the_kernels_solve_a_batch_like_the_reference(device, n, group_size, act_order, sym):
    experts = 3
    H = hessians(routed(n, choices(2 * n, experts, 2), experts)).H.to(device)
    weight = weights(experts, 5, n).to(device, torch.float16)
    factor = factorize(H, ColumnOrder(act_order=act_order, group_size=group_size), damp_percent=0.01)
    rules = GridRules(bits=4, sym=sym, scale_search=False)
    ops = TritonOps() if device.type == "cuda" else InterpretedOps()
    batch = solve([weight[:, :2], weight[:, 2:]], factor, rules, ops=ops)
    filled = torch.zeros(experts, 5, n, device=device)
    batch.dequantize_into(filled, ops)
    for expert in range(experts):
        alone = batch.of_expert(expert)
        assert_agrees(
            alone, weight[expert].T.cpu(), H[expert], bits=4, group_size=group_size, sym=sym, act_order=act_order,
            tie=10 * TIE,
        )  # fmt: skip
        assert torch.equal(filled[expert], alone.dequantized(TorchOps()))
