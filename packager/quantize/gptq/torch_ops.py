"""The solver's operations in plain torch, for every device; on CUDA too, to compare the kernels with."""

from collections.abc import Sequence

import torch
from torch import Tensor

from packager.quantize.gptq import columns as column_loop
from packager.quantize.gptq import grid
from packager.quantize.gptq.grid import GridRules
from packager.quantize.gptq.lazy_updates import Float32Updates
from packager.quantize.gptq.tensor_ops import Grids, LazyUpdates, RoundedColumns


class TorchOps:
    """`TensorOps` in float32."""

    def permute_columns(self, weights: Sequence[Tensor], dead: Tensor, inverse_perm: Tensor | None) -> Tensor:
        """Concatenate, transpose and permute linears; see `TensorOps.permute_columns`."""
        together = torch.cat([weight.T for weight in weights], dim=1).masked_fill_(dead[:, None], 0)
        if inverse_perm is None:
            return together.contiguous()
        return torch.empty_like(together).index_copy_(0, inverse_perm, together)

    def find_grids(self, w: Tensor, group_size: int, rules: GridRules, column_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Choose grids; see `grid.find_grids`."""
        return grid.find_grids(w, group_size, rules, column_weight)

    def round_columns(
        self, w: Tensor, original: Tensor, Hinv: Tensor, diagonal: Tensor, grids: Grids, rules: GridRules,
        inline_group_size: int, result: RoundedColumns,
    ) -> None:  # fmt: skip
        """Quantize the columns of a column block; see `columns.round_columns`."""
        column_loop.round_columns(w, original, Hinv, diagonal, grids, rules, inline_group_size, result)

    def dequantize(self, weight: Tensor, q: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor) -> None:
        """Overwrite a weight with scale * (q - zero); see `TensorOps.dequantize`."""
        groups = g_idx.long()
        weight.copy_(((q.float() - zeros.float()[groups]) * scales.float()[groups]).T)

    def split(
        self, x: Tensor, rows: Tensor | None, columns: Tensor | None, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Split float32 into two float16 numbers; see `TensorOps.split`."""
        high, low = out or (torch.empty(x.shape, dtype=torch.float16, device=x.device) for _ in range(2))
        scaled = x if rows is None else x * rows[:, None]
        scaled = scaled if columns is None else scaled * columns
        high.copy_(scaled)
        low.copy_(scaled - high)
        return high, low

    def add_product(self, total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        """Add a matrix product in float32; see `TensorOps.add_product`."""
        return a.float() @ b.float() if total is None else total.addmm_(a.float(), b.float())

    def lazy_updates(self, U: Tensor, weight: Tensor) -> LazyUpdates:
        """Keep deltas in float32."""
        return Float32Updates(U, weight)
