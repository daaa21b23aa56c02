"""GPTQ's inner loop, column by column (arXiv:2210.17323, algorithm 1), and that of the refinement after it."""

import torch
from torch import Tensor

from packager.quantize.gptq.grid import LEAST_GAIN, GridRules, find_grids, refitted_by
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


def refine_columns(
    G: Tensor, H: Tensor, q: Tensor, grids: Grids, rules: GridRules, inline_group_size: int, change: Tensor
) -> None:
    """Lower the loss of the columns of one column block, from the last to the first; `refine` derives the steps.

    Args:
        G: float32 [columns, out_features], the gradient H (w - q) of these columns; overwritten.
        H: float32 [columns, columns], the block's part of H.
        q: uint8 [columns, out_features]; overwritten.
        grids: groups are those of these columns; scales that are refitted are overwritten.
        rules: bits.
        inline_group_size: columns of a group whose scale is refitted before its columns; 0: no scale changes.
        change: float32 [columns, out_features]; the new quantized values minus the old ones are added.
    """
    u = q.float() - grids.zeros[grids.groups]
    groups, size = grids.groups.tolist(), inline_group_size or len(q)
    for begin in reversed(range(0, len(q), size)):
        end = min(begin + size, len(q))
        if inline_group_size:
            # Rows of G after the group are not needed any more.
            Hu = H[:end, begin:end] @ u[begin:end]
            projection, curvature = ((u[begin:end] * x[begin:end]).sum(0) for x in (G, Hu))
            step = refitted_by(grids.scales[groups[begin]], projection, curvature)
            grids.scales[groups[begin]] += step
            G[:end].addcmul_(Hu, step, value=-1)
            change[begin:end].addcmul_(u[begin:end], step)
        for j in reversed(range(begin, end)):
            scale, zero = grids.scales[groups[j]], grids.zeros[groups[j]]
            best = torch.clamp(torch.round(u[j] + G[j] / (H[j, j] * scale)), -zero, rules.maxq - zero)
            step = (best - u[j]) * scale
            better = step * (2 * G[j] - step * H[j, j]) > LEAST_GAIN * scale.square() * H[j, j]
            step = torch.where(better, step, 0.0)
            q[j] = torch.where(better, best + zero, q[j])
            G[:j].addr_(H[:j, j], step, alpha=-1)
            change[j] += step
