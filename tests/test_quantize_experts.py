"""A sweep over a model with experts: every expert against a float64 reference, and the same bytes in every way."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from packager.inputs.base_model import SourceModel
from packager.model.packing import dequantize_linear, unpack, unpack_zeros
from packager.quantize import memory as memory_module
from packager.quantize.gptq.solve import Solution
from packager.quantize.job import Event, QuantizeJob
from packager.quantize.sweep import quantize
from packager.quantize.workload import Workload
from packager.receipt import ExpertLinearRecord, LinearRecord
from packager.variant import Variant
from tests.samples import sampled
from tests.sources import open_folder
from tests.tiny_models import open_store, save_model, token_rows, variant

CPU = torch.device("cpu")
NUM_EXPERTS, TOP_K, INNER, HIDDEN = 6, 2, 32, 64
TOKENS = 12 * 32
MOE_BLOCK = 1  # block 0 is dense


def save_base(folder: Path, *, unused_expert: int | None = None) -> SourceModel:
    """Save the tiny model; the router of its blocks never chooses `unused_expert`."""
    save_model(folder, "qwen3-moe")
    if unused_expert is not None:
        from safetensors.torch import load_file, save_file

        tensors = load_file(folder / "model.safetensors")
        for name, tensor in tensors.items():
            if name.endswith("mlp.gate.weight"):
                # Of each pair of opposite rows, one gives more than 0 for any input: two experts are always before it.
                tensor[1], tensor[3], tensor[unused_expert] = -tensor[0], -tensor[2], 0
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return open_folder(folder)


def run(source: SourceModel, work: Path, v: Variant) -> tuple[LinearRecord, ...]:
    events: list[Event] = []
    store = open_store(source, work, v)
    job = QuantizeJob(source=source, rows=token_rows(), stores={v: store}, devices=(CPU,))
    return quantize(job, events.append)[v.branch]


def bytes_of(work: Path) -> dict[str, bytes]:
    return {path.relative_to(work).as_posix(): path.read_bytes() for path in work.rglob("*") if path.is_file()}


@dataclass
class Found:
    """A built variant: its records, and its block's tensors by name."""

    source: SourceModel
    records: Mapping[str, LinearRecord]
    stored: Mapping[str, Tensor]
    variant: Variant

    def weight(self, name: str) -> Tensor:
        return dequantize_linear(lambda part: self.stored[f"{name}.{part}"], self.variant.bits)

    def solution(self, name: str) -> Solution:
        bits, out = self.variant.bits, self.stored[f"{name}.scales"].shape[1]
        losses = torch.full((out,), self.records[name].loss)
        return Solution(
            q=unpack(self.stored[f"{name}.qweight"], bits),
            scales=self.stored[f"{name}.scales"],
            zeros=unpack_zeros(self.stored[f"{name}.qzeros"], bits),
            g_idx=self.stored[f"{name}.g_idx"],
            losses=losses,
            unrefined_losses=losses,
        )


def build(folder: Path, v: Variant, **base: Any) -> Found:
    source = save_base(folder / "model", **base)
    records = run(source, folder / "work", v)
    stored: dict[str, Tensor] = {}
    for block in range(source.architecture.num_blocks):
        stored |= open_store(source, folder / "work", v).read(block) or {}
    return Found(source=source, records={record.name: record for record in records}, stored=stored, variant=v)


def expert_inputs(found: Found, block: int) -> tuple[Tensor, Tensor]:
    """Return a block's experts' inputs and choices in transformers, with all linears before them as built."""
    model = AutoModelForCausalLM.from_pretrained(
        found.source.folder, dtype=torch.float32, experts_implementation="eager"
    )
    with torch.no_grad():
        for name, module in model.named_modules():
            number = int(name.split(".")[2]) if name.startswith("model.layers.") else -1
            if isinstance(module, nn.Linear) and f"{name}.qweight" in found.stored and number <= block:
                module.weight.copy_(found.weight(name))
    seen: list[tuple[Tensor, Tensor]] = []
    experts = model.model.layers[block].mlp.experts
    experts.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[1])))
    with torch.no_grad():
        model(token_rows().ids)
    (inputs,) = seen
    return inputs


def pairs(x: Tensor, index: Tensor, expert: int) -> Tensor:
    """Return an expert's inputs, float64, token by token."""
    return torch.stack([x[token] for token in range(len(x)) if expert in index[token].tolist()] or [x[0] * 0]).double()


def shrunk(own: Tensor, every: Tensor, tokens: int) -> tuple[Tensor, float]:
    """H = (1 - rho) H_own + rho H_all in float64, rho = n / (n + tokens)."""
    n = every.shape[1]
    rho = n / (n + tokens)
    H_all = 2 * every.T @ every / len(every)
    H_own = 2 * own.T @ own / max(tokens, 1) if tokens else torch.zeros_like(H_all)
    return (1 - rho) * H_own + rho * H_all, rho


