"""GPTQ's inner loop: round a column, spread its error over the columns after it (arXiv:2210.17323, algorithm 1)."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from packager.quantize.gptq.grid import GridRules, find_grids


@dataclass(frozen=True, kw_only=True)
class Grids:
    """The grids of all groups, filled in as they are found.

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
        return replace(self, groups=self.groups[columns])


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Quantized columns; the tensors are written in place.

    Attributes:
        q: uint8 [columns, out_features].
        change: float32 [columns, out_features], the weight minus what it was quantized to.
        squared_errors: float32 [out_features], added to: what the columns cost in squared output error.
    """

    q: Tensor
    change: Tensor
    squared_errors: Tensor


def round_columns(
    w: Tensor, original: Tensor, Hinv: Tensor, diagonal: Tensor, grids: Grids, rules: GridRules, find_every: int,
    result: Columns,
) -> None:  # fmt: skip
    """Quantize the columns of one column block, in order. `kernels.round_columns` is the same for CUDA.

    Args:
        w: float32 [columns, out_features], with the errors of every column before this block already spread over it;
            overwritten.
        original: float [columns, out_features], the weights before anything was spread.
        Hinv: float32 [columns, columns], upper triangular, the block's part of it.
        diagonal: float32 [columns], 1 / Hinv_ii.
        grids: groups are those of these columns; grids found here are filled in.
        rules: bits, symmetry and search.
        find_every: columns of a group whose grid is to be found when its first column is reached; 0: all are known.
        result: filled in.
    """
    for i, group in enumerate(grids.groups.tolist()):
        if find_every and i % find_every == 0:
            members = slice(i, i + find_every)
            scales, zeros = find_grids(w[members], find_every, rules, diagonal[members].square())
            grids.scales[group], grids.zeros[group] = scales[0], zeros[0]
        scale, zero = grids.scales[group], grids.zeros[group]
        q = torch.clamp(torch.round(w[i] * scale.reciprocal()) + zero, 0, rules.maxq)
        quantized = (q - zero) * scale
        error = (w[i] - quantized) * diagonal[i]
        w[i + 1 :].addr_(Hinv[i, i + 1 :], error, alpha=-1)
        result.q[i] = q
        result.change[i] = original[i].float() - quantized
        result.squared_errors.add_(error.square())
