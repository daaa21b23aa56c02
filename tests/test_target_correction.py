"""Target correction: its formula in float64, both inputs of every linear, and what the sweep makes of them."""

import math
import weakref
from collections.abc import Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

from packager.errors import QuantizeError
from packager.inputs.base_model import SourceModel
from packager.model.batches import TOKENS_PER_BATCH
from packager.model.decoder import Decoder
from packager.model.packing import dequantize_linear
from packager.pipeline.plan import make_plan
from packager.quantize import block as block_module
from packager.quantize import device_shares as shares_module
from packager.quantize import memory
from packager.quantize.activations import Activations
from packager.quantize.block_store import BlockStore
from packager.quantize.gptq import cholesky
from packager.quantize.gptq import target_correction as module
from packager.quantize.gptq.cholesky import split_solve
from packager.quantize.gptq.hessian import Hessian
from packager.quantize.gptq.panels import shift_rows
from packager.quantize.gptq.row_parts import part_of
from packager.quantize.gptq.solve import solve
from packager.quantize.gptq.target_correction import InputShift, corrected_targets
from packager.quantize.job import QuantizeJob
from packager.quantize.memory import SweepPlan, _Sizes, _way, sweep_ways
from packager.quantize.ranks import SweepRank
from packager.quantize.solving_memory import solving_bytes
from packager.quantize.suspended_forward import Reference, _Inputs, sweep_sequential
from packager.quantize.sweep import quantize
from packager.quantize.workload import Workload
from packager.receipt import ExpertLinearRecord, LinearRecord
from packager.recipe.file import RecipeFile
from packager.variant import Variant
from tests.samples import sampled
from tests.sources import open_folder
from tests.test_evaluate import PeakBytes
from tests.test_ranks import each_rank
from tests.tiny_models import open_store, save_model, token_rows, variant

CPU = torch.device("cpu")
CORRECTED = variant(bits=3, group_size=16, target_correction=0.5)
GROUPS = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
          ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))  # fmt: skip
RECIPES = Path(__file__).resolve().parent.parent / "recipes"


def run(source: SourceModel, work: Path, *variants: Variant, ranks: int = 1) -> dict[str, tuple[LinearRecord, ...]]:
    stores = {v: open_store(source, work, v) for v in variants}
    job = QuantizeJob(source=source, rows=token_rows(), stores=stores, devices=(CPU,) * ranks)
    return quantize(job, lambda _: None)


def files(work: Path) -> dict[str, bytes]:
    return {path.relative_to(work).as_posix(): path.read_bytes() for path in work.rglob("*") if path.is_file()}


def inputs(tokens: int = 40, columns: int = 12, seed: int = 0, rows: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Return x, the inputs x0 of the fp16 model, and a weight, float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, columns, generator=generator, dtype=torch.float64) * torch.linspace(0.5, 2, columns)
    x0 = x + 0.3 * torch.randn(tokens, columns, generator=generator, dtype=torch.float64) + 0.1 * x.roll(1, 1)
    return x, x0, torch.randn(rows, columns, generator=generator, dtype=torch.float64)


