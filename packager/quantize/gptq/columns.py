"""GPTQ's inner loop: round a column, subtract its error from the columns after it (arXiv:2210.17323, algorithm 1)."""

import torch
from torch import Tensor

from packager.quantize.gptq.grid import GridRules, find_grids
from packager.quantize.gptq.tensor_ops import Grids, RoundedColumns


def round_columns(
    w: Tensor, original: Tensor, Hinv: Tensor, diagonal: Tensor, grids: Grids, rules: GridRules, inline_group_size: int,
    result: RoundedColumns,
) -> None:  # fmt: skip
    """Quantize the columns of one column block, in order.

    For each column i: q_i = clamp(round(w_i / scale) + zero, 0, 2^bits - 1), e_i = (w_i - scale (q_i - zero)) /
    Hinv_ii, and w_k -= Hinv_ik e_i for every later column k. The column's squared output error is e_i^2.

    Args:
        w: float32 [columns, out_features], with the updates from all columns before this block applied; overwritten.
        original: float [columns, out_features], the weights before any update.
        Hinv: float32 [columns, columns], upper triangular: the block's part of Hinv.
        diagonal: float32 [columns], 1 / Hinv_ii.
        grids: groups are those of these columns; grids found here are filled in.
        rules: bits, symmetry and search.
        inline_group_size: columns of a group whose grid is found when its first column is reached; 0: all are known.
        result: filled in.
    """
    for i, group in enumerate(grids.groups.tolist()):
        if inline_group_size and i % inline_group_size == 0:
            members = slice(i, i + inline_group_size)
            scales, zeros = find_grids(w[members], inline_group_size, rules, diagonal[members].square())
            grids.scales[group], grids.zeros[group] = scales[0], zeros[0]
        scale, zero = grids.scales[group], grids.zeros[group]
        q = torch.clamp(torch.round(w[i] * scale.reciprocal()) + zero, 0, rules.maxq)
        quantized = (q - zero) * scale
        error = (w[i] - quantized) * diagonal[i]
        w[i + 1 :].addr_(Hinv[i, i + 1 :], error, alpha=-1)
        result.q[i] = q
        result.delta[i] = original[i].float() - quantized
        result.squared_errors.add_(error.square())
