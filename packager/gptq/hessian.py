"""The Hessian of a linear's squared output error, H = 2/N sum(x x^T), and the factor GPTQ walks along."""

from dataclasses import dataclass

import torch
from torch import Tensor

from packager.errors import QuantizeError


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
        self.num_tokens = 0

    def add(self, x: Tensor) -> None:
        """Add inputs [..., in_features] of any float dtype; products are accumulated in float32."""
        x = x.reshape(-1, x.shape[-1])
        if x.is_cuda and x.dtype in (torch.float16, torch.bfloat16):
            self._sum += torch.mm(x.T, x, out_dtype=torch.float32)
        else:
            x = x.float()
            self._sum.addmm_(x.T, x)
        self.num_tokens += x.shape[0]

    def matrix(self) -> Tensor:
        """Return H, float32 [in_features, in_features].

        Raises:
            QuantizeError: an input held NaN or Inf, or no input arrived.
        """
        if self.num_tokens == 0:
            raise QuantizeError("a linear never received an input")
        H = self._sum * (2.0 / self.num_tokens)
        if not bool(torch.isfinite(H).all()):
            raise QuantizeError(
                "the activations contain NaN or Inf",
                hint="the base model overflows in this dtype: check its weights, or choose shorter calibration rows",
            )
        return H


@dataclass(frozen=True, kw_only=True)
class Factor:
    """What solving needs of H, shared by every linear that sees the same input.

    Attributes:
        Hinv: upper triangular float32 [in_features, in_features] with H^-1 = Hinv^T Hinv, columns in solving order.
        order: int64 [in_features], the original column at each place of the solving order; None = as stored.
        dead: bool [in_features], columns (original order) whose input is always zero.
        damp_percent: the damping that made the factorisation succeed.
    """

    Hinv: Tensor
    order: Tensor | None
    dead: Tensor
    damp_percent: float


def factorize(H: Tensor, *, desc_act: bool, damp_percent: float, damp_percent_limit: float) -> Factor:
    """Damp H and factor its inverse: with J the reversal, J H J = L L^T gives Hinv = J L^-1 J.

    One Cholesky and one triangular inverse, where the usual route takes Cholesky, inverse and Cholesky again. When the
    factorisation fails, damping is doubled up to `damp_percent_limit`, and the result says how far it went.

    Args:
        H: float32 [in_features, in_features]; not modified.
        desc_act: order columns by decreasing diag(H); equal entries keep their order.
        damp_percent: fraction of mean(diag H) to add.
        damp_percent_limit: the largest fraction allowed.

    Raises:
        QuantizeError: not positive definite even at the limit.
    """
    diagonal = torch.diagonal(H).clone()
    dead = diagonal == 0
    diagonal[dead] = 1
    order = torch.argsort(diagonal, descending=True, stable=True) if desc_act else None
    H = H.clone()
    H.diagonal().copy_(diagonal)
    if order is not None:
        H = H[order][:, order]
    mean = diagonal.mean()
    damping = damp_percent
    while True:
        damped = H.flip(0, 1)
        damped.diagonal().add_(damping * mean)
        L, info = torch.linalg.cholesky_ex(damped)
        if int(info) == 0 and bool(torch.isfinite(L).all()):
            break
        if damping >= damp_percent_limit:
            raise QuantizeError(
                "the Hessian cannot be factored",
                why=f"still not positive definite with damp_percent {damping:g}, the recipe's damp_percent_limit",
                hint="use more calibration rows, or raise damp_percent_limit",
            )
        damping = min(2 * damping, damp_percent_limit)
    identity = torch.eye(H.shape[0], dtype=H.dtype, device=H.device)
    Hinv = torch.linalg.solve_triangular(L, identity, upper=False).flip(0, 1).contiguous()
    return Factor(Hinv=Hinv, order=order, dead=dead, damp_percent=damping)