def sums(x: Tensor, x0: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    H, S = Hessian(x.shape[1], CPU), InputShift(weights)
    H.add(x.float())
    S.add(x.float(), x0.float())
    return H.matrix(), S.matrix()


def corrected(weights: Sequence[Tensor], x: Tensor, x0: Tensor, *, strength: float) -> list[Tensor]:
    H, S = sums(x, x0, weights)
    before = H.clone()
    found = corrected_targets(weights, H, S, strength=strength)
    assert torch.equal(H, before)
    return found


def test_with_hardly_any_damping_a_target_is_the_least_squares_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The weights that make the fp16 model's outputs of the quantized model's inputs, by another way than ours."""
    x, x0, weight = inputs()
    monkeypatch.setattr(module, "CORRECTION_DAMPING", 1e-7)
    (found,) = corrected([weight.float()], x, x0, strength=1.0)
    fit = torch.linalg.lstsq(x, x0 @ weight.T).solution.T
    assert torch.allclose(found.double(), fit, atol=1e-4)
    assert (found - weight).abs().max() > 0.1

    def lost(T: Tensor) -> float:
        return float((x @ T.T - x0 @ weight.T).square().sum())

    assert lost(found.double()) < 0.8 * lost(weight)


@pytest.mark.parametrize("rows", [5, 6, 20], ids=["a sum of outputs", "as many rows as half the columns", "more"])
@pytest.mark.parametrize("strength", [0.25, 1.0])
def test_a_target_is_that_of_the_damped_formula(strength: float, rows: int) -> None:
    x, x0, weight = inputs(tokens=6, rows=rows)  # fewer tokens than columns: H alone has no inverse
    H = 2 / 6 * torch.einsum("ti,tj->ij", x, x)
    S = 2 / 6 * torch.einsum("ti,tj->ij", x, x0 - x)
    damped = H + torch.eye(12) * H.diagonal().sum() / 12
    expected = weight + strength * weight @ (torch.linalg.inv(damped) @ S).T
    both = corrected([weight[:2].float(), weight[2:].float()], x, x0, strength=strength)
    assert [each.dtype for each in both] == [torch.float32, torch.float32]
    assert torch.allclose(torch.cat(both).double(), expected, atol=1e-5)


def test_equal_inputs_leave_the_weights_as_they_are() -> None:
    x, _, weight = inputs()
    (found,) = corrected([weight.float()], x, x, strength=1.0)
    assert torch.equal(found, weight.float())


def test_inputs_that_are_always_zero_leave_the_weights_as_they_are() -> None:
    _, _, weight = inputs()
    (found,) = corrected([weight.float()], torch.zeros(40, 12), torch.zeros(40, 12), strength=1.0)
    assert torch.equal(found, weight.float())


# What the fp16 model's float16 and bfloat16 numbers round by: half of the last of 11 and of 8 bits.
ROUNDING = {torch.float32: 2.0**-22, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


@pytest.mark.parametrize("dtype", ROUNDING, ids=str)
@pytest.mark.parametrize("rows", [40, 240], ids=["a sum of outputs", "a sum of inputs"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_on_tensor_cores_a_target_misses_by_no_more_than_what_was_derived(
    monkeypatch: pytest.MonkeyPatch, device: str, rows: int, dtype: torch.dtype
) -> None:
    """Correlated inputs, one of them 1000 times as large; the sums are given, so that their own rounding counts not."""
    monkeypatch.setattr(module, "solve_rows", lambda P, L, ops: split_solve(P, L, ops, 64))
    x, x0, weight = inputs(tokens=700, columns=300, rows=rows)
    x, x0 = (each + each.roll(1, 1) + each[:, :1] for each in (x, x0))
    x[:, 7] *= 1000
    x0[:, 7] *= 1000
    weights = [part.to(device, dtype) for part in weight.split([rows // 4, rows - rows // 4])]
    W = torch.cat(weights).double()
    H, S = (2 / 700 * (each.T @ x).float().to(device) for each in (x, x0 - x))
    R = torch.linalg.solve(H.double() + H.double().diagonal().mean() * torch.eye(300, device=device), S.double().T).T
    given = S if rows == 240 else (W @ S.double()).float()
    before = H.clone()
    found = torch.cat(corrected_targets(weights, H, given, strength=0.5))
    assert found.dtype == torch.float32
    assert torch.equal(H, before)
    wrong, change = found.double() - W - 0.5 * W @ R, 0.5 * W @ R
    # T is rounded, its solution exact to 22 bits in norm, and of a sum of inputs it is rounded to the weights' dtype.
    rounding = ROUNDING[dtype] if rows == 240 else 0.0
    size = H.diagonal().double().sqrt()
    assert (wrong * size).norm() < rounding * (change * size).norm() + 2.0**-22 * (W * size).norm()
    if rounding > 2.0**-12:
        assert bool((wrong.abs() <= 0.5 * rounding * W.abs() @ R.abs() + 2.0**-22 * W.abs()).all())
    assert (change * size).norm() > 0.03 * (W * size).norm()


@pytest.mark.parametrize("wrong", ["H", "S"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rows", [5, 20], ids=["a sum of outputs", "a sum of inputs"])
@pytest.mark.parametrize("split", [False, True])
def test_sums_that_are_not_finite_make_targets_that_are_not(
    monkeypatch: pytest.MonkeyPatch, wrong: str, value: float, rows: int, split: bool
) -> None:
    if split:
        monkeypatch.setattr(module, "solve_rows", lambda P, L, ops: split_solve(P, L, ops, 4))
    x, x0, weight = inputs(rows=rows)
    H, S = sums(x, x0, [weight.float()])
    if wrong == "H":
        H[3, 3] = value
    else:
        S[2, 3] = value
    (found,) = corrected_targets([weight.float()], H, S, strength=0.5)
    assert not bool(found.isfinite().all())


def test_no_input_is_an_error() -> None:
    with pytest.raises(QuantizeError, match="never received an input"):
        InputShift([torch.ones(4, 4)]).matrix()


@pytest.mark.parametrize(("size", "rows"), [(2, 200), (3, 200), (3, 7)])
def test_the_products_of_several_ranks_are_those_of_one_device_bit_by_bit(size: int, rows: int) -> None:
    weight = inputs(columns=200, rows=rows)[2].float()
    both = [inputs(tokens=5, columns=200, seed=seed)[:2] for seed in range(7)]

    def of(batches: range) -> InputShift:
        found = InputShift([weight])
        for batch in batches:
            x, x0 = both[batch]
            found.add(x.float(), x0.float(), part_of(batch, 7))
        return found

    alone = of(range(7)).matrix()
    x, x0 = (torch.cat(each) for each in zip(*both, strict=True))
    expected = 2 / 35 * (x0 - x).T @ x
    if rows == 7:
        expected = weight.double() @ expected
    assert torch.allclose(alone.double(), expected, rtol=1e-4, atol=1e-5)

    def work(rank: SweepRank) -> Tensor | None:
        return rank.shift(of(rank.batches(7)), [size - 1])

    found = each_rank(size, work)
    assert [S is None for S in found] == [rank != size - 1 for rank in range(size)]
    assert torch.equal(found[-1], alone)


def test_the_targets_of_every_linear_are_those_of_two_whole_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oracle has two unstreamed models: one stays as it is, the other gets each group's weights in turn."""
    source, taken = open_folder(save_model(tmp_path / "model", "llama")), []

    def recorded(*args: Any, **kwargs: Any) -> list[Tensor]:
        taken.append(corrected_targets(*args, **kwargs))
        return taken[-1]

    monkeypatch.setattr(block_module, "corrected_targets", recorded)
    records = {record.name: record for record in run(source, tmp_path / "work", CORRECTED)["main"]}
    original, model = (AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32) for _ in range(2))
    moved = []
    for number, (index, group) in enumerate(product(range(3), GROUPS)):
        names = [f"model.layers.{index}.{each}" for each in group]
        x, x0 = (input_of(each, names[0]) for each in (model, original))
        H = 2 / len(x) * x.T @ x
        damped = H + torch.eye(len(H)) * H.diagonal().mean()
        shift = torch.linalg.solve(damped, 2 / len(x) * x.T @ (x0 - x))
        for name, target in zip(names, taken[number], strict=True):
            weight = cast(nn.Linear, model.get_submodule(name)).weight
            expected = weight.detach().double() + 0.5 * weight.detach().double() @ shift.T
            assert torch.allclose(target.double(), expected, atol=2e-6), name
            moved.append(float((target - weight.detach()).norm() / weight.detach().norm()))
            weight.data.copy_(stored_weight(source, tmp_path / "work", CORRECTED, index, name))
            # The loss is that of the target: it is what the column loop minimizes.
            rest = weight.detach().double() - expected
            with_damp = H + 0.01 * torch.eye(len(H)) * H.diagonal().mean()
            assert records[name].loss == pytest.approx(float(((rest @ with_damp) * rest).sum(1).mean() / 2), rel=1e-3)
    assert len(taken) == 3 * len(GROUPS)
    assert moved[:3] == [0, 0, 0], "no quantized linear precedes the first block's q, k and v"
    assert min(moved[3:]) > 0.01


