"""The order in which columns are quantized, and the groups that share a grid: docs/decisions/0022-act-order.md."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class ColumnOrder:
    """An act order with its group size; see `Variant.act_order`.

    Attributes:
        act_order: none, group, static or full.
        group_size: columns of a group; -1 for one group of all. It need not divide the number of columns: then the
            last group is shorter.
    """

    act_order: Literal["none", "group", "static", "full"]
    group_size: int

    @property
    def has_static_grids(self) -> bool:
        """Whether grids are fixed before any column is quantized, because the order leaves a group and comes back."""
        return self.act_order == "static"

    def size(self, in_features: int) -> int:
        """Return the columns of a group, all but the last one's."""
        return in_features if self.group_size == -1 else self.group_size

    def permutation(self, diagonal: Tensor) -> Tensor | None:
        """Return the stored column at each position of the solving order, int64; None = as stored.

        Equal entries keep their order, so that the result is the same on every device.

        Args:
            diagonal: of H, [in_features], or [experts, in_features].
        """
        if self.act_order == "none":
            return None
        if self.act_order == "group":
            return _inside_then_between(diagonal, self.size(diagonal.shape[-1]))
        return _decreasing(diagonal)


def _decreasing(values: Tensor) -> Tensor:
    return torch.argsort(values, dim=-1, descending=True, stable=True)


def _inside_then_between(diagonal: Tensor, size: int) -> Tensor:
    """Return the group-aware order (arXiv:2505.14638): decreasing inside each group, groups by their largest entry.

    A short last group stays last, so that every whole group begins at a multiple of `size` in both orders. GPTQModel
    7.7.0 (gptqmodel.quantization.gar) has the same order, but leaves the columns of a short last group as they are.
    """
    count = diagonal.shape[-1] // size
    whole = count * size
    groups = diagonal[..., :whole].reshape(*diagonal.shape[:-1], count, size)
    inside = _decreasing(groups)
    first = torch.arange(0, whole, size, device=diagonal.device)[:, None]
    between = _decreasing(groups.amax(-1))
    ordered = (inside + first).gather(-2, between[..., None].expand_as(inside)).flatten(-2)
    return torch.cat([ordered, _decreasing(diagonal[..., whole:]) + whole], dim=-1)
