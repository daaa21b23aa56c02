"""Choose the bits of a mix: for each group of linears, by measured loss, within a size. Decision 34.

Linears that see the same input have the same bits: the engine solves them at once, and runtimes compute them as one.
No torch.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from typing import NamedTuple

from packager.model.architecture import Architecture
from packager.variant import Bits, BitsMix, num_groups

# Sums of losses are rounded: of bounds that differ less than this, neither is known to be lower.
_ROUNDING = 1e-9
_HALVINGS = 200


@dataclass(frozen=True, kw_only=True)
class MixedGroup:
    """Linears that see the same input.

    Attributes:
        linears: their stored names.
        size: what each bit of their weights and zeros takes in the files, in bits.
    """

    linears: tuple[str, ...]
    size: int


def mixed_groups(architecture: Architecture, group_size: int) -> tuple[MixedGroup, ...]:
    """Return the groups of all blocks, in the order of the blocks; of a model without quantized experts."""
    specs = {(linear.block, linear.module): linear for linear in architecture.linears}
    found = [
        (block, [specs[block, module] for module in group.modules])
        for kind in architecture.kinds
        for block in kind.blocks
        for group in kind.groups
    ]
    return tuple(
        MixedGroup(
            linears=tuple(linear.name for linear in linears),
            size=sum(
                linear.out_features * (linear.in_features + num_groups(linear.in_features, group_size))
                for linear in linears
            ),
        )
        for _, linears in sorted(found, key=lambda each: each[0])
    )


def most_size(groups: Sequence[MixedGroup], mix: BitsMix) -> int:
    """Return how many bits the weights and zeros of all linears may have: those of the mean for each of them."""
    return int(Fraction(str(mix.mean)) * sum(group.size for group in groups))


def choose_bits(
    groups: Sequence[MixedGroup], mix: BitsMix, losses: Mapping[Bits, Mapping[str, float]]
) -> tuple[tuple[str, Bits], ...]:
    """Return the bits of each linear with the least sum of losses that is not larger than the mix allows.

    Args:
        groups: of linears.
        mix: the numbers of bits, and the size.
        losses: for each number of bits, the loss of each linear in a variant whose linears all have so many.
    """
    of_groups = [{bits: sum(losses[bits][name] for name in group.linears) for bits in mix.bits} for group in groups]
    chosen = least_loss(of_groups, [group.size for group in groups], most_size(groups, mix))
    return tuple((name, bits) for group, bits in zip(groups, chosen, strict=True) for name in group.linears)


def least_loss(losses: Sequence[Mapping[Bits, float]], sizes: Sequence[int], limit: int) -> tuple[Bits, ...]:
    """Return the bits of each group with the least sum of losses, where the sum of bits times size is in the limit.

    Exact: dynamic programming over the groups keeps, of all choices so far, those that no other choice beats in both
    size and loss. A choice is dropped, too, if even the bound of Lagrange, in which size has a price instead of a
    limit, ends above a choice that is known to fit: few are left then. Of equal sums, the result is always the same
    one.

    Args:
        losses: for each group, that of each number of bits; the fewest bits for all must fit.
        sizes: of each group, for each bit.
        limit: of the sum.
    """
    price = _price(losses, sizes, limit)
    # What the bits of a group cost above the bits that cost least, and how much more all of them may cost.
    costs = [
        {bits: loss[bits] + price * bits * size for bits in loss} for loss, size in zip(losses, sizes, strict=True)
    ]
    above = [{bits: cost - min(each.values()) for bits, cost in each.items()} for each in costs]
    bound = sum(min(each.values()) for each in costs) - price * limit
    known = _known(losses, sizes, limit, price)
    most = known - bound + _ROUNDING * (abs(known) + price * limit)
    # Groups whose bits are not in doubt come first, while there are few choices.
    order = sorted(range(len(losses)), key=lambda group: sorted(above[group].values())[1:2], reverse=True)
    least = [*accumulate((min(losses[group]) * sizes[group] for group in reversed(order)), initial=0)]
    layers = [[_Choice(0, 0.0, 0.0, 0, None)]]
    for left, group in zip(range(len(order) - 1, -1, -1), order, strict=True):
        further = (
            _Choice(each.size + bits * sizes[group], each.loss + losses[group][bits], each.above + cost, place, bits)
            for place, each in enumerate(layers[-1])
            for bits, cost in sorted(above[group].items())
        )
        fitting = (each for each in further if each.size + least[left] <= limit and each.above <= most)
        layers.append(_not_beaten(fitting))
    found, place = {}, len(layers[-1]) - 1
    for group, layer in zip(reversed(order), reversed(layers[1:]), strict=True):
        choice = layer[place]
        assert choice.bits is not None, "a group was chosen for"  # noqa: S101
        found[group], place = choice.bits, choice.before
    return tuple(found[group] for group in range(len(losses)))


class _Choice(NamedTuple):
    """A choice for some groups: `before` is the place of the choice for the groups before the last, `bits` of which."""

    size: int
    loss: float
    above: float
    before: int
    bits: Bits | None


def _not_beaten(choices: Iterable[_Choice]) -> list[_Choice]:
    """Return the choices for which no other is both as small and as good, rising in size and falling in loss."""
    found: list[_Choice] = []
    for choice in sorted(choices, key=lambda each: each[:2]):
        if not found or choice.loss < found[-1].loss:
            found.append(choice)
    return found


def _priced(losses: Sequence[Mapping[Bits, float]], sizes: Sequence[int], price: float) -> list[Bits]:
    """Return the bits of each group with the least sum of loss and priced size; of equal ones the fewest."""
    return [
        min(loss, key=lambda bits: (loss[bits] + price * bits * size, bits))
        for loss, size in zip(losses, sizes, strict=True)
    ]


def _size(bits: Iterable[Bits], sizes: Iterable[int]) -> int:
    return sum(each * size for each, size in zip(bits, sizes, strict=True))


def _price(losses: Sequence[Mapping[Bits, float]], sizes: Sequence[int], limit: int) -> float:
    """Return about the lowest price of size at which what costs least fits."""
    low, high = 0.0, 1.0
    while _size(_priced(losses, sizes, high), sizes) > limit:
        low, high = high, 2 * high
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _size(_priced(losses, sizes, middle), sizes) > limit else (low, middle)
    return high


def _known(losses: Sequence[Mapping[Bits, float]], sizes: Sequence[int], limit: int, price: float) -> float:
    """Return the loss of a choice that fits: what costs least, and what is left spent where it lowers most loss."""
    bits = _priced(losses, sizes, price)
    left = limit - _size(bits, sizes)
    while True:
        better = [
            (losses[group][now] - loss, group, new)
            for group, now in enumerate(bits)
            for new, loss in losses[group].items()
            if (new - now) * sizes[group] <= left and loss < losses[group][now]
        ]
        if not better:
            return sum(loss[now] for loss, now in zip(losses, bits, strict=True))
        _, group, new = max(better)
        left -= (new - bits[group]) * sizes[group]
        bits[group] = new
