"""The Triton versions of what `grid`, `columns`, `copies` and `halves` do; the arguments and results are theirs.

Where columns depend on each other, a program takes a few output features and all columns of a group or column block,
so that programs never wait for each other. The same code runs in Triton's interpreter on a CPU.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from packager.quantize.gptq.columns import Columns, Grids
from packager.quantize.gptq.grid import SEARCH_STEPS, SMALLEST_SCALE, GridRules, search_shrinks

_TILE = 128
# Output features of a program: many where there are many, to use each load more often; few else, to use all of the GPU.
_ROUND_FEATURES, _ROUND_MANY, _ROUND_WARPS = (16, 32), (0, 20000), 1
_GRID_FEATURES, _GRID_WARPS = 32, 4
_SPLIT_TILE, _COPY_TILE = 2048, 64


@triton.jit
def _round_between(x, low, high):
    # Half to even, like torch.round: in float32, x + 1.5 * 2^23 has no bits left for fractions. Good for |x| < 2^22;
    # `low` and `high` are small whole numbers, so clamping before is clamping after.
    x = tl.minimum(tl.maximum(x, low), high)
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
    zero = _round_between(tl.math.div_rn(-low, scale), 0.0, MAXQ * 1.0)
    no_zero = zero == 0
    scale = tl.where(no_zero, _float16(tl.math.div_rn(high, MAXQ - 1.0), SMALLEST), scale)
    return scale, tl.where(no_zero, 1.0, zero)


@triton.jit
def _error_of(w, price, scale, zero, MAXQ: tl.constexpr):
    """Return the weighted squared error of rounding; columns that do not exist have weights and price 0."""
    inverse = tl.math.div_rn(tl.zeros_like(scale) + 1.0, scale)
    steps = _round_between(w * inverse[None, :], -zero[None, :], MAXQ - zero[None, :])
    wrong = w - steps * scale[None, :]
    return tl.sum(wrong * wrong * price[:, None], 0)


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
            error = _error_of(w, price, tried_scale, tried_zero, MAXQ)
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
            error = tl.zeros([FEATURES], tl.float32)
            for tile in range(TILES):
                column = group * group_size + tile * TILE + tl.arange(0, TILE)
                inside = (column < last)[:, None] & in_range[None, :]
                w = tl.load(w_ptr + column[:, None].to(tl.int64) * features + feature[None, :], mask=inside, other=0.0)
                price = tl.load(price_ptr + column, mask=column < last, other=0.0)
                error += _error_of(w, price, tried_scale, tried_zero, MAXQ)
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
def _shared_inputs(i, Hinv_ptr, diagonal_ptr, group_ptr, column, COLUMNS: tl.constexpr, HALF: tl.constexpr):
    """Return what every program reads to round column i: its row of Hinv, in halves, 1 / Hinv_ii, and its group."""
    exists = i < COLUMNS
    row = Hinv_ptr + i * COLUMNS + column
    first = tl.load(row, mask=(column > i) & (column < COLUMNS) & exists, other=0.0)
    second = tl.load(row + HALF, mask=(column + HALF > i) & (column + HALF < COLUMNS) & exists, other=0.0)
    diagonal = tl.load(diagonal_ptr + i, mask=exists, other=0.0)
    group = tl.load(group_ptr + i, mask=exists, other=0)
    return first, second, diagonal, group


@triton.jit
def _original_weights(i, original_ptr, feature, features, in_range, COLUMNS: tl.constexpr):
    weights = original_ptr + tl.cast(i, tl.int64) * features + feature
    return tl.load(weights, mask=in_range & (i < COLUMNS), other=0.0).to(tl.float32)


@triton.jit
def _round_column(
    i, x, scale, inverse, zero, diagonal, original, q_ptr, change_ptr, feature, features, in_range, MAXQ: tl.constexpr
):
    """Round column i, write it down and return its error."""
    steps = _round_between(x * inverse, -zero, MAXQ - zero)
    quantized = steps * scale
    row = tl.cast(i, tl.int64) * features + feature
    tl.store(q_ptr + row, (steps + zero).to(tl.uint8), mask=in_range)
    tl.store(change_ptr + row, original - quantized, mask=in_range)
    return (x - quantized) * diagonal


@triton.jit
def _round_columns_kernel(
    w_ptr, original_ptr, Hinv_ptr, diagonal_ptr, shrink_ptr, scale_ptr, zero_ptr, group_ptr, q_ptr, change_ptr,
    error_ptr, features, COLUMNS: tl.constexpr, HALF: tl.constexpr, FEATURES: tl.constexpr, FIND_EVERY: tl.constexpr,
    GROUP_TILE: tl.constexpr, MAXQ: tl.constexpr, SYM: tl.constexpr, STEPS: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    in_range = feature < features
    scale = tl.zeros([FEATURES], tl.float32) + 1.0
    inverse, zero = scale, tl.zeros([FEATURES], tl.float32)
    if FIND_EVERY > 0:  # the first group's grid, while there is room in the registers
        scale, inverse, zero = _group_grid(
            0, w_ptr, diagonal_ptr, shrink_ptr, scale_ptr, zero_ptr, group_ptr, feature, features, in_range, COLUMNS,
            FIND_EVERY, GROUP_TILE, MAXQ, SYM, STEPS, SMALLEST,
        )  # fmt: skip
    # Two halves: those columns that are done need no more updates.
    column = tl.arange(0, HALF)
    first_ptr = w_ptr + column[:, None].to(tl.int64) * features + feature[None, :]
    second_ptr = first_ptr + HALF * tl.cast(features, tl.int64)
    in_first = (column < COLUMNS)[:, None] & in_range[None, :]
    in_second = (column + HALF < COLUMNS)[:, None] & in_range[None, :]
    first = tl.load(first_ptr, mask=in_first, other=0.0)
    second = tl.load(second_ptr, mask=in_second, other=0.0)
    squared_error = tl.load(error_ptr + feature, mask=in_range, other=0.0)
    # What column i needs is fetched while earlier ones are rounded: what programs share, and so is near, while column
    # i - 1 is; the weights, which come from afar, while i - 4 is.
    coming = _shared_inputs(0, Hinv_ptr, diagonal_ptr, group_ptr, column, COLUMNS, HALF)
    original_0 = _original_weights(0, original_ptr, feature, features, in_range, COLUMNS)
    original_1 = _original_weights(1, original_ptr, feature, features, in_range, COLUMNS)
    original_2 = _original_weights(2, original_ptr, feature, features, in_range, COLUMNS)
    original_3 = _original_weights(3, original_ptr, feature, features, in_range, COLUMNS)
    for half in tl.static_range(2):
        for i in range(half * HALF, HALF if half == 0 and COLUMNS > HALF else COLUMNS):
            to_first, to_second, diagonal, group = coming
            coming = _shared_inputs(i + 1, Hinv_ptr, diagonal_ptr, group_ptr, column, COLUMNS, HALF)
            original, original_0, original_1, original_2 = original_0, original_1, original_2, original_3
            original_3 = _original_weights(i + 4, original_ptr, feature, features, in_range, COLUMNS)
            if FIND_EVERY == 0:
                scale = tl.load(scale_ptr + group * features + feature, mask=in_range, other=1.0)
                zero = tl.load(zero_ptr + group * features + feature, mask=in_range, other=0.0)
                inverse = tl.math.div_rn(tl.zeros_like(scale) + 1.0, scale)
            elif (half + 1) * HALF > FIND_EVERY and i % FIND_EVERY == 0 and i > 0:
                # Through memory, so that the search goes over the group's columns alone.
                if half == 0:
                    tl.store(first_ptr, first, mask=in_first)
                tl.store(second_ptr, second, mask=in_second)
                tl.debug_barrier()
                scale, inverse, zero = _group_grid(
                    i, w_ptr, diagonal_ptr, shrink_ptr, scale_ptr, zero_ptr, group_ptr, feature, features, in_range,
                    COLUMNS, FIND_EVERY, GROUP_TILE, MAXQ, SYM, STEPS, SMALLEST,
                )  # fmt: skip
            here = first if half == 0 else second
            x = tl.sum(tl.where((column + half * HALF == i)[:, None], here, 0.0), 0)
            error = _round_column(
                i, x, scale, inverse, zero, diagonal, original, q_ptr, change_ptr, feature, features, in_range, MAXQ
            )
            if half == 0:
                first -= to_first[:, None] * error[None, :]
            second -= to_second[:, None] * error[None, :]
            squared_error += error * error
    tl.store(error_ptr + feature, squared_error, mask=in_range)


@triton.jit
def _group_grid(
    i, w_ptr, diagonal_ptr, shrink_ptr, scale_ptr, zero_ptr, group_ptr, feature, features, in_range,
    COLUMNS: tl.constexpr, FIND_EVERY: tl.constexpr, GROUP_TILE: tl.constexpr, MAXQ: tl.constexpr, SYM: tl.constexpr,
    STEPS: tl.constexpr, SMALLEST: tl.constexpr,
):  # fmt: skip
    """Find, write down and return the grid of the group that begins at column i and lies in memory: s, 1 / s, zero."""
    column = i + tl.arange(0, GROUP_TILE)
    exists = column < tl.minimum(i + FIND_EVERY, COLUMNS)
    inside = exists[:, None] & in_range[None, :]
    w = tl.load(w_ptr + column[:, None].to(tl.int64) * features + feature[None, :], mask=inside, other=0.0)
    price = tl.load(diagonal_ptr + column, mask=exists, other=0.0)
    scale, zero = _best_grid(w, inside, price * price, shrink_ptr, MAXQ, SYM, STEPS, SMALLEST)
    grid = tl.load(group_ptr + i) * features + feature
    tl.store(scale_ptr + grid, scale, mask=in_range)
    tl.store(zero_ptr + grid, zero, mask=in_range)
    return scale, tl.math.div_rn(tl.zeros_like(scale) + 1.0, scale), zero


def features_at_once(features: int) -> int:
    """Return how many output features a program of `round_columns` takes."""
    return max(size for size, many in zip(_ROUND_FEATURES, _ROUND_MANY, strict=True) if features >= many)


def round_columns(
    w: Tensor, original: Tensor, Hinv: Tensor, diagonal: Tensor, grids: Grids, rules: GridRules, find_every: int,
    result: Columns,
) -> None:  # fmt: skip
    """See `columns.round_columns`; every tensor must be contiguous."""
    columns, features = w.shape
    tile = features_at_once(features)
    with torch.cuda.device_of(w):
        _round_columns_kernel[(triton.cdiv(features, tile),)](
            w, original, Hinv, diagonal, search_shrinks(w.device), grids.scales, grids.zeros, grids.groups, result.q,
            result.change, result.squared_errors, features, COLUMNS=columns, HALF=_TILE // 2, FEATURES=tile,
            FIND_EVERY=find_every, GROUP_TILE=triton.next_power_of_2(max(find_every, 1)), MAXQ=rules.maxq,
            SYM=rules.sym, STEPS=SEARCH_STEPS if rules.scale_search else 1, SMALLEST=SMALLEST_SCALE,
            num_warps=_ROUND_WARPS,
        )  # fmt: skip


@triton.jit
def _split_kernel(
    x_ptr, row_ptr, column_ptr, high_ptr, low_ptr, columns, x_stride, out_stride, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
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


def split(x: Tensor, rows: Tensor | None, columns: Tensor | None, high: Tensor, low: Tensor) -> None:
    """See `split_float16.split`; `high` and `low`, of equal strides, are filled in."""
    x = x if x.stride(1) == 1 else x.contiguous()
    with torch.cuda.device_of(x):
        _split_kernel[(x.shape[0], triton.cdiv(x.shape[1], _SPLIT_TILE))](
            x, x if rows is None else rows, x if columns is None else columns, high, low, x.shape[1], x.stride(0),
            high.stride(0), ROWS=rows is not None, COLUMNS=columns is not None, TILE=_SPLIT_TILE,
        )  # fmt: skip


@triton.jit
def _in_order_kernel(
    weight_ptr, dead_ptr, place_ptr, out_ptr, columns, features, weight_stride, out_stride, ORDERED: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    column = tl.program_id(0) * TILE + tl.arange(0, TILE)
    feature = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = (feature < features)[:, None] & (column < columns)[None, :]
    alive = tl.load(dead_ptr + column, mask=column < columns, other=1) == 0
    weight = weight_ptr + feature[:, None].to(tl.int64) * weight_stride + column[None, :]
    w = tl.load(weight, mask=inside & alive[None, :], other=0.0)
    place = column.to(tl.int64)
    if ORDERED:
        place = tl.load(place_ptr + column, mask=column < columns, other=0)
    out = out_ptr + place[:, None] * out_stride + feature[None, :]
    tl.store(out, tl.trans(w), mask=(column < columns)[:, None] & (feature < features)[None, :])


def in_order(weights: Sequence[Tensor], dead: Tensor, place: Tensor | None) -> Tensor:
    """See `solving_order.in_order`."""
    first, columns = weights[0], dead.shape[0]
    total = sum(weight.shape[0] for weight in weights)
    out, begin = torch.empty(columns, total, dtype=first.dtype, device=first.device), 0
    for weight in weights:
        features, weight = weight.shape[0], weight.contiguous()  # noqa: PLW2901 - the same one, dense
        with torch.cuda.device_of(weight):
            _in_order_kernel[(triton.cdiv(columns, _COPY_TILE), triton.cdiv(features, _COPY_TILE))](
                weight, dead, dead if place is None else place, out[:, begin:], columns, features, weight.stride(0),
                out.stride(0), ORDERED=place is not None, TILE=_COPY_TILE,
            )  # fmt: skip
        begin += features
    return out


@triton.jit
def _dequantize_kernel(
    weight_ptr, q_ptr, zero_ptr, scale_ptr, group_ptr, columns, features, weight_stride, q_stride, zero_stride,
    scale_stride, TILE: tl.constexpr,
):  # fmt: skip
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


def dequantize(weight: Tensor, q: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor) -> None:
    """See `solving_order.dequantize`; `weight`'s rows must be dense."""
    features, columns = weight.shape
    zeros, scales = zeros.contiguous(), scales.contiguous()
    with torch.cuda.device_of(weight):
        _dequantize_kernel[(triton.cdiv(columns, _COPY_TILE), triton.cdiv(features, _COPY_TILE))](
            weight, q, zeros, scales, g_idx, columns, features, weight.stride(0), q.stride(0), zeros.stride(0),
            scales.stride(0), TILE=_COPY_TILE,
        )  # fmt: skip
