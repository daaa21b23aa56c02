"""The Hessian of a linear's squared output error, H = 2/N sum(x x^T), and the factor that GPTQ walks along."""

from dataclasses import dataclass

import torch
from torch import Tensor

from packager.errors import QuantizeError

# H is symmetric: of each panel of rows only what lies right of its diagonal is computed. Eight panels do 9/16 of the
# work and still are large products. Widths that no tile divides are several times slower (H100: 853 against 640).
_PANELS = 8
_PANEL_MULTIPLE = 128


class Hessian:
    """Accumulate H over batches of inputs.

    Args:
        in_features: columns of the linear.
        device: where H lives.

    Attributes:
        num_tokens: inputs seen so far.
    """

    def __init__(self, in_features: int, device: torch.device) -> None:
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        width = -(-in_features // (_PANELS * _PANEL_MULTIPLE)) * _PANEL_MULTIPLE
        self._panels = [(begin, min(begin + width, in_features)) for begin in range(0, in_features, width)]
        self.num_tokens = 0

    def add(self, x: Tensor) -> None:
        """Add inputs [..., in_features] of any float dtype; products are accumulated in float32."""
        x = x.reshape(-1, x.shape[-1])
        tensor_cores = x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)
        x = x if tensor_cores else x.float()
        for begin, end in self._panels:
            rows = self._sum[begin:end, begin:]
            if tensor_cores:
                torch.addmm(rows, x[:, begin:end].T, x[:, begin:], out_dtype=torch.float32, out=rows)
            else:
                rows.addmm_(x[:, begin:end].T, x[:, begin:])
        self.num_tokens += x.shape[0]

    def matrix(self) -> Tensor:
        """Return H, float32 [in_features, in_features], and forget it: the caller alone holds its memory.

        Raises:
            QuantizeError: an input held NaN or Inf, or no input arrived.
        """
        if self.num_tokens == 0:
            raise QuantizeError("a linear never received an input")
        H = self._sum.mul_(2.0 / self.num_tokens)
        del self._sum
        for begin, end in self._panels:
            H[end:, begin:end] = H[begin:end, end:].T
        # Squares only grow: a NaN or Inf in any input is still there in the sum of its squares.
        if not bool(torch.isfinite(H.diagonal()).all()):
            raise QuantizeError(
                "the activations contain NaN or Inf",
                hint="the base model overflows in this dtype: check its weights, or choose shorter calibration rows",
            )
        return H


@dataclass(frozen=True, kw_only=True)
class Factor:
    """What solving needs of H, shared by every linear that sees the same input.

    Attributes:
        M: upper triangular float32 [in_features, in_features] with H = M M^T, damped, columns in solving order. Its
            inverse is the Hinv of the paper: H^-1 = Hinv^T Hinv.
        order: int64 [in_features], the original column at each place of the solving order; None = as stored.
        dead: bool [in_features], columns (original order) whose input is always zero.
        damp_percent: the damping that made the factorisation succeed.
    """

    M: Tensor
    order: Tensor | None
    dead: Tensor
    damp_percent: float


def factorize(H: Tensor, *, desc_act: bool, damp_percent: float, damp_percent_limit: float) -> Factor:
    """Damp H and factor it: with J the reversal, J H J = L L^T gives M = J L J.

    One Cholesky, where the usual route takes Cholesky, inverse and Cholesky again: `solve` needs the inverse of M's
    diagonal blocks only. When the factorisation fails, damping is doubled up to `damp_percent_limit`, and the result
    says how far it went.

    Args:
        H: float32 [in_features, in_features]; its diagonal is changed (dead columns get 1).
        desc_act: order columns by decreasing diag(H); equal entries keep their order.
        damp_percent: fraction of mean(diag H) to add.
        damp_percent_limit: the largest fraction allowed.

    Raises:
        QuantizeError: not positive definite even at the limit.
    """
    diagonal = H.diagonal()
    dead = diagonal == 0
    diagonal.masked_fill_(dead, 1)
    order = torch.argsort(diagonal, descending=True, stable=True) if desc_act else None
    mean = diagonal.mean()
    damping = damp_percent
    while True:
        damped = H.flip(0, 1) if order is None else H[order.flip(0)][:, order.flip(0)]
        damped.diagonal().add_(damping * mean)
        L, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if bool((failed == 0) & L.diagonal().isfinite().all()):
            del H, diagonal
            return Factor(M=L.flip(0, 1), order=order, dead=dead, damp_percent=damping)
        if damping >= damp_percent_limit:
            raise QuantizeError(
                "the Hessian cannot be factored",
                why=f"still not positive definite with damp_percent {damping:g}, the recipe's damp_percent_limit",
                hint="use more calibration rows, or raise damp_percent_limit",
            )
        damping = min(2 * damping, damp_percent_limit)
