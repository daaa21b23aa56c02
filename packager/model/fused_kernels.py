"""Triton kernels for the elementwise parts of a decoder block, with the roundings of the eager code they replace.

Arithmetic is float32; wherever eager PyTorch stores an intermediate tensor, its value is rounded to the tensors' dtype
here too. So rotary embedding and multiplication give the bits of the eager code; SiLU differs only where `exp` does,
RMSNorm only where the order of its sum does. No kernel has a backward pass.

With TRITON_INTERPRET=1 set before the first import, the kernels run on the CPU, slowly, for tests.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import libdevice

# Elements in a program's tile: 16 to 32 of them per thread keep loads 16 bytes wide without spilling.
_TILE = 4096


@triton.jit
def _rounded(x, dtype: tl.constexpr):
    """Return float32 x rounded to the nearest value of dtype, ties to even, as float32."""
    if _INTERPRETED and dtype == tl.bfloat16:  # the interpreter would cut the low bits off
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        result = bits.to(tl.float32, bitcast=True)
    else:
        result = x.to(dtype).to(tl.float32)
    return result


@triton.jit
def _rms_norm_kernel(
    x_ptr,
    weight_ptr,
    out_ptr,
    rows,
    inner,
    outer_stride,
    inner_stride,
    eps,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Store out = weight * rounded(x / sqrt(mean(x^2) + eps)), row by row; see `rms_norm`."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    inside = (row < rows)[:, None] & (column < WIDTH)[None, :]
    begin = (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride
    x = tl.load(x_ptr + begin[:, None] + column[None, :], mask=inside, other=0.0).to(tl.float32)
    variance = tl.sum(x * x, 1) / WIDTH
    normed = _rounded(x * tl.rsqrt(variance + eps)[:, None], dtype)
    weight = tl.load(weight_ptr + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    out = out_ptr + row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(out, _rounded(weight[None, :] * normed, dtype), mask=inside)


@triton.jit
def _rotary_kernel(
    x_ptr,
    cos_ptr,
    sin_ptr,
    heads,
    seq_len,
    batch_stride,
    head_stride,
    token_stride,
    cos_batch_stride,
    cos_token_stride,
    sin_batch_stride,
    sin_token_stride,
    HALF: tl.constexpr,
    COLUMNS: tl.constexpr,
    HEADS: tl.constexpr,
):
    """Store x1, x2 = x1 cos1 - x2 sin1, x2 cos2 + x1 sin2, the two halves of each head; see `rotate_in_place`."""
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    batch = (tl.program_id(0) // seq_len).to(tl.int64)
    token = (tl.program_id(0) % seq_len).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, COLUMNS)
    real = column < HALF
    cos_ptrs = cos_ptr + batch * cos_batch_stride + token * cos_token_stride + column
    sin_ptrs = sin_ptr + batch * sin_batch_stride + token * sin_token_stride + column
    cos1 = tl.load(cos_ptrs, mask=real, other=0.0).to(tl.float32)[None, :]
    cos2 = tl.load(cos_ptrs + HALF, mask=real, other=0.0).to(tl.float32)[None, :]
    sin1 = tl.load(sin_ptrs, mask=real, other=0.0).to(tl.float32)[None, :]
    sin2 = tl.load(sin_ptrs + HALF, mask=real, other=0.0).to(tl.float32)[None, :]
    begin = batch * batch_stride + token * token_stride + head.to(tl.int64) * head_stride
    x_ptrs = x_ptr + begin[:, None] + column[None, :]
    inside = (head < heads)[:, None] & real[None, :]
    x1 = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(x_ptrs + HALF, mask=inside, other=0.0).to(tl.float32)
    # Several threads hold copies of a small tile: all must have read before one writes.
    tl.debug_barrier()
    first = _rounded(x1 * cos1, dtype) - _rounded(x2 * sin1, dtype)
    second = _rounded(x2 * cos2, dtype) + _rounded(x1 * sin2, dtype)
    tl.store(x_ptrs, _rounded(first, dtype), mask=inside)
    tl.store(x_ptrs + HALF, _rounded(second, dtype), mask=inside)


@triton.jit
def _silu_multiply_kernel(gate_ptr, up_ptr, size, TILE: tl.constexpr):
    """Store gate = rounded(gate / (1 + exp(-gate))) * up; see `silu_multiply_in_place`."""
    dtype: tl.constexpr = gate_ptr.dtype.element_ty
    offset = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside = offset < size
    gate = tl.load(gate_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + offset, mask=inside, other=0.0).to(tl.float32)
    # CUDA's own expf and division, as in PyTorch's kernel; Triton's are approximations.
    power = tl.exp(-gate) if _INTERPRETED else libdevice.exp(-gate)
    silu = _rounded(tl.div_rn(gate, 1.0 + power), dtype)
    tl.store(gate_ptr + offset, _rounded(silu * up, dtype), mask=inside)


# Kernels read this constant when they are compiled, so it may be defined after them.
_INTERPRETED = tl.constexpr(not isinstance(_silu_multiply_kernel, triton.JITFunction))


def interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter, which takes CPU tensors too."""
    return bool(_INTERPRETED.value)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return weight * (x / sqrt(mean(x^2) + eps)), rounded to the dtype before and after the weight.

    Args:
        x: [..., width], float16 or bfloat16, the last dimension dense, the others of any stride.
        weight: [width], dense, of x's dtype and device.
        eps: added to the mean of squares.

    Returns:
        A new, contiguous tensor of x's shape.
    """
    width = x.shape[-1]
    # Two strides reach every row of a contiguous tensor or of a slice of a projection; reshape copies any other tensor.
    source = x.reshape(-1, x.shape[-2] if x.dim() > 1 else 1, width)
    rows = source.shape[0] * source.shape[1]
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    columns = triton.next_power_of_2(width)
    rows_per_program = max(1, _TILE // columns)
    with torch.cuda.device_of(x):
        _rms_norm_kernel[(triton.cdiv(rows, rows_per_program),)](
            source,
            weight,
            out,
            rows,
            source.shape[1],
            source.stride(0),
            source.stride(1),
            eps,
            WIDTH=width,
            COLUMNS=columns,
            ROWS=rows_per_program,
            num_warps=max(4, min(16, columns // 1024)),
        )
    return out


def rotate_in_place(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Overwrite x with x * cos + rotate_half(x) * sin, each product and the sum rounded to the dtype.

    Args:
        x: [batch, heads, seq_len, head_dim], float16 or bfloat16, no two elements sharing memory, the last
            dimension dense, the others of any stride.
        cos: [1 or batch, seq_len, head_dim], the last dimension dense, of x's dtype and device.
        sin: like cos.
    """
    batch, heads, seq_len, head_dim = x.shape
    half = head_dim // 2
    columns = triton.next_power_of_2(half)
    heads_per_program = min(16, triton.next_power_of_2(heads))
    with torch.cuda.device_of(x):
        _rotary_kernel[(batch * seq_len, triton.cdiv(heads, heads_per_program))](
            x,
            cos,
            sin,
            heads,
            seq_len,
            x.stride(0),
            x.stride(1),
            x.stride(2),
            cos.stride(0) if cos.shape[0] > 1 else 0,
            cos.stride(1),
            sin.stride(0) if sin.shape[0] > 1 else 0,
            sin.stride(1),
            HALF=half,
            COLUMNS=columns,
            HEADS=heads_per_program,
            num_warps=max(1, min(4, heads_per_program * columns // 256)),
            enable_fp_fusion=False,  # the compiler would make one fma of a product and the sum, rounded once
        )


def silu_multiply_in_place(gate: Tensor, up: Tensor) -> None:
    """Overwrite gate with silu(gate) * up, rounded to the dtype before and after the multiplication.

    Args:
        gate: float16 or bfloat16, contiguous.
        up: contiguous, of gate's shape, dtype and device.
    """
    with torch.cuda.device_of(gate):
        _silu_multiply_kernel[(triton.cdiv(gate.numel(), _TILE),)](gate, up, gate.numel(), TILE=_TILE, num_warps=8)
