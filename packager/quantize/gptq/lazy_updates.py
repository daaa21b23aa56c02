"""What quantized columns owe to those still to come: products of the factor with the changes made so far.

Column k should move by what the columns j before it were changed, sum_j M[j, k] change[j], seen through the inverse of
its own block of M. Those sums are most of the solver's arithmetic and need float32's precision: the columns' rounding
decisions hang on them. On CUDA they are made of three float16 products.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from packager.quantize.gptq.split_float16 import add_product, split

_HEADROOM = 2.0**9  # float16 ends at 2^16; a change exceeds the largest weight only where errors pile up
_SMALLEST = 2.0**-64  # of a weight times its row of M: where all weights are zero the factors stay finite


class Carry(ABC):
    """The changes of the columns quantized so far."""

    @abstractmethod
    def record(self, begin: int, change: Tensor) -> None:
        """Take the changes, float32 [columns, out_features], of the columns from `begin` on."""

    @abstractmethod
    def owed(self, until: int, begin: int, end: int) -> Tensor:
        """Return M[:until, begin:end]^T change[:until], float32 [end - begin, out_features]."""


class Float32Carry(Carry):
    """The plain way.

    Args:
        M: float32 [in_features, in_features].
        weight: [in_features, out_features], the weights that will be changed.
    """

    def __init__(self, M: Tensor, weight: Tensor) -> None:
        self._M = M
        self._change = torch.empty_like(weight, dtype=torch.float32)

    def record(self, begin: int, change: Tensor) -> None:
        """See `Carry`."""
        self._change[begin : begin + change.shape[0]] = change

    def owed(self, until: int, begin: int, end: int) -> Tensor:
        """See `Carry`."""
        return self._M[:until, begin:end].T @ self._change[:until]


class SplitCarry(Carry):
    """Each factor as the sum of two float16 numbers (`halves`); the product of the two low parts is left out.

    Rows of M are scaled by powers of two to at most 1, the changes by the inverse and by a power of two for each output
    feature, so that neither overflows nor loses bits to float16's small range.

    Args and effect: as `Float32Carry`.
    """

    def __init__(self, M: Tensor, weight: Tensor) -> None:
        self._row = torch.exp2(torch.ceil(torch.log2(torch.linalg.vector_norm(M, dim=1))))
        self._M = split(M, rows=1 / self._row)
        largest = torch.linalg.vector_norm(weight * self._row[:, None], torch.inf, dim=0).clamp(min=_SMALLEST)
        self._output = torch.exp2(torch.floor(torch.log2(_HEADROOM / largest)))
        high = torch.empty_like(weight, dtype=torch.float16)
        self._change = high, torch.empty_like(high)

    def record(self, begin: int, change: Tensor) -> None:
        """See `Carry`."""
        rows = slice(begin, begin + change.shape[0])
        high, low = self._change
        split(change, rows=self._row[rows], columns=self._output, out=(high[rows], low[rows]))

    def owed(self, until: int, begin: int, end: int) -> Tensor:
        """See `Carry`."""
        M_high, M_low = (part[:until, begin:end].T for part in self._M)
        high, low = (part[:until] for part in self._change)
        total = add_product(None, M_high, low)
        total = add_product(total, M_low, high)
        total = add_product(total, M_high, high)
        return total.div_(self._output)
