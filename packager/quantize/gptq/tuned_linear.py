"""One linear whose integers and scales are tuned by straight-through gradients.

A weight is w = scale (q - zero), with q = clamp(round(W / scale + zero + V), 0, maxq), W the original weight, and
scale = float16(start m). V and m are tuned in float32. The gradient passes the rounding as if it were not there
(straight through), and stops where the clamp holds:

    dw/dV = scale                   dw/dm = start ((q - zero) - W / scale)          inside the grid
    dw/dV = 0                       dw/dm = start (q - zero)                        where the clamp holds

Parameters and gradients are those of AutoRound (arXiv:2309.05516; auto-round 0.15, `auto_round.data_type.int`,
`quant_tensor_sym`). There V starts at 0 and the scale at max|w|, and each step has one size for all weights. Here both
start where the solver ended, and steps are Adam's (arXiv:1412.6980): a weight whose gradient changes its sign from one
batch to the next hardly moves.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from packager.quantize.gptq.grid import LARGEST_SCALE, SMALLEST_SCALE
from packager.quantize.gptq.solve import Solution

# Positions keep this distance from the borders of their cell, where rounding errors would choose the integer.
_MARGIN = 2.0**-10
_BETAS = 0.9, 0.95  # of Adam: the second is for some hundred steps, not for thousands
_SMALLEST = 1e-30  # of a root that is divided by; gradients are near 1e-3


@dataclass(frozen=True, kw_only=True)
class TunedGrid:
    """Integers uint8 [out_features, in_features] and scales float32 [out_features, n_groups], float16 values."""

    q: Tensor
    scales: Tensor


class TunedLinear:
    """The tuned parameters of a linear.

    Args:
        weight: the original weight [out_features, in_features], any float dtype; kept.
        solution: where the tuning starts; columns in their original order.
        maxq: the largest integer.
    """

    def __init__(self, weight: Tensor, solution: Solution, maxq: int) -> None:
        self._weight, self._maxq = weight, maxq
        self._groups = solution.g_idx.long()
        self._start = solution.scales.mT.float().contiguous()
        self._zeros = solution.zeros.mT.float().contiguous()
        self._factor = torch.ones_like(self._start)
        members = torch.arange(self._start.shape[1], device=weight.device)
        self._members = (self._groups[:, None] == members).float()  # [in_features, n_groups]
        q, position = solution.q.mT.float(), self._position(self._start)
        nearest = position.round()
        inside = (position - nearest).clamp_(_MARGIN - 0.5, 0.5 - _MARGIN)
        # An offset moves a position to its integer's cell and not inside the cell, so that few are near a border.
        self._offset = torch.where(nearest.clamp(0, maxq) == q, 0.0, q + inside - position)
        self._moments = Moments(self._offset), Moments(self._factor)

    def _of_columns(self, values: Tensor) -> Tensor:
        """Return for each column the value of its group."""
        return values.index_select(1, self._groups)

    def _position(self, scales: Tensor) -> Tensor:
        """Return W / scale + zero."""
        return self._weight.float().div(self._of_columns(scales)).add_(self._of_columns(self._zeros))

    def _scales(self) -> Tensor:
        """Return the scales, rounded to float16 and of the sign that they started with."""
        scales = (self._start * self._factor).to(torch.float16).float()
        return scales.abs().clamp(SMALLEST_SCALE, LARGEST_SCALE).copysign(self._start)

    def _rounded(self, scales: Tensor) -> tuple[Tensor, Tensor]:
        """Return the integers as float32, and where the clamp holds them."""
        free = self._position(scales).add_(self._offset).round_()
        q = free.clamp(0, self._maxq)
        return q, q != free

    def grid(self) -> TunedGrid:
        """Return the present integers and scales."""
        scales = self._scales()
        return TunedGrid(q=self._rounded(scales)[0].to(torch.uint8), scales=scales)

    def write(self, weight: Tensor) -> None:
        """Overwrite a weight with what a loader reads of the present integers and scales."""
        scales = self._scales()
        q, _ = self._rounded(scales)
        weight.copy_(q.sub_(self._of_columns(self._zeros)).mul_(self._of_columns(scales)))

    def step(self, gradient: Tensor, rate: float, scale_rate: float) -> None:
        """Take a step of Adam against the gradient of a batch.

        Args:
            gradient: of the loss by the weight, any float dtype.
            rate: the largest distance that an offset moves, in integers.
            scale_rate: likewise a scale, as a fraction of the one that it started with.
        """
        scales = self._scales()
        q, held = self._rounded(scales)
        gradient = gradient.float()
        of_scale = self._weight.float().div(self._of_columns(scales)).masked_fill_(held, 0)
        of_scale = q.sub_(self._of_columns(self._zeros)).sub_(of_scale).mul_(gradient)
        of_factor = (of_scale @ self._members).mul_(self._start)
        # Adam's steps do not depend on a gradient's size: the sign of the scale is all that matters of dw/dV.
        of_offset = gradient.mul(self._of_columns(scales.sign())).masked_fill_(held, 0)
        offsets, factors = self._moments
        self._offset.sub_(offsets.direction(of_offset), alpha=rate)
        self._factor.sub_(factors.direction(of_factor), alpha=scale_rate)


class Moments:
    """Adam's two moments of the gradients of a tensor."""

    def __init__(self, like: Tensor) -> None:
        self._mean, self._square = torch.zeros_like(like), torch.zeros_like(like)
        self._steps = 0

    def direction(self, gradient: Tensor) -> Tensor:
        """Take a gradient into account, and return the direction of the step, at most about 1 in each entry."""
        self._steps += 1
        (first, second), steps = _BETAS, self._steps
        self._mean.lerp_(gradient, 1 - first)
        self._square.lerp_(gradient.square_(), 1 - second)
        root = (self._square / (1 - second**steps)).sqrt_().add_(_SMALLEST)
        return (self._mean / (1 - first**steps)).div_(root)


def tuned_solution(start: Solution, grid: TunedGrid) -> Solution:
    """Return a solution with other integers and scales; its losses are those of the start."""
    return replace(start, q=grid.q.mT.contiguous(), scales=grid.scales.mT.to(torch.float16).contiguous())
