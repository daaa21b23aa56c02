"""The Hessian of a linear's squared output error, H = 2/N sum(x x^T), and its triangular factor U, H = U U^T."""

from dataclasses import dataclass

import torch
from torch import Tensor

from packager.errors import QuantizeError
from packager.quantize.gptq.choose_ops import ops_for
from packager.quantize.gptq.tensor_ops import TensorOps

# H is symmetric: of each panel of rows only the part right of its diagonal is computed. Five panels or more do some
# 60 % of the work and still are large products. Widths that are no multiple of a tile are several times slower.
_PANELS = 5
_WIDEST_PANEL = 1024
_PANEL_MULTIPLE = 128


class Hessian:
    """Accumulate H over batches of inputs.

    Args:
        in_features: columns of the linear.
        device: where H is accumulated.
        ops: the operations to use; None takes the device's.

    Attributes:
        num_tokens: inputs seen so far.
    """

    def __init__(self, in_features: int, device: torch.device, ops: TensorOps | None = None) -> None:
        self._ops = ops or ops_for(device)
        self._sum = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        width = min(-(-in_features // (_PANELS * _PANEL_MULTIPLE)) * _PANEL_MULTIPLE, _WIDEST_PANEL)
        self._panels = [(begin, min(begin + width, in_features)) for begin in range(0, in_features, width)]
        self.num_tokens = 0

    def add(self, x: Tensor) -> None:
        """Add inputs [..., in_features] of any float dtype; products are accumulated in float32."""
        x = x.reshape(-1, x.shape[-1])
        for begin, end in self._panels:
            self._ops.add_product(self._sum[begin:end, begin:], x[:, begin:end].T, x[:, begin:])
        self.num_tokens += x.shape[0]

    def matrix(self) -> Tensor:
        """Return H, float32 [in_features, in_features], and drop this object's reference: the caller alone owns H.

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
    """The factored Hessian, shared by every linear that sees the same input.

    Attributes:
        U: upper triangular float32 [in_features, in_features] with H = U U^T, damped, columns in solving order. Its
            inverse is the paper's Hinv: H^-1 = Hinv^T Hinv.
        perm: int64 [in_features], the original column at each position of the solving order; None = as stored.
        dead: bool [in_features], columns (original order) whose input is always zero.
        damp_percent: the damping that was added to H.
        succeeded: bool [], on the device; False when H with this damping is not positive definite, or not finite.
    """

    U: Tensor
    perm: Tensor | None
    dead: Tensor
    damp_percent: float
    succeeded: Tensor


def factorize(H: Tensor, *, desc_act: bool, damp_percent: float) -> Factor:
    """Damp H and factor it: with J the reversal, J H J = L L^T gives U = J L J.

    One Cholesky replaces the usual Cholesky, inverse and second Cholesky: `solve` needs the inverse of U's diagonal
    blocks only. The call does not wait for a GPU; the caller must check `succeeded`.

    Args:
        H: float32 [in_features, in_features]; not modified.
        desc_act: order columns by decreasing diag(H); equal entries keep their order.
        damp_percent: fraction of mean(diag H) to add.
    """
    dead = H.diagonal() == 0
    diagonal = H.diagonal().masked_fill(dead, 1)
    perm = torch.argsort(diagonal, descending=True, stable=True) if desc_act else None
    diagonal = diagonal + damp_percent * diagonal.mean()
    if perm is None:
        damped = H.flip(0, 1)
        damped.diagonal().copy_(diagonal.flip(0))
    else:
        backwards = perm.flip(0)
        damped = H[backwards][:, backwards]
        damped.diagonal().copy_(diagonal[backwards])
    del H
    L, failed_at = torch.linalg.cholesky_ex(damped)
    del damped
    succeeded = (failed_at == 0) & L.diagonal().isfinite().all()
    return Factor(U=L.flip(0, 1), perm=perm, dead=dead, damp_percent=damp_percent, succeeded=succeeded)


def factorize_within(H: Tensor, *, desc_act: bool, damp_percent: float, damp_percent_limit: float) -> Factor:
    """Factor H like `factorize`; after each failure double the damping, up to `damp_percent_limit`.

    Raises:
        QuantizeError: H holds NaN or Inf, or is not positive definite even at the limit.
    """
    # A NaN or Inf in any input makes the sum of its column's squares NaN or Inf.
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
