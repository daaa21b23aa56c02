"""effort: high: gradients against autograd, the start, the error of a block, bytes, and what is refused."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM

from packager.model.batches import TOKENS_PER_BATCH
from packager.model.packing import dequantize_linear
from packager.quantize.activations import Activations
from packager.quantize.block import BlockJob, quantize_block
from packager.quantize.block_store import BlockStore
from packager.quantize.engines import engine_problems
from packager.quantize.gptq.grid import GridRules
from packager.quantize.gptq.hessian import factorize
from packager.quantize.gptq.order import ColumnOrder
from packager.quantize.gptq.solve import Solution, solve
from packager.quantize.gptq.tuned_linear import TunedLinear
from packager.quantize.memory import SweepPlan, sweep_ways
from packager.quantize.ranks import alone
from packager.quantize.repeatable_attention import RepeatableAttention
from packager.quantize.suspended_forward import Reference, linears_of, run_forward
from packager.quantize.tune_block import TunedBlock, Tuning, tune_block
from packager.quantize.tuning_schedule import TuningSchedule
from packager.quantize.workload import Workload
from packager.variant import Variant
from tests.test_block import CPU, BlockCase, records_of
from tests.test_quantize import files, run, source_of
from tests.tiny_models import token_rows, variant

ORDERS = pytest.mark.parametrize("act_order", ["none", "group", "static", "full"])


def attention_inputs(heads: int, shared: int) -> list[Tensor]:
    """Return query, key and value of two rows of six tokens."""
    generator = torch.Generator().manual_seed(1)
    counts = (heads, heads // shared, heads // shared)
    made = [torch.randn(2, count, 6, 4, dtype=torch.float64, generator=generator) for count in counts]
    return [each.requires_grad_(True) for each in made]


@pytest.mark.parametrize("shared", [1, 2])
@pytest.mark.parametrize("mask", ["causal", "none", "bool", "rows", "float", "heads"])
def test_attention_has_torch_s_gradients(monkeypatch: pytest.MonkeyPatch, mask: str, shared: int) -> None:
    """Also where few scores are held at once, one head after the other."""
    generator = torch.Generator().manual_seed(2)
    kept = torch.rand(2, 1, 6, 6, generator=generator) < 0.6
    kept |= torch.eye(6, dtype=torch.bool)
    masks: dict[str, Tensor | None] = {
        "causal": None, "none": None, "bool": kept[0, 0], "rows": kept,
        "float": torch.randn(1, 1, 6, 6, dtype=torch.float64, generator=generator),
        "heads": torch.randn(1, 4, 6, 6, dtype=torch.float64, generator=generator),
    }  # fmt: skip
    given: dict[str, Any] = {
        "attn_mask": masks[mask],
        "is_causal": mask == "causal",
        "enable_gqa": shared > 1,
        "scale": 0.3,
    }
    query, key, value = inputs = attention_inputs(4, shared)
    weight = torch.randn(2, 4, 6, 4, dtype=torch.float64, generator=generator)
    expected_output = scaled_dot_product_attention(query, key, value, **given)
    expected = torch.autograd.grad(expected_output, inputs, weight)
    for at_once in (2**24, 1):
        monkeypatch.setattr("packager.quantize.repeatable_attention.SCORES_AT_ONCE", at_once)
        with RepeatableAttention():
            output = scaled_dot_product_attention(query, key, value, **given)
        assert output.grad_fn is not None
        assert "_Attention" in type(output.grad_fn).__name__
        assert torch.equal(output, expected_output)
        for found, right in zip(torch.autograd.grad(output, inputs, weight), expected, strict=True):
            torch.testing.assert_close(found, right, rtol=1e-5, atol=1e-6)


def solved(act_order: str, *, bits: int = 4, group_size: int = 16, sym: bool = True) -> tuple[Tensor, Solution]:
    """Return a weight of 40 columns and its solution; some weights lie far outside of their grid."""
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(24, 40, generator=generator)
    weight[::5, ::7] *= 6
    inputs = torch.randn(300, 40, generator=generator) @ torch.randn(40, 40, generator=generator)
    order = ColumnOrder(act_order=act_order, group_size=group_size)  # type: ignore[arg-type]
    rules = GridRules(bits=bits, sym=sym, scale_search="signed" if sym else True)
    factor = factorize(inputs.T @ inputs * 2 / 300, order, damp_percent=0.01)
    return weight, solve([weight], factor, rules, refined=[True])


@pytest.mark.parametrize(("bits", "group_size", "sym"), [(4, 16, True), (2, -1, True), (8, 8, True), (3, 16, False)])
@ORDERS
def test_tuning_starts_where_the_solver_ended(act_order: str, bits: int, group_size: int, sym: bool) -> None:
    weight, solution = solved(act_order, bits=bits, group_size=group_size, sym=sym)
    tuned = TunedLinear(weight, solution, 2**bits - 1)
    assert torch.equal(tuned.grid().q, solution.q.mT)
    assert torch.equal(tuned.grid().scales, solution.scales.mT.float())
    written = torch.empty_like(weight)
    tuned.write(written)
    assert torch.equal(written, solution.dequantized())
    # Weights keep their places inside the cells: few are near a border, whatever the solver made of them.
    assert (tuned._offset - tuned._offset.round()).abs().max() < 2**-9
    assert (tuned._offset != 0).any()


class _Round(torch.autograd.Function):
    """Rounding with the gradient of the identity."""

    @staticmethod
    def forward(_: object, x: Tensor) -> Tensor:
        return x.round()

    @staticmethod
    def backward(_: object, gradient: Tensor) -> Tensor:
        return gradient


@ORDERS
def test_the_first_step_follows_the_signs_of_autograd_s_gradients(act_order: str) -> None:
    """Adam's first step is of one size for all: the rate, against the sign of the gradient."""
    weight, solution = solved(act_order)
    tuned = TunedLinear(weight, solution, 15)
    offset, factor = tuned._offset.double().requires_grad_(True), tuned._factor.double().requires_grad_(True)
    groups, zeros = solution.g_idx.long(), solution.zeros.mT.double()
    scale = (solution.scales.mT.double() * factor)[:, groups]
    q = _Round.apply(weight.double() / scale + zeros[:, groups] + offset).clamp(0, 15)
    gradient = torch.randn(weight.shape, generator=torch.Generator().manual_seed(4))
    ((q - zeros[:, groups]) * scale).backward(gradient.double())
    before = tuned._offset.clone()
    tuned.step(gradient, 0.25, 0.5)
    assert offset.grad is not None
    assert factor.grad is not None
    torch.testing.assert_close(before - tuned._offset, 0.25 * offset.grad.sign().float(), atol=1e-6, rtol=1e-5)
    assert (offset.grad == 0).any(), "the clamp holds some weights"
    torch.testing.assert_close(1 - tuned._factor, 0.5 * factor.grad.sign().float(), atol=1e-5, rtol=1e-5)


