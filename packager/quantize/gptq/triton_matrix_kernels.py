"""The Triton kernels that split, permute, dequantize and multiply whole matrices; `triton_ops` launches them."""

import triton
import triton.language as tl


@triton.jit
def split_kernel(
    x_ptr, row_ptr, column_ptr, high_ptr, low_ptr, columns, x_stride, out_stride, x_batch_stride, row_batch_stride,
    out_batch_stride, BATCHED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store high = float16(x r c) and low = float16(x r c - high), r the row's factor and c the column's."""
    if BATCHED:
        expert = tl.program_id(2).to(tl.int64)
        x_ptr += expert * x_batch_stride
        row_ptr += expert * row_batch_stride
        column_ptr += expert * columns
        high_ptr += expert * out_batch_stride
        low_ptr += expert * out_batch_stride
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < columns
    x = tl.load(x_ptr + row * x_stride + column, mask=inside, other=0.0)
    if ROWS:
        x *= tl.load(row_ptr + row)
    if COLUMNS:
        x *= tl.load(column_ptr + column, mask=inside, other=0.0)
    high = x.to(tl.float16)
    out = row * out_stride + column
    tl.store(high_ptr + out, high, mask=inside)
    tl.store(low_ptr + out, (x - high.to(tl.float32)).to(tl.float16), mask=inside)


@triton.jit
def permute_columns_kernel(
    weight_ptr, dead_ptr, inverse_perm_ptr, out_ptr, columns, features, weight_stride, out_stride,
    BATCHED: tl.constexpr, PERMUTED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store out[inverse_perm[i], j] = weight[j, i], 0 for dead columns i."""
    if BATCHED:
        expert = tl.program_id(2).to(tl.int64)
        weight_ptr += expert * features * weight_stride
        dead_ptr += expert * columns
        inverse_perm_ptr += expert * columns
        out_ptr += expert * columns * out_stride
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    feature = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (feature < features)[:, None] & (column < columns)[None, :]
    alive = tl.load(dead_ptr + column, mask=column < columns, other=1) == 0
    weight = weight_ptr + feature[:, None].to(tl.int64) * weight_stride + column[None, :]
    w = tl.load(weight, mask=inside & alive[None, :], other=0.0)
    row = column.to(tl.int64)
    if PERMUTED:
        row = tl.load(inverse_perm_ptr + column, mask=column < columns, other=0)
    out = out_ptr + row[:, None] * out_stride + feature[None, :]
    tl.store(out, tl.trans(w), mask=(column < columns)[:, None] & (feature < features)[None, :])


@triton.jit
def dequantize_kernel(
    weight_ptr, q_ptr, zero_ptr, scale_ptr, group_ptr, columns, features, weight_stride, q_stride, zero_stride,
    scale_stride, weight_batch_stride, q_batch_stride, grid_batch_stride, BATCHED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store weight[j, i] = scale[g_i, j] (q[i, j] - zero[g_i, j]), g_i the group of column i."""
    if BATCHED:
        expert = tl.program_id(2).to(tl.int64)
        weight_ptr += expert * weight_batch_stride
        q_ptr += expert * q_batch_stride
        zero_ptr += expert * grid_batch_stride
        scale_ptr += expert * grid_batch_stride
        group_ptr += expert * columns
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    feature = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (column < columns)[:, None] & (feature < features)[None, :]
    group = tl.load(group_ptr + column, mask=column < columns, other=0).to(tl.int64)[:, None]
    q = tl.load(q_ptr + column[:, None].to(tl.int64) * q_stride + feature[None, :], mask=inside, other=0)
    zero = tl.load(zero_ptr + group * zero_stride + feature[None, :], mask=inside, other=0)
    scale = tl.load(scale_ptr + group * scale_stride + feature[None, :], mask=inside, other=0.0)
    w = (q.to(tl.float32) - zero.to(tl.float32)) * scale.to(tl.float32)
    out = weight_ptr + feature[:, None].to(tl.int64) * weight_stride + column[None, :]
    tl.store(out, tl.trans(w).to(weight_ptr.dtype.element_ty), mask=tl.trans(inside))


@triton.jit
def add_routed_products_kernel(
    total_ptr, x_ptr, row_ptr, bound_ptr, columns, x_stride, first_expert, panel, GATHERED: tl.constexpr,
    TILE: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Add x_e^T x_e to total[e] for each expert e: a program computes one tile, from inputs that it reads by index.

    Tiles left of the beginning of their panel of rows are left out: H is symmetric.
    """
    first, second = tl.program_id(0) * TILE, tl.program_id(1) * TILE
    if second + TILE > first // panel * panel:
        expert = tl.program_id(2).to(tl.int64)
        begin = tl.load(bound_ptr + first_expert + expert)
        end = tl.load(bound_ptr + first_expert + expert + 1)
        left = first + tl.arange(0, TILE)
        right = second + tl.arange(0, TILE)
        sums = tl.zeros([TILE, TILE], tl.float32)
        for start in range(begin, end, TOKENS):
            pair = start + tl.arange(0, TOKENS)
            inside = pair < end
            row = pair
            if GATHERED:
                row = tl.load(row_ptr + pair, mask=inside, other=0)
            x = x_ptr + row[:, None].to(tl.int64) * x_stride
            a = tl.load(x + left[None, :], mask=inside[:, None] & (left < columns)[None, :], other=0.0)
            b = tl.load(x + right[None, :], mask=inside[:, None] & (right < columns)[None, :], other=0.0)
            sums = tl.dot(tl.trans(a), b, sums, input_precision="ieee")
        out = total_ptr + (expert * columns + left[:, None]) * columns + right[None, :]
        shown = (left < columns)[:, None] & (right < columns)[None, :]
        tl.store(out, tl.load(out, mask=shown, other=0.0) + sums, mask=shown)
