"""The order in which sums over calibration rows are added, on any number of devices that share the rows. No torch.

A float32 sum depends on the order of its terms. So the batches are cut into at most `MOST_PARTS` parts, whatever
computes them. The sum of a part is made batch by batch; the sums of parts are added in pairs, then pairs of pairs:

    ((0 + 1) + (2 + 3)) + ((4 + 5) + (6 + 7))

A rank, one of the devices that share the rows, has consecutive parts. It adds those pairs of which it has both halves;
the rest is added once the ranks' sums are together. Every number of ranks adds the same terms in the same order.
"""

from collections.abc import Callable, Mapping, MutableMapping
from typing import TypeVar

MOST_PARTS = 8
_LEVELS = 3  # 2 ** 3 parts

# A sum of parts: (0, 5) is part 5, (1, 2) is part 4 + part 5, (2, 1) is the sum of parts 4 to 7.
PartialSum = tuple[int, int]
_T = TypeVar("_T")


def num_parts(num_batches: int) -> int:
    """Return how many parts there are, at least 1: also the largest number of devices that can share the rows."""
    return max(1, min(MOST_PARTS, num_batches))


def part_of(batch: int, num_batches: int) -> int:
    """Return the part of a batch; the parts have equal numbers of batches, or differ by one."""
    return batch * num_parts(num_batches) // num_batches


def parts_of_rank(rank: int, num_ranks: int, num_batches: int) -> range:
    """Return the parts of one of the devices that share the rows; each has at least one if there are enough parts."""
    parts = num_parts(num_batches)
    return range(parts * rank // num_ranks, parts * (rank + 1) // num_ranks)


def batches_of_rank(rank: int, num_ranks: int, num_batches: int) -> range:
    """Return the batches of one of the devices that share the rows."""
    parts = parts_of_rank(rank, num_ranks, num_batches)
    batches = [batch for batch in range(num_batches) if part_of(batch, num_batches) in parts]
    return range(batches[0], batches[-1] + 1) if batches else range(0)


def join_pairs(sums: MutableMapping[PartialSum, _T], add: Callable[[_T, _T], _T]) -> None:
    """Replace each pair of finished sums by its sum, then pairs of these; `add` gets the earlier part first."""
    for level in range(_LEVELS):
        for right in sorted(index for found, index in sums if found == level and index % 2):
            if (level, right - 1) in sums:
                left, later = sums.pop((level, right - 1)), sums.pop((level, right))
                sums[level + 1, right // 2] = add(left, later)


def add_up(sums: Mapping[PartialSum, _T], add: Callable[[_T, _T], _T]) -> _T:
    """Return the sum of all parts from the sums of some; a part that does not exist is left out.

    Args:
        sums: of parts that do not overlap; at least one.
        add: returns a new value, and gets the earlier part first.
    """
    found = _total(sums, add, _LEVELS, 0)
    if found is None:
        raise ValueError("there is nothing to add up")
    return found


def _total(sums: Mapping[PartialSum, _T], add: Callable[[_T, _T], _T], level: int, index: int) -> _T | None:
    # No function inside `add_up`: one that calls itself would keep the sums until the garbage collector runs.
    if (level, index) in sums or level == 0:
        return sums.get((level, index))
    left, right = (_total(sums, add, level - 1, 2 * index + half) for half in range(2))
    if left is None or right is None:
        return right if left is None else left
    return add(left, right)


def most_sums(parts: range) -> int:
    """Return how many sums a device with these parts holds at most while it makes them."""
    sums: dict[PartialSum, int] = {}
    most = 1
    for part in parts:
        join_pairs(sums, lambda left, _: left)
        sums[0, part] = 0
        most = max(most, len(sums))
    return most
