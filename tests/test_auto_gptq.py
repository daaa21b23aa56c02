"""AutoGPTQ itself, on the CPU, in the loader's environment: an oracle for our solver, and a check of our script.

Run by `nox -s tests-release`, because the environment must exist. AutoGPTQ needs no GPU for its arithmetic, only for
`torch.cuda.synchronize` and the like, which auto_gptq_on_cpu.py and auto_gptq_oracle.py replace.
"""

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from packager.inputs.base_model import SourceModel
from packager.model.packing import unpack, unpack_zeros
from packager.prove.environments import RuntimeContext, ensure_environment
from packager.prove.probes import probe_environ
from packager.quantize.engines import auto_gptq
from packager.quantize.engines.protocol import EngineResult
from packager.quantize.gptq.grid import GridRules
from packager.quantize.gptq.hessian import Hessian, factorize
from packager.quantize.gptq.order import ColumnOrder
from packager.quantize.gptq.solve import Solution, solve
from packager.quantize.job import QuantizeJob
from packager.quantize.sweep import quantize
from packager.variant import ActOrder, Variant
from tests.sources import open_folder
from tests.tiny_models import open_store, save_model, token_rows, variant

pytestmark = pytest.mark.release

HERE = Path(__file__).parent
CPU = torch.device("cpu")
ENVIRON = {"PATH": os.defpath, "OMP_NUM_THREADS": "2"}
IN_FEATURES, OUT_FEATURES = 256, 96


@pytest.fixture(scope="module")
def cache(pytestconfig: pytest.Config) -> Path:
    return Path(pytestconfig.getoption("--cache-folder")).expanduser()


@pytest.fixture(scope="module")
def python(cache: Path) -> Path:
    return ensure_environment(auto_gptq.SPEC, RuntimeContext(cache=cache, scratch=cache, environ=os.environ, log=print))


# the solver


@dataclass(frozen=True)
class Case:
    """A linear with its inputs; group sizes such that AutoGPTQ and the paper take every grid at the same moment.

    When a group starts inside AutoGPTQ's block of 128 columns, it takes the scale from the columns as they stood at the
    block's start, we from the columns as updated since: so groups are whole blocks here, or static.
    """

    bits: int
    group_size: int
    act_order: ActOrder
    sym: bool
    seed: int

    def inputs(self) -> tuple[Tensor, Tensor]:
        """Return weight [out, in] and x [rows, seq_len, in], its columns of different size and correlated."""
        dice = torch.Generator().manual_seed(self.seed)
        mix = torch.eye(IN_FEATURES) + 0.1 * torch.randn(IN_FEATURES, IN_FEATURES, generator=dice)
        size = torch.rand(IN_FEATURES, generator=dice) * 3 + 0.1
        x = torch.randn(14, 40, IN_FEATURES, generator=dice) * size @ mix
        return torch.randn(OUT_FEATURES, IN_FEATURES, generator=dice).mul(0.02).half().float(), x


_ORDERS: tuple[tuple[int, ActOrder], ...] = ((128, "none"), (128, "full"), (-1, "none"), (-1, "full"), (32, "static"))
CASES = [
    Case(bits, size, act_order, sym, seed)
    for seed, (bits, (size, act_order), sym) in enumerate(product((2, 3, 4, 8), _ORDERS, (True, False)))
]


