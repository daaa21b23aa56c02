"""Modules of experts as transformers builds them: our forward is theirs, and the sweep suspends it twice."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from packager.errors import SourceError
from packager.model.contexts import Context
from packager.model.experts import experts_of
from packager.model.traced_forward import Group
from packager.quantize.activations import Activations
from packager.quantize.experts import own_forward
from packager.quantize.gptq.expert_hessians import expert_hessians, pooled_hessian
from packager.quantize.gptq.grid import GridRules
from packager.quantize.gptq.hessian import factorize
from packager.quantize.gptq.order import ColumnOrder
from packager.quantize.gptq.routing import RoutedInputs
from packager.quantize.gptq.solve import solve
from packager.quantize.suspended_forward import linear_groups, sweep_parallel, sweep_sequential

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("mixtral", "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen3_moe": (
        "qwen3_moe", "Qwen3Moe",
        {"num_experts": 6, "num_local_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48},
    ),
    "deepseek_v3": (
        "deepseek_v3", "DeepseekV3",
        {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48, "n_group": 2, "topk_group": 1},
    ),
    "gpt_oss": ("gpt_oss", "GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2}),
}  # fmt: skip


def experts_module(kind: str) -> nn.Module:
    import importlib

    import transformers

    package, prefix, fields = KINDS[kind]
    config = getattr(transformers, f"{prefix}Config")(**SIZES, **fields)
    config._experts_implementation = "eager"
    module: nn.Module = getattr(
        importlib.import_module(f"transformers.models.{package}.modeling_{package}"), f"{prefix}Experts"
    )(config)
    draw = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=draw) * 0.2
    return module


class Block(nn.Module):
    """A linear, a router, experts, and a linear after them."""

    def __init__(self, experts: nn.Module, num_experts: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(2)
        self.before, self.after = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)
        for linear in (self.before, self.after):
            linear.weight.data = torch.randn(32, 32, generator=draw) * 0.2
        self.router = nn.Parameter(torch.randn(num_experts, 32, generator=draw))
        self.experts = experts

    def forward(self, hidden: Tensor, **_: Any) -> Tensor:
        flat = self.before(hidden).reshape(-1, 32)
        weights, index = (flat @ self.router.T).softmax(-1).topk(2)
        routed: Tensor = self.experts(flat, index, weights)
        return hidden + cast(Tensor, self.after(routed)).view(hidden.shape)


def block_of(kind: str) -> Block:
    module = experts_module(kind)
    (experts,) = experts_of(nn.ModuleDict({"mlp": module})).values()
    return Block(module, experts.num_experts)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_our_forward_is_transformers_own(kind):
    module = experts_module(kind)
    (experts,) = experts_of(nn.ModuleDict({"mlp": module})).values()
    x = torch.randn(40, 32, generator=torch.Generator().manual_seed(3))
    scores = torch.randn(40, experts.num_experts, generator=torch.Generator().manual_seed(4))
    weights, index = scores.softmax(-1).topk(2)
    expected, seen = module(x, index, weights), []
    with own_forward(nn.ModuleDict({"mlp": module}), lambda name, inputs: seen.append((name, inputs.rows.shape))):
        found = module(x, index, weights)
    # Sums over a token's experts are taken in another order.
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert seen == [("mlp.gate_up_proj", (40, 32)), ("mlp.down_proj", (80, 48))]
    assert torch.equal(module(x, index, weights), expected)  # its own forward is back
    assert experts.interleaved == (kind == "gpt_oss")
    assert experts.weight("gate_up_proj").shape == (experts.num_experts, 96, 32)


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
@pytest.mark.parametrize("way", ["all suspended", "one suspended", "parallel"])
def test_the_sweep_quantizes_experts_like_repeated_forwards(kind, way):
    batches = [torch.randn(2, 12, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]

    def sweep(block: Block, solve_experts: Any, how: str) -> list[Tensor]:
        groups, states = linear_groups(block, batches[0], Context(kwargs={})), Activations(list(batches), "device")
        assert groups == (("before",), ("experts.gate_up_proj",), ("experts.down_proj",), ("after",))
        run: Any = sweep_parallel if how == "parallel" else sweep_sequential
        more = {"suspended": 1} if how == "one suspended" else {}

        def halve(group: Group, *_: object) -> None:
            cast(nn.Linear, block.get_submodule(group[0])).weight.data *= 0.5

        run(block, groups, states, [Context(kwargs={})] * 3, halve, solve_experts=solve_experts(block), **more)
        return [states.get(index) for index in range(3)]

    def quantizing(block: Block) -> Any:
        (experts,) = experts_of(block).values()

        def solve_experts(name: str, inputs: list[RoutedInputs]) -> None:
            found = expert_hessians(inputs, range(experts.num_experts), pooled_hessian(inputs))
            weight = experts.weight(name.rpartition(".")[2])
            factor = factorize(found.H, ColumnOrder(act_order="full", group_size=16), damp_percent=0.01)
            rules = GridRules(bits=4, sym=True, scale_search=False)
            weight.copy_(solve([weight], factor, rules).dequantized())

        return solve_experts

    block = block_of(kind)
    before = [parameter.clone() for parameter in block.experts.parameters()]
    outputs = sweep(block, quantizing, way)
    assert all(
        not torch.equal(old, new) for old, new in zip(before[::2], list(block.experts.parameters())[::2], strict=True)
    )
    with own_forward(block), torch.no_grad():
        expected = [block(batch) for batch in batches]
    for found, again in zip(outputs, expected, strict=True):
        assert torch.equal(found, again)
    if way == "one suspended":
        other = sweep(block_of(kind), quantizing, "all suspended")
        assert all(torch.equal(a, b) for a, b in zip(outputs, other, strict=True))


def test_experts_of_another_layout_are_refused_by_name():
    class OtherExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w1 = nn.Parameter(torch.zeros(2, 3, 4))

    assert experts_of(nn.ModuleDict({"mlp": OtherExperts()})) == {}
    module = experts_module("mixtral")
    module.extra = nn.Parameter(torch.zeros(2))
    with pytest.raises(SourceError, match="are not understood") as caught:
        experts_of(nn.ModuleDict({"mlp": module}))
    assert "extra" in caught.value.why
