"""The solver's operations on CUDA: Triton kernels, and float16 products on the tensor cores."""

import math
from collections.abc import Sequence

import torch
import triton
from torch import Tensor

from packager.quantize.gptq import triton_kernels as kernels
from packager.quantize.gptq import triton_matrix_kernels as matrix_kernels
from packager.quantize.gptq.grid import (
    LARGEST_SCALE,
    LEAST_GAIN,
    SEARCH_STEPS,
    SMALLEST_SCALE,
    GridRules,
    search_shrinks,
)
from packager.quantize.gptq.lazy_updates import SplitUpdates
from packager.quantize.gptq.routing import RoutedInputs
from packager.quantize.gptq.tensor_ops import Grids, LazyUpdates, RoundedColumns
from packager.quantize.gptq.triton_refine_kernel import refine_columns_kernel

_TILE = 128
# Output features of a program: many where there are many, to use each load more often; few else, to use all of the GPU.
_ROUND_FEATURES, _ROUND_MANY, _ROUND_WARPS = (16, 32), (0, 20000), 1
_GRID_FEATURES, _GRID_WARPS = 32, 4
_REFINE_FEATURES, _REFINE_WARPS = 16, 1
_SPLIT_TILE, _COPY_TILE = 2048, 64
_PRODUCT_TILE, _PRODUCT_TOKENS = 128, 64  # three stages of two tiles: 98,304 bytes of shared memory
_TENSOR_CORE_DTYPES = (torch.float16, torch.bfloat16)


