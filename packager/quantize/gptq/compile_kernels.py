"""Compile the kernels that round, update and refine columns in parallel, ahead, while the first weights are read.

Each bit width, group size and width of a column block has its own kernel, which takes some seconds to compile.
"""

import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import chain

import torch

from packager.quantize.gptq.grid import GridRules
from packager.quantize.gptq.order import ColumnOrder
from packager.quantize.gptq.solve import COLUMN_BLOCK, column_blocks, inline_group_size
from packager.quantize.gptq.tensor_ops import ColumnSpan, Grids, RoundedColumns
from packager.quantize.gptq.triton_ops import PART, TritonOps


@dataclass(frozen=True, kw_only=True)
class KernelShape:
    """The arguments of `solve` that determine its kernels: a variant's, and the shape of a group of linears.

    `experts` is how many are solved as one batch, 0 for a single group of linears; `refine` whether refinement follows.
    """

    in_features: int
    out_features: int
    rules: GridRules
    order: ColumnOrder
    experts: int = 0
    refine: bool = False


@dataclass(frozen=True, kw_only=True)
class _Rounding:
    """The arguments of one launch that rounds columns, and refines them; equal `key`s run the same compiled kernels.

    `refine` is the refinement's inline group size, which static order has too; None if there is no refinement.
    """

    columns: int
    out_features: int
    rules: GridRules
    inline_group_size: int
    in_features: int
    experts: int
    refine: int | None

    @property
    def key(self) -> tuple[object, ...]:
        # Triton specializes on numbers and addresses that 16 divides.
        aligned = self.out_features % 16 == 0, self.in_features % 16 == 0
        return self.columns, aligned, self.rules, self.inline_group_size, self.experts > 0, self.refine

    def launch(self, device: torch.device, dtype: torch.dtype) -> None:
        """Round columns of zeros."""
        columns, features, inline = self.columns, self.out_features, self.inline_group_size
        zeros = partial(_zeros, self.experts, device=device)

        def of_columns(dtype: torch.dtype = torch.float32) -> torch.Tensor:
            return zeros(self.in_features, dtype=dtype)[..., :columns]

        groups = -(-columns // inline) if inline else 1
        grids = Grids(scales=zeros(groups, features) + 1, zeros=zeros(groups, features), groups=of_columns(torch.int64))
        result = RoundedColumns(
            q=zeros(columns, features, dtype=torch.uint8), delta=zeros(columns, features),
            squared_errors=zeros(features), errors=None if self.refine is None else zeros(columns, features),
        )  # fmt: skip
        span = ColumnSpan(
            weight=zeros(columns, features, dtype=dtype), pending=zeros(columns, features),
            U=zeros(columns, self.in_features)[..., :columns], diagonal=of_columns(),
        )  # fmt: skip
        TritonOps().round_columns(span, 0, zeros(1, columns, columns), grids, self.rules, inline, result)
        if self.refine is not None:
            allowed = torch.zeros((self.experts,) if self.experts else (), dtype=torch.bool, device=device)
            TritonOps().refine_columns(
                zeros(columns, features), zeros(columns, columns) + 1, result.q, grids, self.rules, self.refine,
                allowed, zeros(columns, features),
            )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class _Products:
    """The arguments of the launches that multiply by U; see `_Rounding`."""

    in_features: int
    out_features: int
    experts: int
    refine: bool

    @property
    def key(self) -> tuple[object, ...]:
        aligned = self.out_features % 16 == 0, self.in_features % 16 == 0
        return aligned, self.experts > 0, self.in_features > PART, self.refine

    def launch(self, device: torch.device, _dtype: torch.dtype) -> None:
        """Multiply zeros: a sum of one part, and one of two where these linears have any."""
        zeros = partial(_zeros, self.experts, device=device)
        for terms in (COLUMN_BLOCK, PART + 1)[: 1 + (self.in_features > PART)]:
            U = zeros(terms, self.in_features, dtype=torch.float16)[..., :COLUMN_BLOCK].mT
            delta = zeros(terms, self.out_features, dtype=torch.float16)
            TritonOps().multiply_split((U, U), (delta, delta), None, zeros(self.out_features) + 1)
            if self.refine:
                rows = zeros(COLUMN_BLOCK, max(terms, self.in_features), dtype=torch.float16)[..., :terms]
                scales = zeros(COLUMN_BLOCK) + 1, zeros(self.out_features) + 1
                TritonOps().multiply_split((rows, rows), (delta, delta), *scales)


def _zeros(
    experts: int, *shape: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:  # fmt: skip
    return torch.zeros(*((experts,) if experts else ()), *shape, dtype=dtype, device=device)


def compile_for_shapes(shapes: Iterable[KernelShape], device: torch.device, dtype: torch.dtype) -> int:
    """Compile, and load on a GPU, the kernels that solving these shapes launches; return the number of their kinds.

    Args:
        shapes: of the linears to be solved.
        device: the device to load them on.
        dtype: of the weights.
    """
    found: dict[tuple[object, ...], _Rounding | _Products] = {}
    for launch in chain.from_iterable(map(_launches, shapes)):
        found.setdefault((type(launch), *launch.key), launch)
    with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="compile") as pool:
        list(pool.map(lambda launch: launch.launch(device, dtype), found.values()))
    return len(found)


def _launches(shape: KernelShape) -> Iterator[_Rounding | _Products]:
    size = shape.order.size(shape.in_features)
    inline = 0 if shape.order.has_static_grids else inline_group_size(size)
    yield _Products(
        in_features=shape.in_features, out_features=shape.out_features, experts=shape.experts, refine=shape.refine
    )
    for begin, end in column_blocks(shape.in_features, size):
        yield _Rounding(
            columns=end - begin,
            out_features=shape.out_features,
            rules=shape.rules,
            inline_group_size=inline,
            in_features=shape.in_features,
            experts=shape.experts,
            refine=inline_group_size(size) if shape.refine else None,
        )
