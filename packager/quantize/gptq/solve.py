"""GPTQ over all columns of a linear: grids, rounding, and the spreading of errors, column block by column block.

With H = M M^T, M upper triangular, the weights that GPTQ has updated before it reaches a block B of columns are
w[B] + owed[B] Hinv[B, B], where owed[B] = sum over the columns j before B of change[j] M[j, B] and Hinv[B, B] is the
inverse of M[B, B]. So M itself is all that is needed of H; its whole inverse, the paper's Hinv, is never formed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from packager.quantize.gptq import columns, grid, solving_order
from packager.quantize.gptq.columns import Columns, Grids
from packager.quantize.gptq.grid import GridRules
from packager.quantize.gptq.hessian import Factor
from packager.quantize.gptq.lazy_updates import Carry, Float32Carry, SplitCarry

COLUMN_BLOCK = 128
# Column blocks whose debts to each other are settled one by one; those to earlier ones in one product before the first.
_BLOCKS_AT_ONCE = 4


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What a kind of device has its own version of; see `copies`, `grid`, `columns` and `carry` for the plain ones."""

    in_order: Callable[[Sequence[Tensor], Tensor, Tensor | None], Tensor]
    find_grids: Callable[[Tensor, int, GridRules, Tensor], tuple[Tensor, Tensor]]
    round_columns: Callable[[Tensor, Tensor, Tensor, Tensor, Grids, GridRules, int, Columns], None]
    dequantize: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], None]
    carry: type[Float32Carry] | type[SplitCarry]


TORCH = Backend(
    in_order=solving_order.in_order,
    find_grids=grid.find_grids,
    round_columns=columns.round_columns,
    dequantize=solving_order.dequantize,
    carry=Float32Carry,
)


def backend_for(device: torch.device) -> Backend:
    """Return Triton kernels on CUDA, torch elsewhere."""
    if device.type != "cuda":
        return TORCH
    from packager.quantize.gptq import kernels

    return Backend(
        in_order=kernels.in_order,
        find_grids=kernels.find_grids,
        round_columns=kernels.round_columns,
        dequantize=kernels.dequantize,
        carry=SplitCarry,
    )


@dataclass(frozen=True, kw_only=True)
class Solution:
    """A quantized linear, columns in their original order.

    Attributes:
        q: uint8 [in_features, out_features].
        scales: float16 [n_groups, out_features].
        zeros: uint8 [n_groups, out_features].
        g_idx: int32 [in_features], the group of each column.
        losses: float32 [out_features], squared output error per calibration token.
    """

    q: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    losses: Tensor

    def dequantize_into(self, weight: Tensor) -> None:
        """Overwrite a linear's weight, [out_features, in_features], with what a loader will compute with."""
        backend_for(weight.device).dequantize(weight, self.q, self.zeros, self.scales, self.g_idx)

    def dequantized(self) -> Tensor:
        """Return these weights, float32 [out_features, in_features]."""
        weight = torch.empty(self.q.shape[::-1], dtype=torch.float32, device=self.q.device)
        self.dequantize_into(weight)
        return weight

    def by_linear(self, out_features: Sequence[int]) -> "list[Solution]":
        """Return the parts of linears that were solved side by side."""
        ends = list(accumulate(out_features))
        parts = [slice(end - width, end) for end, width in zip(ends, out_features, strict=True)]
        return [
            Solution(
                q=self.q[:, part],
                scales=self.scales[:, part],
                zeros=self.zeros[:, part],
                g_idx=self.g_idx,
                losses=self.losses[part],
            )
            for part in parts
        ]

    def fits(self) -> Tensor:
        """Return whether every scale fits float16, bool [] on the device: to know it, a GPU must finish."""
        return torch.isfinite(self.scales).all()


