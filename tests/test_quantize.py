"""The sweep over whole models of any architecture, against an unstreamed model and the repeated-forward way."""

import copy
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import get_args

import pytest
import torch
from transformers import AutoModelForCausalLM

from packager.errors import MachineError, QuantizeError, SourceError
from packager.inputs.base_model import SourceModel
from packager.model.batches import TOKENS_PER_BATCH
from packager.model.decoder import Decoder, forward
from packager.model.packing import dequantize_linear
from packager.quantize import block as block_module
from packager.quantize import device_shares as shares_module
from packager.quantize import restore_block as restore_block_module
from packager.quantize import sweep as sweep_module
from packager.quantize import worker as worker_module
from packager.quantize.block import quantize_block
from packager.quantize.block_store import BlockStore
from packager.quantize.gptq.grid import GridRules
from packager.quantize.gptq.hessian import Hessian, factorize
from packager.quantize.gptq.solve import solve
from packager.quantize.job import BlockDone, Event, QuantizeJob
from packager.quantize.memory import SweepPlan
from packager.quantize.shared_reader import SharedReader
from packager.quantize.sweep import quantize
from packager.quantize.variant_rules import order_of
from packager.receipt import LinearRecord
from packager.variant import ActOrder, Variant
from tests.samples import sampled
from tests.sources import open_folder
from tests.tiny_models import CONFIGS, WITH_EXPERTS, open_store, save_model, token_rows, variant

CPU = torch.device("cpu")
ORDERS: tuple[ActOrder, ...] = get_args(ActOrder)


def source_of(folder: Path, name: str) -> SourceModel:
    return open_folder(save_model(folder / "model", name))


class Counter:
    """A clock that goes on a second each time it is read."""

    now = 0.0

    def monotonic(self) -> float:
        self.now += 1
        return self.now


def run(
    source: SourceModel, work: Path, *variants: Variant, devices: int = 1
) -> tuple[dict[str, tuple[LinearRecord, ...]], list[BlockDone]]:
    steps: list[Event] = []
    stores = {v: open_store(source, work, v) for v in variants}
    job = QuantizeJob(source=source, rows=token_rows(), stores=stores, devices=(CPU,) * devices)
    records = quantize(job, steps.append)
    return records, [step for step in steps if isinstance(step, BlockDone)]


def stored_block(source: SourceModel, work: Path, v: Variant, block: int) -> dict[str, torch.Tensor]:
    tensors = open_store(source, work, v).read(block)
    assert tensors is not None
    return tensors


def files(work: Path) -> dict[str, bytes]:
    """Return weights and journals of every variant."""
    return {path.relative_to(work).as_posix(): path.read_bytes() for path in work.rglob("*") if path.is_file()}


def dequantized(source: SourceModel, work: Path, v: Variant, block: int) -> dict[str, torch.Tensor]:
    stored = stored_block(source, work, v, block)

    def weight(linear: str) -> torch.Tensor:
        return dequantize_linear(lambda part: stored[f"{linear}.{part}"], v.bits)

    return {name: weight(name) for name in sorted({name.rpartition(".")[0] for name in stored})}


EVERY_CONFIG = (*CONFIGS, *WITH_EXPERTS)


