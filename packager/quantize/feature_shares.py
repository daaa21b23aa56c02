"""The output features of a group of linears over the ranks: each rounds some of them, with the factor of one rank.

What an output feature becomes depends on no other one (`gptq.tensor_ops`), so the shares make the bytes of a group that
one device rounds whole.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
from torch import Tensor

from packager.quantize.gptq.hessian import Factor, PanelSum
from packager.quantize.gptq.panels import panels
from packager.quantize.gptq.solve import Solution
from packager.quantize.gptq.tensor_ops import TensorOps
from packager.quantize.ranks import Owned, SweepRank

# Output features are cut at multiples of this: of the tiles of every kernel.
FEATURES_TOGETHER = 128
# A kernel for widths that 16 does not divide is another one, and may round in another way: such groups are not cut.
_ALIGNED = 16


@dataclass(frozen=True, kw_only=True)
class FactoredGroup:
    """What the rank that factored a group of linears knows.

    Attributes:
        factor: of the group's Hessian.
        targets: what is to be quantized, [out_features, in_features] each; None: the linears' own weights, which every
            rank has.
        finite: whether the targets are, bool [] on the device.
    """

    factor: Factor
    targets: Sequence[Tensor] | None
    finite: Tensor


def cut_features(features: int, ranks: int, owner: int, *, spread: bool) -> list[range]:
    """Return each rank's output features: all are the owner's if they are not spread, or cannot be cut."""
    units = features // FEATURES_TOGETHER
    if not spread or features % _ALIGNED or units < 2:
        return [range(features if rank == owner else 0) for rank in range(ranks)]
    cuts = [*(units * rank // ranks * FEATURES_TOGETHER for rank in range(ranks)), features]
    return [range(begin, end) for begin, end in pairwise(cuts)]


class FeatureShares:
    """A group of linears whose output features the ranks share; every rank makes one, and does the same calls.

    Args:
        rank: this rank.
        owner: the rank that factors the Hessian and gets the solution.
        weights: of this rank, [out_features, in_features] each; overwritten by `solve`.
        spread: whether the features are shared; else they are the owner's.
    """

    def __init__(self, rank: SweepRank, owner: int, weights: Sequence[Tensor], *, spread: bool) -> None:
        self._rank, self._owner, self.weights = rank, owner, weights
        self._shares = cut_features(sum(map(len, weights)), rank.size, owner, spread=spread)
        self._spread = sum(map(bool, self._shares)) > 1

    def solve(
        self, factored: FactoredGroup | None, solve: Callable[[Sequence[Tensor], Factor], Solution], ops: TensorOps
    ) -> Solution | None:
        """Return the solution of the whole group on the owner, None elsewhere; dequantize this rank's features.

        Args:
            factored: on the owner; None elsewhere.
            solve: quantizes linears, or some of their output features.
            ops: dequantize.

        Raises:
            RankStopped: a rank has failed.
        """
        if self._spread:
            factored = self._passed_on(factored)
        if factored is None:
            return None
        rows = list(self._rows(self._shares[self._rank.number], factored.targets or self.weights))
        part = solve([self._rank.pull(each) for each in rows], factored.factor) if rows else None
        if part is not None:
            mine = list(self._rows(self._shares[self._rank.number], self.weights))
            for weight, each in zip(mine, part.by_linear(list(map(len, mine))), strict=True):
                each.dequantize_into(weight, ops)
        return self._joined(part) if self._spread else part

    def owned(self) -> Iterator[Owned]:
        """Yield the rows of the weights that each rank overwrote."""
        for owner, share in enumerate(self._shares):
            yield from (Owned(tensor=rows, owner=owner) for rows in self._rows(share, self.weights))

    def _rows(self, share: range, weights: Sequence[Tensor]) -> Iterator[Tensor]:
        """Yield the rows of each linear that are in a share of the output features of all."""
        first = 0
        for weight in weights:
            begin, end = max(share.start - first, 0), min(share.stop - first, len(weight))
            if begin < end:
                yield weight[begin:end]
            first += len(weight)

    def _passed_on(self, factored: FactoredGroup | None) -> FactoredGroup:
        """Return the owner's, with the factor on this rank's device; the targets stay where they are."""
        posted = None if factored is None else (factored, _panels_of(factored.factor.U))
        found, rows = _only(self._rank.exchange(posted))
        if factored is not None:
            return factored
        pull, factor = self._rank.pull, found.factor
        U = factor.U
        if U.device != self._rank.device:
            U = torch.zeros(U.shape, dtype=U.dtype, device=self._rank.device)
            for panel, each in zip(panels(len(U)), rows, strict=True):
                U[panel, panel.start :] = pull(each)
        perm = None if factor.perm is None else pull(factor.perm)
        return replace(found, factor=replace(factor, U=U, perm=perm, dead=pull(factor.dead)))

    def _joined(self, part: Solution | None) -> Solution | None:
        """Return the parts of all ranks side by side on the owner, None elsewhere."""
        parts = [each for each in self._rank.exchange(part) if each is not None]
        if self._rank.number != self._owner:
            return None
        return Solution(
            g_idx=self._rank.pull(parts[0].g_idx),
            **{
                name: torch.cat([self._rank.pull(getattr(each, name)) for each in parts], dim=-1)
                for name in ("q", "scales", "zeros", "losses", "unrefined_losses")
            },
        )


def _panels_of(U: Tensor) -> PanelSum:
    """Return the part of a triangular matrix that is not zero, in contiguous pieces that are copied fast."""
    return [U[panel, panel.start :].contiguous() for panel in panels(len(U))]


def _only(posted: Sequence[tuple[FactoredGroup, PanelSum] | None]) -> tuple[FactoredGroup, PanelSum]:
    (found,) = (each for each in posted if each is not None)
    return found
