"""Divisions of the kernels that search scales: they round as IEEE division does, from every start of a GPU."""

import os
import subprocess
import sys

import pytest
import torch
from torch import Tensor

triton = pytest.importorskip("triton", reason="Triton is not made for this system")
import triton.language as tl  # noqa: E402

from packager.quantize.gptq import triton_kernels as kernels  # noqa: E402 - imports Triton
from tests.kernel_devices import KERNEL_DEVICES, kernel_device  # noqa: E402

# The interpreter computes with numpy, which warns of infinity minus infinity.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")
BLOCK = 1024
# As many units in the last place as a GPU's approximate quotient may be off.
OFF = (-2, -1, 0, 1, 2)


@pytest.fixture(params=KERNEL_DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return kernel_device(request.param)


@triton.jit
def corrected_kernel(x_ptr, y_ptr, divisor_ptr, out_ptr, BLOCK: tl.constexpr):
    """Correct quotients y of x once, as `reciprocal` does."""
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y, divisor = tl.load(x_ptr + place), tl.load(y_ptr + place), tl.load(divisor_ptr + place)
    tl.store(out_ptr + place, y + y * kernels._residual(x, y, divisor))


@triton.jit
def reciprocal_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + place, kernels.reciprocal(tl.load(x_ptr + place)))


@triton.jit
def divided_kernel(x_ptr, out_ptr, DIVISOR: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + place, kernels._divided(tl.load(x_ptr + place), DIVISOR))


def compiled_division() -> str:
    """Return the code that a GPU of compute capability 9.0 gets for `_divided`; no GPU is needed."""
    source = triton.compiler.ASTSource(
        fn=divided_kernel,
        signature={"x_ptr": "*fp32", "out_ptr": "*fp32", "DIVISOR": "constexpr", "BLOCK": "constexpr"},
        constexprs={(2,): 15, (3,): 128},
    )
    code: str = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32)).asm["ptx"]
    return code


@pytest.mark.slow
def test_no_product_is_fused_into_the_difference_that_must_be_exact() -> None:
    """On a GPU a multiplication and a subtraction become one operation, of the product before it is rounded."""
    command = "from tests.test_gptq_division import compiled_division; print(compiled_division())"
    environ = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    made = subprocess.run([sys.executable, "-c", command], env=environ, capture_output=True, text=True, check=True)
    instructions = [line.split()[0] for line in made.stdout.splitlines() if line.strip()]
    assert instructions.count("sub.f32") == 1
    assert "mul.f32" not in instructions


def padded(values: Tensor) -> Tensor:
    return torch.nn.functional.pad(values, (0, -len(values) % BLOCK), value=1.0)


def all_scales() -> Tensor:
    """Every positive float16 value, as float32; the kernels' negative scales are these with the other sign."""
    return torch.arange(1, 0x7C00, dtype=torch.int16).view(torch.float16).float()


def test_every_float16_has_the_reciprocal_of_ieee_division(device: torch.device) -> None:
    for sign in (1, -1):
        scales = padded(all_scales()) * sign
        found = torch.empty_like(scales, device=device)
        reciprocal_kernel[(len(scales) // BLOCK,)](scales.to(device), found, BLOCK=BLOCK)
        assert torch.equal(found.cpu(), (1 / scales.double()).float())


@pytest.mark.parametrize("off", OFF)
def test_a_reciprocal_that_is_off_becomes_the_nearest(device: torch.device, off: int) -> None:
    scales = padded(all_scales())
    exact = (1 / scales.double()).float()
    start = (exact.view(torch.int32) + off).view(torch.float32)
    found = torch.empty_like(scales, device=device)
    corrected_kernel[(len(scales) // BLOCK,)](
        torch.ones_like(scales, device=device), start.to(device), scales.to(device), found, BLOCK=BLOCK
    )
    assert torch.equal(found.cpu(), exact)


@pytest.mark.parametrize("divisor", [3, 7, 15, 255])
def test_a_range_is_divided_as_ieee_division_does(device: torch.device, divisor: int) -> None:
    generator = torch.Generator().manual_seed(divisor)
    sizes = torch.randn(2**15, generator=generator).abs() * 10 ** torch.linspace(-6, 8, 2**15)
    found = torch.empty_like(sizes, device=device)
    divided_kernel[(len(sizes) // BLOCK,)](sizes.to(device), found, DIVISOR=divisor, BLOCK=BLOCK)
    assert torch.equal(found.cpu(), (sizes.double() / divisor).float())
    beyond = torch.tensor([float("inf"), 0.0, 3e38]).repeat(BLOCK)[:BLOCK]
    found = torch.empty_like(beyond, device=device)
    divided_kernel[(1,)](beyond.to(device), found, DIVISOR=divisor, BLOCK=BLOCK)
    assert torch.allclose(found.cpu(), beyond / divisor, rtol=1e-6)