def input_of(model: Any, name: str) -> Tensor:
    """Return a linear's inputs in a whole model, float64."""
    seen: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(token_rows().ids)
    handle.remove()
    return seen[0].reshape(-1, seen[0].shape[-1]).double()


def stored_weight(source: SourceModel, work: Path, v: Variant, block: int, name: str) -> Tensor:
    stored = open_store(source, work, v).read(block)
    assert stored is not None
    return dequantize_linear(lambda part: stored[f"{name}.{part}"], v.bits)


def test_variants_of_a_sweep_equal_variants_made_alone(tmp_path: Path) -> None:
    source = open_folder(save_model(tmp_path / "model", "llama"))
    variants = (
        variant(branch="plain", bits=3, group_size=16),
        variant(branch="half", bits=3, group_size=16, target_correction=0.5),
        variant(branch="refined", bits=3, group_size=16, act_order="static", target_correction=1.0, refine=True),
    )
    run(source, tmp_path / "together", *variants)
    for v in variants:
        run(source, tmp_path / "alone", v)
    assert files(tmp_path / "together") == files(tmp_path / "alone")
    last = "model.layers.2.mlp.down_proj"
    plain, half, refined = (stored_weight(source, tmp_path / "alone", v, 2, last) for v in variants)
    assert not torch.equal(plain, half)
    assert not torch.equal(half, refined)


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_finished_blocks_are_passed_by_both_activations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source = open_folder(save_model(tmp_path / "model", name))
    records = run(source, tmp_path / "work", CORRECTED)
    expected, read = files(tmp_path / "work"), BlockStore.read
    monkeypatch.setattr(BlockStore, "read", lambda store, block: None if block == 2 else read(store, block))
    assert run(source, tmp_path / "work", CORRECTED) == records
    assert files(tmp_path / "work") == expected


