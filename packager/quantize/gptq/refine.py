"""Refinement after the column loop: better scales and integers, from the last column to the first.

With R = w - q, the loss of an output feature is |E|^2 / 2 with E = U^T R, the errors of the column loop; row k of E
needs the columns up to k. The loss has the gradient G = H R = U E, whose row j needs the rows of E from j on. So a walk
from the last columns to the first needs E and U, and of H only the blocks on its diagonal. A step takes the best value
that the grid has, in one variable, and is taken only if the loss falls:

    an integer  d = (q_j' - q_j) scale changes the loss by d^2 H_jj / 2 - d G_j: the nearest to d = G_j / H_jj is best.
    a scale     s' = float16(s + (u G) / (u H u)), u = q - zero of the group's columns, changes them by (s' - s) u.

A change d of columns B takes U[B, :]^T d off E, and H[:, B] d off G. This is coordinate descent on the integers
(CDQuant, arXiv:2406.17542) and stage 2 of two-stage grid optimization (arXiv:2602.02126), in terms of E and U.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from packager.quantize.gptq.grid import GridRules, refitted_by
from packager.quantize.gptq.tensor_ops import Grids, LazyUpdates, TensorOps, ordered_rows

# Linears that were calibrated on fewer tokens are left: on the activations of a real model the loss on other text falls
# from 3 tokens per column on, and does not at 1.8 (docs/explanation/measurements.md).
TOKENS_PER_COLUMN = 2
_ROWS_AT_ONCE = 512  # of sums over E: keeps products of its size out of memory


@dataclass(frozen=True, kw_only=True)
class RoundedLinear:
    """Linears whose columns were all rounded; refinement overwrites `errors`, `q` and the scales.

    Columns are in an order in which groups are consecutive: the solving order, or that of the checkpoint for static
    order, in which the rows of U are no longer triangular.

    Attributes:
        errors: float32 [in_features, out_features], E = U^T (w - q), in solving order.
        q: uint8 [in_features, out_features].
        grids: of all groups.
        U: float32 [in_features, in_features], H = U U^T, in solving order.
        columns: int64 [in_features], the row of U of each column; None: in solving order.
        updates: multiplies by U, its rows in the order of `columns`; its deltas are lost.
    """

    errors: Tensor
    q: Tensor
    grids: Grids
    U: Tensor
    columns: Tensor | None
    updates: LazyUpdates


def refine(
    linear: RoundedLinear, spans: Sequence[Sequence[tuple[int, int]]], group_size: int, rules: GridRules,
    allowed: Tensor, ops: TensorOps, *, inline: bool,
) -> None:  # fmt: skip
    """Refit each group's scale once and choose each column's integer once, from the last column to the first.

    Groups inside a column block are refitted when the walk reaches them, just before their columns; others, which
    several column blocks share, before the walk.

    Args:
        linear: overwritten.
        spans: consecutive column blocks, each as its first column and the one after its last, in lists of blocks whose
            changes are taken off E together.
        group_size: columns of a group.
        rules: bits.
        allowed: bool [], or [experts]: which are refined.
        ops: the operations to use.
        inline: whether column blocks hold whole groups.
    """
    if not inline:
        _refit_shared_groups(linear, group_size, allowed)
    for blocks in reversed(spans):
        start, stop = blocks[0][0], blocks[-1][1]
        rows = ordered_rows(linear.U, linear.columns, start, stop)[..., linear.updates.first_row(start) :]
        H = ops.add_product(None, rows, rows.mT)
        G = linear.updates.gradient(start, stop, linear.errors)
        change = torch.empty_like(G)
        for begin, end in reversed(blocks):
            before, here = slice(0, begin - start), slice(begin - start, end - start)
            ops.refine_columns(
                G[..., here, :], H[..., here, here].contiguous(), linear.q[..., begin:end, :],
                linear.grids.of(slice(begin, end)), rules, group_size if inline else 0, allowed, change[..., here, :],
            )  # fmt: skip
            if begin > start:
                ops.add_product(G[..., before, :], -H[..., before, here], change[..., here, :])
        linear.errors[..., linear.updates.first_row(start) :, :].sub_(linear.updates.spread(start, stop, change))


def _refit_shared_groups(linear: RoundedLinear, group_size: int, allowed: Tensor) -> None:
    """Refit the scales of groups whose columns lie in several column blocks, the last group first.

    With u scale, the group's quantized columns B, and v = U[B, :]^T u scale: u G scale = v E and u H u scale^2 = v v.
    """
    grids, in_features = linear.grids, linear.q.shape[-2]
    for group in reversed(range(grids.scales.shape[-2])):
        begin, end = group * group_size, min((group + 1) * group_size, in_features)
        errors = linear.errors[..., linear.updates.first_row(begin) :, :]
        scale = grids.scales[..., group, :].clone()
        rounded = linear.q[..., begin:end, :].float().sub_(grids.zeros[..., group, None, :]).mul_(scale[..., None, :])
        v = linear.updates.spread(begin, end, rounded)
        del rounded
        projection, curvature = _products(v, errors)
        step = refitted_by(scale, projection / scale, curvature / scale.square()) * allowed[..., None]
        grids.scales[..., group, :] += step
        errors.addcmul_(v, (step / scale)[..., None, :], value=-1)


def _products(v: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sums of v E and v v over the rows, [..., out_features]."""
    parts = [slice(begin, begin + _ROWS_AT_ONCE) for begin in range(0, v.shape[-2], _ROWS_AT_ONCE)]
    both = [(v[..., part, :], errors[..., part, :]) for part in parts]
    return (
        torch.stack([(a * b).sum(-2) for a, b in both]).sum(0),
        torch.stack([a.square().sum(-2) for a, _ in both]).sum(0),
    )