@pytest.mark.parametrize("name", sampled(EVERY_CONFIG, "llama-bias", "mistral-sliding"))
def test_streamed_forward_equals_the_whole_model(tmp_path, name):
    source = source_of(tmp_path, name)
    ids = token_rows().ids
    decoder = Decoder(source.folder, source.read, device=CPU, dtype=torch.float32)
    states = forward(decoder, ids, rows=5)
    found = torch.cat([decoder.logits(state) for state in states])
    whole = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32)
    with torch.no_grad():
        expected = whole(ids).logits
    assert torch.allclose(found, expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", sampled(EVERY_CONFIG, "qwen3", "qwen3-moe"))
def test_quantizes_every_architecture(tmp_path, name):
    source = source_of(tmp_path, name)
    v = variant(act_order="full")
    records, done = run(source, tmp_path / "work", v)
    assert {record.name for record in records["main"]} == {linear.name for linear in source.architecture.linears}
    assert len(done) == source.architecture.num_blocks
    assert all(record.loss > 0 for record in records["main"])
    for block in range(3):
        for linear, weight in dequantized(source, tmp_path / "work", v, block).items():
            original = source.read(f"{linear}.weight").float()
            assert (weight - original).norm() / original.norm() < 0.2
    stored = stored_block(source, tmp_path / "work", v, 0)
    biases = {name for name in stored if name.endswith(".bias")}
    assert biases == {
        f"{linear.name}.bias" for linear in source.architecture.linears if linear.bias and linear.block == 0
    }


def test_suspended_forward_equals_the_repeated_forward_bit_by_bit(tmp_path, monkeypatch):
    """The oracle runs the block anew for every group, as AutoGPTQ does, on an ordinary unstreamed model."""
    source = source_of(tmp_path, "llama")
    v = variant(act_order="full", group_size=16)
    monkeypatch.setattr("packager.quantize.worker.time", Counter())
    records, done = run(source, tmp_path / "work", v)
    losses: dict[str, float] = {}
    model = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
    rules = GridRules(bits=4, sym=True, scale_search=False)
    groups = (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("self_attn.o_proj",),
              ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))  # fmt: skip
    with torch.no_grad():
        for index, block in enumerate(model.model.layers):
            for group in groups:
                linears = [block.get_submodule(name) for name in group]
                hessian = Hessian(linears[0].in_features, CPU)
                handle = linears[0].register_forward_pre_hook(lambda _, args, hessian=hessian: hessian.add(args[0]))
                model(token_rows().ids)
                handle.remove()
                H = hessian.matrix()
                damped = H.double() + torch.eye(len(H)) * 0.01 * H.double().diagonal().mean()
                factor = factorize(H, order_of(v), damp_percent=0.01)
                weights = [linear.weight for linear in linears]
                solution = solve(weights, factor, rules)
                parts = solution.by_linear([linear.out_features for linear in linears])
                for name, linear, part in zip(group, linears, parts, strict=True):
                    delta = part.dequantized().double() - linear.weight.double()
                    losses[f"model.layers.{index}.{name}"] = float(((delta @ damped) * delta).sum(1).mean() / 2)
                    linear.weight.copy_(part.dequantized())
            for name, weight in dequantized(source, tmp_path / "work", v, index).items():
                oracle = model.get_submodule(name).weight
                assert torch.allclose(weight, oracle, atol=1e-6), name
    assert {record.name: record.loss for record in records["main"]} == pytest.approx(losses, rel=1e-3)
    for step in done:
        block = [loss for name, loss in losses.items() if name.startswith(f"model.layers.{step.block}.")]
        assert len(block) == 7
        assert step.loss == pytest.approx(sum(block), rel=1e-3)
        assert step.seconds == 1, "the clock is read when a block begins and when it has ended"


def test_linears_that_share_an_input_form_a_group(tmp_path):
    source = source_of(tmp_path, "qwen2")
    decoder = Decoder(source.folder, source.read, device=CPU, dtype=torch.float32)
    assert decoder.groups(0) == (
        ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        ("self_attn.o_proj",),
        ("mlp.gate_proj", "mlp.up_proj"),
        ("mlp.down_proj",),
    )


def test_variants_of_a_sweep_equal_variants_made_alone(tmp_path):
    source = source_of(tmp_path, "llama")
    first = variant(branch="a", group_size=32)
    second = variant(branch="b", group_size=16, act_order="full", true_sequential=False)
    third = variant(branch="c", bits=3, sym=False, group_size=-1, scale_search=True)
    others = (variant(branch=order, act_order=order, group_size=16, refine=True) for order in ("group", "static"))
    variants = (first, second, third, *others)
    run(source, tmp_path / "together", *variants)
    for v in variants:
        run(source, tmp_path / "alone", v)
    assert files(tmp_path / "together") == files(tmp_path / "alone")


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_blocks_of_every_act_order_are_restored_to_the_same_bytes(tmp_path, monkeypatch, name):
    """Only full order scatters groups, and its weights are restored by g_idx; the last block shows what came before."""
    source, variants = source_of(tmp_path, name), [variant(branch=order, act_order=order) for order in ORDERS]
    run(source, tmp_path / "work", *variants)
    for v in variants:
        stored = stored_block(source, tmp_path / "work", v, 0)
        scattered = [name for name, value in stored.items() if name.endswith("g_idx") and (value.diff() < 0).any()]
        assert bool(scattered) == (v.act_order == "full")
    expected = files(tmp_path / "work")
    last = source.architecture.num_blocks - 1
    read = BlockStore.read
    monkeypatch.setattr(BlockStore, "read", lambda store, block: None if block == last else read(store, block))
    run(source, tmp_path / "work", *variants)
    assert files(tmp_path / "work") == expected


