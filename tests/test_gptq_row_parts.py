"""The order of sums over rows: one tree, whatever number of devices adds it up."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packager.quantize.gptq.row_parts import (
    MOST_PARTS,
    PartialSum,
    add_up,
    batches_of_rank,
    join_pairs,
    most_sums,
    num_parts,
    part_of,
    parts_of_rank,
)

BATCHES = st.integers(1, 40)


def written(left: str, right: str) -> str:
    return f"({left} {right})"


def whole(num_parts: int) -> str:
    """Return the tree of all parts, written out: an oracle that knows no partial sums."""
    terms: list[str | None] = [str(part) if part < num_parts else None for part in range(8)]
    while len(terms) > 1:
        pairs = zip(terms[::2], terms[1::2], strict=True)
        terms = [written(left, right) if left and right else left or right for left, right in pairs]
    return str(terms[0])


def on_ranks(num_ranks: int, num_parts: int) -> str:
    """Return how the sums of ranks are added: each joins the pairs of its own parts, then all are added up."""
    sums: dict[PartialSum, str] = {}
    for rank in range(num_ranks):
        own: dict[PartialSum, str] = {}
        for part in parts_of_rank(rank, num_ranks, num_parts):
            join_pairs(own, written)
            own[0, part] = str(part)
        join_pairs(own, written)
        assert not sums.keys() & own.keys()
        sums |= own
    return add_up(sums, written)


def test_the_tree_of_eight_parts() -> None:
    assert whole(8) == "(((0 1) (2 3)) ((4 5) (6 7)))"
    assert whole(3) == "((0 1) 2)"


@given(num_ranks=st.integers(1, MOST_PARTS), num_parts=st.integers(1, MOST_PARTS))
def test_every_number_of_ranks_adds_in_the_same_order(num_ranks: int, num_parts: int) -> None:
    assert on_ranks(min(num_ranks, num_parts), num_parts) == whole(num_parts)


@given(num_batches=BATCHES, num_ranks=st.integers(1, MOST_PARTS))
def test_each_batch_has_one_rank_and_a_part_of_it(num_batches: int, num_ranks: int) -> None:
    num_ranks = min(num_ranks, num_parts(num_batches))
    shares = [batches_of_rank(rank, num_ranks, num_batches) for rank in range(num_ranks)]
    assert [batch for share in shares for batch in share] == list(range(num_batches))
    assert all(shares), "no rank is without rows"
    for rank, share in enumerate(shares):
        assert {part_of(batch, num_batches) for batch in share} == set(parts_of_rank(rank, num_ranks, num_batches))
    sizes = [sum(part_of(batch, num_batches) == part for batch in range(num_batches)) for part in range(MOST_PARTS)]
    made = [size for size in sizes if size]
    assert len(made) == num_parts(num_batches)
    assert max(made) - min(made) <= 1


def test_a_device_holds_few_sums_at_once() -> None:
    assert [most_sums(range(count)) for count in (1, 2, 4, 8)] == [1, 2, 3, 4]
    assert most_sums(range(5, 8)) == 3  # part 5 has no neighbour here


def test_nothing_has_no_sum() -> None:
    with pytest.raises(ValueError, match="nothing to add up"):
        add_up({}, written)