@pytest.fixture
def few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take larger steps, and fewer of them."""
    schedule = TuningSchedule(steps=24, checks=2, rate=0.01, scale_rate=0.0001)
    monkeypatch.setattr("packager.quantize.tune_block.SCHEDULE", schedule)


class TunedCase(BlockCase):
    """A block of a tiny model that is tuned."""

    def quantize_towards(self, v: Variant) -> dict[str, Tensor]:
        """Quantize the block."""
        self.targets, fp16 = Activations(self.inputs, "host"), Activations([x * 1.25 for x in self.inputs], "host")
        run_forward(self.load(), (), self.targets, self.contexts)
        reference = Reference(states=fp16, contexts=self.contexts, last=False) if v.target_correction else None
        self.states, self.reported = Activations(self.inputs, "host"), []
        job = BlockJob(
            variant=v, index=1, groups=self.groups, names=self.names, experts={}, states=self.states,
            targets=Activations(self.inputs, "host") if v.effort == "high" else None, contexts=self.contexts,
            reference=reference, rank=alone(CPU), suspended=3, last=False, on_outputs_needed=lambda: None,
        )  # fmt: skip
        made = quantize_block(self.load, job, self.reported.append)
        self.records = records_of(made)
        for index in range(len(fp16) if v.target_correction else 0):
            nearer = fp16.get(index) * v.target_correction + self.targets.get(index) * (1 - v.target_correction)
            self.targets.put(index, nearer)
        return dict(made.tensors)

    def error_of(self, tensors: dict[str, Tensor], bits: int) -> float:
        """Return the mean squared error of the block's outputs, in float64, with weights read from packed tensors."""
        block = self.load().double()
        for module, name in self.names.items():
            weight = dequantize_linear(lambda part, name=name: tensors[f"{name}.{part}"], bits)  # type: ignore[misc]
            linears_of(block)[module].weight.copy_(weight)
        sums, count = 0.0, 0
        for index, x in enumerate(self.inputs):
            context = self.contexts[index]
            kwargs = {key: _double(value) for key, value in context.kwargs.items()}
            output = block(x.double(), *map(_double, context.args), **kwargs)
            output = output[0] if isinstance(output, tuple) else output
            sums += float((output - self.targets.get(index).double()).square().sum())
            count += output.numel()
        return sums / count


