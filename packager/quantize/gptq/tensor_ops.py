"""The operations that a kind of device implements in its own way, and the tensors that they share.

Every tensor may have one more dimension in front, the experts of a batch (as in torch.linalg): the same operation on
each of them. Without it, the operation is the one of a single linear.

`torch_ops` runs on every device, `triton_ops` on CUDA. `choose_ops` is the only place that chooses between them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor

from packager.quantize.gptq.grid import GridRules
from packager.quantize.gptq.routing import RoutedInputs


@dataclass(frozen=True, kw_only=True)
class Grids:
    """The grids of all groups; each group's entries are written when its grid is found.

    Attributes:
        scales: float32 [n_groups, out_features].
        zeros: float32 [n_groups, out_features].
        groups: int64 [columns], the group of each column, in solving order.
    """

    scales: Tensor
    zeros: Tensor
    groups: Tensor

    def of(self, columns: slice) -> "Grids":
        """Return the same grids for some of the columns."""
        return replace(self, groups=self.groups[..., columns])

    def of_expert(self, expert: int) -> "Grids":
        """Return the grids of one expert of a batch."""
        return Grids(scales=self.scales[expert], zeros=self.zeros[expert], groups=self.groups[expert])


@dataclass(frozen=True, kw_only=True)
class RoundedColumns:
    """The output of `TensorOps.round_columns`; the tensors are written in place.

    Attributes:
        q: uint8 [columns, out_features].
        delta: float32 [columns, out_features], W - Q: the original weight minus its quantized value. The paper's error
            divides the updated weight's by Hinv_ii; this one is neither updated nor divided.
        squared_errors: float32 [out_features], to which the columns' squared output errors are added.
    """

    q: Tensor
    delta: Tensor
    squared_errors: Tensor

    def of_expert(self, expert: int) -> "RoundedColumns":
        """Return the output for one expert of a batch."""
        return RoundedColumns(q=self.q[expert], delta=self.delta[expert], squared_errors=self.squared_errors[expert])


def rows_of(x: Tensor, rows: Tensor) -> Tensor:
    """Return rows of x, [..., n, m], by their numbers, int64 [..., k], which may be others for each expert."""
    return x[rows] if x.ndim == 2 else x.gather(-2, rows[..., None].expand(*rows.shape, x.shape[-1]))


def ordered_rows(x: Tensor, order: Tensor | None, begin: int, end: int) -> Tensor:
    """Return rows `begin` to `end` of x, [..., n, m], after its rows were put in an order; None keeps them.

    Only these rows are copied, where x itself in another order would take its memory again.
    """
    return x[..., begin:end, :] if order is None else rows_of(x, order[..., begin:end])


class LazyUpdates(Protocol):
    """The deltas of the columns quantized so far, and their products with U; for refinement, other products with it."""

    def record(self, begin: int, delta: Tensor) -> None:
        """Store the deltas, float32 [columns, out_features], of the columns from `begin` on."""

    def pending_update(self, until: int, begin: int, end: int) -> Tensor:
        """Return U[:until, begin:end]^T delta[:until], float32 [end - begin, out_features]."""

    def reorder(self, columns: Tensor) -> None:
        """Give the rows of U, one for each column, another order, int64 [in_features], for the products below."""

    def first_row(self, begin: int) -> int:
        """Return from where on U[begin:] is not zero: `begin`, or 0 when the rows of U were reordered."""

    def gradient(self, begin: int, end: int, errors: Tensor) -> Tensor:
        """Return U[begin:end, first:] errors[first:], float32 [end - begin, out_features]; the deltas are lost.

        `first` is `first_row(begin)`. Between two calls the norm of no output feature's errors may grow.
        """

    def spread(self, begin: int, end: int, change: Tensor) -> Tensor:
        """Return U[begin:end, first:]^T change, float32 [in_features - first, out_features]."""


class TensorOps(Protocol):
    """The operations of the solver that differ by device. Weights are held transposed, [in_features, out_features]."""

    def permute_columns(self, weights: Sequence[Tensor], dead: Tensor, inverse_perm: Tensor | None) -> Tensor:
        """Return linears side by side, [in_features, sum of out_features], contiguous, in solving order.

        Args:
            weights: [out_features, in_features] each, of one float dtype.
            dead: bool [in_features], columns that become zero.
            inverse_perm: int64 [in_features], the row of the result that each column becomes; None keeps the order.
        """

    def find_grids(self, w: Tensor, group_size: int, rules: GridRules, column_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Choose the grids of consecutive groups of columns; see `grid.find_grids`."""

    def round_columns(
        self, w: Tensor, original: Tensor, Hinv: Tensor, diagonal: Tensor, grids: Grids, rules: GridRules,
        inline_group_size: int, result: RoundedColumns,
    ) -> None:  # fmt: skip
        """Quantize the columns of one column block, in order; see `columns.round_columns`.

        The tensors of each expert are contiguous.
        """

    def refine_columns(
        self, G: Tensor, H: Tensor, q: Tensor, grids: Grids, rules: GridRules, inline_group_size: int, allowed: Tensor,
        change: Tensor,
    ) -> None:  # fmt: skip
        """Lower the loss of one column block's columns; see `columns.refine_columns`.

        The tensors of each expert are contiguous. `allowed`, bool [] or [experts], leaves experts as they are.
        """

    def dequantize(self, weight: Tensor, q: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor) -> None:
        """Overwrite a linear's weight with scale * (q - zero).

        Args:
            weight: [out_features, in_features], any float dtype, rows dense.
            q: uint8 [in_features, out_features], rows dense.
            zeros: uint8 [n_groups, out_features].
            scales: float16, like zeros.
            g_idx: int32 [in_features], the group of each column.
        """

    def split(
        self, x: Tensor, rows: Tensor | None, columns: Tensor | None, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return float16 `high` and `low` with high + low = x, its rows and columns multiplied by powers of two.

        The sum has 22 bits: low holds what rounding to high leaves.

        Args:
            x: float32 [n, m].
            rows: float32 [n], the factor of each row; None for 1.
            columns: float32 [m], likewise.
            out: float16 [n, m] each, of equal strides, rows dense, to be filled in; None allocates them.
        """

    def add_product(self, total: Tensor | None, a: Tensor, b: Tensor, alpha: float = 1) -> Tensor:
        """Return total + alpha a b, float32, accumulated in float32; `total` is overwritten, None stands for 0.

        Args:
            total: float32 [n, m].
            a: [n, k], float16, bfloat16 or float32.
            b: [k, m], of a's dtype.
            alpha: 1 where there is no total.
        """

    def add_routed_products(self, total: Tensor, inputs: RoutedInputs, experts: range, panel: int) -> None:
        """Add sum x x^T over each expert's inputs, accumulated in float32.

        Args:
            total: float32 [experts, n, n]; of each panel of rows, only the part right of its beginning is computed.
            inputs: of one batch.
            experts: which experts `total` holds.
            panel: rows of a panel.
        """

    def lazy_updates(self, U: Tensor, weight: Tensor) -> LazyUpdates:
        """Return the store of deltas for a factor, float32 [in_features, in_features], and the weights to quantize."""
