"""Lazy updates (arXiv:2210.17323, step 2): the product U[:k, B]^T (W - Q)[:k] that updates the later columns B.

`solve` derives the update. Its products are most of the solver's arithmetic and need float32's precision, because the
columns' rounding decisions depend on them. On CUDA each is the sum of three float16 products.
"""

import torch
from torch import Tensor

from packager.quantize.gptq.tensor_ops import TensorOps, ordered_rows

_HEADROOM = 2.0**9  # float16 ends at 2^16; a delta exceeds the largest weight only where errors accumulate
_SMALLEST = 2.0**-64  # of a weight times its row of U: keeps the factors finite where all weights are zero


class Float32Updates:
    """`LazyUpdates` with deltas and products in float32.

    Args:
        U: float32 [in_features, in_features].
        weight: [in_features, out_features], the weights to be quantized.
        ops: multiplies.
    """

    def __init__(self, U: Tensor, weight: Tensor, ops: TensorOps) -> None:
        self._U, self._ops = U, ops
        self._delta = torch.empty_like(weight, dtype=torch.float32)
        self._columns: Tensor | None = None

    def record(self, begin: int, delta: Tensor) -> None:
        """Store deltas; see `LazyUpdates.record`."""
        self._delta[..., begin : begin + delta.shape[-2], :] = delta

    def pending_update(self, until: int, begin: int, end: int) -> Tensor:
        """Return U[:until, begin:end]^T delta[:until]."""
        return self._ops.add_product(None, self._U[..., :until, begin:end].mT, self._delta[..., :until, :])

    def reorder(self, columns: Tensor) -> None:
        """Give the rows of U another order; see `LazyUpdates.reorder`."""
        self._columns = columns

    def first_row(self, begin: int) -> int:
        """Return where rows of U begin; see `LazyUpdates.first_row`."""
        return begin if self._columns is None else 0

    def gradient(self, begin: int, end: int, errors: Tensor) -> Tensor:
        """Return U[begin:end, first:] errors[first:]; see `LazyUpdates.gradient`."""
        first = self.first_row(begin)
        return self._ops.add_product(None, self._rows(begin, end), errors[..., first:, :])

    def spread(self, begin: int, end: int, change: Tensor) -> Tensor:
        """Return U[begin:end, first:]^T change; see `LazyUpdates.spread`."""
        return self._ops.add_product(None, self._rows(begin, end).mT, change)

    def _rows(self, begin: int, end: int) -> Tensor:
        return ordered_rows(self._U, self._columns, begin, end)[..., self.first_row(begin) :]


class SplitUpdates:
    """`LazyUpdates` with each factor split into two float16 numbers; the product of the two low parts is left out.

    Rows of U are scaled by powers of two to at most 1, the deltas by the inverse and by a power of two for each output
    feature, so that neither overflows nor loses bits to float16's small range.

    Args:
        U: float32 [in_features, in_features].
        weight: [in_features, out_features], the weights to be quantized.
        ops: splits and multiplies.
    """

    def __init__(self, U: Tensor, weight: Tensor, ops: TensorOps) -> None:
        self._ops = ops
        self._row_scale = torch.exp2(torch.ceil(torch.log2(torch.linalg.vector_norm(U, dim=-1))))
        self._U = ops.split(U, 1 / self._row_scale, None)
        scaled = weight * self._row_scale[..., None]
        largest = torch.linalg.vector_norm(scaled, torch.inf, dim=-2).clamp(min=_SMALLEST)
        self._out_scale = torch.exp2(torch.floor(torch.log2(_HEADROOM / largest)))
        high = torch.empty_like(weight, dtype=torch.float16)
        self._delta = high, torch.empty_like(high)
        self._error_scale: Tensor | None = None
        self._columns: Tensor | None = None

    def record(self, begin: int, delta: Tensor) -> None:
        """Split and store deltas; see `LazyUpdates.record`."""
        rows = slice(begin, begin + delta.shape[-2])
        high, low = (part[..., rows, :] for part in self._delta)
        self._ops.split(delta, self._row_scale[..., rows], self._out_scale, (high, low))

    def pending_update(self, until: int, begin: int, end: int) -> Tensor:
        """Return U[:until, begin:end]^T delta[:until]."""
        U_high, U_low = (part[..., :until, begin:end].mT for part in self._U)
        high, low = (part[..., :until, :] for part in self._delta)
        return self._sum_of_products(U_high, U_low, high, low).div_(self._out_scale[..., None, :])

    def reorder(self, columns: Tensor) -> None:
        """Give the rows of U another order; see `LazyUpdates.reorder`."""
        self._columns, self._row_scale = columns, self._row_scale.gather(-1, columns)

    def first_row(self, begin: int) -> int:
        """Return where rows of U begin; see `LazyUpdates.first_row`."""
        return begin if self._columns is None else 0

    def gradient(self, begin: int, end: int, errors: Tensor) -> Tensor:
        """Return U[begin:end, first:] errors[first:]; see `LazyUpdates.gradient`."""
        first = self.first_row(begin)
        if self._error_scale is None:
            norm = torch.linalg.vector_norm(errors, dim=-2).clamp(min=_SMALLEST)
            self._error_scale = torch.exp2(torch.floor(torch.log2(_HEADROOM / norm)))
        U_high, U_low = self._rows(begin, end)
        # The memory of the deltas, which nothing needs any more, holds the parts of the errors.
        parts = self._delta[0][..., first:, :], self._delta[1][..., first:, :]
        high, low = self._ops.split(errors[..., first:, :], None, self._error_scale, parts)
        total = self._sum_of_products(U_high, U_low, high, low)
        return total.mul_(self._row_scale[..., begin:end, None]).div_(self._error_scale[..., None, :])

    def spread(self, begin: int, end: int, change: Tensor) -> Tensor:
        """Return U[begin:end, first:]^T change; see `LazyUpdates.spread`."""
        U_high, U_low = self._rows(begin, end)
        high, low = self._ops.split(change, self._row_scale[..., begin:end], self._out_scale)
        return self._sum_of_products(U_high.mT, U_low.mT, high, low).div_(self._out_scale[..., None, :])

    def _rows(self, begin: int, end: int) -> tuple[Tensor, Tensor]:
        high, low = (ordered_rows(part, self._columns, begin, end) for part in self._U)
        return high[..., self.first_row(begin) :], low[..., self.first_row(begin) :]

    def _sum_of_products(self, a_high: Tensor, a_low: Tensor, b_high: Tensor, b_low: Tensor) -> Tensor:
        """Return a b but for the product of the two low parts."""
        total = self._ops.add_product(None, a_high, b_low)
        total = self._ops.add_product(total, a_low, b_high)
        return self._ops.add_product(total, a_high, b_high)
