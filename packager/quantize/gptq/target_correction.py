"""Target correction: the weights that a linear should have for the inputs that the quantized model gives it.

In the fp16 model a linear sees inputs x0, behind quantized linears it sees x. GPTQ makes Q x resemble W x, and what is
lost before the linear stays lost. What is wanted is W x0, of which x says a part: sum |W x0 - Q x|^2 has the minimum of
sum |T x - Q x|^2, with

    T = W + W S H^-1,  S = 2/N sum (x0 - x) x^T,  H = 2/N sum x x^T.

So GPTQ is given T in the place of W. S H^-1 fits the noise of the calibration text where H is small; H is damped by the
mean of its diagonal, far more than for the column loop, and a part of the correction is taken: QEP (quantization error
propagation, arXiv:2504.09629), whose program takes the half.

Where the outputs are fewer than half of the inputs, W S = 2/N sum W (x0 - x) x^T takes less than S: `shift_rows`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from packager.quantize.gptq.cholesky import DAMPED_PANEL, split_solve
from packager.quantize.gptq.choose_ops import ops_for
from packager.quantize.gptq.hessian import PanelSum, ProductSums, cholesky, required_sum
from packager.quantize.gptq.panels import shift_rows
from packager.quantize.gptq.tensor_ops import TensorOps

# Of mean(diag H), added to H where T is computed; QEP's program takes the same.
CORRECTION_DAMPING = 1.0
# The largest entry of a matrix when it becomes float16, which ends at 2^16; and the smallest one, to divide by.
_LARGEST_ENTRY, _SMALLEST_ENTRY = 2.0**14, 2.0**-100


class InputShift(ProductSums):
    """Accumulate S, the products of what the fp16 model's inputs of linears differ by with the inputs; or W S.

    Args:
        weights: [out_features, in_features] each, of the linears that see the inputs, in the fp16 model and its dtype.
        ops: the operations to use; None takes the device's.
    """

    def __init__(self, weights: Sequence[Tensor], ops: TensorOps | None = None) -> None:
        in_features = weights[0].shape[1]
        rows = shift_rows(in_features, sum(weight.shape[0] for weight in weights))
        super().__init__([slice(0, rows)], in_features, weights[0].device, ops)
        self._weight = None if rows == in_features else weights[0] if len(weights) == 1 else torch.cat(list(weights))

    def add(self, x: Tensor, reference: Tensor, part: int = 0) -> None:
        """Add inputs of the same tokens in both models.

        Args:
            x: [..., in_features], behind quantized linears.
            reference: likewise, of the fp16 model.
            part: of the rows, see `row_parts.part_of`.
        """
        x, reference = (each.reshape(-1, each.shape[-1]) for each in (x, reference))
        shift = reference - x
        if self._weight is not None:
            shift = shift @ self._weight.mT
        self.add_products(shift, x, part)

    def matrix(self) -> Tensor:
        """Return S or W S, float32 [in_features or out_features, in_features], and drop this object's reference.

        Raises:
            QuantizeError: no input arrived.
        """
        return shift_of_sum(self.take_total(), self.num_tokens)


def shift_of_sum(total: PanelSum | None, num_tokens: int) -> Tensor:
    """Return S or W S of a sum, which is overwritten.

    Raises:
        QuantizeError: there is no input.
    """
    (only,) = required_sum(total, num_tokens)
    return only.mul_(2.0 / num_tokens)


def corrected_targets(
    weights: Sequence[Tensor], H: Tensor, S: Tensor, *, strength: float, ops: TensorOps | None = None
) -> list[Tensor]:
    """Return T for linears that see the same input, float32 [out_features, in_features] each.

    The call does not wait for a GPU. NaN or Inf in H or S make targets that are not finite.

    On CUDA all products are on the tensor cores. S H^-1 is solved for with 22 bits (`split_solve`). Its product with W
    is one product in W's dtype: with u = 2^-11 for float16 and 2^-8 for bfloat16, T misses by at most A u |W| |S H^-1|,
    in norm by less than u of what is added to W. That is enough, because T only says what is rounded to a grid.

    Args:
        weights: [out_features, in_features] each, of one float dtype; not modified.
        H: float32 [in_features, in_features]; not modified.
        S: what `InputShift` gives for these weights; overwritten.
        strength: A, the part of the correction that is taken, 0 to 1.
        ops: the operations to use; None takes the device's.
    """
    ops = ops or ops_for(H.device)
    damped = H.clone()
    damping = CORRECTION_DAMPING * damped.diagonal().mean()
    damped.diagonal().add_(torch.where(damping == 0, 1, damping))  # 0: the inputs are always zero, and so is S
    # With this damping H is positive definite, unless a number in it is not finite.
    L, _ = cholesky(damped, DAMPED_PANEL)
    del damped
    change = solve_rows(S, L, ops)
    del S, L
    rows = [weight.shape[0] for weight in weights]
    if shift_rows(H.shape[0], sum(rows)) != H.shape[0]:
        parts = torch.split(change.mul_(strength), rows)
        return [part.add_(weight) for part, weight in zip(parts, weights, strict=True)]
    return _products(weights, change, strength, ops)


def solve_rows(P: Tensor, L: Tensor, ops: TensorOps) -> Tensor:
    """Return P A^-1, A = L L^T, float32 [k, n]; P and L may be overwritten."""
    return split_solve(P, L, ops) if P.is_cuda else torch.cholesky_solve(P.mT, L).mT


def _products(weights: Sequence[Tensor], change: Tensor, strength: float, ops: TensorOps) -> list[Tensor]:
    """Return W + A W (S H^-1) for each weight; `change`, S H^-1, is overwritten.

    One factor is enough for float16, which has 11 bits down to 2^-28 of the largest number: the damped H_ii, by whose
    roots the columns differ, are at most n + 1 times the least of them.
    """
    largest = torch.linalg.vector_norm(change, torch.inf).clamp(min=_SMALLEST_ENTRY)
    scale = torch.exp2(torch.floor(torch.log2(_LARGEST_ENTRY / largest)))
    entries = change.mul_(scale).to(weights[0].dtype)
    targets = [ops.add_product(None, weight, entries) for weight in weights]
    return [target.mul_(strength / scale).add_(weight) for target, weight in zip(targets, weights, strict=True)]