def _double(value: object) -> object:
    if isinstance(value, tuple):
        return tuple(map(_double, value))
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


CASES = [
    {"act_order": "none", "scale_search": "signed", "refine": True, "group_size": 16},
    {"act_order": "full", "scale_search": True, "bits": 3, "group_size": 32},
    {"act_order": "static", "sym": False, "bits": 2, "group_size": -1, "target_correction": 0.25},
    {"act_order": "group", "true_sequential": False, "bits": 8, "group_size": 16},
]


@pytest.mark.slow
@pytest.mark.usefixtures("few_steps")
@pytest.mark.parametrize("fields", CASES, ids=str)
def test_the_error_of_a_block_never_rises(tmp_path: Path, fields: dict[str, object]) -> None:
    """And is the error that float64 and the packed tensors give; zeros and groups are the solver's."""
    case = TunedCase(tmp_path, ids=token_rows(9, 32).ids)
    v = variant(**fields)
    plain = case.quantize_towards(v)
    before = case.error_of(plain, v.bits)
    tensors = case.quantize_towards(replace(v, effort="high"))
    after = case.error_of(tensors, v.bits)
    ((untuned, tuned),) = {(record.untuned_block_error, record.block_error) for record in case.records}
    assert untuned == pytest.approx(before, rel=1e-4)
    assert tuned == pytest.approx(after, rel=1e-4)
    assert after <= before
    assert after < 0.99 * before or v.bits == 8, "the tuning lowers the error of coarse grids"
    changed = {name.rpartition(".")[2] for name in plain if not torch.equal(plain[name], tensors[name])}
    assert changed <= {"qweight", "scales"}
    assert {name: each.dtype for name, each in plain.items()} == {name: each.dtype for name, each in tensors.items()}
    # The next block sees the outputs of the tuned block.
    outputs = [x.clone() for x in case.outputs()]
    block = case.load()
    for module, name in case.names.items():
        weight = dequantize_linear(lambda part, name=name: tensors[f"{name}.{part}"], v.bits)  # type: ignore[misc]
        linears_of(block)[module].weight.copy_(weight)
    states = Activations(case.inputs, "host")
    run_forward(block, case.groups, states, case.contexts)
    assert all(torch.equal(states.get(index), outputs[index]) for index in range(3))
    again = case.quantize_towards(replace(v, effort="high"))
    assert all(torch.equal(tensors[name], again[name]) for name in tensors)


@pytest.mark.slow
def test_steps_that_only_raise_the_error_change_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schedule = TuningSchedule(steps=6, checks=3, rate=3.0, scale_rate=0.3)
    monkeypatch.setattr("packager.quantize.tune_block.SCHEDULE", schedule)
    case = TunedCase(tmp_path, ids=token_rows(9, 32).ids)
    plain = case.quantize_towards(variant())
    outputs = [x.clone() for x in case.outputs()]
    tensors = case.quantize_towards(variant(effort="high"))
    assert all(torch.equal(plain[name], tensors[name]) for name in plain)
    assert all(record.block_error == record.untuned_block_error for record in case.records)
    assert case.outputs_are(outputs)


