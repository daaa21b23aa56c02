"""GPTQ's column loop: round a column, spread its error over those still to come (arXiv:2210.17323, algorithm 1)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from packager.gptq.grid import Grid, find_grid
from packager.gptq.hessian import Factor

COLUMN_BLOCK = 128


@dataclass(frozen=True, kw_only=True)
class GridRules:
    """How grids are chosen: the parameters of a variant that `solve` needs."""

    bits: int
    group_size: int
    sym: bool
    static_groups: bool
    scale_search: bool


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A quantized linear, columns in their original order.

    Attributes:
        q: uint8 [in_features, out_features].
        scales: float16 [n_groups, out_features].
        zeros: uint8 [n_groups, out_features].
        g_idx: int32 [in_features], the group of each column.
        losses: float32 [out_features], squared output error per calibration token.
    """

    q: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    losses: Tensor

    def dequantized(self) -> Tensor:
        """Return the weights a loader will compute with, float32 [in_features, out_features]."""
        groups = self.g_idx.long()
        return (self.q.float() - self.zeros.float()[groups]) * self.scales.float()[groups]

    def outputs(self, begin: int, end: int) -> "Solution":
        """Return the part for output features begin..end."""
        return Solution(
            q=self.q[:, begin:end],
            scales=self.scales[:, begin:end],
            zeros=self.zeros[:, begin:end],
            g_idx=self.g_idx,
            losses=self.losses[begin:end],
        )


def solve(weight: Tensor, factor: Factor, rules: GridRules) -> Solution:
    """Quantize a linear, or several that see the same input side by side.

    Args:
        weight: [in_features, out_features], any float dtype; not modified.
        factor: of the Hessian of these inputs.
        rules: bits, grouping and how grids are found.

    Groups are cut in solving order (so desc_act without static_groups gives a scattered g_idx); a group that begins
    inside a column block takes its grid from the columns as updated so far. `group_size` need not divide anything.
    """
    in_features, out_features = weight.shape
    W = weight.to(torch.float32, copy=True)
    W[factor.dead] = 0
    group_size = in_features if rules.group_size == -1 else rules.group_size
    order = factor.order if factor.order is not None else torch.arange(in_features, device=W.device)
    if rules.static_groups:
        grids = _static_grids(W, factor, group_size, rules)
        groups = order // group_size
    else:
        grids = []
        groups = torch.arange(in_features, device=W.device) // group_size
    W = W[order] if factor.order is not None else W
    q = torch.empty_like(W, dtype=torch.uint8)
    losses = torch.zeros(out_features, dtype=torch.float32, device=W.device)
    group_of = groups.tolist()
    for begin in range(0, in_features, COLUMN_BLOCK):
        end = min(begin + COLUMN_BLOCK, in_features)
        errors = torch.empty(end - begin, out_features, dtype=torch.float32, device=W.device)
        for i in range(begin, end):
            if len(grids) == group_of[i]:
                grids.append(_grid(W[i : i + group_size], factor.Hinv, i, rules))
            grid = grids[group_of[i]]
            column = grid.quantize(W[i])
            q[i] = column
            error = (W[i] - grid.dequantize(column)) / factor.Hinv[i, i]
            W[i:end].addr_(factor.Hinv[i, i:end], error, alpha=-1)
            errors[i - begin] = error
        losses += errors.square().sum(0)
        W[end:].addmm_(factor.Hinv[begin:end, end:].T, errors, alpha=-1)
    inverse = torch.argsort(order)
    return Solution(
        q=q[inverse],
        scales=torch.stack([grid.scale for grid in grids]).to(torch.float16),
        zeros=torch.stack([grid.zero for grid in grids]).to(torch.uint8),
        g_idx=groups[inverse].to(torch.int32),
        losses=losses / 2,
    )


def _grid(columns: Tensor, Hinv: Tensor, first: int, rules: GridRules) -> Grid:
    weight = None
    if rules.scale_search:
        weight = Hinv.diagonal()[first : first + columns.shape[0]].square().reciprocal()
    return find_grid(columns, bits=rules.bits, sym=rules.sym, search_weight=weight)


def _static_grids(W: Tensor, factor: Factor, group_size: int, rules: GridRules) -> list[Grid]:
    """Return the grids of the original, unordered columns."""
    weight = None
    if rules.scale_search:
        weight = factor.Hinv.diagonal().square().reciprocal()
        if factor.order is not None:
            weight = weight[torch.argsort(factor.order)]

    def grids() -> Iterator[Grid]:
        for begin in range(0, W.shape[0], group_size):
            part = slice(begin, begin + group_size)
            yield find_grid(
                W[part], bits=rules.bits, sym=rules.sym, search_weight=None if weight is None else weight[part]
            )

    return list(grids())
