"""The Hessian of a linear's squared output error, H = 2/N sum(x x^T), and its triangular factor U, H = U U^T."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from packager.errors import QuantizeError
from packager.quantize.gptq.cholesky import SPLIT_PANEL, SPLIT_WIDTH, blocked_cholesky, split_cholesky
from packager.quantize.gptq.choose_ops import ops_for
from packager.quantize.gptq.order import ColumnOrder
from packager.quantize.gptq.panels import panels
from packager.quantize.gptq.row_parts import PartialSum, add_up, join_pairs
from packager.quantize.gptq.tensor_ops import TensorOps

OVERFLOW_HINT = "the base model overflows in this dtype: check its weights, or choose shorter calibration rows"

# A sum of x x^T: its panels, each [width, in_features - its first row].
PanelSum = Sequence[Tensor]


class ProductSums:
    """Sums of x y^T over batches of inputs, panel by panel, in the order of `packager.quantize.gptq.row_parts`.

    Args:
        spans: the rows of each panel, whose columns begin at its own first row.
        in_features: columns.
        device: where they are accumulated.
        ops: the operations to use; None takes the device's.

    Attributes:
        num_tokens: inputs seen so far.
    """

    def __init__(
        self, spans: Sequence[slice], in_features: int, device: torch.device, ops: TensorOps | None = None
    ) -> None:
        self._ops = ops or ops_for(device)
        self._device = device
        self._spans, self._shapes = spans, [(span.stop - span.start, in_features - span.start) for span in spans]
        self._sums: dict[PartialSum, Tensor] = {}
        self.num_tokens = 0

    def add_products(self, x: Tensor, y: Tensor, part: int) -> None:
        """Add x y^T, of [tokens, in_features] each; products are accumulated in float32."""
        if (0, part) not in self._sums:
            self.join()
            elements = sum(map(math.prod, self._shapes))
            self._sums[0, part] = torch.zeros(elements, dtype=torch.float32, device=self._device)
        for total, panel in zip(self.panels_of(self._sums[0, part]), self._spans, strict=True):
            self._ops.add_product(total, x[:, panel].T, y[:, panel.start :])
        self.num_tokens += x.shape[0]

    def panels_of(self, total: Tensor) -> PanelSum:
        """Return the panels of a sum that lies in one piece of memory: pieces of many sizes would leave gaps."""
        pieces = torch.split(total, [math.prod(shape) for shape in self._shapes])
        return [piece.view(shape) for piece, shape in zip(pieces, self._shapes, strict=True)]

    def join(self) -> None:
        """Add the sums that can be added now, because no input of theirs follows."""
        join_pairs(self._sums, Tensor.add_)

    def take_sums(self) -> dict[PartialSum, Tensor]:
        """Return the sums, float32 [elements of all panels]; this object keeps no reference to them."""
        self.join()
        sums, self._sums = self._sums, {}
        return sums

    def take_total(self) -> PanelSum | None:
        """Return the sum over all inputs, None if there were none; this object keeps no reference to it."""
        return self.panels_of(add_up(self.take_sums(), Tensor.add_)) if self.num_tokens else None


class Hessian(ProductSums):
    """Accumulate H over batches of inputs.

    Args:
        in_features: columns of the linear.
        device: where H is accumulated.
        ops: the operations to use; None takes the device's.
    """

    def __init__(self, in_features: int, device: torch.device, ops: TensorOps | None = None) -> None:
        super().__init__(panels(in_features), in_features, device, ops)

    def add(self, x: Tensor, part: int = 0) -> None:
        """Add inputs [..., in_features] of any float dtype; products are accumulated in float32.

        Args:
            x: the inputs.
            part: of the rows, see `row_parts.part_of`; a part's inputs are added one after the other.
        """
        x = x.reshape(-1, x.shape[-1])
        self.add_products(x, x, part)

    def matrix(self) -> Tensor:
        """Return H, float32 [in_features, in_features], and drop this object's reference: the caller alone owns H.

        Raises:
            QuantizeError: no input arrived.
        """
        return hessian_of_sum(self.take_total(), self.num_tokens)


def required_sum(total: PanelSum | None, num_tokens: int) -> PanelSum:
    """Return a sum over tokens.

    Raises:
        QuantizeError: there is no input.
    """
    if total is None or num_tokens == 0:
        raise QuantizeError("a linear never received an input")
    return total


def hessian_of_sum(total: PanelSum | None, num_tokens: int) -> Tensor:
    """Return H of a sum of x x^T, float32 [in_features, in_features].

    Raises:
        QuantizeError: there is no input.
    """
    total = required_sum(total, num_tokens)
    n = total[0].shape[1]
    H = torch.empty(n, n, dtype=torch.float32, device=total[0].device)
    for panel, each in zip(panels(n), total, strict=True):
        torch.mul(each, 2.0 / num_tokens, out=H[panel, panel.start :])
    return mirror(H)


def mirror(H: Tensor) -> Tensor:
    """Complete H, [..., n, n], in place: each panel of rows is known from its own columns on."""
    for panel in panels(H.shape[-1]):
        H[..., panel.stop :, panel] = H[..., panel, panel.stop :].mT
    return H


@dataclass(frozen=True, kw_only=True)
class Factor:
    """The factored Hessian, shared by every linear that sees the same input; or those of a batch of experts.

    For a batch, every tensor has one more dimension in front.

    Attributes:
        order: of columns, and their groups.
        U: upper triangular float32 [in_features, in_features] with H = U U^T, damped, columns in solving order. Its
            inverse is the paper's Hinv: H^-1 = Hinv^T Hinv.
        perm: int64 [in_features], the original column at each position of the solving order; None = as stored.
        dead: bool [in_features], columns (original order) whose input is always zero.
        damp_percents: the damping that was added to H, one number for each expert.
        succeeded: bool [], on the device; False when H with this damping is not positive definite, or not finite.
    """

    order: ColumnOrder
    U: Tensor
    perm: Tensor | None
    dead: Tensor
    damp_percents: tuple[float, ...]
    succeeded: Tensor

    @property
    def damp_percent(self) -> float:
        """The damping of a single Hessian."""
        (only,) = self.damp_percents
        return only


def factorize(H: Tensor, order: ColumnOrder, *, damp_percent: float) -> Factor:
    """Damp H and factor it: with J the reversal, J H J = L L^T gives U = J L J.

    One Cholesky replaces the usual Cholesky, inverse and second Cholesky: `solve` needs the inverse of U's diagonal
    blocks only. The call does not wait for a GPU; the caller must check `succeeded`.

    Args:
        H: float32 [in_features, in_features], or [experts, in_features, in_features]; not modified.
        order: in which columns will be quantized.
        damp_percent: fraction of mean(diag H) to add.
    """
    count = 1 if H.ndim == 2 else H.shape[0]
    dead = H.diagonal(dim1=-2, dim2=-1) == 0
    diagonal = H.diagonal(dim1=-2, dim2=-1).masked_fill(dead, 1)
    perm = order.permutation(diagonal)
    diagonal = diagonal + damp_percent * diagonal.mean(-1, keepdim=True)
    backwards = torch.arange(H.shape[-1] - 1, -1, -1, device=H.device) if perm is None else perm.flip(-1)
    damped = H.flip(-2, -1) if perm is None else _reordered(H, backwards)
    damped.diagonal(dim1=-2, dim2=-1).copy_(diagonal.gather(-1, backwards.expand_as(diagonal)))
    del H
    L, failed = cholesky(damped)
    del damped
    succeeded = ~failed & L.diagonal(dim1=-2, dim2=-1).isfinite().all(-1)
    return Factor(
        order=order, U=L.flip(-2, -1), perm=perm, dead=dead, damp_percents=(damp_percent,) * count, succeeded=succeeded
    )  # fmt: skip


def _reordered(H: Tensor, order: Tensor) -> Tensor:
    """Return H, [..., n, n], with rows and columns in the order of `order`, [..., n]."""
    if H.ndim == 2:
        return H[order][:, order]
    found = torch.empty_like(H)
    for alone, its_order, out in zip(H, order, found, strict=True):
        torch.index_select(alone[its_order], 1, its_order, out=out)
    return found


def cholesky(A: Tensor, panel: int = SPLIT_PANEL) -> tuple[Tensor, Tensor]:
    """Return L with A = L L^T, and bool [...], whether that failed; A may be overwritten.

    Args:
        A: float32 [..., n, n].
        panel: of `split_cholesky`, where that is used.
    """
    if A.is_cuda and A.ndim == 3:
        return blocked_cholesky(A)
    if A.is_cuda and A.shape[-1] >= SPLIT_WIDTH:
        return split_cholesky(A, ops_for(A.device), panel)
    L, failed_at = torch.linalg.cholesky_ex(A)
    return L, failed_at != 0


def factorize_within(H: Tensor, order: ColumnOrder, *, damp_percent: float, damp_percent_limit: float) -> Factor:
    """Factor H like `factorize`; after each failure double the damping, up to `damp_percent_limit`.

    Of a batch, only the experts that fail are damped further.

    Raises:
        QuantizeError: H holds NaN or Inf, or is not positive definite even at the limit; names the experts of a batch
            by their positions in it.
    """
    # A NaN or Inf in any input makes the sum of its column's squares NaN or Inf.
    if failed := _positions(~torch.isfinite(H.diagonal(dim1=-2, dim2=-1)).all(-1)):
        raise QuantizeError(
            f"the activations{_of_experts(H, failed)} contain NaN or Inf",
            hint=OVERFLOW_HINT,
        )
    factor = factorize(H, order, damp_percent=damp_percent)
    while failed := _positions(~factor.succeeded):
        if damp_percent >= damp_percent_limit:
            raise QuantizeError(
                f"the Hessian{_of_experts(H, failed)} cannot be factored",
                why=f"still not positive definite with damp_percent {damp_percent:g}, the recipe's damp_percent_limit",
                hint="use more calibration rows, or raise damp_percent_limit",
            )
        damp_percent = min(2 * damp_percent, damp_percent_limit)
        if H.ndim == 2:
            del factor  # its U would take as much as H beside the next one
            factor = factorize(H, order, damp_percent=damp_percent)
        else:
            again = factorize(H[failed], order, damp_percent=damp_percent)
            factor = _with(factor, failed, again)
    return factor


def _positions(wrong: Tensor) -> list[int]:
    """Return where a bool [] or [experts] is True; this waits for a GPU."""
    return [position for position, each in enumerate(wrong.reshape(-1).tolist()) if each]


def _of_experts(H: Tensor, positions: list[int]) -> str:
    return "" if H.ndim == 2 else f" of experts {', '.join(map(str, positions))}"


def _with(factor: Factor, positions: list[int], again: Factor) -> Factor:
    """Return a batch's factor in which some experts were factored again; U is overwritten."""
    factor.U[positions] = again.U
    succeeded = factor.succeeded.clone()
    succeeded[positions] = again.succeeded
    damps = list(factor.damp_percents)
    for position, damp in zip(positions, again.damp_percents, strict=True):
        damps[position] = damp
    return replace(factor, damp_percents=tuple(damps), succeeded=succeeded)