TWO_VARIANTS = (variant(branch="a"), variant(branch="b", act_order="full", true_sequential=False))
WAYS = [
    (placement, suspended, together)
    for placement in ("device", "host", "disk")
    for suspended in (0, 2, 3)
    for together in (1, 2)
]


WAYS_AND_MODELS = [(*way, "llama") for way in WAYS] + [(*way, "qwen3-moe") for way in WAYS[1::5]]
SAVING = (("device", 2, 1, "llama"), ("host", 3, 1, "llama"), ("disk", 0, 2, "llama"))


@pytest.fixture(scope="module")
def plenty(tmp_path_factory) -> Callable[[str], tuple[SourceModel, Path, dict[str, tuple[LinearRecord, ...]]]]:
    """What a model becomes with all memory that it needs, made once: the model, the work folder and the records."""
    made = {}

    def of(name):
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            source = source_of(folder, name)
            records, _ = run(source, folder / "plenty", *TWO_VARIANTS)
            made[name] = (source, folder / "plenty", records)
        return made[name]

    return of


@pytest.mark.parametrize(("placement", "suspended", "together", "name"), sampled(WAYS_AND_MODELS, *SAVING))
def test_memory_is_saved_without_changing_a_byte(tmp_path, monkeypatch, plenty, placement, suspended, together, name):
    monkeypatch.setitem(TOKENS_PER_BATCH, "cpu", token_rows().ids.numel() // 3)
    source, work, expected = plenty(name)
    plan = SweepPlan(
        num_variants=together, placement=placement, num_batches=3, suspended_batches=suspended, device_bytes=0,
        host_bytes=0,
    )  # fmt: skip
    monkeypatch.setattr(shares_module, "sweep_plan", lambda *_, **__: plan)
    records, _ = run(source, tmp_path / "scarce", *TWO_VARIANTS)
    assert records == expected
    assert files(tmp_path / "scarce") == files(work)


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_weights_may_wait_on_the_host(tmp_path, monkeypatch, name):
    source, asked = source_of(tmp_path, name), []
    variants = variant(branch="a"), variant(branch="b", act_order="full")
    expected, _ = run(source, tmp_path / "plenty", *variants)
    plan = SweepPlan(
        num_variants=2, placement="device", num_batches=1, suspended_batches=1, weights="host", device_bytes=0,
        host_bytes=0,
    )  # fmt: skip
    stream = Decoder.stream
    monkeypatch.setattr(Decoder, "stream", lambda self, *, on_host: asked.append(on_host) or stream(self, on_host=True))
    monkeypatch.setattr(shares_module, "sweep_plan", lambda *_, **__: plan)
    records, _ = run(source, tmp_path / "scarce", *variants)
    assert asked == [True]
    assert records == expected
    assert files(tmp_path / "scarce") == files(tmp_path / "plenty")


def test_devices_with_unequal_numbers_of_sweeps_keep_no_tensor(tmp_path, monkeypatch):
    source, readers = source_of(tmp_path, "llama"), []

    class Reader(SharedReader):
        def __init__(self, *rest):
            super().__init__(*rest)
            readers.append(self)

    plan = SweepPlan(
        num_variants=1, placement="device", num_batches=1, suspended_batches=1, device_bytes=0, host_bytes=0
    )  # fmt: skip
    monkeypatch.setattr(sweep_module, "SharedReader", Reader)
    monkeypatch.setattr(shares_module, "sweep_plan", lambda *_, **__: plan)
    run(source, tmp_path / "work", *(variant(branch=name) for name in "abc"), devices=2)
    assert len(readers) == 1
    assert not readers[0]._kept


@pytest.mark.parametrize("devices", sampled([2, 3, 5], 3))
def test_several_devices_make_the_bytes_of_one(tmp_path, devices):
    source = source_of(tmp_path, "llama")
    variants = [variant(branch=name, group_size=size) for name, size in (("a", 16), ("b", 32), ("c", -1))]
    expected, _ = run(source, tmp_path / "one", *variants)
    records, _ = run(source, tmp_path / "several", *variants, devices=devices)
    assert list(records.items()) == list(expected.items())
    assert files(tmp_path / "several") == files(tmp_path / "one")


def test_a_finished_variant_is_not_run_again(tmp_path, monkeypatch):
    source = source_of(tmp_path, "llama")
    done, other = variant(branch="a"), variant(branch="b", group_size=16)
    expected, _ = run(source, tmp_path / "work", done)
    forwarded = []
    restore = restore_block_module.restore_block
    monkeypatch.setattr(worker_module, "restore_block", lambda *rest: (forwarded.append(rest), restore(*rest)))
    records, steps = run(source, tmp_path / "work", other, done)
    assert list(records) == ["b", "a"]
    assert records["a"] == expected["a"]
    assert [step.branch for step in steps if step.resumed] == ["a"] * source.architecture.num_blocks
    assert not forwarded


def test_a_full_gpu_is_a_clear_error(tmp_path, monkeypatch):
    source = source_of(tmp_path, "llama")

    def fill(*_args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has ...")

    monkeypatch.setattr(worker_module, "quantize_block", fill)
    with pytest.raises(MachineError, match="memory is exhausted") as caught:
        run(source, tmp_path / "work", variant())
    assert "--gpu-memory" in str(caught.value)


def test_the_limit_of_gpu_memory_is_lifted_when_quantizing_fails(tmp_path, monkeypatch):
    """Without CUDA the first call on the GPU fails, after the limit was set."""
    source, v, fractions = source_of(tmp_path, "llama"), variant(), []

    def fail(_):
        raise MachineError("no GPU")

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80 * 10**9))
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *rest: fractions.append(rest))
    monkeypatch.setattr(sweep_module, "load_linear_algebra", fail)
    gpu = torch.device("cuda", 0)
    job = QuantizeJob(
        source=source, rows=token_rows(), stores={v: open_store(source, tmp_path / "work", v)}, devices=(gpu,),
        device_limit=20 * 10**9,
    )  # fmt: skip
    with pytest.raises(MachineError, match="no GPU"):
        quantize(job, lambda _: None)
    assert fractions == [(0.25, gpu), (1.0, gpu)]


