"""GPTQ over all columns of a linear: grids, rounding, and updates of later columns, column block by column block.

H = U U^T with U upper triangular and Hinv = U^-1, so H^-1 = Hinv^T Hinv. A weight row w becomes q, column by column:

    e_j = (w'_j - q_j) / Hinv_jj, and e_j Hinv[j, k] is subtracted from every later w_k. Hence w - q = e Hinv.
    Before a block B of columns, with < for all columns before it: w'_B = w_B - e_< Hinv[<, B].
    From Hinv U = I: Hinv[<, B] = -Hinv[<, <] U[<, B] Hinv[B, B], and e_< Hinv[<, <] = (w - q)_<.
    Hence w'_B = w_B + (w - q)_< U[<, B] Hinv[B, B], and Hinv[B, B] is the inverse of U[B, B].

So U is all that is needed of H: its whole inverse, the paper's Hinv, is never formed. `delta` is w - q, and the
`pending update` of B is (w - q)_< U[<, B]. Weights are held transposed, [in_features, out_features]: a column of the
paper is one contiguous row here, and the checkpoint format packs along the same axis.

The experts of a layer are one batch: every tensor of theirs has one more dimension in front. Experts do not interact,
so a batch is computed as one linear is, with the same number of launches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from packager.quantize.gptq.cholesky import inverse_blocks
from packager.quantize.gptq.choose_ops import ops_for
from packager.quantize.gptq.column_blocks import column_blocks, inline_group_size, some_at_once
from packager.quantize.gptq.grid import GridRules
from packager.quantize.gptq.hessian import Factor
from packager.quantize.gptq.refine import RoundedLinear, refine
from packager.quantize.gptq.tensor_ops import Grids, RoundedColumns, TensorOps, rows_of


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A quantized linear, columns in their original order; or a batch of experts, one more dimension in front.

    Attributes:
        q: uint8 [in_features, out_features].
        scales: float16 [n_groups, out_features].
        zeros: uint8 [n_groups, out_features].
        g_idx: int32 [in_features], the group of each column.
        losses: float32 [out_features], squared output error per calibration token.
        unrefined_losses: the same before the refinement; `losses` itself where there was none.
    """

    q: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    losses: Tensor
    unrefined_losses: Tensor

    def dequantize_into(self, weight: Tensor, ops: TensorOps | None = None) -> None:
        """Overwrite a linear's weight, [out_features, in_features], with the weights that a loader reads.

        Args:
            weight: any float dtype, rows dense.
            ops: the operations to use; None takes the device's.
        """
        (ops or ops_for(weight.device)).dequantize(weight, self.q, self.zeros, self.scales, self.g_idx)

    def of_expert(self, expert: int) -> "Solution":
        """Return the solution of one expert of a batch."""
        return Solution(
            q=self.q[expert],
            scales=self.scales[expert],
            zeros=self.zeros[expert],
            g_idx=self.g_idx[expert],
            losses=self.losses[expert],
            unrefined_losses=self.unrefined_losses[expert],
        )

    def dequantized(self, ops: TensorOps | None = None) -> Tensor:
        """Return the weights that a loader reads, float32 [out_features, in_features]."""
        weight = torch.empty(self.q.mT.shape, dtype=torch.float32, device=self.q.device)
        self.dequantize_into(weight, ops)
        return weight

    def by_linear(self, out_features: Sequence[int]) -> "list[Solution]":
        """Split the solution of linears that were solved side by side."""
        ends = list(accumulate(out_features))
        parts = [slice(end - width, end) for end, width in zip(ends, out_features, strict=True)]
        return [
            Solution(
                q=self.q[..., part],
                scales=self.scales[..., part],
                zeros=self.zeros[..., part],
                g_idx=self.g_idx,
                losses=self.losses[..., part],
                unrefined_losses=self.unrefined_losses[..., part],
            )
            for part in parts
        ]

    def scales_are_finite(self) -> Tensor:
        """Return whether every scale fits float16, bool [] on the device; reading it waits for a GPU to finish."""
        return torch.isfinite(self.scales).all()


