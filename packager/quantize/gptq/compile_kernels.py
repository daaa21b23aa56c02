"""Have the kernels that round columns compiled before they are needed, side by side, while the first weights are read.

Each bit width, group size and width of a linear has its own, and a compiler takes one to two seconds for each.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

from packager.quantize.gptq import kernels
from packager.quantize.gptq.columns import Columns, Grids
from packager.quantize.gptq.grid import GridRules
from packager.quantize.gptq.solve import column_blocks, find_every


@dataclass(frozen=True, kw_only=True)
class Walk:
    """What of a variant and a group of linears decides which kernels their solution takes; see `solve`."""

    in_features: int
    out_features: int
    rules: GridRules
    group_size: int
    static_groups: bool


@dataclass(frozen=True, kw_only=True)
class _Launch:
    """What a kernel is launched for; `key` is equal where the kernel is the same."""

    columns: int
    out_features: int
    rules: GridRules
    find_every: int

    @property
    def key(self) -> tuple[object, ...]:
        aligned = self.out_features % 16 == 0  # Triton has another kernel for numbers and addresses that 16 divides
        return self.columns, kernels.features_at_once(self.out_features), aligned, self.rules, self.find_every


def compile_kernels(walks: Iterable[Walk], device: torch.device, dtype: torch.dtype) -> int:
    """Compile, and load on a GPU, what these walks will launch; return how many kernels that are.

    Args:
        walks: what will be solved.
        device: where.
        dtype: of the weights.
    """
    launches: dict[tuple[object, ...], _Launch] = {}
    for walk in walks:
        size = walk.in_features if walk.group_size == -1 else walk.group_size
        for begin, end in column_blocks(walk.in_features, size):
            launch = _Launch(
                columns=end - begin,
                out_features=walk.out_features,
                rules=walk.rules,
                find_every=find_every(size, static_groups=walk.static_groups),
            )
            launches.setdefault(launch.key, launch)
    with ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="compile") as pool:
        list(pool.map(partial(_launch, device=device, dtype=dtype), launches.values()))
    return len(launches)


def _launch(launch: _Launch, *, device: torch.device, dtype: torch.dtype) -> None:
    """Round columns of zeros."""
    columns, features = launch.columns, launch.out_features

    def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    groups = -(-columns // launch.find_every) if launch.find_every else 1
    grids = Grids(
        scales=zeros(groups, features) + 1, zeros=zeros(groups, features), groups=zeros(columns, dtype=torch.int64)
    )
    result = Columns(
        q=zeros(columns, features, dtype=torch.uint8), change=zeros(columns, features), squared_errors=zeros(features)
    )
    kernels.round_columns(
        zeros(columns, features), zeros(columns, features, dtype=dtype), zeros(columns, columns), zeros(columns), grids,
        launch.rules, launch.find_every, result,
    )  # fmt: skip
