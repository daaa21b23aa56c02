"""The Hessian of a linear's squared output error, H = 2/N sum(x x^T), and the factor that GPTQ walks along."""

from dataclasses import dataclass

import torch
from torch import Tensor

from packager.errors import QuantizeError

# H is symmetric: of each panel of rows only what lies right of its diagonal is computed. Five panels or more do some
# 60 % of the work and still are large products. Widths that no tile divides are several times slower.
_PANELS = 5
_WIDEST_PANEL = 1024
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
        width = min(-(-in_features // (_PANELS * _PANEL_MULTIPLE)) * _PANEL_MULTIPLE, _WIDEST_PANEL)
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
            QuantizeError: no input arrived.
        """
        if self.num_tokens == 0:
            raise QuantizeError("a linear never received an input")
        H = self._sum.mul_(2.0 / self.num_tokens)
        del self._sum
        for begin, end in self._panels:
            H[end:, begin:end] = H[begin:end, end:].T
        return H


@dataclass(frozen=True, kw_only=True)
class Factor:
    """What solving needs of H, shared by every linear that sees the same input.

    Attributes:
        M: upper triangular float32 [in_features, in_features] with H = M M^T, damped, columns in solving order. Its
            inverse is the Hinv of the paper: H^-1 = Hinv^T Hinv.
        order: int64 [in_features], the original column at each place of the solving order; None = as stored.
        dead: bool [in_features], columns (original order) whose input is always zero.
        damp_percent: the damping that went into it.
        succeeded: bool [], on the device; False when H with this damping is not positive definite, or not finite.
    """

    M: Tensor
    order: Tensor | None
    dead: Tensor
    damp_percent: float
    succeeded: Tensor


def factorize(H: Tensor, *, desc_act: bool, damp_percent: float) -> Factor:
    """Damp H and factor it: with J the reversal, J H J = L L^T gives M = J L J.

    One Cholesky, where the usual route takes Cholesky, inverse and Cholesky again: `solve` needs the inverse of M's
    diagonal blocks only. Nothing here waits for a GPU to finish; whoever uses the result asks `succeeded` in time.

    Args:
        H: float32 [in_features, in_features]; not modified.
        desc_act: order columns by decreasing diag(H); equal entries keep their order.
        damp_percent: fraction of mean(diag H) to add.
    """
    dead = H.diagonal() == 0
    diagonal = H.diagonal().masked_fill(dead, 1)
    order = torch.argsort(diagonal, descending=True, stable=True) if desc_act else None
    diagonal = diagonal + damp_percent * diagonal.mean()
    if order is None:
        damped = H.flip(0, 1)
        damped.diagonal().copy_(diagonal.flip(0))
    else:
        backwards = order.flip(0)
        damped = H[backwards][:, backwards]
        damped.diagonal().copy_(diagonal[backwards])
    del H
    L, failed_at = torch.linalg.cholesky_ex(damped)
    del damped
    succeeded = (failed_at == 0) & L.diagonal().isfinite().all()
    return Factor(M=L.flip(0, 1), order=order, dead=dead, damp_percent=damp_percent, succeeded=succeeded)


def factorize_within(H: Tensor, *, desc_act: bool, damp_percent: float, damp_percent_limit: float) -> Factor:
    """Factor H as `factorize` does; when that fails, double the damping, up to `damp_percent_limit`.

    Raises:
        QuantizeError: H holds NaN or Inf, or is not positive definite even at the limit.
    """
    # Squares only grow: a NaN or Inf in any input is still there in the sum of its squares.
    if not bool(torch.isfinite(H.diagonal()).all()):
        raise QuantizeError(
            "the activations contain NaN or Inf",
            hint="the base model overflows in this dtype: check its weights, or choose shorter calibration rows",
        )
    while True:
        factor = factorize(H, desc_act=desc_act, damp_percent=damp_percent)
        if bool(factor.succeeded):
            return factor
        if damp_percent >= damp_percent_limit:
            raise QuantizeError(
                "the Hessian cannot be factored",
                why=f"still not positive definite with damp_percent {damp_percent:g}, the recipe's damp_percent_limit",
                hint="use more calibration rows, or raise damp_percent_limit",
            )
        damp_percent = min(2 * damp_percent, damp_percent_limit)