@pytest.mark.slow
@pytest.mark.usefixtures("few_steps")
def test_a_tuned_variant_is_the_same_however_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside another variant, after a crash, and with activations off the device; the other variant stays the same."""
    monkeypatch.setitem(TOKENS_PER_BATCH, "cpu", token_rows().ids.numel() // 3)
    source, v, other = source_of(tmp_path, "llama"), variant(branch="high", effort="high"), variant(branch="standard")
    records, _ = run(source, tmp_path / "alone", v)
    run(source, tmp_path / "alone", other)
    expected = files(tmp_path / "alone")
    run(source, tmp_path / "together", other, v)
    assert files(tmp_path / "together") == expected
    plan = SweepPlan(
        num_variants=2, placement="host", num_batches=3, suspended_batches=1, weights="host", device_bytes=0,
        host_bytes=0,
    )  # fmt: skip
    with monkeypatch.context() as scarce:
        scarce.setattr("packager.quantize.device_shares.sweep_plan", lambda *_, **__: plan)
        run(source, tmp_path / "scarce", v, other)
    assert files(tmp_path / "scarce") == expected
    # The last block's inputs show that the blocks before it were restored as they were.
    read, last = BlockStore.read, source.architecture.num_blocks - 1
    with monkeypatch.context() as crashed:
        crashed.setattr(BlockStore, "read", lambda store, block: None if block == last else read(store, block))
        again, done = run(source, tmp_path / "alone", v)
    assert [step.resumed for step in done] == [True] * last + [False]
    assert (again, files(tmp_path / "alone")) == (records, expected)


@pytest.mark.slow
def test_a_correction_goes_on_beside_a_tuned_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no step is better the tuned variant is the untuned one: so both saw the same fp16 model in each block.

    The last block, too, is tuned towards outputs of the fp16 model: transformers computes the same.
    """
    schedule = TuningSchedule(steps=2, checks=1, rate=3.0, scale_rate=0.3)
    monkeypatch.setattr("packager.quantize.tune_block.SCHEDULE", schedule)
    outputs: list[Tensor] = []

    def tune(block: nn.Module, solutions: Mapping[str, Solution], tuning: Tuning) -> TunedBlock:
        assert tuning.fp16_outputs is not None
        outputs.append(torch.cat([tuning.fp16_outputs.get(batch) for batch in range(len(tuning.states))]))
        return tune_block(block, solutions, tuning)

    monkeypatch.setattr("packager.quantize.block.tune_block", tune)
    source = source_of(tmp_path, "llama")
    plain, tuned = (variant(effort=effort, target_correction=0.5) for effort in ("standard", "high"))
    losses = []
    for each in (plain, tuned):
        records, _ = run(source, tmp_path / each.effort, each)
        losses.append([record.loss for record in records[each.branch]])
        assert each is plain or all(record.block_error == record.untuned_block_error for record in records[each.branch])
    assert losses[0] == losses[1]
    base = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    expected: list[Tensor] = []
    for layer in base.model.layers:
        layer.register_forward_hook(lambda _module, _args, output: expected.append(output))
    with torch.no_grad():
        base(token_rows().ids)
    torch.testing.assert_close(outputs, expected, atol=1e-5, rtol=1e-5)


def test_the_outputs_of_the_original_block_are_planned(tmp_path: Path) -> None:
    """Where activations are what counts, a tuned variant takes one set more."""
    architecture = source_of(tmp_path, "llama").architecture

    def planned(num_samples: int, **fields: Any) -> int:
        work = Workload(
            architecture=architecture, num_samples=num_samples, seq_len=64, num_variants=1, packed_bits=8, **fields
        )  # fmt: skip
        return next(sweep_ways(work, "cuda")).device_bytes

    first, second = 200_000, 400_000  # rows; the batch that runs is the same
    plain = planned(second) - planned(first)
    one_set = 2 * (second - first) * 64 * architecture.hidden_size
    assert planned(second, tuned=True) - planned(first, tuned=True) == plain + one_set


def test_blocks_with_experts_are_refused_before_anything_is_read(tmp_path: Path) -> None:
    architecture = source_of(tmp_path, "qwen3-moe").architecture
    skipped = architecture.leaving(["*experts*"])
    for found in (architecture, skipped):
        high, standard = variant(branch="high", effort="high"), variant()
        (problem,) = engine_problems([high, standard], found.config, found, 32)
        assert problem.startswith("high: effort high cannot tune blocks with experts (mlp.experts)")
        assert problem.endswith("use effort: standard")
