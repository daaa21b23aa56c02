"""Target correction: the weights that a linear should have for the inputs that the quantized model gives it.

In the fp16 model a linear sees inputs x0, behind quantized linears it sees x. GPTQ makes Q x resemble W x, and what is
lost before the linear stays lost. What is wanted is W x0, of which x says a part: sum |W x0 - Q x|^2 has the minimum of
sum |T x - Q x|^2, with

    T = W + W S^T H^-1,  S = 2/N sum x (x0 - x)^T,  H = 2/N sum x x^T.

So GPTQ is given T in the place of W. H^-1 S fits the noise of the calibration text where H is small; H is damped by the
mean of its diagonal, far more than for the column loop, and a part of the correction is taken: QEP (quantization error
propagation, arXiv:2504.09629), whose program takes the half.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from packager.quantize.gptq.hessian import PanelSum, ProductSums, cholesky, required_sum
from packager.quantize.gptq.tensor_ops import TensorOps

# Of mean(diag H), added to H where T is computed; QEP's program takes the same.
CORRECTION_DAMPING = 1.0


class InputShift(ProductSums):
    """Accumulate S, the products of a linear's inputs with what the fp16 model's differ by.

    Args:
        in_features: columns of the linear.
        device: where S is accumulated.
        ops: the operations to use; None takes the device's.
    """

    def __init__(self, in_features: int, device: torch.device, ops: TensorOps | None = None) -> None:
        super().__init__([slice(0, in_features)], in_features, device, ops)

    def add(self, x: Tensor, reference: Tensor, part: int = 0) -> None:
        """Add inputs of the same tokens in both models.

        Args:
            x: [..., in_features], behind quantized linears.
            reference: likewise, of the fp16 model.
            part: of the rows, see `row_parts.part_of`.
        """
        x, reference = (each.reshape(-1, each.shape[-1]) for each in (x, reference))
        self.add_products(x, reference - x, part)

    def matrix(self) -> Tensor:
        """Return S, float32 [in_features, in_features], and drop this object's reference.

        Raises:
            QuantizeError: no input arrived.
        """
        return shift_of_sum(self.take_total(), self.num_tokens)


def shift_of_sum(total: PanelSum | None, num_tokens: int) -> Tensor:
    """Return S of a sum of x (x0 - x)^T, which is overwritten.

    Raises:
        QuantizeError: there is no input.
    """
    (only,) = required_sum(total, num_tokens)
    return only.mul_(2.0 / num_tokens)


def corrected_targets(weights: Sequence[Tensor], H: Tensor, S: Tensor, *, strength: float) -> list[Tensor]:
    """Return T for linears that see the same input, float32 [out_features, in_features] each.

    The call does not wait for a GPU. NaN or Inf in H or S make targets that are not finite.

    Args:
        weights: [out_features, in_features] each, any float dtype; not modified.
        H: float32 [in_features, in_features]; not modified.
        S: likewise.
        strength: the part of the correction that is taken, 0 to 1.
    """
    damped = H.clone()
    diagonal = damped.diagonal()
    diagonal += CORRECTION_DAMPING * diagonal.mean()
    # With this damping H is positive definite, unless a number in it is not finite.
    L, _ = cholesky(damped)
    del damped, diagonal
    if sum(weight.shape[0] for weight in weights) < H.shape[0]:  # fewer columns to solve for than S has
        return [_added(weight, torch.cholesky_solve(S @ weight.float().mT, L), strength) for weight in weights]
    shift = torch.cholesky_solve(S, L).mul_(strength)
    return [torch.addmm(weight.float(), weight.float(), shift.mT) for weight in weights]


def _added(weight: Tensor, change: Tensor, strength: float) -> Tensor:
    """Return a weight, [out_features, in_features], with a part of a change, [in_features, out_features], added."""
    return torch.add(weight, change.mT, alpha=strength)