def solve(
    weights: Sequence[Tensor], factor: Factor, rules: GridRules, *, refined: Sequence[bool] = (),
    ops: TensorOps | None = None,
) -> Solution:  # fmt: skip
    """Quantize linears that see the same input, side by side; or each expert's, all experts of a batch at once.

    A group's grid is found from its updated columns when the first of them is reached, but for static order: there all
    grids are found at first, from the columns as stored.

    Args:
        weights: [out_features, in_features] each, any float dtype, or [experts, out_features, in_features]; not
            modified.
        factor: of the Hessian of these inputs, or of each expert's, with the order of columns.
        rules: how grids are found.
        refined: whether the linears are refined when all columns are quantized, or which experts of a batch; empty for
            none.
        ops: the operations to use; None takes the device's.
    """
    size, perm = factor.order.size(factor.dead.shape[-1]), factor.perm
    ops = ops or ops_for(factor.U.device)
    inverse_perm = None if perm is None else torch.argsort(perm)
    weight = ops.permute_columns(weights, factor.dead, inverse_perm)
    solver = _ColumnSolver(weight=weight, U=factor.U, rules=rules, group_size=size, ops=ops, keep_errors=any(refined))
    del weight
    if factor.order.has_static_grids:
        solver.grids = _static_grids(weights, factor, rules, ops)
    solver.run(find=not factor.order.has_static_grids)
    unrefined_losses = losses = solver.squared_errors / 2
    if any(refined):
        losses = solver.refine(refined, perm if factor.order.has_static_grids else None)
    grids = solver.grids
    if factor.order.act_order == "group" and perm is not None:
        grids = _by_stored_group(grids, perm[..., ::size] // size)
    return Solution(
        q=solver.q if inverse_perm is None else rows_of(solver.q, inverse_perm),
        scales=grids.scales.to(torch.float16),
        zeros=grids.zeros.to(torch.uint8),
        g_idx=(grids.groups if inverse_perm is None else grids.groups.gather(-1, inverse_perm)).to(torch.int32),
        losses=losses,
        unrefined_losses=unrefined_losses,
    )


def _static_grids(weights: Sequence[Tensor], factor: Factor, rules: GridRules, ops: TensorOps) -> Grids:
    """Return the grids of the groups of stored columns, found from these columns; `groups` is in solving order."""
    assert factor.perm is not None, "static order permutes"  # noqa: S101
    size = factor.order.size(factor.dead.shape[-1])
    diagonal = factor.U.diagonal(dim1=-2, dim2=-1)
    column_weight = torch.empty_like(diagonal).scatter_(-1, factor.perm, diagonal.square())
    as_stored = ops.permute_columns(weights, factor.dead, None)
    scales, zeros = ops.find_grids(as_stored.float(), size, rules, column_weight)
    return Grids(scales=scales, zeros=zeros, groups=factor.perm // size)


def _by_stored_group(grids: Grids, stored: Tensor) -> Grids:
    """Return grids by the number of the stored group; `stored`, [..., n_groups], has it of each group as solved."""
    back = torch.argsort(stored)
    return Grids(
        scales=rows_of(grids.scales, back), zeros=rows_of(grids.zeros, back), groups=stored.gather(-1, grids.groups)
    )


class _ColumnSolver:
    """One pass over the columns, all in solving order.

    Attributes:
        diagonal: float32 [in_features], of U, which is 1 / Hinv_ii: its square weights the squared error of a column.
        grids: of the groups reached so far.
        q: uint8 [in_features, out_features].
        squared_errors: float32 [out_features].
        errors: float32 [in_features, out_features], for the refinement; else None.
    """

    def __init__(
        self, *, weight: Tensor, U: Tensor, rules: GridRules, group_size: int, ops: TensorOps, keep_errors: bool
    ) -> None:
        *experts, in_features, out_features = weight.shape
        self._weight, self._U, self._rules, self._group_size, self._ops = weight, U, rules, group_size, ops
        self._updates = ops.lazy_updates(U, weight)
        self.diagonal = U.diagonal(dim1=-2, dim2=-1).contiguous()
        n_groups = -(-in_features // group_size)
        scales = torch.empty(*experts, n_groups, out_features, dtype=torch.float32, device=weight.device)
        groups = (
            (torch.arange(in_features, device=weight.device) // group_size).expand(*experts, in_features).contiguous()
        )
        self.grids = Grids(scales=scales, zeros=torch.empty_like(scales), groups=groups)
        self.q = torch.empty_like(weight, dtype=torch.uint8)
        self.squared_errors = torch.zeros(*experts, out_features, dtype=torch.float32, device=weight.device)
        self.errors = torch.empty_like(weight, dtype=torch.float32) if keep_errors else None

    def run(self, *, find: bool) -> None:
        """Quantize every column; find the grids on the way, or use the given ones."""
        blocks = column_blocks(self._weight.shape[-2], self._group_size)
        inverses = inverse_blocks(self._U, blocks)
        for some in some_at_once(len(blocks)):
            self._run_some(blocks[some], inverses[some], find=find)

    def refine(self, refined: Sequence[bool], perm: Tensor | None) -> Tensor:
        """Lower the losses of all linears, or of the experts that are True; return the new losses.

        Args:
            refined: one value, or one for each expert.
            perm: of static order, whose groups are consecutive as stored alone: columns are refined in that order.
        """
        assert self.errors is not None, "the errors are kept"  # noqa: S101
        blocks = column_blocks(self._weight.shape[-2], self._group_size)
        del self._weight
        q, groups = self.q, self.grids.groups
        back = None if perm is None else torch.argsort(perm)
        if back is not None:
            q, groups = rows_of(q, back), groups.gather(-1, back)
            self._updates.reorder(back)
        grids = replace(self.grids, groups=groups)
        linear = RoundedLinear(errors=self.errors, q=q, grids=grids, U=self._U, columns=back, updates=self._updates)
        allowed = torch.tensor(refined, device=q.device).reshape(q.shape[:-2])
        spans = [blocks[some] for some in some_at_once(len(blocks))]
        inline = inline_group_size(self._group_size) > 0
        refine(linear, spans, self._group_size, self._rules, allowed, self._ops, inline=inline)
        self.q = q if perm is None else rows_of(q, perm)
        losses: Tensor = torch.linalg.vector_norm(self.errors, dim=-2).square() / 2
        return torch.where(allowed[..., None], losses, self.squared_errors / 2)

    def _run_some(self, blocks: Sequence[tuple[int, int]], inverses: Sequence[Tensor], *, find: bool) -> None:
        """Quantize consecutive column blocks: w'_B = w_B + pending_B Hinv[B, B] for each block B, then its columns."""
        start, stop = blocks[0][0], blocks[-1][1]
        weight = self._weight[..., start:stop, :].to(torch.float32, copy=True)
        pending = self._updates.pending_update(start, start, stop) if start else torch.zeros_like(weight)
        delta = torch.empty_like(weight)
        inline = inline_group_size(self._group_size) if find else 0
        for (begin, end), Hinv in zip(blocks, inverses, strict=True):
            here, after = slice(begin - start, end - start), slice(end - start, None)
            updated = self._ops.add_product(weight[..., here, :], Hinv.mT, pending[..., here, :])
            if find and not inline and begin % self._group_size == 0:
                self._find_grid(begin, delta[..., : begin - start, :])
            result = RoundedColumns(
                q=self.q[..., begin:end, :], delta=delta[..., here, :], squared_errors=self.squared_errors
            )
            self._ops.round_columns(
                updated, self._weight[..., begin:end, :], Hinv, self.diagonal[..., begin:end],
                self.grids.of(slice(begin, end)), self._rules, inline, result,
            )  # fmt: skip
            if self.errors is not None:
                within = self._U[..., begin:end, begin:end].mT
                self.errors[..., begin:end, :] = self._ops.add_product(
                    pending[..., here, :], within, delta[..., here, :]
                )
            if end < stop:
                self._ops.add_product(pending[..., after, :], self._U[..., begin:end, end:stop].mT, delta[..., here, :])
        self._updates.record(start, delta)

    def _find_grid(self, begin: int, delta: Tensor) -> None:
        """Find the grid of the group at `begin`, from its columns with all updates of earlier columns applied.

        Args:
            begin: the group's first column.
            delta: of the columns just before `begin` that are not recorded yet.
        """
        end = min(begin + self._group_size, self._weight.shape[-2])
        updated = self._weight[..., begin:end, :].float()
        if begin:
            recorded = begin - delta.shape[-2]
            pending = self._ops.add_product(None, self._U[..., recorded:begin, begin:end].mT, delta)
            if recorded:
                pending += self._updates.pending_update(recorded, begin, end)
            # Not in place: `updated` is a view of the given weights where they are float32.
            lower = self._U[..., begin:end, begin:end].mT
            solved = torch.linalg.solve_triangular(lower, pending, upper=False)
            del pending
            updated = updated + solved
            del solved
        column_weight = self.diagonal[..., begin:end].square()
        scales, zeros = self._ops.find_grids(updated, self._group_size, self._rules, column_weight)
        group = slice(begin // self._group_size, begin // self._group_size + 1)
        self.grids.scales[..., group, :], self.grids.zeros[..., group, :] = scales, zeros