def test_what_fails_on_one_device_stops_the_others(tmp_path, monkeypatch):
    source = source_of(tmp_path, "llama")

    def fail_for_b(load, job, solved):
        if job.variant.branch == "b":
            raise QuantizeError("no", where="b")
        time.sleep(0.05)
        return quantize_block(load, job, solved)

    monkeypatch.setattr(worker_module, "quantize_block", fail_for_b)
    with pytest.raises(QuantizeError, match="no"):
        run(source, tmp_path / "work", variant(branch="b"), variant(branch="a"), devices=2)


@pytest.mark.crash
@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_a_killed_sweep_resumes_to_the_same_bytes(tmp_path, monkeypatch, name):
    source = source_of(tmp_path, name)
    variants = variant(branch="a"), variant(branch="b", act_order="full")
    expected, _ = run(source, tmp_path / "whole", *variants)
    written = []

    def write_then_die(store, *rest):
        original(store, *rest)
        written.append(store)
        if len(written) == 3:
            raise KeyboardInterrupt

    original = BlockStore.write
    monkeypatch.setattr(BlockStore, "write", write_then_die)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "killed", *variants)
    monkeypatch.undo()
    records, done = run(source, tmp_path / "killed", *variants)
    resumed = [step.resumed for step in done]
    assert resumed[:3] == [True, True, True]  # a block of the other variant may have been under way
    assert not any(resumed[4:])
    assert records == expected
    assert files(tmp_path / "killed") == files(tmp_path / "whole")


def test_blocks_made_from_something_else_are_not_taken_over(tmp_path):
    source = source_of(tmp_path, "llama")
    run(source, tmp_path / "work", variant())
    other = open_folder(save_model(tmp_path / "other", "llama", seed=1))
    _, done = run(other, tmp_path / "work", variant())
    assert not any(step.resumed for step in done)


def test_nan_in_a_weight_names_the_tensor(tmp_path):
    source = source_of(tmp_path, "llama")

    def damaged(name: str) -> torch.Tensor:
        tensor = source.read(name)
        if name == "model.layers.1.mlp.up_proj.weight":
            tensor[0, 0] = float("nan")
        return tensor

    broken = copy.copy(source)
    object.__setattr__(broken, "read", damaged)
    with pytest.raises(SourceError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        run(broken, tmp_path / "work", variant())


def test_a_hessian_beyond_the_damping_limit_names_branch_and_linear(tmp_path, monkeypatch):
    source = source_of(tmp_path, "llama")

    def fail(*_args, **_rest):
        raise QuantizeError("the Hessian cannot be factored")

    monkeypatch.setattr(block_module, "factorize_within", fail)
    with pytest.raises(QuantizeError, match=r"main, model\.layers\.0\.self_attn\.q_proj"):
        run(source, tmp_path / "work", variant())
