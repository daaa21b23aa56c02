"""Write the names of thousands of tensors as a few patterns: `model.layers.{0..47}.mlp.up_proj.weight`.

Numbers that stand between dots are the places of a pattern; `{0..2,5}` is 0, 1, 2 and 5. No torch here.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import islice, product

_NUMBER = re.compile(r"(?<![^.])(?:0|[1-9]\d{0,8})(?![^.])")
_PLACE = re.compile(r"\{([0-9.,]+)\}")
_RANGE = re.compile(r"(0|[1-9]\d{0,8})(?:\.\.(0|[1-9]\d{0,8}))?\Z")
MOST_NAMES = 400_000
# Of one name. The longest names in transformers have 12 parts; 400,000 names of these sizes take 300 MB.
_MOST_PARTS, _MOST_CHARACTERS = 32, 256

Numbers = tuple[int, ...]


def natural_key(name: str) -> list[tuple[int, str]]:
    """Return a sort key by which block 2 comes before block 10."""
    return [*map(part_key, name.split("."))]


@lru_cache(maxsize=4096)
def part_key(part: str) -> tuple[int, str]:
    """Return the sort key of what stands between two dots of a name, see `natural_key`."""
    return (int(part), "") if part.isascii() and part.isdigit() else (-1, part)


def patterns_of(names: Iterable[str]) -> list[str]:
    """Return few patterns that together stand for exactly the given names, which are all different.

    Raises:
        ValueError: a name holds a brace.
    """
    found: dict[str, list[Numbers]] = defaultdict(list)
    for name in names:
        if "{" in name or "}" in name:
            raise ValueError(f"{name!r} holds a brace")
        found[_NUMBER.sub("{}", name)].append(tuple(map(int, _NUMBER.findall(name))))
    return [
        _filled(template, places)
        for template, numbers in found.items()
        for places in _products(sorted(numbers))
    ]  # fmt: skip


def _products(numbers: Sequence[Numbers]) -> Iterator[list[Numbers]]:
    """Cut sorted tuples into products of sets: one set of numbers for each place."""
    if not numbers or not numbers[0]:
        yield []
        return
    places = [tuple(sorted({values[place] for values in numbers})) for place in range(len(numbers[0]))]
    if math.prod(map(len, places)) == len(numbers):
        yield places
        return
    rests: dict[tuple[Numbers, ...], list[int]] = defaultdict(list)
    by_first: dict[int, list[Numbers]] = defaultdict(list)
    for first, *rest in numbers:
        by_first[first].append(tuple(rest))
    for first, rest_numbers in by_first.items():
        rests[tuple(rest_numbers)].append(first)
    for rest_of_first, firsts in rests.items():
        for places in _products(rest_of_first):
            yield [tuple(firsts), *places]


def _filled(template: str, places: Sequence[Numbers]) -> str:
    for numbers in places:
        written = f"{numbers[0]}" if len(numbers) == 1 else f"{{{write_numbers(numbers)}}}"
        template = template.replace("{}", written, 1)
    return template


def write_numbers(numbers: Sequence[int]) -> str:
    """Write sorted numbers as ranges: `0..2,5`."""
    parts: list[str] = []
    begin = previous = numbers[0]
    for number in [*numbers[1:], None]:
        if number is None or number != previous + 1:
            parts.append(f"{begin}" if begin == previous else f"{begin}..{previous}")
            begin = number if number is not None else begin
        previous = number if number is not None else previous
    return ",".join(parts)


def read_numbers(text: str) -> Numbers:
    """Read `0..2,5`.

    Raises:
        ValueError: it is not written so, or stands for more than `MOST_NAMES` numbers.
    """
    numbers: list[int] = []
    for part in text.split(","):
        match = _RANGE.match(part)
        if match is None:
            raise ValueError(f"{text!r} is not a list of numbers such as 0..2,5")
        begin, end = int(match[1]), int(match[2] or match[1])
        if not begin <= end < begin + MOST_NAMES - len(numbers) or (numbers and begin <= numbers[-1]):
            raise ValueError(f"{text!r} is not in rising order, or too long")
        numbers.extend(range(begin, end + 1))
    return tuple(numbers)


def names_of(pattern: str) -> Iterator[str]:
    """Yield the names that a pattern stands for.

    Raises:
        ValueError: see `parts_of`.
    """
    return map(".".join, product(*parts_of(pattern)))


def parts_of(pattern: str) -> tuple[tuple[str, ...], ...]:
    """Return what may stand at each place between dots: a name that the pattern stands for has one of each.

    Raises:
        ValueError: the pattern is malformed, its names are too long, or it stands for more than `MOST_NAMES` names.
    """
    template = _PLACE.sub("{}", pattern)
    texts = _PLACE.findall(pattern)
    if template.count("{") != len(texts) or template.count("}") != len(texts):
        raise ValueError(f"{pattern!r} has a brace that no numbers stand in")
    places: list[Numbers] = []
    for text in texts:
        places.append(read_numbers(text))
        if math.prod(map(len, places)) > MOST_NAMES:  # before the next place takes memory
            raise ValueError(f"{pattern!r} stands for more than {MOST_NAMES} names")
    if len(template) > _MOST_CHARACTERS or template.count(".") >= _MOST_PARTS:
        raise ValueError(f"{pattern[:40]!r}... is longer than {_MOST_CHARACTERS} characters or {_MOST_PARTS} parts")
    numbers = iter(places)
    return tuple(
        tuple(part.format(*values) for values in product(*islice(numbers, part.count("{}"))))
        for part in template.split(".")
    )
