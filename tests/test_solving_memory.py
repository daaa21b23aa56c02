"""What solving linears takes, from their Hessian to their solution, against the plan of it."""

import gc
import weakref
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from packager.quantize import block as block_module
from packager.quantize import ranks as ranks_module
from packager.quantize.activations import Activations
from packager.quantize.block import BlockJob, _BlockSolver
from packager.quantize.gptq import hessian as hessian_module
from packager.quantize.gptq.cholesky import SPLIT_WIDTH
from packager.quantize.gptq.hessian import Factor, Hessian, hessian_of_sum
from packager.quantize.gptq.panels import panels_bytes, shift_rows
from packager.quantize.gptq.solve import solve
from packager.quantize.gptq.target_correction import InputShift
from packager.quantize.ranks import alone
from packager.quantize.solving_memory import solving_bytes
from packager.quantize.workload import _columns_of_group
from packager.variant import Variant
from tests.test_evaluate import PeakBytes
from tests.tiny_models import variant

GROUP = ("linear",)
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "static": {"act_order": "static"},
    "full": {"act_order": "full"},
    "refined": {"refine": True},
    "static, refined": {"act_order": "static", "refine": True},
    "refined, whole rows": {"group_size": -1, "refine": True},
    "wide groups": {"group_size": 512},
    "corrected": {"target_correction": 0.5},
    "static, corrected": {"act_order": "static", "target_correction": 0.5},
    "static, refined, corrected": {"act_order": "static", "refine": True, "target_correction": 0.5},
}
# Where the Hessian takes most, and where the weights do; a correction keeps S of the first, and W S of the others.
SHAPES = {"wide": (896, 256), "tall": (384, 896)}


def made(fields: dict[str, Any]) -> Variant:
    return variant(**{"group_size": 128, **fields})


class _Linear(nn.Module):
    def __init__(self, in_features: int, out_features: int, device: str) -> None:
        super().__init__()
        dtype = torch.float16 if device == "cuda" else torch.float32
        self.linear = nn.Linear(in_features, out_features, bias=False, device=device, dtype=dtype).requires_grad_(False)


def solver_of(block: nn.Module, device: str, fields: dict[str, Any]) -> _BlockSolver:
    states = Activations([torch.zeros(1, device=device)], "device")
    job = BlockJob(
        variant=made(fields), index=0, groups=(GROUP,), names={"linear": "linear"},
        experts={}, states=states, contexts=(), rank=alone(torch.device(device)), suspended=0, last=True,
        on_outputs_needed=lambda: None,
    )  # fmt: skip
    return _BlockSolver(block, job, lambda _: None, checked=device == "cpu")


@torch.no_grad()
def peak_of(device: str, shape: tuple[int, int], fields: dict[str, Any], measured: Callable[..., int]) -> int:
    """Return the most bytes at once beside the weights, of which the sums of the inputs are counted."""
    in_features, out_features = shape
    block = _Linear(in_features, out_features, device)
    solver = solver_of(block, device, fields)
    hessian = Hessian(in_features, torch.device(device))
    shift = InputShift([block.linear.weight]) if "target_correction" in fields else None
    torch.manual_seed(0)
    for _ in range(4):
        x = torch.randn(in_features, in_features, device=device, dtype=block.linear.weight.dtype)
        hessian.add(x)
        if shift is not None:
            shift.add(x, x + 0.1 * torch.randn_like(x))
    del x
    sums = panels_bytes(in_features)
    if shift is not None:
        sums += 4 * shift_rows(in_features, out_features) * in_features
    return measured(lambda: solver._solve(GROUP, hessian, shift), sums)


def on_cpu(solve: Callable[[], None], sums: int) -> int:
    gc.collect()
    with PeakBytes() as counter:
        solve()
    # What existed before was counted when an operation met it: the sums, and the weights.
    most: int = counter.peak
    return most


def on_cuda(solve: Callable[[], None], sums: int) -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    solve()
    most: int = torch.cuda.max_memory_allocated()
    return most - before + sums


def planned(device: str, shape: tuple[int, int], fields: dict[str, Any]) -> int:
    refined = _columns_of_group(made(fields)) if "refine" in fields else 0
    return solving_bytes(*shape, device, refined_group=refined, corrected="target_correction" in fields)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "name"), [*product(["wide"], VARIANTS), ("tall", "plain"), ("tall", "static, refined, corrected")]
)
def test_solving_takes_what_is_planned_on_a_cpu(shape: str, name: str) -> None:
    fields, (in_features, out_features) = VARIANTS[name], SHAPES[shape]
    found = peak_of("cpu", SHAPES[shape], fields, on_cpu) - 4 * in_features * out_features
    assert 0.55 < found / planned("cpu", SHAPES[shape], fields) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("shape", "least"), [((12288, 3072), 0.9), ((4096, 4096), 0.85), ((4096, 16384), 0.65)])
def test_solving_takes_what_is_planned_on_a_gpu(shape: tuple[int, int], least: float, name: str) -> None:
    """Where the Hessian takes most, it decides; else a plan counts what static order or refinement alone need."""
    fields = VARIANTS[name]
    peak_of("cuda", (SPLIT_WIDTH, 128), fields, on_cuda)  # libraries take their workspaces, kernels are compiled
    found = peak_of("cuda", shape, fields, on_cuda)
    # cuSOLVER's workspace comes and goes with a factorisation.
    assert least < found / planned("cuda", shape, fields) < 1.01


def test_groups_of_whole_rows_take_more_while_they_are_refined() -> None:
    """Bytes of the deltas' memory, integers twice, errors, their changes, quantized columns, and two parts of these."""
    n, m = 65536, 16384
    square, most = 4 * n**2, solving_bytes(n, m, "cuda", refined_group=2**31)
    beside = 4 * 5 * 512 * m + (3 * 4 * 128 + 8 * 512) * n
    assert most == 2 * square + (4 + 1 + 1 + 4 + 4 + 4 + 2 + 2) * n * m + beside
    assert solving_bytes(n, m, "cuda", refined_group=128) == 2 * square + (13 + 4) * n * m + beside
    assert solving_bytes(n, m, "cuda", refined_group=8192) == solving_bytes(n, m, "cuda", refined_group=128)


def test_a_second_damping_takes_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A factorisation that failed is gone when the next one is made."""
    factor, tries = hessian_module.factorize, list[bool]()

    def fails_first(*arguments: Any, **options: Any) -> Factor:
        tries.append(True)
        found = factor(*arguments, **options)
        return replace(found, succeeded=torch.tensor(len(tries) > 1))

    once = peak_of("cpu", (512, 64), VARIANTS["plain"], on_cpu)
    monkeypatch.setattr(hessian_module, "factorize", fails_first)
    assert peak_of("cpu", (512, 64), VARIANTS["plain"], on_cpu) == once
    assert len(tries) == 2


@pytest.mark.parametrize("name", ["plain", "static, corrected"])
def test_a_hessian_is_freed_when_it_is_factored(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Of a wide linear it takes more than everything else together."""
    hessians: list[weakref.ref[Tensor]] = []
    while_solving: list[Tensor | None] = []

    def seen(*arguments: Any) -> Tensor:
        hessians.append(weakref.ref(found := hessian_of_sum(*arguments)))
        return found

    def solved(*arguments: Any, **options: Any) -> Any:
        while_solving.append(hessians[-1]())
        return solve(*arguments, **options)

    monkeypatch.setattr(ranks_module, "hessian_of_sum", seen)
    monkeypatch.setattr(block_module, "solve", solved)
    peak_of("cpu", (256, 128), VARIANTS[name], on_cpu)
    assert while_solving == [None]
