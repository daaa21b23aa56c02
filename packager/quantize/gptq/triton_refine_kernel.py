"""The Triton kernel of the refinement; `triton_ops` launches it, `columns.refine_columns` is the same in torch."""

import triton
import triton.language as tl

from packager.quantize.gptq.triton_kernels import round_between


@triton.jit
def refine_columns_kernel(
    G_ptr, H_ptr, q_ptr, scale_ptr, zero_ptr, group_ptr, allowed_ptr, change_ptr, features, G_stride, q_stride,
    grid_stride, group_stride, BATCHED: tl.constexpr, COLUMNS: tl.constexpr, TILE: tl.constexpr,
    FEATURES: tl.constexpr, INLINE_GROUP_SIZE: tl.constexpr, MAXQ: tl.constexpr, SMALLEST: tl.constexpr,
    LARGEST: tl.constexpr, LEAST_GAIN: tl.constexpr,
):  # fmt: skip
    """Refine up to 128 columns, a group after the other from the last: its scale, then its columns from the last.

    A program takes a few output features and all columns, G in registers. Strides lead from one expert to the next.
    """
    if BATCHED:
        expert = tl.program_id(1).to(tl.int64)
        G_ptr += expert * G_stride
        change_ptr += expert * G_stride
        H_ptr += expert * COLUMNS * COLUMNS
        q_ptr += expert * q_stride
        scale_ptr += expert * grid_stride
        zero_ptr += expert * grid_stride
        group_ptr += expert * group_stride
        allowed_ptr += expert
    feature = tl.program_id(0) * FEATURES + tl.arange(0, FEATURES)
    in_range = feature < features
    allowed = (tl.load(allowed_ptr) != 0) & in_range
    column = tl.arange(0, TILE)
    tile = column[:, None].to(tl.int64) * features + feature[None, :]
    inside = (column < COLUMNS)[:, None] & in_range[None, :]
    G = tl.load(G_ptr + tile, mask=inside, other=0.0)
    size = INLINE_GROUP_SIZE if INLINE_GROUP_SIZE > 0 else COLUMNS
    for number in range((COLUMNS + size - 1) // size):
        begin = ((COLUMNS + size - 1) // size - 1 - number) * size
        end = tl.minimum(begin + size, COLUMNS)
        group = tl.load(group_ptr + begin)
        scale = tl.load(scale_ptr + group * features + feature, mask=in_range, other=1.0)
        zero = tl.load(zero_ptr + group * features + feature, mask=in_range, other=0.0)
        refit = tl.zeros([FEATURES], tl.float32)
        if INLINE_GROUP_SIZE > 0:
            members = inside & ((column >= begin) & (column < end))[:, None]
            G, refit = _refit_group(
                begin, end, G, members, H_ptr, q_ptr, scale, zero, column, feature, features, in_range, allowed,
                COLUMNS, SMALLEST, LARGEST,
            )  # fmt: skip
            scale += refit
            tl.store(scale_ptr + group * features + feature, scale, mask=in_range)
        for back in range(end - begin):
            j = end - 1 - back
            if INLINE_GROUP_SIZE == 0:
                group = tl.load(group_ptr + j)
                scale = tl.load(scale_ptr + group * features + feature, mask=in_range, other=1.0)
                zero = tl.load(zero_ptr + group * features + feature, mask=in_range, other=0.0)
            at = tl.cast(j, tl.int64) * features + feature
            u = tl.load(q_ptr + at, mask=in_range, other=0).to(tl.float32) - zero
            gradient = tl.sum(tl.where((column == j)[:, None], G, 0.0), 0)
            taken = _taken(u, gradient, tl.load(H_ptr + j * COLUMNS + j), scale, zero, MAXQ, LEAST_GAIN)
            taken = tl.where(allowed, taken, u)
            step = (taken - u) * scale
            tl.store(q_ptr + at, (taken + zero).to(tl.uint8), mask=in_range)
            tl.store(change_ptr + at, u * refit + step, mask=in_range)
            H = tl.load(H_ptr + j * COLUMNS + column, mask=column < COLUMNS, other=0.0)
            G -= H[:, None] * step[None, :]


@triton.jit
def _taken(u, gradient, curvature, scale, zero, MAXQ: tl.constexpr, LEAST_GAIN: tl.constexpr):
    """Return a column's integers without the zero: those that are best, or the present ones where little is gained."""
    best = round_between(u + tl.math.div_rn(gradient, curvature * scale), -zero, MAXQ - zero)
    step = (best - u) * scale
    gain = step * (2 * gradient - step * curvature)
    return tl.where(gain > LEAST_GAIN * (scale * scale) * curvature, best, u)


@triton.jit
def _refit_group(
    begin, end, G, members, H_ptr, q_ptr, scale, zero, column, feature, features, in_range, allowed,
    COLUMNS: tl.constexpr, SMALLEST: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Return G after the change of a group's scale, and the change."""
    Hu = tl.zeros_like(G)
    for j in range(begin, end):
        H = tl.load(H_ptr + j * COLUMNS + column, mask=column < COLUMNS, other=0.0)
        q = tl.load(q_ptr + tl.cast(j, tl.int64) * features + feature, mask=in_range, other=0)
        Hu += H[:, None] * (q.to(tl.float32) - zero)[None, :]
    tile = column[:, None].to(tl.int64) * features + feature[None, :]
    q = tl.load(q_ptr + tile, mask=members, other=0)
    u = tl.where(members, q.to(tl.float32) - zero[None, :], 0.0)
    refit = _refitted_by(scale, tl.sum(u * G, 0), tl.sum(u * Hu, 0), SMALLEST, LARGEST)
    refit = tl.where(allowed, refit, 0.0)
    return G - Hu * refit[None, :], refit


@triton.jit
def _refitted_by(scale, projection, curvature, SMALLEST: tl.constexpr, LARGEST: tl.constexpr):
    """Return by how much to change scales, 0 where no float16 value of the same sign is better; see `grid.py`."""
    curved = curvature > 0
    wanted = scale + tl.math.div_rn(projection, tl.where(curved, curvature, 1.0))
    step = wanted.to(tl.float16).to(tl.float32) - scale
    magnitude = (scale + step) * tl.where(scale > 0, 1.0, -1.0)
    better = curved & (step * (2 * projection - step * curvature) > 0)
    return tl.where(better & (magnitude >= SMALLEST) & (magnitude <= LARGEST), step, 0.0)