WAYS = [(placement, suspended) for placement in ("device", "host", "disk") for suspended in (0, 2, 3)]


@pytest.mark.parametrize(
    ("name", "placement", "suspended"),
    [
        *sampled([("llama", *way) for way in WAYS], ("llama", "host", 2)),
        *sampled([("qwen3-moe", "device", suspended) for suspended in (0, 2)], ("qwen3-moe", "device", 0)),
    ],
)
def test_memory_is_saved_without_changing_a_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, placement: Any, suspended: int
) -> None:
    monkeypatch.setitem(TOKENS_PER_BATCH, "cpu", token_rows().ids.numel() // 3)
    source = open_folder(save_model(tmp_path / "model", name))
    expected = run(source, tmp_path / "plenty", CORRECTED)
    plan = SweepPlan(
        num_variants=1, placement=placement, num_batches=3, suspended_batches=suspended, device_bytes=0, host_bytes=0
    )
    monkeypatch.setattr(shares_module, "sweep_plan", lambda *_, **__: plan)
    assert run(source, tmp_path / "scarce", CORRECTED) == expected
    assert files(tmp_path / "scarce") == files(tmp_path / "plenty")


@pytest.mark.parametrize("ranks", sampled([2, 3, 8], 3))
def test_ranks_make_the_bytes_of_one_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int) -> None:
    monkeypatch.setitem(TOKENS_PER_BATCH, "cpu", 32)
    source = open_folder(save_model(tmp_path / "model", "llama"))
    assert run(source, tmp_path / "one", CORRECTED) == run(source, tmp_path / "several", CORRECTED, ranks=ranks)
    assert files(tmp_path / "one") == files(tmp_path / "several")


def test_linears_of_experts_keep_their_targets(tmp_path: Path) -> None:
    """Other tokens reach an expert of the quantized model; the first block's experts see what the attention changed."""
    source = open_folder(save_model(tmp_path / "model", "qwen3-moe"))
    records = run(source, tmp_path / "work", CORRECTED)["main"]
    assert {isinstance(record, ExpertLinearRecord) for record in records} == {True, False}
    assert all(record.loss > 0 for record in records)


