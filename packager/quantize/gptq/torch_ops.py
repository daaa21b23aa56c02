"""The solver's operations in plain torch, for every device; on CUDA too, to compare the kernels with.

Where the order of a sum matters, a batch of experts is a loop over them: each gets the bits that it would get alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from packager.quantize.gptq import columns as column_loop
from packager.quantize.gptq import grid
from packager.quantize.gptq.grid import GridRules
from packager.quantize.gptq.lazy_updates import Float32Updates
from packager.quantize.gptq.routing import RoutedInputs
from packager.quantize.gptq.tensor_ops import Grids, LazyUpdates, RoundedColumns


class TorchOps:
    """`TensorOps` in float32."""

    def permute_columns(self, weights: Sequence[Tensor], dead: Tensor, inverse_perm: Tensor | None) -> Tensor:
        """Concatenate, transpose and permute linears; see `TensorOps.permute_columns`."""
        together = torch.cat([weight.mT for weight in weights], dim=-1).masked_fill_(dead[..., None], 0)
        if inverse_perm is None:
            return together.contiguous()
        return torch.empty_like(together).scatter_(-2, inverse_perm[..., None].expand_as(together), together)

    def find_grids(self, w: Tensor, group_size: int, rules: GridRules, column_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Choose grids; see `grid.find_grids`."""
        if w.ndim == 2:
            return grid.find_grids(w, group_size, rules, column_weight)
        found = [
            grid.find_grids(alone, group_size, rules, its_weight)
            for alone, its_weight in zip(w, column_weight, strict=True)
        ]
        return torch.stack([scales for scales, _ in found]), torch.stack([zeros for _, zeros in found])

    def round_columns(
        self, w: Tensor, original: Tensor, Hinv: Tensor, diagonal: Tensor, grids: Grids, rules: GridRules,
        inline_group_size: int, result: RoundedColumns,
    ) -> None:  # fmt: skip
        """Quantize the columns of a column block; see `columns.round_columns`."""
        if w.ndim == 2:
            column_loop.round_columns(w, original, Hinv, diagonal, grids, rules, inline_group_size, result)
            return
        for expert, alone in enumerate(zip(w, original, Hinv, diagonal, strict=True)):
            column_loop.round_columns(
                *alone, grids.of_expert(expert), rules, inline_group_size, result.of_expert(expert)
            )  # fmt: skip

    def refine_columns(
        self, G: Tensor, H: Tensor, q: Tensor, grids: Grids, rules: GridRules, inline_group_size: int, allowed: Tensor,
        change: Tensor,
    ) -> None:  # fmt: skip
        """Lower the loss of a column block's columns; see `columns.refine_columns`."""
        change.zero_()
        if G.ndim == 2:
            column_loop.refine_columns(G, H, q, grids, rules, inline_group_size, change)
            return
        for expert, is_refined in enumerate(allowed.tolist()):
            if is_refined:
                column_loop.refine_columns(
                    G[expert], H[expert], q[expert], grids.of_expert(expert), rules, inline_group_size, change[expert]
                )

    def dequantize(self, weight: Tensor, q: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor) -> None:
        """Overwrite a weight with scale * (q - zero); see `TensorOps.dequantize`."""
        groups = g_idx.long()[..., None].expand_as(q)
        weight.copy_(((q.float() - zeros.float().gather(-2, groups)) * scales.float().gather(-2, groups)).mT)

    def split(
        self, x: Tensor, rows: Tensor | None, columns: Tensor | None, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Split float32 into two float16 numbers; see `TensorOps.split`."""
        high, low = out or (torch.empty(x.shape, dtype=torch.float16, device=x.device) for _ in range(2))
        scaled = x if rows is None else x * rows[..., None]
        scaled = scaled if columns is None else scaled * columns[..., None, :]
        high.copy_(scaled)
        low.copy_(scaled - high)
        return high, low

    def add_product(self, total: Tensor | None, a: Tensor, b: Tensor, alpha: float = 1) -> Tensor:
        """Add a matrix product in float32; see `TensorOps.add_product`."""
        if a.ndim == 2:
            return a.float() @ b.float() if total is None else total.addmm_(a.float(), b.float(), alpha=alpha)
        if total is None:
            return torch.stack([self.add_product(None, *alone) for alone in zip(a, b, strict=True)])
        for alone in zip(total, a, b, strict=True):
            self.add_product(*alone, alpha)
        return total

    def add_routed_products(self, total: Tensor, inputs: RoutedInputs, experts: range, panel: int) -> None:
        """Add each expert's products in float32; see `TensorOps.add_routed_products`."""
        for H, expert in zip(total, experts, strict=True):
            x = inputs.of_expert(expert)
            if x.shape[0]:
                for begin in range(0, H.shape[0], panel):
                    end = min(begin + panel, H.shape[0])
                    self.add_product(H[begin:end, begin:], x[:, begin:end].T, x[:, begin:])

    def lazy_updates(self, U: Tensor, weight: Tensor) -> LazyUpdates:
        """Keep deltas in float32."""
        return Float32Updates(U, weight, self)
