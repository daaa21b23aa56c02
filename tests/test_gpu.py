"""The same engine on a CUDA GPU: run with `nox -s tests-gpu`; without a GPU these fail, they do not skip."""

import copy
import hashlib
import math
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3MoeConfig

from packager.errors import MachineError, QuantizeError
from packager.inputs.base_model import SourceModel
from packager.inputs.texts import TextSets
from packager.model.decoder import Decoder, forward
from packager.model.devices import GPU_ALLOCATION
from packager.model.packing import CheckpointReader, pack, pack_zeros, unpack
from packager.prove.evaluate import quality_of, run_base, run_checkpoint
from packager.prove.evaluation_memory import evaluation_memory
from packager.quantize.gptq.grid import GridRules
from packager.quantize.gptq.hessian import Hessian, factorize
from packager.quantize.gptq.order import ColumnOrder
from packager.quantize.gptq.solve import solve
from packager.quantize.job import BlockDone, Event, QuantizeJob
from packager.quantize.memory import HOST_LIMIT_BYTES, USABLE, SweepPlan, sweep_ways
from packager.quantize.sweep import quantize
from packager.quantize.workload import Workload
from packager.receipt import LinearRecord
from packager.variant import Variant
from tests.gptq_reference import assert_agrees
from tests.sources import open_folder
from tests.tiny_models import CONFIGS, WITH_EXPERTS, open_store, save_model, token_rows, variant

pytestmark = pytest.mark.gpu
os.environ.setdefault(*GPU_ALLOCATION)  # as the command does
ROOT = Path(__file__).resolve().parent.parent
CUDA = torch.device("cuda", 0)
# Rows of the larger models: eight batches, so that some can wait while others do not.
ROWS, LENGTH, VOCABULARY = 64, 2048, 512


@pytest.fixture(autouse=True)
def _gpu() -> Iterator[None]:
    assert torch.cuda.is_available(), "these tests need a CUDA GPU"
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def save_larger(folder: Path, *, hidden: int, intermediate: int, blocks: int, vocab_size: int = VOCABULARY) -> Path:
    """Save a random Llama of a size at which memory is what is estimated, not what libraries take."""
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=blocks,
        num_attention_heads=hidden // 128, num_key_value_heads=hidden // 256, max_position_embeddings=LENGTH,
        dtype="float16",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(CUDA):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    assert torch.cuda.is_available(), "these tests need a CUDA GPU"
    folder = save_larger(tmp_path_factory.mktemp("large"), hidden=3072, intermediate=8192, blocks=2)
    return open_folder(folder)


@pytest.fixture(scope="module")
def large_experts(tmp_path_factory: pytest.TempPathFactory) -> SourceModel:
    """A layer of experts as wide as Qwen3-30B-A3B's, with fewer of them."""
    assert torch.cuda.is_available(), "these tests need a CUDA GPU"
    fields: dict[str, Any] = {"head_dim": 128, "num_local_experts": 48}
    config = Qwen3MoeConfig(
        **fields, vocab_size=VOCABULARY, hidden_size=2048, intermediate_size=768, num_hidden_layers=2,
        num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=LENGTH, num_experts=48,
        num_experts_per_tok=8, moe_intermediate_size=768, dtype="float16",
    )  # fmt: skip
    torch.manual_seed(0)
    with torch.device(CUDA):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float16)
    folder = tmp_path_factory.mktemp("experts")
    model.save_pretrained(folder)
    return open_folder(folder)


def tiny(folder: Path, name: str = "llama") -> SourceModel:
    return open_folder(save_model(folder / "model", name))


def run(
    source: SourceModel, work: Path, *variants: Variant, rows: Any = None, devices: tuple[torch.device, ...] = (CUDA,),
    report: Callable[[Any], None] = lambda _: None, **limits: int,
) -> dict[str, tuple[LinearRecord, ...]]:  # fmt: skip
    stores = {v: open_store(source, work, v, device=devices[0]) for v in variants}
    job = QuantizeJob(source=source, rows=rows or token_rows(), stores=stores, devices=devices, **limits)
    return quantize(job, report)