@pytest.mark.parametrize("unused", sampled([None, 4], 4))
@pytest.mark.parametrize("act_order", sampled(["none", "group", "static", "full"], "full"))
def test_each_expert_is_what_the_float64_reference_makes_of_its_inputs(tmp_path, act_order, unused):
    v = variant(act_order=act_order, group_size=32)
    found = build(tmp_path, v, unused_expert=unused)
    x, index = expert_inputs(found, MOE_BLOCK)
    layer = f"model.layers.{MOE_BLOCK}.mlp.experts"
    original = {
        (expert, name): found.source.read(f"{layer}.{expert}.{name}.weight").float()
        for expert in range(NUM_EXPERTS)
        for name in ("gate_proj", "up_proj", "down_proj")
    }
    counts = [int((index == expert).sum()) for expert in range(NUM_EXPERTS)]
    assert sum(counts) == TOKENS * TOP_K
    assert (unused is None) or counts[unused] == 0
    every = torch.cat([pairs(x, index, expert) for expert in range(NUM_EXPERTS) if counts[expert]])
    inner = {}
    for expert in range(NUM_EXPERTS):
        own = pairs(x, index, expert)
        H, rho = shrunk(own, every, counts[expert])
        for name in ("gate_proj", "up_proj"):
            check(found, f"{layer}.{expert}.{name}", original[expert, name], H, counts[expert], rho, act_order)
        gate, up = (found.weight(f"{layer}.{expert}.{name}") for name in ("gate_proj", "up_proj"))
        inner[expert] = nn.functional.silu(own @ gate.double().T) * (own @ up.double().T)
    every_inner = torch.cat([inner[expert] for expert in range(NUM_EXPERTS) if counts[expert]])
    for expert in range(NUM_EXPERTS):
        H, rho = shrunk(inner[expert], every_inner, counts[expert])
        check(found, f"{layer}.{expert}.down_proj", original[expert, "down_proj"], H, counts[expert], rho, act_order)


def check(found: Found, name: str, weight: Tensor, H: Tensor, tokens: int, rho: float, act_order: str) -> None:
    record = found.records[name]
    assert isinstance(record, ExpertLinearRecord)
    assert record.tokens == tokens
    assert record.rho == pytest.approx(rho)
    reference = assert_decisions(found.solution(name), weight, H, act_order=act_order)
    assert record.loss == pytest.approx(float(reference.losses.mean()), rel=2e-2)


def assert_decisions(found: Solution, weight: Tensor, H: Tensor, *, act_order: str) -> Any:
    """Compare with the reference; the inputs are transformers' and differ in the last bits, hence the wider ties."""
    from tests.gptq_reference import gptq

    reference = gptq(weight.T, H, bits=4, group_size=32, sym=True, act_order=act_order, damp=0.01, follow=found)
    assert found.g_idx.tolist() == reference.g_idx
    assert float(reference.q_misses.max()) <= 2e-3
    assert float(reference.grid_misses.max()) <= 2e-3
    assert (reference.q_misses > 0).double().mean() <= 1e-2
    return reference


def four_at_a_time(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(memory_module, "MOST_PARTS", 1)
    patch.setitem(memory_module._SLICE_BYTES, "cpu", 4 * (16 * HIDDEN**2 + 16 * HIDDEN * 2 * INNER))


WAYS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "all experts at once": lambda patch: patch.setattr(memory_module, "MOST_PARTS", 1),
    "four experts at a time": four_at_a_time,
}


@pytest.mark.parametrize("way", sampled(WAYS, "four experts at a time"))
def test_slices_of_experts_do_not_change_a_byte(tmp_path, monkeypatch, way):
    v = variant(act_order="full")
    source = save_base(tmp_path / "model")
    expected = run(source, tmp_path / "whole", v)
    WAYS[way](monkeypatch)
    assert run(source, tmp_path / "slices", v) == expected
    assert bytes_of(tmp_path / "slices") == bytes_of(tmp_path / "whole")


def test_experts_are_cut_into_eight_slices_or_more():
    """Eight for eight devices; more where an eighth would need over six gigabytes while it is solved."""
    assert memory_module.slice_sizes(2048, 1536, 128, "cuda") == (16,)
    assert memory_module.slice_sizes(32, 64, 6, "cpu") == (1,)
    assert memory_module.slice_sizes(768, 2048, 60, "cuda") == (4, 8)  # 7 x 8 + 4
    # DeepSeek-V3: four float32 matrices of 7168 x 7168 and 16 bytes per weight of gate and up are 1,291,845,632.
    assert memory_module.slice_sizes(7168, 4096, 256, "cuda") == (4,)
    assert memory_module.slice_sizes(16384, 16384, 8, "cuda") == (1,)  # one expert, however large
    slices = memory_module.expert_slices(2048, 1536, 128, "cuda")
    assert [expert for each in slices for expert in each] == list(range(128))


def test_the_plan_holds_the_inputs_of_experts_that_wait(tmp_path):
    """With 2 of 2 choices a token gives the second linears two inputs of 32 elements, and 2 indices of 8 bytes."""
    architecture = save_base(tmp_path / "model").architecture
    (down,) = (group for group in architecture.group_sizes if group.experts and not group.experts.per_token)
    (first,) = (group for group in architecture.group_sizes if group.experts and group.experts.per_token)
    work = Workload(architecture=architecture, num_samples=8, seq_len=32, packed_bits=4.625, num_variants=1)
    sizes = memory_module._Sizes(work, "cuda")
    assert sizes._routed_inputs(first) == HIDDEN * 2 + TOP_K * 8
    assert sizes._routed_inputs(down) == TOP_K * INNER * 2 + TOP_K * 8
    assert down.held_bytes - first.held_bytes == TOP_K * INNER * 2
    held = sizes.peak(0, 0, 32, 10**9, inputs_held=0) - sizes.peak(0, 0, 32, 0, inputs_held=0)
    assert held == pytest.approx(10**9 * (sizes._routed_inputs(first) + sizes._routed_inputs(down)), rel=1e-3)