def test_a_reference_that_is_not_finite_is_an_error_that_names_the_linears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_folder(save_model(tmp_path / "model", "llama"))
    add = InputShift.add
    monkeypatch.setattr(InputShift, "add", lambda self, x, x0, part: add(self, x, x0 / 0, part))
    with pytest.raises(QuantizeError, match="activations of the fp16 model contain NaN or Inf") as caught:
        run(source, tmp_path / "work", CORRECTED)
    assert caught.value.where == ", ".join(["main", *(f"model.layers.0.{name}" for name in GROUPS[0])])


def test_the_plan_counts_the_fp16_models_activations() -> None:
    plan = make_plan(RecipeFile.load(RECIPES / "llama-2-13b-chat.yaml"))

    def ways(*, corrected: bool) -> list[SweepPlan]:
        work = Workload(
            architecture=plan.architecture, num_samples=128, seq_len=2048, num_variants=1, corrected=corrected,
            packed_bits=4.15625,
        )  # fmt: skip
        return [way for way in sweep_ways(work, "cuda") if way.weights == "device"]

    states = 2 * 128 * 2048 * 5120
    for plain, corrected in zip(ways(corrected=False), ways(corrected=True), strict=True):
        # As many of its batches are suspended inside the block, wherever its activations wait.
        on_device = states if plain.placement == "device" else 0
        suspended = states * plain.suspended_batches // plain.num_batches
        assert corrected.device_bytes > plain.device_bytes + on_device + suspended
        assert corrected.host_bytes == plain.host_bytes + (states if plain.placement == "host" else 0)
    assert min(way.device_bytes for way in ways(corrected=True)) < 9.7e9


def test_the_plan_counts_the_targets_while_the_widest_linear_is_solved() -> None:
    """They are float32; of a 13B shape those of `gate_proj` and `up_proj` take most, which are rounded at once."""
    architecture = make_plan(RecipeFile.load(RECIPES / "llama-2-13b-chat.yaml")).architecture
    # Of so few tokens that solving takes most.
    work = Workload(
        architecture=architecture, num_samples=1, seq_len=16, packed_bits=4.625, num_variants=1, corrected=True
    )
    wide = 2 * 13824
    peak = memory._Sizes(work, "cuda").peak(0, 0, 16, 16, inputs_held=0)
    assert peak == 4 * 5120 * wide + solving_bytes(5120, wide, "cuda")


@pytest.mark.parametrize("suspended", range(4))
def test_what_a_correction_takes_beside_a_variant_is_planned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suspended: int
) -> None:
    """Where a batch of the fp16 model runs again, two batches are inside the block: the variant's own waits."""
    rows, length = 16, 64
    monkeypatch.setitem(TOKENS_PER_BATCH, "cpu", rows * length)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=128, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2)  # fmt: skip
    AutoModelForCausalLM.from_config(config, dtype=torch.float16).save_pretrained(tmp_path)
    source = open_folder(tmp_path)
    decoder = Decoder(source.folder, source.read, device=CPU, dtype=torch.float32)
    (weights,) = decoder.stream()
    batches = decoder.embed(torch.zeros(3 * rows, length, dtype=torch.int64), rows=rows)
    contexts = [batch.contexts[0] for batch in batches]

    def measured(*, corrected: bool) -> int:
        block = decoder.load_block(0, weights)
        own, fp16 = (Activations([batch.hidden.clone() for batch in batches], "device") for _ in range(2))
        reference = Reference(states=fp16, contexts=contexts, last=False) if corrected else None
        counter = PeakBytes()
        with counter:
            for tensor in (*block.parameters(), *(each.get(index) for each in (own, fp16) for index in range(3))):
                tensor.view(-1)  # is counted before
            before = counter.live
            sweep_sequential(
                block, GROUPS, own, contexts, lambda *_: None, suspended=suspended, reference=reference
            )  # fmt: skip
        return counter.peak - before

    work = Workload(
        architecture=source.architecture,
        num_samples=3 * rows,
        seq_len=length,
        packed_bits=4.625,
        num_variants=1,
        corrected=True,
    )

    def planned(*, corrected: bool) -> int:
        this = replace(work, corrected=corrected)
        way = _way(
            this, _Sizes(this, "cpu"), "cpu", num_batches=3, suspended=suspended, count=1,
            placement="device", weights="device",
        )  # fmt: skip
        return way.device_bytes - corrected * 4 * 3 * rows * length * 32  # without the fp16 model's states

    taken = measured(corrected=True) - measured(corrected=False)
    assert 0 < taken <= planned(corrected=True) - planned(corrected=False)


