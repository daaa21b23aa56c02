"""Kernels are compiled ahead: exactly those that solving will launch, each once."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from packager.quantize.gptq.grid import GridRules
from packager.quantize.gptq.hessian import factorize
from packager.quantize.gptq.order import ColumnOrder
from packager.quantize.gptq.solve import solve
from packager.quantize.gptq.torch_ops import TorchOps
from packager.variant import ActOrder
from tests.samples import sampled
from tests.test_gptq import hessian, inputs

pytest.importorskip("triton", reason="Triton is not made for this system")
from packager.quantize.gptq import compile_kernels as compile_kernels_module
from packager.quantize.gptq import triton_kernels
from packager.quantize.gptq.compile_kernels import KernelShape, compile_for_shapes
from packager.quantize.gptq.triton_ops import TritonOps, features_per_program

CPU = torch.device("cpu")
RULES = GridRules(bits=4, sym=True, scale_search=False)


def ordered(act_order: ActOrder, group_size: int) -> ColumnOrder:
    return ColumnOrder(act_order=act_order, group_size=group_size)


def key_of(arguments: tuple[Any, ...]) -> tuple[object, ...]:
    """Return what distinguishes the kernels of two calls of `round_columns`."""
    w, _, Hinv, _, _, rules, inline_group_size, _ = arguments
    assert Hinv.shape == (w.shape[0], w.shape[0])
    return w.shape[0], features_per_program(w.shape[1]), w.shape[1] % 16 == 0, rules, inline_group_size


@pytest.mark.parametrize("act_order", ["full", "static", "group"])
@pytest.mark.parametrize("group_size", sampled([16, 48, 128, 200, -1], 48, -1))
def test_the_kernels_launched_ahead_are_those_that_solving_launches(monkeypatch, group_size, act_order):
    solved, ahead_of_it = [], []

    class Recording(TorchOps):
        def round_columns(self, *arguments: Any) -> None:
            solved.append(key_of(arguments))
            super().round_columns(*arguments)

    n, widths = 536, (24, 32)
    order = ordered(act_order, group_size)
    factor = factorize(hessian(inputs(n, 1)), order, damp_percent=0.01)
    for width in widths:
        weights = [torch.randn(width, n)]
        solve(weights, factor, RULES, ops=Recording())
    monkeypatch.setattr(TritonOps, "round_columns", lambda _, *arguments: ahead_of_it.append(key_of(arguments)))
    shapes = [KernelShape(in_features=n, out_features=width, rules=RULES, order=order) for width in widths]
    assert compile_for_shapes(shapes, CPU, torch.float16) == len(ahead_of_it)
    assert sorted(map(repr, ahead_of_it)) == sorted({repr(key) for key in solved})


@pytest.mark.parametrize("act_order", ["full", "static"])
@pytest.mark.parametrize("group_size", [48, 200])
def test_the_kernels_of_the_refinement_are_launched_ahead_too(monkeypatch, group_size, act_order):
    def key(arguments: tuple[Any, ...]) -> tuple[object, ...]:
        G, H, _, _, rules, inline_group_size, _, _ = arguments
        assert H.shape == (G.shape[0], G.shape[0])
        return G.shape[0], rules, inline_group_size

    launched, ahead_of_it = [], []

    class Recording(TorchOps):
        def refine_columns(self, *arguments: Any) -> None:
            launched.append(key(arguments))
            super().refine_columns(*arguments)

    n, width, order = 536, 24, ordered(act_order, group_size)
    factor = factorize(hessian(inputs(n, 1)), order, damp_percent=0.01)
    solve([torch.randn(width, n)], factor, RULES, refined=(True,), ops=Recording())
    monkeypatch.setattr(TritonOps, "round_columns", lambda *_: None)
    monkeypatch.setattr(TritonOps, "refine_columns", lambda _, *arguments: ahead_of_it.append(key(arguments)))
    for refine in (False, True):
        shape = KernelShape(in_features=n, out_features=width, rules=RULES, order=order, refine=refine)
        compile_for_shapes([shape], CPU, torch.float16)
        assert sorted(map(repr, ahead_of_it)) == (sorted({repr(each) for each in launched}) if refine else [])


def test_four_variants_of_a_13b_take_six_kernels(monkeypatch):
    """Two widths of programs, three group sizes."""
    launched = []
    monkeypatch.setattr(compile_kernels_module, "_launch_once", lambda launch, **_: launched.append(launch))
    linears = ((5120, 15360), (5120, 5120), (5120, 27648), (13824, 5120))
    shapes = [
        KernelShape(in_features=rows, out_features=width, rules=RULES, order=ordered("full", size))
        for size in (128, 32, 64, 128)
        for rows, width in linears
    ]
    assert compile_for_shapes(shapes, CPU, torch.float16) == 6
    assert {(launch.columns, launch.inline_group_size) for launch in launched} == {(128, 128), (128, 32), (128, 64)}


EVERY_CASE: tuple[tuple[int, ActOrder], ...] = ((32, "none"), (32, "static"), (-1, "none"))


@pytest.mark.parametrize("cases", [EVERY_CASE[:1], pytest.param(EVERY_CASE, marks=pytest.mark.interpreter)], ids=len)
def test_the_compiled_launches_run(monkeypatch, cases):
    # Triton's interpreter serves one thread.
    monkeypatch.setattr("packager.quantize.gptq.compile_kernels.os.cpu_count", lambda: 1)
    rules = replace(RULES, scale_search=True)
    shapes = [
        KernelShape(in_features=72, out_features=8, rules=rules, order=ordered(act_order, size), refine=True)
        for size, act_order in cases
    ]
    assert compile_for_shapes(shapes, CPU, torch.float16) == len(cases)


@pytest.mark.gpu
def test_nothing_is_left_to_compile(monkeypatch):
    rules = replace(RULES, scale_search=True)
    shape = KernelShape(in_features=288, out_features=48, rules=rules, order=ordered("full", 96))
    weight = (torch.randn(48, 288) * 0.02).half().cuda()
    assert compile_for_shapes([shape], torch.device("cuda"), torch.float16) == 1
    kernel = type(triton_kernels.round_columns_kernel)
    compiled: list[object] = []
    compile_one = kernel._do_compile
    monkeypatch.setattr(kernel, "_do_compile", lambda self, *rest: compiled.append(self) or compile_one(self, *rest))
    factor = factorize(hessian(inputs(288, 1)).cuda(), shape.order, damp_percent=0.01)
    solve([weight], factor, shape.rules)
    assert triton_kernels.round_columns_kernel not in compiled
    assert compiled  # the others are still compiled when they are needed: the check can fail