def solve(
    weights: Sequence[Tensor],
    factor: Factor,
    rules: GridRules,
    *,
    group_size: int,
    static_groups: bool,
    backend: Backend | None = None,
) -> Solution:
    """Quantize linears that see the same input, side by side.

    Args:
        weights: [out_features, in_features] each, any float dtype; not modified.
        factor: of the Hessian of these inputs.
        rules: how grids are found.
        group_size: columns of a group; -1 for one group of all. It need not divide anything.
        static_groups: take the grids from the columns as stored, before any is changed, and cut groups there; else cut
            them in solving order (so desc_act gives a scattered g_idx), and a group's grid comes from its columns as
            updated when the first of them is reached.
        backend: for tests; None takes the device's own.
    """
    in_features = factor.dead.shape[0]
    size = in_features if group_size == -1 else group_size
    backend = backend or backend_for(factor.M.device)
    back = None if factor.order is None else torch.argsort(factor.order)
    weight = backend.in_order(weights, factor.dead, back)
    walk = _Walk(weight=weight, M=factor.M, rules=rules, group_size=size, backend=backend)
    if static_groups:
        order = torch.arange(in_features, device=weight.device) if factor.order is None else factor.order
        price = torch.empty_like(walk.diagonal).index_copy_(0, order, walk.diagonal.square())
        as_stored = backend.in_order(weights, factor.dead, None)
        scales, zeros = backend.find_grids(as_stored.float(), size, rules, price)
        walk.grids = Grids(scales=scales, zeros=zeros, groups=order // size)
    walk.run(find=not static_groups)
    return Solution(
        q=walk.q if back is None else walk.q[back],
        scales=walk.grids.scales.to(torch.float16),
        zeros=walk.grids.zeros.to(torch.uint8),
        g_idx=(walk.grids.groups if back is None else walk.grids.groups[back]).to(torch.int32),
        losses=walk.squared_errors / 2,
    )


class _Walk:
    """One pass over the columns, all in solving order.

    Attributes:
        diagonal: float32 [in_features], of M, which is 1 / Hinv_ii: its square is what an error in a column costs.
        grids: of the groups reached so far.
        q: uint8 [in_features, out_features].
        squared_errors: float32 [out_features].
    """

    def __init__(self, *, weight: Tensor, M: Tensor, rules: GridRules, group_size: int, backend: Backend) -> None:
        in_features, out_features = weight.shape
        self._weight, self._M, self._rules, self._size = weight, M, rules, group_size
        self.backend = backend
        self._carry: Carry = backend.carry(M, weight)
        self.diagonal = M.diagonal().contiguous()
        scales = torch.empty(-(-in_features // group_size), out_features, dtype=torch.float32, device=weight.device)
        groups = torch.arange(in_features, device=weight.device) // group_size
        self.grids = Grids(scales=scales, zeros=torch.empty_like(scales), groups=groups)
        self.q = torch.empty_like(weight, dtype=torch.uint8)
        self.squared_errors = torch.zeros(out_features, dtype=torch.float32, device=weight.device)

    def run(self, *, find: bool) -> None:
        """Quantize every column, finding the grids on the way or using those that are there."""
        blocks = column_blocks(self._weight.shape[0], self._size)
        inverses = inverse_blocks(self._M, blocks)
        for first in range(0, len(blocks), _BLOCKS_AT_ONCE):
            some = slice(first, first + _BLOCKS_AT_ONCE)
            self._run_some(blocks[some], inverses[some], find=find)

    def _run_some(self, blocks: Sequence[tuple[int, int]], inverses: Sequence[Tensor], *, find: bool) -> None:
        start, stop = blocks[0][0], blocks[-1][1]
        weight = self._weight[start:stop].float()
        owed = self._carry.owed(start, start, stop) if start else torch.zeros_like(weight)
        change = torch.empty_like(weight)
        every = find_every(self._size, static_groups=not find)
        for (begin, end), Hinv in zip(blocks, inverses, strict=True):
            here, after = slice(begin - start, end - start), slice(end - start, None)
            updated = torch.addmm(weight[here], Hinv.T, owed[here])
            if find and not every and begin % self._size == 0:
                self._find_grid(begin, change[: begin - start])
            result = Columns(q=self.q[begin:end], change=change[here], squared_errors=self.squared_errors)
            self.backend.round_columns(
                updated, self._weight[begin:end], Hinv, self.diagonal[begin:end], self.grids.of(slice(begin, end)),
                self._rules, every, result,
            )  # fmt: skip
            if end < stop:
                owed[after].addmm_(self._M[begin:end, end:stop].T, change[here])
        self._carry.record(start, change)

    def _find_grid(self, begin: int, change: Tensor) -> None:
        """Find the grid of the group at `begin`; `change` is that of the columns just before, new to the carry."""
        end = min(begin + self._size, self._weight.shape[0])
        updated = self._weight[begin:end].float()
        if begin:
            known = begin - change.shape[0]
            owed = self._M[known:begin, begin:end].T @ change
            if known:
                owed += self._carry.owed(known, begin, end)
            # Not in place: the weights as given may be float32 themselves.
            updated = updated + torch.linalg.solve_triangular(self._M[begin:end, begin:end].T, owed, upper=False)
        scales, zeros = self.backend.find_grids(updated, self._size, self._rules, self.diagonal[begin:end].square())
        group = slice(begin // self._size, begin // self._size + 1)
        self.grids.scales[group], self.grids.zeros[group] = scales, zeros


def find_every(group_size: int, *, static_groups: bool) -> int:
    """Return how many columns share a grid that is found while they are rounded: those of a group that fits a block."""
    return 0 if static_groups or group_size > COLUMN_BLOCK else group_size


def column_blocks(in_features: int, group_size: int) -> list[tuple[int, int]]:
    """Cut the columns into blocks of at most `COLUMN_BLOCK` that hold whole groups, or part of a single one."""
    if group_size <= COLUMN_BLOCK:
        width = COLUMN_BLOCK // group_size * group_size
        starts = list(range(0, in_features, width))
    else:
        starts = [
            begin
            for group in range(0, in_features, group_size)
            for begin in range(group, min(group + group_size, in_features), COLUMN_BLOCK)
        ]
    return list(zip(starts, [*starts[1:], in_features], strict=True))


def inverse_blocks(M: Tensor, blocks: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Return the inverses of M's diagonal blocks, upper triangular; blocks of one width are inverted in one call."""
    inverses: dict[int, Tensor] = {}
    for width in {end - begin for begin, end in blocks}:
        chosen = [number for number, (begin, end) in enumerate(blocks) if end - begin == width]
        squares = torch.stack([M[slice(*blocks[number]), slice(*blocks[number])] for number in chosen])
        identity = torch.eye(width, dtype=M.dtype, device=M.device).expand_as(squares)
        inverses |= dict(
            zip(chosen, torch.linalg.solve_triangular(squares, identity, upper=True).contiguous(), strict=True)
        )
    return [inverses[number] for number in range(len(blocks))]