@pytest.mark.parametrize("split", [False, True], ids=["library", "tensor cores"])
@pytest.mark.parametrize(("rows", "columns"), [(64, 512), (255, 512), (256, 512), (512, 512), (900, 512), (700, 1000)])
def test_targets_are_made_in_the_memory_that_solving_takes_later(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, split: bool
) -> None:
    if split:
        monkeypatch.setattr(module, "solve_rows", lambda P, L, ops: split_solve(P, L, ops, 64))
        # Emulated, the product of a part takes 6 bytes for the 2 on a GPU: a third of the columns at once.
        monkeypatch.setattr(cholesky, "_SOLVE_COLUMNS", columns // 6)
    weights = [torch.randn(rows, columns).half()]
    x = torch.randn(2 * columns, columns)
    H, S = x.T @ x, torch.randn(shift_rows(columns, rows), columns)
    with PeakBytes() as counter:
        H.view(-1), S.view(-1), weights[0].view(-1)  # are counted before
        taken = weights[0].numel() * 2
        found = corrected_targets(weights, H, S, strength=0.5)
    assert found[0].shape == (rows, columns)
    assert counter.peak - taken <= solving_bytes(columns, rows, "cuda" if split else "cpu", corrected=True)


def test_a_sum_of_outputs_has_those_of_all_linears_that_see_the_input() -> None:
    linears = {name: nn.Linear(64, 12).requires_grad_(False) for name in ("a", "b")}
    x, x0, _ = (each.float() for each in inputs(columns=64))
    expected = 2 / 40 * torch.cat([linear.weight for linear in linears.values()]) @ (x0 - x).T @ x
    found = _Inputs(("a", "b"), linears, None, 1, shifted=True)
    found.add(x, 0, x0)
    seen: list[Tensor] = []
    found.solve(lambda _, __, shift: seen.append(cast(InputShift, shift).matrix()), lambda *_: None)
    assert torch.allclose(seen[0], expected, atol=1e-5)


def test_s_is_freed_before_columns_are_solved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum of outputs becomes the targets instead."""
    alive: list[weakref.ref[Tensor]] = []
    found: list[bool] = []

    def recorded(weights: Sequence[Tensor], H: Tensor, S: Tensor, **kwargs: Any) -> list[Tensor]:
        if len(S) == len(H):
            alive.append(weakref.ref(S))
        return corrected_targets(weights, H, S, **kwargs)

    def solved(*args: Any, **kwargs: Any) -> Any:
        found.append(any(each() is not None for each in alive))
        return solve(*args, **kwargs)

    monkeypatch.setattr(block_module, "corrected_targets", recorded)
    monkeypatch.setattr(block_module, "solve", solved)
    run(open_folder(save_model(tmp_path / "model", "llama")), tmp_path / "work", CORRECTED)
    assert found == [False] * 3 * len(GROUPS)
    assert len(alive) >= 3


def test_a_sum_of_outputs_is_kept_where_it_takes_less_arithmetic() -> None:
    """For each token: two products with as many columns as inputs, of outputs, instead of one of inputs."""
    assert [shift_rows(100, rows) for rows in (1, 49, 50, 51, 100, 500)] == [1, 49, 100, 100, 100, 100]


def test_variants_without_a_correction_keep_their_parameters() -> None:
    assert "target_correction" not in variant().parameters()
    assert variant(target_correction=0.5).parameters() == {**variant().parameters(), "target_correction": 0.5}
