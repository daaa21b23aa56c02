"""The quantization grid of a group: one scale and one zero per output feature.

A weight w is stored as q = clamp(round(w / scale) + zero, 0, 2^bits - 1) and read back as scale * (q - zero). Scales
are rounded to float16 before they are used, so that what is stored is what was solved.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from packager.errors import QuantizeError

_SMALLEST_SCALE = 2.0**-24  # the smallest positive float16
_LARGEST_SCALE = 65504.0
# 41 candidates from 100 % down to 60 % of the full range: measured in docs/explanation/quality.md.
_SEARCH_STEPS = 41
_SEARCH_LOWEST = 0.6


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Scales and zeros, float32 [out_features] each; scales hold float16 values, zeros whole numbers.

    Attributes:
        maxq: the largest stored integer, 2^bits - 1.
    """

    scale: Tensor
    zero: Tensor
    maxq: int

    def quantize(self, w: Tensor) -> Tensor:
        """Return the stored integers (as floats) of w [..., out_features]."""
        return torch.clamp(torch.round(w / self.scale) + self.zero, 0, self.maxq)

    def dequantize(self, q: Tensor) -> Tensor:
        """Return the weights that the integers q [..., out_features] stand for."""
        return (q - self.zero) * self.scale


def find_grid(w: Tensor, *, bits: int, sym: bool, search_weight: Tensor | None = None) -> Grid:
    """Choose the grid of one group.

    Args:
        w: float32 [columns, out_features], the group's weights as they stand.
        bits: 2, 3, 4 or 8.
        sym: zero fixed at 2^(bits-1) and scale = 2 max|w| / (2^bits - 1); else from min(w, 0) and max(w, 0).
        search_weight: float32 [columns]; if given, also try smaller scales and keep, per output feature, the one with
            the least squared rounding error under these weights (1 / Hinv_ii^2 is what GPTQ pays for an error).

    Raises:
        QuantizeError: a scale does not fit float16.
    """
    high = w.amax(0).clamp(min=0)
    low = w.amin(0).clamp(max=0)
    best = _grid_of(low, high, bits=bits, sym=sym)
    if search_weight is None:
        return best
    weight = search_weight[:, None]
    best_error = _error(w, best, weight)
    scale, zero = best.scale.clone(), best.zero.clone()
    for shrink in torch.linspace(1.0, _SEARCH_LOWEST, _SEARCH_STEPS).tolist()[1:]:
        candidate = _grid_of(low * shrink, high * shrink, bits=bits, sym=sym)
        error = _error(w, candidate, weight)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        scale = torch.where(better, candidate.scale, scale)
        zero = torch.where(better, candidate.zero, zero)
    return Grid(scale=scale, zero=zero, maxq=best.maxq)


def _error(w: Tensor, grid: Grid, weight: Tensor) -> Tensor:
    return ((w - grid.dequantize(grid.quantize(w))).square() * weight).sum(0)


def _grid_of(low: Tensor, high: Tensor, *, bits: int, sym: bool) -> Grid:
    """Return the grid that spans [low, high], float32 [out_features] each, low <= 0 <= high."""
    maxq = 2**bits - 1
    empty = (low == 0) & (high == 0)
    low, high = torch.where(empty, -1.0, low), torch.where(empty, 1.0, high)
    if sym:
        scale = _float16(2 * torch.maximum(-low, high) / maxq)
        return Grid(scale=scale, zero=torch.full_like(scale, 2.0 ** (bits - 1)), maxq=maxq)
    scale = _float16((high - low) / maxq)
    zero = torch.clamp(torch.round(-low / scale), 0, maxq)
    # The v1 checkpoint format stores zero - 1 and so cannot hold 0: such a group gives up one step below its minimum.
    no_zero = zero == 0
    scale = torch.where(no_zero, _float16(high / (maxq - 1)), scale)
    return Grid(scale=scale, zero=torch.where(no_zero, 1.0, zero), maxq=maxq)


def _float16(scale: Tensor) -> Tensor:
    if bool((scale > _LARGEST_SCALE).any()):
        raise QuantizeError(
            "a scale does not fit float16", why=f"it would be {float(scale.max()):g}; the largest is 65504"
        )
    return scale.clamp(min=_SMALLEST_SCALE).to(torch.float16).to(torch.float32)
