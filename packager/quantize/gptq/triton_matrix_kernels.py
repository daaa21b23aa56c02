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


@triton.jit(do_not_specialize=["rows", "terms", "row_tiles"])
def multiply_split_kernel(
    a_high_ptr, a_low_ptr, b_high_ptr, b_low_ptr, row_scale_ptr, feature_scale_ptr, out_ptr, rows, features, terms,
    a_row_stride, a_term_stride, b_stride, a_batch_stride, b_batch_stride, row_batch_stride, row_tiles,
    BATCHED: tl.constexpr, ROW_SCALED: tl.constexpr, WHOLE: tl.constexpr, ROWS: tl.constexpr, FEATURES: tl.constexpr,
    TERMS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Store (a b - a_low b_low) r / s, with r the row's factor and s the feature's: or without them, of one part.

    A program computes one tile, of PART terms of the sum in the order of the terms, so an entry depends on its own row
    and feature alone. With several parts (not WHOLE), out is [experts, parts, rows, features], for `add_parts_kernel`.
    """
    row_tile, part = tl.program_id(0) % row_tiles, tl.program_id(0) // row_tiles
    parts = tl.num_programs(0) // row_tiles
    out_number = part
    if BATCHED:
        expert = tl.program_id(2).to(tl.int64)
        a_high_ptr += expert * a_batch_stride
        a_low_ptr += expert * a_batch_stride
        b_high_ptr += expert * b_batch_stride
        b_low_ptr += expert * b_batch_stride
        row_scale_ptr += expert * row_batch_stride
        feature_scale_ptr += expert * features
        out_number = expert * parts + part
    row = row_tile * ROWS + tl.arange(0, ROWS)
    feature = tl.program_id(1) * FEATURES + tl.arange(0, FEATURES)
    has_row, has_feature = row < rows, feature < features
    total = tl.zeros([ROWS, FEATURES], tl.float32)
    for start in range(part * PART, tl.minimum(part * PART + PART, terms), TERMS):
        term = start + tl.arange(0, TERMS)
        in_a = has_row[:, None] & (term < terms)[None, :]
        in_b = (term < terms)[:, None] & has_feature[None, :]
        at_a = row[:, None].to(tl.int64) * a_row_stride + term[None, :].to(tl.int64) * a_term_stride
        at_b = term[:, None].to(tl.int64) * b_stride + feature[None, :]
        a_high = tl.load(a_high_ptr + at_a, mask=in_a, other=0.0)
        a_low = tl.load(a_low_ptr + at_a, mask=in_a, other=0.0)
        b_high = tl.load(b_high_ptr + at_b, mask=in_b, other=0.0)
        b_low = tl.load(b_low_ptr + at_b, mask=in_b, other=0.0)
        total = tl.dot(a_high, b_low, total)
        total = tl.dot(a_low, b_high, total)
        total = tl.dot(a_high, b_high, total)
    if WHOLE:
        if ROW_SCALED:
            total *= tl.load(row_scale_ptr + row, mask=has_row, other=1.0)[:, None]
        total /= tl.load(feature_scale_ptr + feature, mask=has_feature, other=1.0)[None, :]  # a power of two: exact
    out = out_ptr + (tl.cast(out_number, tl.int64) * rows + row[:, None]) * features + feature[None, :]
    tl.store(out, total, mask=has_row[:, None] & has_feature[None, :])


@triton.jit(do_not_specialize=["rows", "parts"])
def add_parts_kernel(
    part_ptr, row_scale_ptr, feature_scale_ptr, out_ptr, rows, features, parts, row_batch_stride,
    BATCHED: tl.constexpr, ROW_SCALED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store sum_p part[p] r / s, the parts added in their order; r and s as in `multiply_split_kernel`."""
    row = tl.program_id(0).to(tl.int64)
    feature = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = feature < features
    size = tl.cast(rows, tl.int64) * features
    if BATCHED:
        expert = tl.program_id(2).to(tl.int64)
        part_ptr += expert * parts * size
        row_scale_ptr += expert * row_batch_stride
        feature_scale_ptr += expert * features
        out_ptr += expert * size
    at = row * features + feature
    total = tl.load(part_ptr + at, mask=inside, other=0.0)
    for part in range(1, parts):
        total += tl.load(part_ptr + part * size + at, mask=inside, other=0.0)
    if ROW_SCALED:
        total *= tl.load(row_scale_ptr + row)
    total /= tl.load(feature_scale_ptr + feature, mask=inside, other=1.0)
    tl.store(out_ptr + at, total, mask=inside)