def digests(work: Path) -> dict[str, str]:
    """Return the sha256 of every weights file and journal."""
    paths = [path for path in sorted(work.rglob("*")) if path.is_file()]
    return {str(path.relative_to(work)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


@pytest.mark.parametrize("in_features", [256, 1500])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_hessian_of_half_precision_inputs_is_accumulated_in_float32(dtype, in_features):
    x = torch.randn(4096, in_features, device=CUDA).to(dtype)
    hessian = Hessian(in_features, CUDA)
    for part in x.split(500):
        hessian.add(part)
    expected = 2 * x.double().T @ x.double() / x.shape[0]
    H = hessian.matrix()
    assert (H.double() - expected).norm() / expected.norm() < 1e-5
    assert torch.equal(H, H.T)


@pytest.mark.parametrize(
    ("bits", "group_size", "sym", "act_order"), [(4, 128, True, "none"), (3, 64, False, "full"), (4, 64, True, "group")]
)
def test_hessian_to_q_agrees_with_the_float64_reference(bits, group_size, sym, act_order):
    n, generator = 768, torch.Generator(CUDA).manual_seed(1)
    x = torch.randn(6144, n, device=CUDA, generator=generator) * torch.rand(n, device=CUDA, generator=generator) * 3
    hessian = Hessian(n, CUDA)
    for part in x.half().split(2048):
        hessian.add(part)
    H = hessian.matrix()
    weight = (torch.randn(n, 200, device=CUDA, generator=generator) * 0.02).half()
    factor = factorize(H, ColumnOrder(act_order=act_order, group_size=group_size), damp_percent=0.01)
    rules = GridRules(bits=bits, sym=sym, scale_search=True)
    found = solve([weight.T], factor, rules)
    how = {"bits": bits, "group_size": group_size, "sym": sym, "act_order": act_order}
    assert_agrees(found, weight, H, scale_search=True, **how)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("width", [1, 40])
def test_packing_gives_the_bytes_of_the_cpu(bits, width):
    values = torch.randint(0, 2**bits, (128, width), dtype=torch.uint8)
    packed = pack(values.to(CUDA), bits)
    assert torch.equal(packed.cpu(), pack(values, bits))
    assert torch.equal(unpack(packed, bits).cpu(), values)
    zeros = values.T.contiguous().clamp(min=1)
    assert torch.equal(pack_zeros(zeros.to(CUDA), bits).cpu(), pack_zeros(zeros, bits))


@pytest.mark.parametrize("name", [*CONFIGS, *WITH_EXPERTS])
def test_every_architecture_quantizes_as_on_the_cpu(tmp_path, name):
    source = tiny(tmp_path, name)
    variants = (
        variant(branch="main"),
        variant(branch="act", act_order="full", group_size=16, scale_search=True),
        variant(branch="parallel", bits=3, sym=False, group_size=-1, true_sequential=False),
        variant(branch="static", bits=8, act_order="static"),
    )
    losses, tensors = {}, {}
    for device in (torch.device("cpu"), CUDA):
        records = run(source, tmp_path / device.type, *variants, devices=(device,))
        losses[device.type] = {
            branch: torch.tensor([record.loss for record in found]) for branch, found in records.items()
        }
        stores = [open_store(source, tmp_path / device.type, v, device=device) for v in variants]
        tensors[device.type] = [store.read(2) or {} for store in stores]
    for branch, expected in losses["cpu"].items():
        # float16 activations move single roundings; the sum over a model's linears hardly moves.
        assert float(losses["cuda"][branch].sum()) == pytest.approx(float(expected.sum()), rel=0.05)
    for on_gpu, on_cpu in zip(tensors["cuda"], tensors["cpu"], strict=True):
        assert on_gpu.keys() == on_cpu.keys()
        biases = [key for key in on_gpu if key.endswith(".bias")]
        assert all(torch.equal(on_gpu[key], on_cpu[key]) for key in biases)
        assert bool(biases) == any(linear.bias for linear in source.architecture.linears)


def test_the_same_gpu_gives_the_same_bytes_twice(tmp_path):
    source, variants = tiny(tmp_path), (variant(act_order="full"), variant(branch="b", scale_search=True))
    for number in ("first", "second"):
        run(source, tmp_path / number, *variants)
    assert digests(tmp_path / "first") == digests(tmp_path / "second")


@pytest.mark.parametrize("many", [2, 3])
def test_several_devices_make_the_bytes_of_one(tmp_path, large, many):
    """They are the same GPU here, used by several threads."""
    source = large if many == 2 else tiny(tmp_path)
    rows = token_rows(16, LENGTH, vocab_size=VOCABULARY) if many == 2 else token_rows()
    variants = [variant(branch=name, group_size=size) for name, size in (("a", 32), ("b", 64), ("c", -1))]
    limits: dict[str, Any] = {"device_limit": 20 * 10**9} if many == 2 else {}
    expected = run(source, tmp_path / "one", *variants, rows=rows)
    records = run(source, tmp_path / "several", *variants, rows=rows, devices=(CUDA,) * many, **limits)
    assert list(records.items()) == list(expected.items())
    assert digests(tmp_path / "several") == digests(tmp_path / "one")


@pytest.mark.parametrize("gpus", ["twice the same", "every"])
@pytest.mark.parametrize("experts", [False, True], ids=["linears", "experts"])
def test_devices_that_share_the_rows_make_the_bytes_of_one(tmp_path, large, large_experts, gpus, experts):
    """Eight batches; on a machine with one GPU both cases are that one, used by two threads."""
    source, rows = large_experts if experts else large, token_rows(ROWS, LENGTH, vocab_size=VOCABULARY)
    every = tuple(torch.device("cuda", number) for number in range(min(8, torch.cuda.device_count())))
    devices = every if gpus == "every" and len(every) > 1 else (CUDA, CUDA)
    limits: dict[str, Any] = {} if devices == every else {"device_limit": 50 * 10**9}
    expected = run(source, tmp_path / "one", PAIR[1], rows=rows)
    records = run(source, tmp_path / "shared", PAIR[1], rows=rows, devices=devices, **limits)
    assert records == expected
    assert digests(tmp_path / "shared") == digests(tmp_path / "one")


def ways_of(source: SourceModel) -> dict[tuple[Any, ...], SweepPlan]:
    work = Workload.of(source.architecture, ROWS, LENGTH, PAIR)
    return {way_key(way): way for way in sweep_ways(work, "cuda")}


def way_key(way: SweepPlan) -> tuple[Any, ...]:
    return way.placement, way.num_variants, way.suspended_batches, way.weights


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, large: SourceModel) -> dict[str, str]:
    """The digests of two variants, quantized with enough memory for everything."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run(large, folder, *PAIR, rows=token_rows(ROWS, LENGTH, vocab_size=VOCABULARY))
    return digests(folder)


PAIR = variant(branch="a", group_size=128, scale_search=True), variant(branch="b", group_size=32, act_order="full")
# Not ("host", 2, 8): one variant on the device needs less of it, and is tried first (tests/test_memory.py). So does one
# whose weights wait on the host, where the disk would do with weights on the device.
SCARCE = [
    ("device", 1, 8, "device"), ("host", 2, 3, "device"), ("host", 2, 0, "device"), ("host", 2, 0, "host"),
    ("disk", 2, 0, "host"),
]  # fmt: skip


@pytest.mark.parametrize("key", SCARCE)
def test_scarce_memory_is_enough_and_changes_no_byte(tmp_path, large, undisturbed, key):
    """torch may allocate exactly the planned bytes: an estimate that is too low would be an error."""
    way = ways_of(large)[key]
    # One variant at a time on the device is what is left when the host has nothing to spare.
    host_limit = way.host_bytes if way.placement != "host" else HOST_LIMIT_BYTES
    assert planned_in(tmp_path, large, way, host_limit) == [key]
    assert digests(tmp_path) == undisturbed


@pytest.mark.parametrize("suspended", [3, 0])
def test_the_planned_memory_is_enough_for_a_target_correction(tmp_path, large, suspended):
    """Where a batch of the fp16 model runs again, the variant's own waits inside the block."""
    corrected, rows = variant(group_size=128, target_correction=0.5), token_rows(ROWS, LENGTH, vocab_size=VOCABULARY)
    work = Workload.of(large.architecture, ROWS, LENGTH, [corrected])
    key = ("host", 1, suspended, "device")
    way = {way_key(each): each for each in sweep_ways(work, "cuda")}[key]
    run(large, tmp_path / "plenty", corrected, rows=rows)
    seen: list[Any] = []
    run(
        large, tmp_path / "scarce", corrected, rows=rows, report=seen.append,
        device_limit=int(way.device_bytes / USABLE) + 1,
    )  # fmt: skip
    assert [way_key(step.plan) for step in seen if hasattr(step, "plan")] == [key]
    assert digests(tmp_path / "scarce") == digests(tmp_path / "plenty")


@pytest.mark.parametrize("key", [("device", 2, 8, "device"), ("device", 1, 8, "device"), "host"])
def test_the_planned_memory_is_enough_for_experts(tmp_path, large_experts, key):
    ways = ways_of(large_experts)
    if key == "host":  # the first way that needs less than all that keep the weights on the device
        least = min(way.device_bytes for way in ways.values() if way.weights == "device" and way.placement != "disk")
        key = next(key for key, way in ways.items() if way.weights == "host" and way.device_bytes < least)
    way = ways[key]
    run(large_experts, tmp_path / "plenty", *PAIR, rows=token_rows(ROWS, LENGTH, vocab_size=VOCABULARY))
    assert planned_in(tmp_path / "scarce", large_experts, way, way.host_bytes) == [key]
    assert digests(tmp_path / "scarce") == digests(tmp_path / "plenty")


def test_a_wide_vocabulary_takes_the_planned_memory(tmp_path):
    """Its embedding is larger than the blocks; the head is checked on the host."""
    folder = save_larger(tmp_path / "wide", hidden=1024, intermediate=1024, blocks=2, vocab_size=262144)
    source, rows = open_folder(folder), token_rows(8, 64)
    work = Workload(architecture=source.architecture, num_samples=8, seq_len=64, packed_bits=4.625, num_variants=1)
    planned = next(sweep_ways(work, "cuda")).device_bytes
    run(tiny(tmp_path), tmp_path / "first", variant())  # loads what libraries load when they are first used
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(source, tmp_path / "work", variant(group_size=128), rows=rows)
    assert torch.cuda.max_memory_allocated() - before == pytest.approx(planned, rel=0.2)


def planned_in(work: Path, source: SourceModel, way: SweepPlan, host_limit: int) -> list[tuple[Any, ...]]:
    """Quantize the pair in exactly the memory of a way; return the keys of the ways that were chosen."""
    seen: list[Any] = []
    run(
        source, work, *PAIR, rows=token_rows(ROWS, LENGTH, vocab_size=VOCABULARY), report=seen.append,
        device_limit=int(way.device_bytes / USABLE) + 1, host_limit=host_limit,
    )  # fmt: skip
    return [way_key(step.plan) for step in seen if hasattr(step, "plan")]


def test_the_memory_limit_ends_with_quantizing(tmp_path):
    """Later stages, such as evaluation, may use the whole GPU."""
    total = torch.cuda.get_device_properties(CUDA).total_memory
    run(tiny(tmp_path), tmp_path / "work", variant(), device_limit=total // 8)
    torch.cuda.empty_cache()
    torch.empty(total // 4, dtype=torch.uint8, device=CUDA)


def test_too_little_memory_is_an_error_before_anything_is_computed(tmp_path):
    with pytest.raises(MachineError, match="does not fit into this machine's memory"):
        run(tiny(tmp_path), tmp_path / "work", variant(), device_limit=100_000)


def test_a_singular_hessian_is_damped_as_on_the_cpu(tmp_path):
    """The unchecked attempt on a GPU fails at the end of a block, and the block is quantized again with checks."""
    source = tiny(tmp_path)
    v = variant(damp_percent=1e-9, damp_percent_limit=0.1, group_size=16)
    records = run(source, tmp_path / "work", v, rows=token_rows(2, 8))["main"]
    damped = [record for record in records if record.damp_percent > v.damp_percent]
    assert len(damped) > len(records) / 2
    assert all(record.damp_percent <= v.damp_percent_limit and record.loss >= 0 for record in records)
    again = run(source, tmp_path / "again", v, rows=token_rows(2, 8))["main"]
    assert again == records
    assert digests(tmp_path / "again") == digests(tmp_path / "work")


def test_errors_name_branch_and_linears(tmp_path):
    source, changed = tiny(tmp_path), "model.layers.1.mlp.up_proj.weight"

    def enlarged(name: str) -> torch.Tensor:
        return source.read(name) * (60000 if name == changed else 1)

    broken = copy.copy(source)
    object.__setattr__(broken, "read", enlarged)
    with pytest.raises(QuantizeError) as caught:
        run(broken, tmp_path / "work", variant(branch="mine"))
    assert caught.value.where.startswith("mine, model.layers.1.mlp.")
    with pytest.raises(QuantizeError, match="cannot be factored") as caught:
        run(source, tmp_path / "other", variant(damp_percent=1e-9, damp_percent_limit=2e-9), rows=token_rows(1, 4))
    assert caught.value.where.startswith("main, model.layers.0.self_attn.q_proj, ")


def started(model: Path, work: Path) -> "subprocess.Popen[str]":
    """Start the driver and return when it is about to quantize."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.gpu_crash_driver", str(model), str(work)], cwd=ROOT, stdout=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "begins\n"
    return process


def test_a_run_killed_at_any_moment_is_run_again_to_the_same_bytes(tmp_path):
    model, dice = save_larger(tmp_path / "wide", hidden=1024, intermediate=2816, blocks=8), random.Random(5)
    whole = started(model, tmp_path / "whole")
    assert whole.communicate()[0] == "0\n"

    def finished_blocks() -> int:
        return len(list((tmp_path / "killed").rglob("block-*.json")))

    for number in range(3):
        killed = started(model, tmp_path / "killed")
        # Start-up takes longer than the blocks: kill soon after the first, second and third block is finished.
        while finished_blocks() <= number and killed.poll() is None:
            time.sleep(0.001)
        time.sleep(dice.uniform(0.0, 0.05))
        killed.kill()
        killed.communicate()
    finished = finished_blocks()
    assert finished >= 3
    last = started(model, tmp_path / "killed")
    assert last.communicate()[0] == f"{finished}\n"
    assert last.returncode == 0
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def test_streamed_forward_in_float32_equals_the_cpu(tmp_path):
    source, ids = tiny(tmp_path), token_rows().ids
    logits = []
    for device in (torch.device("cpu"), CUDA):
        decoder = Decoder(source.folder, source.read, device=device, dtype=torch.float32)
        (state,) = forward(decoder, ids, rows=64)
        logits.append(decoder.logits(state).cpu())
    assert (logits[0] - logits[1]).norm() / logits[0].norm() < 1e-4


@pytest.mark.parametrize("name", ["llama", "qwen3-moe"])
def test_a_checkpoint_is_dequantized_on_the_gpu_to_the_weights_of_the_cpu(tmp_path, name):
    """By several threads on a stream of their own; experts are put together on the host."""
    source = open_folder(save_model(tmp_path / "model", name))
    v = variant(act_order="full")
    run(source, tmp_path / "work", v)
    store = open_store(source, tmp_path / "work", v, device=CUDA)
    packed: dict[str, torch.Tensor] = {}
    for block in range(source.architecture.num_blocks):
        packed |= store.read(block) or {}
    linears = {stored.removesuffix(".qweight") for stored in packed if stored.endswith(".qweight")}
    rest = {each: source.read(each) for each in source.tensors if each.removesuffix(".weight") not in linears}
    save_file(packed | rest, tmp_path / "model.safetensors")
    blocks = []
    for device, dtype in ((torch.device("cpu"), torch.float32), (CUDA, torch.float32), (CUDA, torch.float16)):
        read = CheckpointReader(tmp_path, 4, device=device, dtype=dtype)
        decoder = Decoder(
            source.folder, read, names=read.names, dequantized=read.dequantized, device=device, dtype=dtype
        )
        blocks.append([{key: tensor.cpu() for key, tensor in weights.items()} for weights in decoder.stream()])
    for on_cpu, on_gpu, half in zip(*blocks, strict=True):
        assert all(torch.equal(tensor, on_gpu[key]) for key, tensor in on_cpu.items())
        assert all(torch.equal(tensor.half(), half[key].half()) for key, tensor in on_cpu.items())


def test_measuring_takes_the_planned_memory_at_most_however_many_blocks(tmp_path):
    """Packed blocks are read sooner than they are computed: they do not gather on the GPU."""
    source = open_folder(save_larger(tmp_path / "base", hidden=2048, intermediate=5632, blocks=12))
    v, rows = variant(group_size=128), token_rows(ROWS, LENGTH, vocab_size=VOCABULARY)
    run(source, tmp_path / "work", v)
    folder = open_store(source, tmp_path / "work", v, device=CUDA).checkpoint
    shutil.copyfile(source.folder / "config.json", folder / "config.json")
    rest = {name: source.read(name) for name in source.tensors if ".proj" not in name and "_proj" not in name}
    save_file(rest, folder / "rest.safetensors")
    texts = TextSets(calibration=rows, evaluation=rows, questions=(), prompts=())
    planned = evaluation_memory(source.architecture, num_tokens=ROWS * LENGTH, seq_len=LENGTH, device_type="cuda")
    quality_of(run_base(source, texts, CUDA), run_base(source, texts, CUDA), texts)  # loads what libraries load
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    base = run_base(source, texts, CUDA)
    quality = quality_of(base, run_checkpoint(folder, 4, source, texts, CUDA), texts)
    assert math.isfinite(quality.kl_divergence)
    # All readers seldom dequantize a part of the largest linear at once, as the plan counts.
    assert 0.3 * planned.device_bytes < torch.cuda.max_memory_allocated() - before < 1.1 * planned.device_bytes


def test_a_finished_variant_is_not_run_again(tmp_path):
    source = tiny(tmp_path)
    steps: list[Event] = []
    expected = run(source, tmp_path / "work", variant(act_order="full"))
    before = digests(tmp_path / "work")
    assert run(source, tmp_path / "work", variant(act_order="full"), report=steps.append) == expected
    assert all(step.resumed for step in steps if isinstance(step, BlockDone))
    assert digests(tmp_path / "work") == before
