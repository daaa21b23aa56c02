"""Weights on their way from linears into solving order, and back. `kernels` has the same for CUDA, in one pass each."""

from collections.abc import Sequence

import torch
from torch import Tensor


def in_order(weights: Sequence[Tensor], dead: Tensor, place: Tensor | None) -> Tensor:
    """Return linears side by side, [in_features, sum of out_features], contiguous.

    Args:
        weights: [out_features, in_features] each, of one float dtype.
        dead: bool [in_features], columns that become zero.
        place: int64 [in_features], which row of the result each column becomes; None: as they are.
    """
    together = torch.cat([weight.T for weight in weights], dim=1).masked_fill_(dead[:, None], 0)
    return together.contiguous() if place is None else torch.empty_like(together).index_copy_(0, place, together)


def dequantize(weight: Tensor, q: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor) -> None:
    """Overwrite a linear's weight with what its quantized form stands for.

    Args:
        weight: [out_features, in_features], any float dtype.
        q: uint8 [in_features, out_features], rows dense.
        zeros: uint8 [n_groups, out_features].
        scales: float16, like zeros.
        g_idx: int32 [in_features], the group of each column.
    """
    groups = g_idx.long()
    weight.copy_(((q.float() - zeros.float()[groups]) * scales.float()[groups]).T)
