"""The Triton kernels that find grids and round columns; `triton_ops` launches them.

A program takes a few output features and all columns of a group or column block, because columns depend on each other
and output features do not: programs never wait for each other. The same code runs in Triton's interpreter on a CPU.
"""

import triton
import triton.language as tl


@triton.jit
def round_between(x, low, high):
    """Return clamp(round(x), low, high), half to even like torch.round.

    In float32, x + 1.5 * 2^23 has no bits left for fractions, which holds for |x| < 2^22. `low` and `high` are small
    whole numbers, so clamping before rounding equals clamping after.
    """
    x = tl.minimum(tl.maximum(x, low), high)
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _float16(scale, SMALLEST: tl.constexpr):
    """Return float32 scales rounded to positive float16 values."""
    return tl.maximum(scale, SMALLEST).to(tl.float16).to(tl.float32)


@triton.jit
def _residual(x, y, c):
    """Return x - y c, exact where y is next to x / c: products of c, at most 12 bits, and 12 bits of y have 24 bits."""
    upper = (y.to(tl.int32, bitcast=True) & -4096).to(tl.float32, bitcast=True)
    return (x - upper * c) - (y - upper) * c


@triton.jit
def reciprocal(scale):
    """Return 1 / scale rounded to nearest, for float16 values: as div_rn, without its branches.

    The quotient y is off by 2 units in the last place at most. Corrected, it is off by 2^-42 of itself, and no
    reciprocal of 11 bits is within 2^-35 of the middle of two float32 numbers.
    """
    y = 1.0 / scale
    return y + y * _residual(1.0, y, scale)


@triton.jit
def _divided(x, DIVISOR: tl.constexpr):
    """Return x / DIVISOR, a whole number of at most 8 bits, rounded to nearest where the result is a normal number.

    The addition of 0 keeps the compiler from computing `y - upper` of the unrounded product.
    """
    y = tl.fma(x, 1.0 / DIVISOR, 0.0)
    return tl.where(x < 1e30, y + _residual(x, y, DIVISOR * 1.0) * (1.0 / DIVISOR), y)


@triton.jit
def _grid_of(low, high, MAXQ: tl.constexpr, SYM: tl.constexpr, SMALLEST: tl.constexpr):
    """Return scale and zero of the grid that spans [low, high].

    sym: scale = 2 max(-low, high) / maxq, zero = (maxq + 1) / 2; else scale = (high - low) / maxq, zero =
    round(-low / scale); where that zero is 0, scale = high / (maxq - 1) and zero = 1.
    """
    empty = (low == 0) & (high == 0)
    low = tl.where(empty, -1.0, low)
    high = tl.where(empty, 1.0, high)
    if SYM:
        scale = _float16(_divided(2 * tl.maximum(-low, high), MAXQ), SMALLEST)
        return scale, tl.zeros_like(scale) + (MAXQ + 1) // 2
    scale = _float16(tl.math.div_rn(high - low, MAXQ * 1.0), SMALLEST)
    zero = round_between(tl.math.div_rn(-low, scale), 0.0, MAXQ * 1.0)
    no_zero = zero == 0
    scale = tl.where(no_zero, _float16(tl.math.div_rn(high, MAXQ - 1.0), SMALLEST), scale)
    return scale, tl.where(no_zero, 1.0, zero)


@triton.jit
def _negative_scale(low, high, MAXQ: tl.constexpr, SMALLEST: tl.constexpr):
    """Return the negative scale of a symmetric grid: a step more above zero than below, see `grid.py`."""
    size = tl.maximum(-low, high)
    return -_float16(tl.where(high > -low, size * (2.0 / (MAXQ + 1)), _divided(2 * size, MAXQ)), SMALLEST)


@triton.jit
def _tried_grids(
    low, high, shrink, MAXQ: tl.constexpr, SYM: tl.constexpr, SIGNED: tl.constexpr, SMALLEST: tl.constexpr
):
    """Return scale and zero for a shrunken range, and the negative scale if it is tried too, else the scale again."""
    low, high = low * shrink, high * shrink
    scale, zero = _grid_of(low, high, MAXQ, SYM, SMALLEST)
    negative = scale
    if SIGNED:
        negative = _negative_scale(low, high, MAXQ, SMALLEST)
    return scale, zero, negative


