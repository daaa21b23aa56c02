"""Which branch is better than which, as far as the held-out rows tell.

Branches are compared pairwise: both were measured on the same rows, and a row that is hard for one is hard for the
other, so the difference is known better than either figure. A difference of less than twice its standard error is not
called one.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from packager.receipt import LEAST_ROWS, Provenance, standard_error

# Sizes that differ by less are one size to a reader who chooses by size.
_SAME_SIZE = 0.005

Rank = Literal["only", "among", ""]


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The mean over rows of a branch's KL divergence less another's, nats, and its standard error."""

    mean: float
    error: float

    @property
    def is_one(self) -> bool:
        """Whether the rows tell the branches apart."""
        return self.mean != 0 and abs(self.mean) >= 2 * self.error


@dataclass(frozen=True, kw_only=True)
class Neighbour:
    """A branch of the same size, or the next smaller one, and how a branch compares with it.

    Attributes:
        branch: its name.
        bytes_less: by how much it is smaller; 0 for one of the same size.
        ratio: the KL divergence of the branch, divided by that of the neighbour.
        difference: of the two; None where they cannot be compared.
    """

    branch: str
    bytes_less: int
    ratio: float
    difference: Difference | None


@dataclass(frozen=True, kw_only=True)
class Standing:
    """A branch among the others of its repository.

    Attributes:
        closest: "only" if its KL divergence is less than that of every other branch; "among" if the rows do not tell it
            from the least; "" if it is greater, or if not all branches can be compared.
        smallest: "only" if all others are larger, "among" if another one is as small, "" if it is larger.
        neighbours: the best one of the same size, and the best one of the next smaller size.
    """

    closest: Rank
    smallest: Rank
    neighbours: tuple[Neighbour, ...]


def kl_difference(one: Provenance, other: Provenance) -> Difference | None:
    """Return the paired difference of two branches; None where they were not measured on the same rows."""
    if one.quality is None or other.quality is None or one.evaluation.digest != other.evaluation.digest:
        return None
    own, others = one.quality.rows, other.quality.rows
    if own is None or others is None or not len(own.kl_divergence) == len(others.kl_divergence) >= LEAST_ROWS:
        return None
    pairs = [own - other for own, other in zip(own.kl_divergence, others.kl_divergence, strict=True)]
    if not all(map(math.isfinite, pairs)):
        return None
    return Difference(mean=math.fsum(pairs) / len(pairs), error=standard_error(pairs))


def closest_of(receipts: Sequence[Provenance]) -> tuple[Provenance, ...]:
    """Return the branch with the least KL divergence and those that the rows do not tell from it.

    Empty where one of them was not measured, or where they cannot be compared.
    """
    least = min(receipts, key=_kl, default=None)
    if least is None or least.quality is None:
        return ()
    differences = [kl_difference(receipt, least) for receipt in receipts if receipt is not least]
    if None in differences:
        return ()
    return tuple(
        receipt
        for receipt in receipts
        if receipt is least or ((found := kl_difference(receipt, least)) is not None and not found.is_one)
    )


def standings(receipts: Sequence[Provenance]) -> tuple[Standing, ...]:
    """Return the standing of every branch, in the order of `receipts`."""
    closest = closest_of(receipts) if len(receipts) > 1 else ()
    least = min(receipt.weights_bytes for receipt in receipts)
    smallest = [receipt for receipt in receipts if receipt.weights_bytes == least]
    if len(smallest) == len(receipts):
        smallest = []
    return tuple(
        Standing(
            closest=_rank(receipt, closest),
            smallest=_rank(receipt, smallest),
            neighbours=tuple(_neighbour(receipt, other) for other in _next_to(receipt, receipts)),
        )
        for receipt in receipts
    )


def _rank(receipt: Provenance, best: Sequence[Provenance]) -> Rank:
    if not any(receipt is each for each in best):
        return ""
    return "only" if len(best) == 1 else "among"


def _next_to(receipt: Provenance, receipts: Sequence[Provenance]) -> list[Provenance]:
    """Return the measured branches to compare one with: of the same size, and of the next smaller size."""
    if receipt.quality is None:
        return []
    others = [other for other in receipts if other is not receipt and other.quality is not None]
    same = [other for other in others if _same_size(other.weights_bytes, receipt.weights_bytes)]
    smaller = [other for other in others if other.weights_bytes < receipt.weights_bytes and other not in same]
    largest = max((other.weights_bytes for other in smaller), default=0)
    below = [other for other in smaller if _same_size(other.weights_bytes, largest)]
    return [min(group, key=_kl) for group in (same, below) if group]


def _same_size(one: int, other: int) -> bool:
    return abs(one - other) < _SAME_SIZE * other


def _neighbour(receipt: Provenance, other: Provenance) -> Neighbour:
    less = receipt.weights_bytes - other.weights_bytes
    same = _same_size(other.weights_bytes, receipt.weights_bytes)
    base = _kl(other)
    return Neighbour(
        branch=other.branch,
        bytes_less=0 if same else less,
        ratio=_kl(receipt) / base if base > 0 else math.inf,
        difference=kl_difference(receipt, other),
    )


def _kl(receipt: Provenance) -> float:
    return receipt.quality.kl_divergence if receipt.quality is not None else math.inf