class TritonOps:
    """`TensorOps` on CUDA. In Triton's interpreter the kernels take CPU tensors; `add_product` needs CUDA there too."""

    def permute_columns(self, weights: Sequence[Tensor], dead: Tensor, inverse_perm: Tensor | None) -> Tensor:
        """Concatenate, transpose and permute linears in one pass; see `TensorOps.permute_columns`."""
        first, columns = weights[0], dead.shape[-1]
        total = sum(weight.shape[-2] for weight in weights)
        out, begin = torch.empty(*dead.shape, total, dtype=first.dtype, device=first.device), 0
        for weight in weights:
            features, dense = weight.shape[-2], weight.contiguous()
            tiles = triton.cdiv(columns, _COPY_TILE), triton.cdiv(features, _COPY_TILE)
            with _device_of(dense):
                matrix_kernels.permute_columns_kernel[(*tiles, *_experts(dense))](
                    dense, dead, dead if inverse_perm is None else inverse_perm, out[..., begin:], columns, features,
                    dense.stride(-2), out.stride(-2), BATCHED=dense.ndim > 2, PERMUTED=inverse_perm is not None,
                    TILE=_COPY_TILE,
                )  # fmt: skip
            begin += features
        return out

    def find_grids(self, w: Tensor, group_size: int, rules: GridRules, column_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Choose grids; see `grid.find_grids`."""
        *experts, columns, features = w.shape
        w = w.contiguous()
        groups = triton.cdiv(columns, group_size)
        scales = torch.empty(*experts, groups, features, dtype=torch.float32, device=w.device)
        zeros = torch.empty_like(scales)
        tile = min(_TILE, triton.next_power_of_2(group_size))
        with _device_of(w):
            kernels.find_grids_kernel[(triton.cdiv(features, _GRID_FEATURES), groups, *_experts(w))](
                w, column_weight.contiguous(), search_shrinks(w.device), scales, zeros, columns, features, group_size,
                BATCHED=w.ndim > 2, TILE=tile, FEATURES=_GRID_FEATURES,
                TILES=triton.cdiv(min(group_size, columns), tile), MAXQ=rules.maxq,
                SYM=rules.sym, SIGNED=rules.signed, STEPS=SEARCH_STEPS if rules.scale_search else 1,
                SMALLEST=SMALLEST_SCALE, num_warps=_GRID_WARPS,
            )  # fmt: skip
        return scales, zeros

    def round_columns(
        self, w: Tensor, original: Tensor, Hinv: Tensor, diagonal: Tensor, grids: Grids, rules: GridRules,
        inline_group_size: int, result: RoundedColumns,
    ) -> None:  # fmt: skip
        """Quantize the columns of a column block in one launch; see `columns.round_columns`."""
        *experts, columns, features = w.shape
        tile = features_per_program(features * math.prod(experts))
        moving = (w, original, diagonal, grids.scales, grids.groups, result.q, result.delta)
        strides = [tensor.stride(0) if experts else 0 for tensor in moving]
        with _device_of(w):
            kernels.round_columns_kernel[(triton.cdiv(features, tile), *experts)](
                w, original, Hinv, diagonal, search_shrinks(w.device), grids.scales, grids.zeros, grids.groups,
                result.q, result.delta, result.squared_errors, features, *strides, BATCHED=bool(experts),
                COLUMNS=columns, TILE_COLUMNS=_TILE // 2,
                FEATURES=tile, INLINE_GROUP_SIZE=inline_group_size,
                GROUP_TILE=triton.next_power_of_2(max(inline_group_size, 1)), MAXQ=rules.maxq, SYM=rules.sym,
                SIGNED=rules.signed, STEPS=SEARCH_STEPS if rules.scale_search else 1, SMALLEST=SMALLEST_SCALE,
                num_warps=_ROUND_WARPS,
            )  # fmt: skip

    def refine_columns(
        self, G: Tensor, H: Tensor, q: Tensor, grids: Grids, rules: GridRules, inline_group_size: int, allowed: Tensor,
        change: Tensor,
    ) -> None:  # fmt: skip
        """Lower the loss of a column block's columns in one launch; see `columns.refine_columns`."""
        *experts, columns, features = G.shape
        strides = [tensor.stride(0) if experts else 0 for tensor in (G, q, grids.scales, grids.groups)]
        with _device_of(G):
            refine_columns_kernel[(triton.cdiv(features, _REFINE_FEATURES), *experts)](
                G, H, q, grids.scales, grids.zeros, grids.groups, allowed, change, features, *strides,
                BATCHED=bool(experts), COLUMNS=columns, TILE=_TILE, FEATURES=_REFINE_FEATURES,
                INLINE_GROUP_SIZE=inline_group_size, MAXQ=rules.maxq, SMALLEST=SMALLEST_SCALE, LARGEST=LARGEST_SCALE,
                LEAST_GAIN=LEAST_GAIN, num_warps=_REFINE_WARPS,
            )  # fmt: skip

    def dequantize(self, weight: Tensor, q: Tensor, zeros: Tensor, scales: Tensor, g_idx: Tensor) -> None:
        """Overwrite a weight with scale * (q - zero) in one pass; see `TensorOps.dequantize`."""
        *experts, features, columns = weight.shape
        zeros, scales, g_idx = zeros.contiguous(), scales.contiguous(), g_idx.contiguous()
        tiles = triton.cdiv(columns, _COPY_TILE), triton.cdiv(features, _COPY_TILE)
        strides = [tensor.stride(0) if experts else 0 for tensor in (weight, q, scales)]
        with _device_of(weight):
            matrix_kernels.dequantize_kernel[(*tiles, *experts)](
                weight, q, zeros, scales, g_idx, columns, features, weight.stride(-2), q.stride(-2), zeros.stride(-2),
                scales.stride(-2), *strides, BATCHED=bool(experts), TILE=_COPY_TILE,
            )  # fmt: skip

    def split(
        self, x: Tensor, rows: Tensor | None, columns: Tensor | None, out: tuple[Tensor, Tensor] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Split float32 into two float16 numbers in one pass; see `TensorOps.split`."""
        high, low = out or (torch.empty(x.shape, dtype=torch.float16, device=x.device) for _ in range(2))
        x = x if x.stride(-1) == 1 else x.contiguous()
        *experts, n, m = x.shape
        rows_stride = rows.stride(0) if experts and rows is not None else 0
        strides = (x.stride(0), rows_stride, high.stride(0)) if experts else (0, 0, 0)
        with _device_of(x):
            matrix_kernels.split_kernel[(n, triton.cdiv(m, _SPLIT_TILE), *experts)](
                x, x if rows is None else rows, x if columns is None else columns.contiguous(), high, low, m,
                x.stride(-2), high.stride(-2), *strides, BATCHED=bool(experts),
                ROWS=rows is not None, COLUMNS=columns is not None, TILE=_SPLIT_TILE,
            )  # fmt: skip
        return high, low

    def add_product(self, total: Tensor | None, a: Tensor, b: Tensor, alpha: float = 1) -> Tensor:
        """Add a matrix product on the tensor cores, float32 for float32 inputs; see `TensorOps.add_product`."""
        if a.ndim > 2:
            return _add_batched(total, a, b, alpha)
        if a.dtype not in _TENSOR_CORE_DTYPES:
            return a @ b if total is None else total.addmm_(a, b, alpha=alpha)
        if total is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(total, a, b, out_dtype=torch.float32, alpha=alpha, out=total)

    def add_routed_products(self, total: Tensor, inputs: RoutedInputs, experts: range, panel: int) -> None:
        """Add all experts' products in one launch; see `TensorOps.add_routed_products`.

        A float16 or bfloat16 product is exact in float32, and so is one that float32 inputs ask for.
        """
        x, rows = inputs.rows, inputs.row_numbers()
        columns = x.shape[1]
        x = x if x.stride(1) == 1 else x.contiguous()
        tiles = triton.cdiv(columns, _PRODUCT_TILE)
        with _device_of(x):
            matrix_kernels.add_routed_products_kernel[(tiles, tiles, len(experts))](
                total, x, inputs.routing.bounds if rows is None else rows, inputs.routing.bounds, columns, x.stride(0),
                experts.start, panel, GATHERED=rows is not None, TILE=_PRODUCT_TILE,
                TOKENS=_PRODUCT_TOKENS if x.dtype in _TENSOR_CORE_DTYPES else _PRODUCT_TOKENS // 2, num_warps=8,
                num_stages=3,
            )  # fmt: skip

    def lazy_updates(self, U: Tensor, weight: Tensor) -> LazyUpdates:
        """Keep deltas as two float16 numbers, for products on the tensor cores."""
        return SplitUpdates(U, weight, self)


def _add_batched(total: Tensor | None, a: Tensor, b: Tensor, alpha: float) -> Tensor:
    """Return total + alpha a b for each expert, float32."""
    if a.dtype not in _TENSOR_CORE_DTYPES:
        return torch.bmm(a, b) if total is None else total.baddbmm_(a, b, alpha=alpha)
    if total is None:
        return torch.bmm(a, b, out_dtype=torch.float32)
    return torch.baddbmm(total, a, b, out_dtype=torch.float32, alpha=alpha, out=total)


def _experts(tensor: Tensor) -> tuple[int, ...]:
    """Return the launch's dimension of experts: none for a single linear."""
    return tuple(tensor.shape[:-2])


def features_per_program(features: int) -> int:
    """Return how many output features a program of `round_columns` takes."""
    return max(size for size, many in zip(_ROUND_FEATURES, _ROUND_MANY, strict=True) if features >= many)


def _device_of(tensor: Tensor) -> torch.cuda.device_of:
    """Return a context that launches kernels on a tensor's GPU; it does nothing for a CPU tensor."""
    return torch.cuda.device_of(tensor)  # type: ignore[no-untyped-call]
