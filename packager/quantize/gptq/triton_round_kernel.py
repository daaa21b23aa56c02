"""The Triton kernel that rounds the columns of up to four column blocks; `triton_ops` launches it.

A program takes a few output features and all columns, because columns depend on each other and output features do not:
programs never wait for each other, and what one computes depends on no other one. The same code runs in Triton's
interpreter on a CPU.
"""

import triton
import triton.language as tl

from packager.quantize.gptq.triton_kernels import best_grid, inverse_of, round_between


@triton.jit
def _shared_inputs(
    i, Hinv_ptr, diagonal_ptr, row_scale_ptr, group_ptr, column, COLUMNS: tl.constexpr, TILE_COLUMNS: tl.constexpr
):
    """Return what all programs need for column i: Hinv[i, :] in two tiles, 1 / Hinv_ii, delta's factor, the group."""
    exists = i < COLUMNS
    row = Hinv_ptr + i * COLUMNS + column
    first = tl.load(row, mask=(column > i) & (column < COLUMNS) & exists, other=0.0)
    later = column + TILE_COLUMNS
    second = tl.load(row + TILE_COLUMNS, mask=(later > i) & (later < COLUMNS) & exists, other=0.0)
    diagonal = tl.load(diagonal_ptr + i, mask=exists, other=0.0)
    row_scale = tl.load(row_scale_ptr + i, mask=exists, other=0.0)
    group = tl.load(group_ptr + i, mask=exists, other=0)
    return first, second, diagonal, row_scale, group


@triton.jit
def _original_weights(i, original_ptr, feature, features, in_range, COLUMNS: tl.constexpr):
    weights = original_ptr + tl.cast(i, tl.int64) * features + feature
    return tl.load(weights, mask=in_range & (i < COLUMNS), other=0.0).to(tl.float32)


@triton.jit
def _round_column(
    x, scale, inverse, zero, diagonal, original, delta_scale, q_ptr, delta_high_ptr, delta_low_ptr, error_ptr, at,
    in_range, KEEP_ERRORS: tl.constexpr, MAXQ: tl.constexpr,
):  # fmt: skip
    """Store q = clamp(round(x / scale) + zero) and original - scale (q - zero) in two float16 parts; return the error.

    The error is (x - scale (q - zero)) / Hinv_ii, with `diagonal` = 1 / Hinv_ii. `delta_scale` is a power of two.
    """
    steps = round_between(x * inverse, -zero, MAXQ - zero)
    quantized = steps * scale
    error = (x - quantized) * diagonal
    delta = (original - quantized) * delta_scale
    high = delta.to(tl.float16)
    tl.store(q_ptr + at, (steps + zero).to(tl.uint8), mask=in_range)
    tl.store(delta_high_ptr + at, high, mask=in_range)
    tl.store(delta_low_ptr + at, (delta - high.to(tl.float32)).to(tl.float16), mask=in_range)
    if KEEP_ERRORS:
        tl.store(error_ptr + at, error, mask=in_range)
    return error


@triton.jit
def _tile(w_ptr, column, feature, features, in_range, COLUMNS: tl.constexpr):
    """Return the addresses, the mask and the values of some columns.

    A program keeps its columns in two tiles: the first needs no updates once all its columns are rounded.
    """
    inside = (column < COLUMNS)[:, None] & in_range[None, :]
    address = w_ptr + column[:, None].to(tl.int64) * features + feature[None, :]
    return address, inside, tl.load(address, mask=inside, other=0.0)


