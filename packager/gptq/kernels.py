"""The Triton versions of `grid.find_grids` and `columns.round_columns`; the arguments and results are theirs.

A program takes a few output features and all columns of a group or column block, so that programs never wait for each
other. The same code runs in Triton's interpreter on a CPU.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from packager.gptq.columns import Columns, Grids
from packager.gptq.grid import SEARCH_STEPS, SMALLEST_SCALE, GridRules, search_shrinks

_TILE = 128
# Output features of a program: many where there are many, to use each load more often; few else, to use all of the GPU.
_ROUND_FEATURES, _ROUND_MANY, _ROUND_WARPS = (8, 16, 32), (0, 10000, 20000), 1
_GRID_FEATURES, _GRID_WARPS = 32, 4


@triton.jit
def _round(x):
    # Half to even, like torch.round: in float32, x + 1.5 * 2^23 has no bits left for fractions. Good for |x| < 2^22;
    # what is larger is clamped to the grid afterwards, and stays beyond it after this clamp.
    x = tl.minimum(tl.maximum(x, -1048576.0), 1048576.0)
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _float16(scale, SMALLEST: tl.constexpr):
    return tl.maximum(scale, SMALLEST).to(tl.float16).to(tl.float32)


@triton.jit
def _grid_of(low, high, MAXQ: tl.constexpr, SYM: tl.constexpr, SMALLEST: tl.constexpr):
    empty = (low == 0) & (high == 0)
    low = tl.where(empty, -1.0, low)
    high = tl.where(empty, 1.0, high)
    if SYM:
        scale = _float16(tl.math.div_rn(2 * tl.maximum(-low, high), MAXQ * 1.0), SMALLEST)
        return scale, tl.zeros_like(scale) + (MAXQ + 1) // 2
    scale = _float16(tl.math.div_rn(high - low, MAXQ * 1.0), SMALLEST)
    zero = tl.minimum(tl.maximum(_round(tl.math.div_rn(-low, scale)), 0.0), MAXQ * 1.0)
    no_zero = zero == 0
    scale = tl.where(no_zero, _float16(tl.math.div_rn(high, MAXQ - 1.0), SMALLEST), scale)
    return scale, tl.where(no_zero, 1.0, zero)


@triton.jit
def _error_of(w, inside, price, scale, inverse, zero, MAXQ: tl.constexpr):
    q = tl.minimum(tl.maximum(_round(w * inverse[None, :]) + zero[None, :], 0.0), MAXQ * 1.0)
    wrong = w - (q - zero[None, :]) * scale[None, :]
    return tl.sum(tl.where(inside, wrong * wrong * price[:, None], 0.0), 0)


@triton.jit
def _best_grid(
    w, inside, price, shrink_ptr, MAXQ: tl.constexpr, SYM: tl.constexpr, STEPS: tl.constexpr, SMALLEST: tl.constexpr
):
    """Return the grid of a group that is in registers; `price` counts if there is a search."""
    low = tl.min(tl.where(inside, tl.minimum(w, 0.0), 0.0), 0)
    high = tl.max(tl.where(inside, tl.maximum(w, 0.0), 0.0), 0)
    scale, zero = _grid_of(low, high, MAXQ, SYM, SMALLEST)
    if STEPS > 1:
        least = tl.zeros_like(low) + float("inf")
        for step in range(STEPS):
            shrink = tl.load(shrink_ptr + step)
            tried_scale, tried_zero = _grid_of(low * shrink, high * shrink, MAXQ, SYM, SMALLEST)
            inverse = tl.math.div_rn(tl.zeros_like(tried_scale) + 1.0, tried_scale)
            error = _error_of(w, inside, price, tried_scale, inverse, tried_zero, MAXQ)
            better = error < least
            least = tl.where(better, error, least)
            scale = tl.where(better, tried_scale, scale)
            zero = tl.where(better, tried_zero, zero)
    return scale, zero


@triton.jit
def _find_grids_kernel(
    w_ptr, price_ptr, shrink_ptr, scale_ptr, zero_ptr, columns, features, group_size,
    TILE: tl.constexpr, FEATURES: tl.constexpr, TILES: tl.constexpr, MAXQ: tl.constexpr, SYM: tl.constexpr,
    STEPS: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
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
            inverse = tl.math.div_rn(tl.zeros_like(tried_scale) + 1.0, tried_scale)
            error = tl.zeros([FEATURES], tl.float32)
            for tile in range(TILES):
                column = group * group_size + tile * TILE + tl.arange(0, TILE)
                inside = (column < last)[:, None] & in_range[None, :]
                w = tl.load(w_ptr + column[:, None].to(tl.int64) * features + feature[None, :], mask=inside, other=0.0)
                price = tl.load(price_ptr + column, mask=column < last, other=0.0)
                error += _error_of(w, inside, price, tried_scale, inverse, tried_zero, MAXQ)
            better = error < least
            least = tl.where(better, error, least)
            scale = tl.where(better, tried_scale, scale)
            zero = tl.where(better, tried_zero, zero)
    out = group.to(tl.int64) * features + feature
    tl.store(scale_ptr + out, scale, mask=in_range)
    tl.store(zero_ptr + out, zero, mask=in_range)


def find_grids(w: Tensor, group_size: int, rules: GridRules, price: Tensor) -> tuple[Tensor, Tensor]:
    """See `grid.find_grids`."""
    columns, features = w.shape
    w = w.contiguous()
    groups = triton.cdiv(columns, group_size)
    scales = torch.empty(groups, features, dtype=torch.float32, device=w.device)
    zeros = torch.empty_like(scales)
    tile = min(_TILE, triton.next_power_of_2(group_size))
    with torch.cuda.device_of(w):
        _find_grids_kernel[(triton.cdiv(features, _GRID_FEATURES), groups)](
            w, price.contiguous(), search_shrinks(w.device), scales, zeros, columns, features, group_size,
            TILE=tile, FEATURES=_GRID_FEATURES, TILES=triton.cdiv(min(group_size, columns), tile), MAXQ=rules.maxq,
            SYM=rules.sym, STEPS=SEARCH_STEPS if rules.scale_search else 1, SMALLEST=SMALLEST_SCALE,
            num_warps=_GRID_WARPS,
        )  # fmt: skip
    return scales, zeros


@triton.jit
def _column_inputs(
    i, Hinv_ptr, diagonal_ptr, group_ptr, original_ptr, column, feature, features, in_range, COLUMNS: tl.constexpr
):
    """Return what rounding column i needs from memory: its row of Hinv, 1 / Hinv_ii, its group and its weights."""
    exists = i < COLUMNS
    spread = tl.load(Hinv_ptr + i * COLUMNS + column, mask=(column > i) & (column < COLUMNS) & exists, other=0.0)
    diagonal = tl.load(diagonal_ptr + i, mask=exists, other=0.0)
    group = tl.load(group_ptr + i, mask=exists, other=0)
    weights = original_ptr + tl.cast(i, tl.int64) * features + feature
    original = tl.load(weights, mask=in_range & exists, other=0.0).to(tl.float32)
    return spread, diagonal, group, original


@triton.jit
def _round_columns_kernel(
    w_ptr, original_ptr, Hinv_ptr, diagonal_ptr, shrink_ptr, scale_ptr, zero_ptr, group_ptr, q_ptr, change_ptr,
    error_ptr, features, COLUMNS: tl.constexpr, TILE: tl.constexpr, FEATURES: tl.constexpr, FIND_EVERY: tl.constexpr,
    GROUP_TILE: tl.constexpr, MAXQ: tl.constexpr, SYM: tl.constexpr, STEPS: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    in_range = feature < features
    column = tl.arange(0, TILE)
    inside = (column < COLUMNS)[:, None] & in_range[None, :]
    w_tile = w_ptr + column[:, None].to(tl.int64) * features + feature[None, :]
    w = tl.load(w_tile, mask=inside, other=0.0)
    scale = tl.zeros([FEATURES], tl.float32) + 1.0
    zero = tl.zeros([FEATURES], tl.float32)
    inverse = scale
    squared_error = tl.load(error_ptr + feature, mask=in_range, other=0.0)
    # What column i needs is fetched while column i - 1 is rounded.
    coming = _column_inputs(
        0, Hinv_ptr, diagonal_ptr, group_ptr, original_ptr, column, feature, features, in_range, COLUMNS
    )
    for i in range(COLUMNS):
        spread, diagonal, group, original = coming
        coming = _column_inputs(
            i + 1, Hinv_ptr, diagonal_ptr, group_ptr, original_ptr, column, feature, features, in_range, COLUMNS
        )
        grid = group * features + feature
        row = tl.cast(i, tl.int64) * features + feature
        if FIND_EVERY == 0:
            scale = tl.load(scale_ptr + grid, mask=in_range, other=1.0)
            zero = tl.load(zero_ptr + grid, mask=in_range, other=0.0)
            inverse = tl.math.div_rn(tl.zeros_like(scale) + 1.0, scale)
        elif i % FIND_EVERY == 0:
            if FIND_EVERY < COLUMNS:  # through memory, so that the search goes over the group's columns alone
                tl.store(w_tile, w, mask=inside)
                tl.debug_barrier()
            scale, zero = _group_grid(
                w, w_ptr, diagonal_ptr, shrink_ptr, i, column, feature, features, in_range, COLUMNS, FIND_EVERY,
                GROUP_TILE, MAXQ, SYM, STEPS, SMALLEST,
            )  # fmt: skip
            inverse = tl.math.div_rn(tl.zeros_like(scale) + 1.0, scale)
            tl.store(scale_ptr + grid, scale, mask=in_range)
            tl.store(zero_ptr + grid, zero, mask=in_range)
        x = tl.sum(tl.where((column == i)[:, None], w, 0.0), 0)
        q = tl.minimum(tl.maximum(_round(x * inverse) + zero, 0.0), MAXQ * 1.0)
        quantized = (q - zero) * scale
        error = (x - quantized) * diagonal
        w -= spread[:, None] * error[None, :]
        squared_error += error * error
        tl.store(q_ptr + row, q.to(tl.uint8), mask=in_range)
        tl.store(change_ptr + row, original - quantized, mask=in_range)
    tl.store(error_ptr + feature, squared_error, mask=in_range)


@triton.jit
def _group_grid(
    w, w_ptr, diagonal_ptr, shrink_ptr, i, column, feature, features, in_range, COLUMNS: tl.constexpr,
    FIND_EVERY: tl.constexpr, GROUP_TILE: tl.constexpr, MAXQ: tl.constexpr, SYM: tl.constexpr, STEPS: tl.constexpr,
    SMALLEST: tl.constexpr,
):  # fmt: skip
    """Return the grid of the group at column i: all of `w`, or some of it, which lies in memory then."""
    if FIND_EVERY < COLUMNS:
        column = i + tl.arange(0, GROUP_TILE)
        inside = (column < tl.minimum(i + FIND_EVERY, COLUMNS))[:, None] & in_range[None, :]
        w = tl.load(w_ptr + column[:, None].to(tl.int64) * features + feature[None, :], mask=inside, other=0.0)
    else:
        inside = (column < COLUMNS)[:, None] & in_range[None, :]
    price = tl.load(diagonal_ptr + column, mask=column < COLUMNS, other=0.0)
    return _best_grid(w, inside, price * price, shrink_ptr, MAXQ, SYM, STEPS, SMALLEST)


def round_columns(
    w: Tensor, original: Tensor, Hinv: Tensor, diagonal: Tensor, grids: Grids, rules: GridRules, find_every: int,
    result: Columns,
) -> None:  # fmt: skip
    """See `columns.round_columns`; every tensor must be contiguous."""
    columns, features = w.shape
    tile = max(size for size, many in zip(_ROUND_FEATURES, _ROUND_MANY, strict=True) if features >= many)
    with torch.cuda.device_of(w):
        _round_columns_kernel[(triton.cdiv(features, tile),)](
            w, original, Hinv, diagonal, search_shrinks(w.device), grids.scales, grids.zeros, grids.groups, result.q,
            result.change, result.squared_errors, features, COLUMNS=columns, TILE=_TILE, FEATURES=tile,
            FIND_EVERY=find_every, GROUP_TILE=triton.next_power_of_2(max(find_every, 1)), MAXQ=rules.maxq,
            SYM=rules.sym, STEPS=SEARCH_STEPS if rules.scale_search else 1, SMALLEST=SMALLEST_SCALE,
            num_warps=_ROUND_WARPS,
        )  # fmt: skip