@pytest.fixture(scope="module")
def solved(python: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Case, dict[str, Tensor]]:
    """AutoGPTQ's results of all cases, made in one process."""
    folder = tmp_path_factory.mktemp("oracle")
    jobs: list[dict[str, Any]] = []
    for case in CASES:
        weight, x = case.inputs()
        save_file({"weight": weight, "x": x}, folder / f"input-{case.seed}.safetensors")
        places = {name: str(folder / f"{name}-{case.seed}.safetensors") for name in ("input", "output")}
        order = {"desc_act": case.act_order != "none", "static_groups": case.act_order == "static"}
        jobs.append({**vars(case), **order, **places, "damp_percent": 0.01})
    (folder / "cases.json").write_text(json.dumps(jobs))
    command = [str(python), "-I", str(HERE / "auto_gptq_oracle.py"), str(folder / "cases.json")]
    done = subprocess.run(
        command,
        env=probe_environ(python, ENVIRON, "cpu", folder),
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {case: load_file(job["output"]) for case, job in zip(CASES, jobs, strict=True)}


def our_solution(case: Case) -> Solution:
    weight, x = case.inputs()
    hessian = Hessian(IN_FEATURES, CPU)
    hessian.add(x)
    order = ColumnOrder(act_order=case.act_order, group_size=case.group_size)
    factor = factorize(hessian.matrix(), order, damp_percent=0.01)
    rules = GridRules(bits=case.bits, sym=case.sym, scale_search=False)
    return solve([weight], factor, rules)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_our_solver_agrees_with_autogptq(solved: Mapping[Case, Mapping[str, Tensor]], case: Case) -> None:
    """Measured with these and 8 more: the same integers in all but one, there 99.93 %; losses to 2e-6, there 3e-4."""
    theirs, ours = solved[case], our_solution(case)
    assert torch.equal(theirs["linear.g_idx"], ours.g_idx)
    assert torch.equal(unpack_zeros(theirs["linear.qzeros"], case.bits), ours.zeros)
    same_scale = (theirs["linear.scales"] == ours.scales).all(0)
    assert same_scale.double().mean() >= 0.97
    assert torch.allclose(theirs["linear.scales"], ours.scales, rtol=2e-3)
    q = unpack(theirs["linear.qweight"], case.bits)
    assert (q == ours.q)[:, same_scale].double().mean() >= 0.995
    assert float(ours.losses.mean()) == pytest.approx(float(theirs["loss"]), rel=1e-3)


# the engine


@dataclass(frozen=True, kw_only=True)
class Both:
    """One variant made by both engines from the same rows."""

    native: Mapping[str, Tensor]
    reference: Mapping[str, Tensor]
    ratios: Tensor
    made: EngineResult


def dequantized(tensors: Mapping[str, Tensor], linear: str, bits: int) -> Tensor:
    """Return the weight [out, in] that packed tensors represent."""
    q, zeros = unpack(tensors[f"{linear}.qweight"], bits), unpack_zeros(tensors[f"{linear}.qzeros"], bits)
    groups = tensors[f"{linear}.g_idx"].long()
    return ((q.float() - zeros.float()[groups]) * tensors[f"{linear}.scales"].float()[groups]).T


def both(source: SourceModel, folder: Path, cache: Path, v: Variant) -> Both:
    foreign = replace(v, engine="auto-gptq")
    rows, tensors = token_rows(), []
    native = open_store(source, folder / "native", v)
    records = quantize(QuantizeJob(source=source, rows=rows, stores={v: native}, devices=(CPU,)), lambda _: None)
    # Unconfined: the script runs another one, which a confined process would not see.
    context = RuntimeContext(cache=cache, scratch=folder / "work", environ=ENVIRON, log=print, confinement="none")
    engine = auto_gptq.AutoGptq(context, replace(auto_gptq.SPEC, script=HERE / "auto_gptq_on_cpu.py"), 300.0)
    reference = open_store(source, folder / "reference", foreign)
    job = QuantizeJob(source=source, rows=rows, stores={foreign: reference}, devices=(CPU,))
    made = engine.quantize(job, lambda _: None)
    for store in (native, reference):
        blocks = [store.read(block) or {} for block in range(source.architecture.num_blocks)]
        tensors.append({name: tensor for block in blocks for name, tensor in block.items()})
    pairs = zip(made.records["main"], records["main"], strict=True)
    ratios = torch.tensor([theirs.loss / ours.loss for theirs, ours in pairs])
    return Both(native=tensors[0], reference=tensors[1], ratios=ratios, made=made)


@pytest.mark.parametrize(
    ("model", "fields"),
    [
        # rotary embedding, grouped queries and biases as our own forward has them, or later losses would differ
        ("qwen2", {"act_order": "full", "group_size": 16}),
        ("mistral-sliding", {"bits": 3, "sym": False, "group_size": 32}),
        ("llama-tied", {"bits": 8, "group_size": -1, "act_order": "full"}),
        ("llama", {"bits": 2, "act_order": "static", "true_sequential": False}),
    ],
)
def test_both_engines_make_equivalent_variants(cache: Path, tmp_path: Path, model: str, fields: dict[str, Any]) -> None:
    """Measured: losses 0.93 to 1.10 of ours linear by linear, 0.99 to 1.01 in the mean of a model's."""
    source = open_folder(save_model(tmp_path / "model", model))
    v = variant(**fields)
    result = both(source, tmp_path, cache, v)
    assert result.made.made_with == "AutoGPTQ 0.7.1"
    assert result.made.versions["transformers"].startswith("4.4")
    assert 0.8 < float(result.ratios.min()) <= float(result.ratios.max()) < 1.25
    assert float(result.ratios.mean()) == pytest.approx(1.0, abs=0.05)
    for linear in source.architecture.linears:
        original = source.read(f"{linear.name}.weight").float()
        reference, native = (
            (dequantized(made, linear.name, v.bits) - original).norm() for made in (result.reference, result.native)
        )
        assert float(reference) == pytest.approx(float(native), rel=0.15)
        if linear.bias:
            assert torch.equal(result.reference[f"{linear.name}.bias"], result.native[f"{linear.name}.bias"])


def test_a_group_of_positive_weights_does_not_spoil_its_neighbours(cache: Path, tmp_path: Path) -> None:
    """AutoGPTQ alone writes a zero of 0 as -1, whose bits run over the seven zeros beside it."""
    source = open_folder(save_model(tmp_path / "model", "llama"))
    name = "model.layers.0.self_attn.q_proj"
    tensors = load_file(tmp_path / "model" / "model.safetensors")
    tensors[f"{name}.weight"][3, :32] = tensors[f"{name}.weight"][3, :32].abs() + 0.01
    save_file(tensors, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    source = open_folder(tmp_path / "model")
    result = both(source, tmp_path, cache, variant(sym=False, act_order="none"))
    zeros = unpack_zeros(result.reference[f"{name}.qzeros"], 4)
    assert int(zeros[0, 3]) == 1
    assert torch.equal(zeros[0], unpack_zeros(result.native[f"{name}.qzeros"], 4)[0])
    original = source.read(f"{name}.weight").float()
    assert (dequantized(result.reference, name, 4) - original).norm() / original.norm() < 0.15