@triton.jit(do_not_specialize=["first", "blocks", "width"])
def round_columns_kernel(
    weight_ptr, pending_ptr, U_high_ptr, U_low_ptr, row_scale_ptr, feature_scale_ptr, Hinv_ptr, Hinv_high_ptr,
    Hinv_low_ptr, Hinv_scale_ptr, diagonal_ptr, shrink_ptr, scale_ptr, zero_ptr, group_ptr, q_ptr, delta_high_ptr,
    delta_low_ptr, error_ptr, loss_ptr, features, first, blocks, width, U_stride, weight_stride, pending_stride,
    U_batch_stride, row_scale_stride, Hinv_stride, Hinv_scale_stride, diagonal_stride, grid_stride, group_stride,
    q_stride, delta_stride, error_stride, BATCHED: tl.constexpr, COLUMNS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
    FEATURES: tl.constexpr, PRODUCT_ROWS: tl.constexpr, WHOLE_TILES: tl.constexpr, KEEP_ERRORS: tl.constexpr,
    INLINE_GROUP_SIZE: tl.constexpr, GROUP_TILE: tl.constexpr, MAXQ: tl.constexpr, SYM: tl.constexpr,
    SIGNED: tl.constexpr, STEPS: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """Quantize column blocks of a span of one linear, or those of the expert that is the program's second number.

    For each block: its pending update, its columns with that update, then each column in order. A program reads what it
    stored, after a barrier. Strides but U_stride lead from one expert to the next.
    """
    if BATCHED:
        expert = tl.program_id(1).to(tl.int64)
        weight_ptr += expert * weight_stride
        pending_ptr += expert * pending_stride
        U_high_ptr += expert * U_batch_stride
        U_low_ptr += expert * U_batch_stride
        row_scale_ptr += expert * row_scale_stride
        feature_scale_ptr += expert * features
        Hinv_ptr += expert * Hinv_stride
        Hinv_high_ptr += expert * Hinv_stride
        Hinv_low_ptr += expert * Hinv_stride
        Hinv_scale_ptr += expert * Hinv_scale_stride
        diagonal_ptr += expert * diagonal_stride
        scale_ptr += expert * grid_stride
        zero_ptr += expert * grid_stride
        group_ptr += expert * group_stride
        q_ptr += expert * q_stride
        delta_high_ptr += expert * delta_stride
        delta_low_ptr += expert * delta_stride
        error_ptr += expert * error_stride
        loss_ptr += expert * features
    for block in tl.range(0, blocks, disable_licm=True):
        begin = first + block * COLUMNS
        at = tl.cast(begin, tl.int64) * features
        row, square = tl.cast(begin, tl.int64) * U_stride, block * COLUMNS * COLUMNS
        _update_columns(
            weight_ptr + at, pending_ptr + at, U_high_ptr + row, U_low_ptr + row, U_stride, delta_high_ptr,
            delta_low_ptr, begin, feature_scale_ptr, Hinv_high_ptr + square, Hinv_low_ptr + square,
            Hinv_scale_ptr + block * COLUMNS, features, width, COLUMNS, 2 * TILE_COLUMNS, FEATURES, PRODUCT_ROWS,
            WHOLE_TILES,
        )  # fmt: skip
        _round_columns(
            pending_ptr + at, weight_ptr + at, Hinv_ptr + square, diagonal_ptr + begin, row_scale_ptr + begin,
            feature_scale_ptr, shrink_ptr, scale_ptr, zero_ptr, group_ptr + begin, q_ptr + at, delta_high_ptr + at,
            delta_low_ptr + at, error_ptr + at, loss_ptr, features, COLUMNS, TILE_COLUMNS, FEATURES, KEEP_ERRORS,
            INLINE_GROUP_SIZE, GROUP_TILE, MAXQ, SYM, SIGNED, STEPS, SMALLEST,
        )  # fmt: skip
        tl.debug_barrier()


@triton.jit
def _update_columns(
    weight_ptr, pending_ptr, U_high_ptr, U_low_ptr, U_stride, delta_high_ptr, delta_low_ptr, before,
    feature_scale_ptr, Hinv_high_ptr, Hinv_low_ptr, Hinv_scale_ptr, features, width, COLUMNS: tl.constexpr,
    TILE: tl.constexpr, FEATURES: tl.constexpr, ROWS: tl.constexpr, WHOLE_TILES: tl.constexpr,
):  # fmt: skip
    """Overwrite the pending update of a block, p, by its updated columns.

    They are w + (p + delta_< U[<, B]) Hinv[B, B], with < for the `before` columns of the span before the block. The
    block's part of delta, which is not known yet, holds the two float16 parts of the parenthesis.
    """
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    in_range = feature < features
    column = tl.arange(0, TILE)
    inside = (column < COLUMNS)[:, None] & in_range[None, :]
    at = column[:, None] * features + feature[None, :]
    update = tl.zeros([TILE, FEATURES], tl.float32)
    update = _add_split_product(
        update, U_high_ptr, U_low_ptr, U_stride, delta_high_ptr, delta_low_ptr, before, column, feature, features,
        in_range, COLUMNS, ROWS, WHOLE_TILES,
    )  # fmt: skip
    inverse_scale = inverse_of(tl.load(feature_scale_ptr + feature, mask=in_range, other=1.0))
    pending = tl.load(pending_ptr + at, mask=inside, other=0.0) + update * inverse_scale[None, :]
    pending *= tl.load(Hinv_scale_ptr + column, mask=column < COLUMNS, other=0.0)[:, None]
    # The power of two at or below the largest entry: float16 has room for 2^8 times as much.
    largest = tl.maximum(tl.max(tl.abs(pending), 0), 1e-30)
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    pending *= (inverse_of(power) * 256.0)[None, :]
    high = pending.to(tl.float16)
    of_block = tl.cast(before, tl.int64) * features
    tl.store(delta_high_ptr + of_block + at, high, mask=inside)
    tl.store(delta_low_ptr + of_block + at, (pending - high.to(tl.float32)).to(tl.float16), mask=inside)
    tl.debug_barrier()
    update = tl.zeros([TILE, FEATURES], tl.float32)
    update = _add_split_product(
        update, Hinv_high_ptr, Hinv_low_ptr, COLUMNS, delta_high_ptr + of_block, delta_low_ptr + of_block, width,
        column, feature, features, in_range, COLUMNS, ROWS, WHOLE_TILES,
    )  # fmt: skip
    w = tl.load(weight_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(pending_ptr + at, w + update * (power * 0.00390625)[None, :], mask=inside)
    tl.debug_barrier()


@triton.jit
def _add_split_product(
    total, a_high_ptr, a_low_ptr, a_stride, b_high_ptr, b_low_ptr, rows, column, feature, features, in_range,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, WHOLE_TILES: tl.constexpr,
):  # fmt: skip
    """Return total + a b - a_low b_low, of a [columns, rows] and b [rows, features] in two float16 parts each."""
    for start in tl.range(0, rows, ROWS, disable_licm=True):
        row = start + tl.arange(0, ROWS)
        in_a = (column < COLUMNS)[:, None] & (row >= 0)[None, :]
        in_b = (row >= 0)[:, None] & in_range[None, :]
        if not WHOLE_TILES:  # such masks keep loads from being wide
            in_a &= (row < rows)[None, :]
            in_b &= (row < rows)[:, None]
        at_a = column[:, None] * a_stride + row[None, :]  # a span has less than 2^31 entries
        at_b = row[:, None] * features + feature[None, :]
        a_high = tl.load(a_high_ptr + at_a, mask=in_a, other=0.0)
        a_low = tl.load(a_low_ptr + at_a, mask=in_a, other=0.0)
        b_high = tl.load(b_high_ptr + at_b, mask=in_b, other=0.0)
        b_low = tl.load(b_low_ptr + at_b, mask=in_b, other=0.0)
        total = tl.dot(a_high, b_low, total)
        total = tl.dot(a_low, b_high, total)
        total = tl.dot(a_high, b_high, total)
    return total


@triton.jit
def _round_columns(
    w_ptr, original_ptr, Hinv_ptr, diagonal_ptr, row_scale_ptr, feature_scale_ptr, shrink_ptr, scale_ptr, zero_ptr,
    group_ptr, q_ptr, delta_high_ptr, delta_low_ptr, error_ptr, loss_ptr, features, COLUMNS: tl.constexpr,
    TILE_COLUMNS: tl.constexpr, FEATURES: tl.constexpr, KEEP_ERRORS: tl.constexpr, INLINE_GROUP_SIZE: tl.constexpr,
    GROUP_TILE: tl.constexpr, MAXQ: tl.constexpr, SYM: tl.constexpr, SIGNED: tl.constexpr, STEPS: tl.constexpr,
    SMALLEST: tl.constexpr,
):  # fmt: skip
    """Quantize up to 128 columns in order: store q_i and delta_i, then w_k -= Hinv_ik e_i for every column k > i.

    e_i = (w_i - scale (q_i - zero)) / Hinv_ii; with INLINE_GROUP_SIZE, a group's first column finds the group's grid.
    """
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    in_range = feature < features
    scale = tl.zeros([FEATURES], tl.float32) + 1.0
    inverse, zero = scale, tl.zeros([FEATURES], tl.float32)
    if INLINE_GROUP_SIZE > 0:  # the first group's grid, before the tiles fill the registers
        scale, inverse, zero = _inline_grid(
            0, w_ptr, diagonal_ptr, shrink_ptr, scale_ptr, zero_ptr, group_ptr, feature, features, in_range, COLUMNS,
            INLINE_GROUP_SIZE, GROUP_TILE, MAXQ, SYM, SIGNED, STEPS, SMALLEST,
        )  # fmt: skip
    column = tl.arange(0, TILE_COLUMNS)
    first_ptr, in_first, first = _tile(w_ptr, column, feature, features, in_range, COLUMNS)
    second_ptr, in_second, second = _tile(w_ptr, column + TILE_COLUMNS, feature, features, in_range, COLUMNS)
    loss = tl.load(loss_ptr + feature, mask=in_range, other=0.0)
    feature_scale = tl.load(feature_scale_ptr + feature, mask=in_range, other=1.0)
    # Inputs of column i are prefetched: those that programs share, which are in the cache, one column ahead; the
    # original weights, which come from device memory, four columns ahead.
    prefetched = _shared_inputs(0, Hinv_ptr, diagonal_ptr, row_scale_ptr, group_ptr, column, COLUMNS, TILE_COLUMNS)
    original_0 = _original_weights(0, original_ptr, feature, features, in_range, COLUMNS)
    original_1 = _original_weights(1, original_ptr, feature, features, in_range, COLUMNS)
    original_2 = _original_weights(2, original_ptr, feature, features, in_range, COLUMNS)
    original_3 = _original_weights(3, original_ptr, feature, features, in_range, COLUMNS)
    for tile in tl.static_range(2):
        for i in range(tile * TILE_COLUMNS, TILE_COLUMNS if tile == 0 and COLUMNS > TILE_COLUMNS else COLUMNS):
            Hinv_first, Hinv_second, diagonal, row_scale, group = prefetched
            prefetched = _shared_inputs(
                i + 1, Hinv_ptr, diagonal_ptr, row_scale_ptr, group_ptr, column, COLUMNS, TILE_COLUMNS
            )
            original, original_0, original_1, original_2 = original_0, original_1, original_2, original_3
            original_3 = _original_weights(i + 4, original_ptr, feature, features, in_range, COLUMNS)
            if INLINE_GROUP_SIZE == 0:
                scale = tl.load(scale_ptr + group * features + feature, mask=in_range, other=1.0)
                zero = tl.load(zero_ptr + group * features + feature, mask=in_range, other=0.0)
                inverse = tl.math.div_rn(tl.zeros_like(scale) + 1.0, scale)
            elif (tile + 1) * TILE_COLUMNS > INLINE_GROUP_SIZE and i % INLINE_GROUP_SIZE == 0 and i > 0:
                # Through memory, so that the search reads the group's columns only: masking made 32g twice as slow.
                if tile == 0:
                    tl.store(first_ptr, first, mask=in_first)
                tl.store(second_ptr, second, mask=in_second)
                tl.debug_barrier()
                scale, inverse, zero = _inline_grid(
                    i, w_ptr, diagonal_ptr, shrink_ptr, scale_ptr, zero_ptr, group_ptr, feature, features, in_range,
                    COLUMNS, INLINE_GROUP_SIZE, GROUP_TILE, MAXQ, SYM, SIGNED, STEPS, SMALLEST,
                )  # fmt: skip
            here = first if tile == 0 else second
            x = tl.sum(tl.where((column + tile * TILE_COLUMNS == i)[:, None], here, 0.0), 0)
            error = _round_column(
                x, scale, inverse, zero, diagonal, original, row_scale * feature_scale, q_ptr, delta_high_ptr,
                delta_low_ptr, error_ptr, tl.cast(i, tl.int64) * features + feature, in_range, KEEP_ERRORS, MAXQ,
            )  # fmt: skip
            if tile == 0:
                first -= Hinv_first[:, None] * error[None, :]
            second -= Hinv_second[:, None] * error[None, :]
            loss += error * error
    tl.store(loss_ptr + feature, loss, mask=in_range)


@triton.jit
def _inline_grid(
    i, w_ptr, diagonal_ptr, shrink_ptr, scale_ptr, zero_ptr, group_ptr, feature, features, in_range,
    COLUMNS: tl.constexpr, INLINE_GROUP_SIZE: tl.constexpr, GROUP_TILE: tl.constexpr, MAXQ: tl.constexpr,
    SYM: tl.constexpr, SIGNED: tl.constexpr, STEPS: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """Find and store the grid of the group that begins at column i, read from memory; return scale, 1 / scale, zero."""
    column = i + tl.arange(0, GROUP_TILE)
    exists = column < tl.minimum(i + INLINE_GROUP_SIZE, COLUMNS)
    inside = exists[:, None] & in_range[None, :]
    w = tl.load(w_ptr + column[:, None].to(tl.int64) * features + feature[None, :], mask=inside, other=0.0)
    diagonal = tl.load(diagonal_ptr + column, mask=exists, other=0.0)
    scale, zero = best_grid(w, inside, diagonal * diagonal, shrink_ptr, MAXQ, SYM, SIGNED, STEPS, SMALLEST)
    grid = tl.load(group_ptr + i) * features + feature
    tl.store(scale_ptr + grid, scale, mask=in_range)
    tl.store(zero_ptr + grid, zero, mask=in_range)
    return scale, tl.math.div_rn(tl.zeros_like(scale) + 1.0, scale), zero
