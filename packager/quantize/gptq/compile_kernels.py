"""Compile the kernels that round and refine columns in parallel, ahead, while the first weights are read.

Each bit width, group size and width of a linear has its own kernel, which takes one to two seconds to compile.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from packager.quantize.gptq.column_blocks import column_blocks, inline_group_size
from packager.quantize.gptq.grid import GridRules
from packager.quantize.gptq.order import ColumnOrder
from packager.quantize.gptq.tensor_ops import Grids, RoundedColumns
from packager.quantize.gptq.triton_ops import TritonOps, features_per_program


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
class _Specialization:
    """The arguments of one launch; launches with equal `key` run the same compiled kernels.

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
        aligned = self.out_features % 16 == 0  # Triton specializes on numbers and addresses that 16 divides
        tile = features_per_program(self.out_features * max(self.experts, 1))
        batch = (self.experts > 0, self.experts > 0 and self.in_features % 16 == 0)
        return self.columns, tile, aligned, self.rules, self.inline_group_size, batch, self.refine


def compile_for_shapes(shapes: Iterable[KernelShape], device: torch.device, dtype: torch.dtype) -> int:
    """Compile, and load on a GPU, the kernels that solving these shapes launches; return their number.

    Args:
        shapes: of the linears to be solved.
        device: the device to load them on.
        dtype: of the weights.
    """
    found: dict[tuple[object, ...], _Specialization] = {}
    for shape in shapes:
        size = shape.order.size(shape.in_features)
        inline = 0 if shape.order.has_static_grids else inline_group_size(size)
        for begin, end in column_blocks(shape.in_features, size):
            launch = _Specialization(
                columns=end - begin,
                out_features=shape.out_features,
                rules=shape.rules,
                inline_group_size=inline,
                in_features=shape.in_features,
                experts=shape.experts,
                refine=inline_group_size(size) if shape.refine else None,
            )
            found.setdefault(launch.key, launch)
    with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="compile") as pool:
        list(pool.map(partial(_launch_once, device=device, dtype=dtype), found.values()))
    return len(found)


def _launch_once(launch: _Specialization, *, device: torch.device, dtype: torch.dtype) -> None:
    """Round columns of zeros."""
    columns, features, inline = launch.columns, launch.out_features, launch.inline_group_size

    experts = (launch.experts,) if launch.experts else ()

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(*experts, *shape, dtype=dtype, device=device)

    def of_columns(dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return zeros(launch.in_features, dtype=dtype)[..., :columns]

    groups = -(-columns // inline) if inline else 1
    grids = Grids(scales=zeros(groups, features) + 1, zeros=zeros(groups, features), groups=of_columns(torch.int64))
    result = RoundedColumns(
        q=zeros(columns, features, dtype=torch.uint8), delta=zeros(columns, features), squared_errors=zeros(features)
    )
    TritonOps().round_columns(
        zeros(columns, features), zeros(columns, features, dtype=dtype), zeros(columns, columns), of_columns(), grids,
        launch.rules, inline, result,
    )  # fmt: skip
    if launch.refine is not None:
        allowed = torch.zeros(experts, dtype=torch.bool, device=device)
        TritonOps().refine_columns(
            zeros(columns, features), zeros(columns, columns) + 1, result.q, grids, launch.rules, launch.refine,
            allowed, zeros(columns, features),
        )  # fmt: skip