@triton.jit
def _error_of(w, column_weight, scale, zero, MAXQ: tl.constexpr):
    """Return sum_i column_weight_i (w_i - scale (q_i - zero))^2; w and column_weight are 0 beyond the group."""
    steps = round_between(w * reciprocal(scale)[None, :], -zero[None, :], MAXQ - zero[None, :])
    wrong = w - steps * scale[None, :]
    return tl.sum(wrong * wrong * column_weight[:, None], 0)


@triton.jit
def _best_grid(
    w, inside, column_weight, shrink_ptr, MAXQ: tl.constexpr, SYM: tl.constexpr, SIGNED: tl.constexpr,
    STEPS: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """Return the grid of a group that is in registers: of all shrunken ranges the one with the least weighted error."""
    low = tl.min(tl.where(inside, tl.minimum(w, 0.0), 0.0), 0)
    high = tl.max(tl.where(inside, tl.maximum(w, 0.0), 0.0), 0)
    scale, zero = _grid_of(low, high, MAXQ, SYM, SMALLEST)
    if STEPS > 1:
        least = tl.zeros_like(low) + float("inf")
        # The next range's grids are computed beside the errors of this one's, which keep the units busy.
        next_scale, next_zero, next_negative = _tried_grids(low, high, tl.load(shrink_ptr), MAXQ, SYM, SIGNED, SMALLEST)
        for step in range(STEPS):
            tried_scale, tried_zero, negative = next_scale, next_zero, next_negative
            shrink = tl.load(shrink_ptr + tl.minimum(step + 1, STEPS - 1))
            next_scale, next_zero, next_negative = _tried_grids(low, high, shrink, MAXQ, SYM, SIGNED, SMALLEST)
            error = _error_of(w, column_weight, tried_scale, tried_zero, MAXQ)
            better = error < least
            least = tl.where(better, error, least)
            scale = tl.where(better, tried_scale, scale)
            zero = tl.where(better, tried_zero, zero)
            if SIGNED:  # of the same range, with the same zero
                error = _error_of(w, column_weight, negative, tried_zero, MAXQ)
                scale = tl.where(error < least, negative, scale)
                least = tl.minimum(least, error)
    return scale, zero


@triton.jit
def find_grids_kernel(
    w_ptr, column_weight_ptr, shrink_ptr, scale_ptr, zero_ptr, columns, features, group_size, BATCHED: tl.constexpr,
    TILE: tl.constexpr, FEATURES: tl.constexpr, TILES: tl.constexpr, MAXQ: tl.constexpr, SYM: tl.constexpr,
    SIGNED: tl.constexpr, STEPS: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """Store each group's grid; a group longer than TILE columns is read tile by tile, once per tried range."""
    if BATCHED:
        expert = tl.program_id(2).to(tl.int64)
        w_ptr += expert * columns * features
        column_weight_ptr += expert * columns
        scale_ptr += expert * tl.num_programs(1) * features
        zero_ptr += expert * tl.num_programs(1) * features
    group = tl.program_id(1)
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    in_range = feature < features
    last = tl.minimum(group * group_size + group_size, columns)
    low = tl.zeros([FEATURES], tl.float32)
    high = tl.zeros([FEATURES], tl.float32)
    for tile in range(TILES):
        column = group * group_size + tile * TILE + tl.arange(0, TILE)
        inside = (column < last)[:, None] & in_range[None, :]
        w = tl.load(w_ptr + column[:, None].to(tl.int64) * features + feature[None, :], mask=inside, other=0.0)
        low = tl.minimum(low, tl.min(w, 0))
        high = tl.maximum(high, tl.max(w, 0))
    scale, zero = _grid_of(low, high, MAXQ, SYM, SMALLEST)
    if STEPS > 1:
        least = tl.zeros([FEATURES], tl.float32) + float("inf")
        for step in range(STEPS):
            shrink = tl.load(shrink_ptr + step)
            tried_scale, tried_zero = _grid_of(low * shrink, high * shrink, MAXQ, SYM, SMALLEST)
            error = tl.zeros([FEATURES], tl.float32)
            if SIGNED:
                negative = _negative_scale(low * shrink, high * shrink, MAXQ, SMALLEST)
                negative_error = tl.zeros([FEATURES], tl.float32)
            for tile in range(TILES):
                column = group * group_size + tile * TILE + tl.arange(0, TILE)
                inside = (column < last)[:, None] & in_range[None, :]
                w = tl.load(w_ptr + column[:, None].to(tl.int64) * features + feature[None, :], mask=inside, other=0.0)
                column_weight = tl.load(column_weight_ptr + column, mask=column < last, other=0.0)
                error += _error_of(w, column_weight, tried_scale, tried_zero, MAXQ)
                if SIGNED:
                    negative_error += _error_of(w, column_weight, negative, tried_zero, MAXQ)
            better = error < least
            least = tl.where(better, error, least)
            scale = tl.where(better, tried_scale, scale)
            zero = tl.where(better, tried_zero, zero)
            if SIGNED:
                scale = tl.where(negative_error < least, negative, scale)
                least = tl.minimum(least, negative_error)
    out = group.to(tl.int64) * features + feature
    tl.store(scale_ptr + out, scale, mask=in_range)
    tl.store(zero_ptr + out, zero, mask=in_range)


@triton.jit
def _shared_inputs(i, Hinv_ptr, diagonal_ptr, group_ptr, column, COLUMNS: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    """Return the inputs to column i that all programs share: Hinv[i, :] in two tiles, 1 / Hinv_ii, and the group."""
    exists = i < COLUMNS
    row = Hinv_ptr + i * COLUMNS + column
    first = tl.load(row, mask=(column > i) & (column < COLUMNS) & exists, other=0.0)
    later = column + TILE_COLUMNS
    second = tl.load(row + TILE_COLUMNS, mask=(later > i) & (later < COLUMNS) & exists, other=0.0)
    diagonal = tl.load(diagonal_ptr + i, mask=exists, other=0.0)
    group = tl.load(group_ptr + i, mask=exists, other=0)
    return first, second, diagonal, group


@triton.jit
def _original_weights(i, original_ptr, feature, features, in_range, COLUMNS: tl.constexpr):
    weights = original_ptr + tl.cast(i, tl.int64) * features + feature
    return tl.load(weights, mask=in_range & (i < COLUMNS), other=0.0).to(tl.float32)


@triton.jit
def _round_column(
    i, x, scale, inverse, zero, diagonal, original, q_ptr, delta_ptr, feature, features, in_range, MAXQ: tl.constexpr
):
    """Store q = clamp(round(x / scale) + zero) and delta = original - scale (q - zero); return the error.

    The error is (x - scale (q - zero)) / Hinv_ii, with `diagonal` = 1 / Hinv_ii.
    """
    steps = round_between(x * inverse, -zero, MAXQ - zero)
    quantized = steps * scale
    row = tl.cast(i, tl.int64) * features + feature
    tl.store(q_ptr + row, (steps + zero).to(tl.uint8), mask=in_range)
    tl.store(delta_ptr + row, original - quantized, mask=in_range)
    return (x - quantized) * diagonal


@triton.jit
def _tile(w_ptr, column, feature, features, in_range, COLUMNS: tl.constexpr):
    """Return the addresses, the mask and the values of some columns.

    A program keeps its columns in two tiles: the first needs no updates once all its columns are rounded.
    """
    inside = (column < COLUMNS)[:, None] & in_range[None, :]
    address = w_ptr + column[:, None].to(tl.int64) * features + feature[None, :]
    return address, inside, tl.load(address, mask=inside, other=0.0)


@triton.jit
def round_columns_kernel(
    w_ptr, original_ptr, Hinv_ptr, diagonal_ptr, shrink_ptr, scale_ptr, zero_ptr, group_ptr, q_ptr, delta_ptr,
    error_ptr, features, w_stride, original_stride, diagonal_stride, grid_stride, group_stride, q_stride, delta_stride,
    BATCHED: tl.constexpr, COLUMNS: tl.constexpr, TILE_COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
    INLINE_GROUP_SIZE: tl.constexpr, GROUP_TILE: tl.constexpr, MAXQ: tl.constexpr, SYM: tl.constexpr,
    SIGNED: tl.constexpr, STEPS: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """Quantize the columns of one linear, or those of the expert that is the program's second number.

    Strides lead from one expert to the next.
    """
    if BATCHED:
        expert = tl.program_id(1).to(tl.int64)
        w_ptr += expert * w_stride
        original_ptr += expert * original_stride
        Hinv_ptr += expert * COLUMNS * COLUMNS
        diagonal_ptr += expert * diagonal_stride
        scale_ptr += expert * grid_stride
        zero_ptr += expert * grid_stride
        group_ptr += expert * group_stride
        q_ptr += expert * q_stride
        delta_ptr += expert * delta_stride
        error_ptr += expert * features
    _round_columns(
        w_ptr, original_ptr, Hinv_ptr, diagonal_ptr, shrink_ptr, scale_ptr, zero_ptr, group_ptr, q_ptr, delta_ptr,
        error_ptr, features, COLUMNS, TILE_COLUMNS, FEATURES, INLINE_GROUP_SIZE, GROUP_TILE, MAXQ, SYM, SIGNED, STEPS,
        SMALLEST,
    )  # fmt: skip


@triton.jit
def _round_columns(
    w_ptr, original_ptr, Hinv_ptr, diagonal_ptr, shrink_ptr, scale_ptr, zero_ptr, group_ptr, q_ptr, delta_ptr,
    error_ptr, features, COLUMNS: tl.constexpr, TILE_COLUMNS: tl.constexpr, FEATURES: tl.constexpr,
    INLINE_GROUP_SIZE: tl.constexpr, GROUP_TILE: tl.constexpr, MAXQ: tl.constexpr, SYM: tl.constexpr,
    SIGNED: tl.constexpr, STEPS: tl.constexpr, SMALLEST: tl.constexpr,
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
    squared_error = tl.load(error_ptr + feature, mask=in_range, other=0.0)
    # Inputs of column i are prefetched: those that programs share, which are in the cache, one column ahead; the
    # original weights, which come from device memory, four columns ahead.
    prefetched = _shared_inputs(0, Hinv_ptr, diagonal_ptr, group_ptr, column, COLUMNS, TILE_COLUMNS)
    original_0 = _original_weights(0, original_ptr, feature, features, in_range, COLUMNS)
    original_1 = _original_weights(1, original_ptr, feature, features, in_range, COLUMNS)
    original_2 = _original_weights(2, original_ptr, feature, features, in_range, COLUMNS)
    original_3 = _original_weights(3, original_ptr, feature, features, in_range, COLUMNS)
    for tile in tl.static_range(2):
        for i in range(tile * TILE_COLUMNS, TILE_COLUMNS if tile == 0 and COLUMNS > TILE_COLUMNS else COLUMNS):
            Hinv_first, Hinv_second, diagonal, group = prefetched
            prefetched = _shared_inputs(i + 1, Hinv_ptr, diagonal_ptr, group_ptr, column, COLUMNS, TILE_COLUMNS)
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
                i, x, scale, inverse, zero, diagonal, original, q_ptr, delta_ptr, feature, features, in_range, MAXQ
            )
            if tile == 0:
                first -= Hinv_first[:, None] * error[None, :]
            second -= Hinv_second[:, None] * error[None, :]
            squared_error += error * error
    tl.store(error_ptr + feature, squared_error, mask=in_range)


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
    scale, zero = _best_grid(w, inside, diagonal * diagonal, shrink_ptr, MAXQ, SYM, SIGNED, STEPS, SMALLEST)
    grid = tl.load(group_ptr + i) * features + feature
    tl.store(scale_ptr + grid, scale, mask=in_range)
    tl.store(zero_ptr + grid, zero, mask=in_range)
    return scale, tl.math.div_rn(tl.zeros_like(scale) + 1.0, scale), zero
