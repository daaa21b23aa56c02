"""Draw parts of a text of any size by a seed, in one pass and in bounded memory.

A text is a sequence of units: pieces of plain text, or conversations. Each unit gets a random number in the order of
the text; the units with the smallest numbers are kept, as many as have the wanted size. So a draw depends on the text,
the seed and the size alone, and a larger draw holds all units of a smaller one.
"""

import heapq
import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

Unit = TypeVar("Unit")


@dataclass(frozen=True, kw_only=True)
class Draw(Generic[Unit]):
    """The units that were drawn.

    Attributes:
        units: with their numbers in the text, in its order.
        everything: whether these are all units of the text.
    """

    units: tuple[tuple[int, Unit], ...]
    everything: bool


def draw(units: Iterable[Unit], size_of: Callable[[Unit], int], *, least: int, seed: int) -> Draw[Unit]:
    """Draw units whose sizes have the sum `least`, or all units if they have less.

    Args:
        units: of a text, in order; not all are in memory at once.
        size_of: returns the size of a unit, in any measure.
        least: the smallest sum of the drawn units' sizes.
        seed: decides which units are drawn.
    """
    dice = random.Random(seed)  # noqa: S311, no secret; random() gives these numbers in every version of Python
    kept: list[tuple[float, int, Unit]] = []  # negative numbers: the largest is the first that goes
    total, everything = 0, True
    for index, unit in enumerate(units):
        heapq.heappush(kept, (-dice.random(), index, unit))
        total += size_of(unit)
        while len(kept) > 1 and total - size_of(kept[0][2]) >= least:
            total -= size_of(heapq.heappop(kept)[2])
            everything = False
    return Draw(units=tuple(sorted(((index, unit) for _, index, unit in kept), key=_number)), everything=everything)


def drawn_numbers(count: int, *, of: int, seed: int) -> list[int]:
    """Return `count` of the numbers below `of`, drawn without repetition, in ascending order."""
    found = draw(range(of), lambda _: 1, least=count, seed=seed)
    return [number for number, _ in found.units]


def pieces(blocks: Iterable[str], most: int) -> Iterator[str]:
    """Cut a text into pieces of `most` characters or, where a line or a word ends, of more than half of that.

    Args:
        blocks: the text, in any division.
        most: characters of a piece, at least 2.
    """
    held, size = [""], 0
    for block in blocks:
        begin = 0
        while size + len(block) - begin >= most:
            end = begin + most - size
            text = "".join([*held, block[begin:end]])
            cut = _cut(text)
            yield text[:cut]
            held, size, begin = [text[cut:]], len(text) - cut, end
        held.append(block[begin:])
        size += len(block) - begin
    if size:
        yield "".join(held)


def stretches(found: Draw[str]) -> list[str]:
    """Return the drawn pieces of a text, those that follow each other as one."""
    joined: list[list[str]] = []
    last = -2
    for number, piece in found.units:
        if number == last + 1:
            joined[-1].append(piece)
        else:
            joined.append([piece])
        last = number
    return ["".join(parts) for parts in joined]


def _cut(text: str) -> int:
    """Return where a piece ends: after the last line in its second half, else after the last word, else at its end."""
    half = len(text) // 2
    for mark in ("\n", " "):
        if (end := text.rfind(mark, half)) >= 0:
            return end + 1
    return len(text)


def _number(unit: tuple[int, object]) -> int:
    return unit[0]
