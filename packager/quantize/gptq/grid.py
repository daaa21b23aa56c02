"""The quantization grids of groups of columns: one scale and one zero per group and output feature.

A weight w is stored as q = clamp(round(w / scale) + zero, 0, 2^bits - 1) and read back as scale * (q - zero). Scales
are rounded to float16 before they are used, so that the stored scales are those the solver used.
"""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor

SMALLEST_SCALE, LARGEST_SCALE = 2.0**-24, 65504.0  # the smallest positive float16, and the largest
# From the full range down to 60 % of it in steps of 1 %: docs/explanation/measurements.md has the gain.
SEARCH_STEPS = 41
_SEARCH_LOWEST = 0.6
# An integer is chosen anew if the loss falls by more than this share of what its scale, a whole step, would cost: from
# 0.55 steps on, not from 0.5. It costs no gain where tokens are many, and where they are few the rest would be noise.
LEAST_GAIN = 0.1


@dataclass(frozen=True, kw_only=True)
class GridRules:
    """The rules by which grids are chosen.

    Attributes:
        bits: 2, 3, 4 or 8.
        sym: zero fixed at 2^(bits-1) and scale = 2 max|w| / (2^bits - 1); else from min(w, 0) and max(w, 0).
        scale_search: also try smaller ranges and keep, per group and output feature, the one with the least squared
            rounding error, each column weighted by 1 / Hinv_ii^2, its factor in the squared output error. "signed":
            of each range both a positive and a negative scale, for sym alone.
    """

    bits: int
    sym: bool
    scale_search: bool | Literal["signed"]

    def __post_init__(self) -> None:
        """Refuse negative scales of asymmetric grids, whose zero makes up for them."""
        if self.signed and not self.sym:
            raise ValueError("scale_search: signed is for symmetric grids")

    @property
    def signed(self) -> bool:
        """Whether negative scales are tried."""
        return self.scale_search == "signed"

    @property
    def maxq(self) -> int:
        """The largest stored integer."""
        return int(2**self.bits - 1)


@cache
def search_shrinks(device: torch.device) -> Tensor:
    """Return the fractions of a group's range that the scale search tries, the whole range first."""
    return torch.linspace(1.0, _SEARCH_LOWEST, SEARCH_STEPS, dtype=torch.float32).to(device)


def find_grids(w: Tensor, group_size: int, rules: GridRules, column_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Choose the grids of consecutive groups of columns.

    Args:
        w: float32 [columns, out_features]; groups are cut from its first column on, the last may be shorter.
        group_size: columns of a group, positive.
        rules: bits, symmetry and search.
        column_weight: float32 [columns], 1 / Hinv_ii^2; used by the scale search alone.

    Returns:
        Scales and zeros, float32 [n_groups, out_features]; scales hold float16 values (infinity where none is large
        enough), negative ones only if the rules are signed; zeros whole numbers.
    """
    groups = [slice(begin, begin + group_size) for begin in range(0, w.shape[0], group_size)]
    grids = [_find_grid(w[group], rules, column_weight[group]) for group in groups]
    return torch.stack([scale for scale, _ in grids]), torch.stack([zero for _, zero in grids])


def _find_grid(w: Tensor, rules: GridRules, column_weight: Tensor) -> tuple[Tensor, Tensor]:
    low, high = w.amin(0).clamp(max=0), w.amax(0).clamp(min=0)
    if not rules.scale_search:
        return _grid_of(low, high, rules)
    shrinks = search_shrinks(w.device)[:, None]
    low, high = low * shrinks, high * shrinks
    scales, zeros = _grid_of(low, high, rules)
    if rules.signed:
        scales = torch.stack([scales, _negative_scale(low, high, rules)], 1).flatten(0, 1)
        zeros = zeros.repeat_interleave(2, 0)
    errors = [_error(w, scale, zero, rules.maxq, column_weight) for scale, zero in zip(scales, zeros, strict=True)]
    best = torch.stack(errors).argmin(0, keepdim=True)  # argmin takes the first of equal ones: the largest range
    return scales.gather(0, best)[0], zeros.gather(0, best)[0]


def _error(w: Tensor, scale: Tensor, zero: Tensor, maxq: int, column_weight: Tensor) -> Tensor:
    """Return the weighted squared rounding error; multiplying by 1/scale is precise enough for the choice."""
    q = (w * scale.reciprocal()).round_().add_(zero).clamp_(0, maxq)
    return column_weight @ q.sub_(zero).mul_(scale).sub_(w).square_()


def _grid_of(low: Tensor, high: Tensor, rules: GridRules) -> tuple[Tensor, Tensor]:
    """Return scale and zero of the grid that spans [low, high], float32 of one shape, low <= 0 <= high."""
    maxq = rules.maxq
    empty = (low == 0) & (high == 0)
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    if rules.sym:
        scale = _float16(2 * torch.maximum(-low, high) / maxq)
        return scale, torch.full_like(scale, 2.0 ** (rules.bits - 1))
    scale = _float16((high - low) / maxq)
    zero = torch.clamp(torch.round(-low / scale), 0, maxq)
    # The v1 checkpoint format stores zero - 1 and so cannot hold 0: such a range loses the step below its minimum.
    no_zero = zero == 0
    return torch.where(no_zero, _float16(high / (maxq - 1)), scale), torch.where(no_zero, 1.0, zero)


def _negative_scale(low: Tensor, high: Tensor, rules: GridRules) -> Tensor:
    """Return the negative scale of a symmetric grid for the range [low, high].

    The integers run from -2^(bits-1) to 2^(bits-1) - 1: a negative scale has a step more above zero than below. So the
    step is max|w| / 2^(bits-1) where the largest weight is positive; else it is that of the positive scale.
    """
    half = rules.maxq / 2
    return -_float16(torch.maximum(-low, high) / torch.where(high > -low, half + 0.5, half))


def _float16(scale: Tensor) -> Tensor:
    return scale.clamp(min=SMALLEST_SCALE).to(torch.float16).to(torch.float32)


def refitted_by(scale: Tensor, projection: Tensor, curvature: Tensor) -> Tensor:
    """Return by how much to change the scales of groups for the least loss; 0 where no float16 value is better.

    The loss falls by step projection - step^2 curvature / 2. A scale keeps its sign: a symmetric branch has negative
    ones only if they were searched, and the zero of another one belongs to a positive one.

    Args:
        scale: float32 of any shape, float16 values.
        projection: u G of each group's columns, u their integers without the zero and G the gradient; like scale.
        curvature: u H u, likewise.
    """
    step = (scale + projection / curvature).to(torch.float16).to(torch.float32) - scale
    magnitude = (scale + step) * scale.sign()
    better = (curvature > 0) & (step * (2 * projection - step * curvature) > 0)
    return torch.where(better & (magnitude >= SMALLEST_SCALE) & (magnitude <= LARGEST_SCALE), step, 0.0)
