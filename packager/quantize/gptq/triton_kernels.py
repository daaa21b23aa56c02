"""The Triton kernel that finds grids, and what that of the rounding shares with it; `triton_ops` launches them.

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
def inverse_of(scale):
    """Return 1 / scale, which is exact for powers of two."""
    return tl.math.div_rn(tl.zeros_like(scale) + 1.0, scale)


@triton.jit
def _float16(scale, SMALLEST: tl.constexpr):
    """Return float32 scales rounded to positive float16 values."""
    return tl.maximum(scale, SMALLEST).to(tl.float16).to(tl.float32)


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
        scale = _float16(tl.math.div_rn(2 * tl.maximum(-low, high), MAXQ * 1.0), SMALLEST)
        return scale, tl.zeros_like(scale) + (MAXQ + 1) // 2
    scale = _float16(tl.math.div_rn(high - low, MAXQ * 1.0), SMALLEST)
    zero = round_between(tl.math.div_rn(-low, scale), 0.0, MAXQ * 1.0)
    no_zero = zero == 0
    scale = tl.where(no_zero, _float16(tl.math.div_rn(high, MAXQ - 1.0), SMALLEST), scale)
    return scale, tl.where(no_zero, 1.0, zero)


@triton.jit
def _negative_scale(low, high, MAXQ: tl.constexpr, SMALLEST: tl.constexpr):
    """Return the negative scale of a symmetric grid: a step more above zero than below, see `grid.py`."""
    half = MAXQ * 0.5
    return -_float16(tl.math.div_rn(tl.maximum(-low, high), tl.where(high > -low, half + 0.5, half)), SMALLEST)


@triton.jit
def _error_of(w, column_weight, scale, zero, MAXQ: tl.constexpr):
    """Return sum_i column_weight_i (w_i - scale (q_i - zero))^2; w and column_weight are 0 beyond the group."""
    inverse = tl.math.div_rn(tl.zeros_like(scale) + 1.0, scale)
    steps = round_between(w * inverse[None, :], -zero[None, :], MAXQ - zero[None, :])
    wrong = w - steps * scale[None, :]
    return tl.sum(wrong * wrong * column_weight[:, None], 0)


@triton.jit
def best_grid(
    w, inside, column_weight, shrink_ptr, MAXQ: tl.constexpr, SYM: tl.constexpr, SIGNED: tl.constexpr,
    STEPS: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """Return the grid of a group that is in registers: of all shrunken ranges the one with the least weighted error."""
    low = tl.min(tl.where(inside, tl.minimum(w, 0.0), 0.0), 0)
    high = tl.max(tl.where(inside, tl.maximum(w, 0.0), 0.0), 0)
    scale, zero = _grid_of(low, high, MAXQ, SYM, SMALLEST)
    if STEPS > 1:
        least = tl.zeros_like(low) + float("inf")
        for step in range(STEPS):
            shrink = tl.load(shrink_ptr + step)
            tried_scale, tried_zero = _grid_of(low * shrink, high * shrink, MAXQ, SYM, SMALLEST)
            error = _error_of(w, column_weight, tried_scale, tried_zero, MAXQ)
            better = error < least
            least = tl.where(better, error, least)
            scale = tl.where(better, tried_scale, scale)
            zero = tl.where(better, tried_zero, zero)
            if SIGNED:  # of the same range, with the same zero
                tried_scale = _negative_scale(low * shrink, high * shrink, MAXQ, SMALLEST)
                error = _error_of(w, column_weight, tried_scale, tried_zero, MAXQ)
                scale = tl.where(error < least, tried_scale, scale)
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
