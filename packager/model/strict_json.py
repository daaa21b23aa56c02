"""Parse JSON that others wrote: one meaning, bounded memory, and an error in a sentence.

Python's parser takes more than JSON is (NaN, 1e999, half of a surrogate pair) and keeps the last of two equal keys,
where another parser keeps the first: two readers of one file would see two files.
"""

import json
import math
import re
from collections.abc import Iterator
from typing import Any, NoReturn

# The largest tokenizer.json that is known (Gemma 3, 33 MB) has 2 million commas and brackets. Each can cost
# 350 bytes of memory.
MOST_JSON_VALUES = 2_500_000
_MOST_LEVELS = 64
_MOST_DIGITS = 64  # transformers writes model_max_length 10^30
# Hooks for every number cost seconds, so they are used only where the text can need them. What can need them is found
# in a copy whose digits are all 0: ten times as fast as a search for [0-9]{65} or [eE]\+?[0-9]{3}.
_DIGITS_ARE_0 = bytes.maketrans(b"123456789E", b"000000000e")
_MANY_DIGITS = re.compile(rf"[0-9]{{{_MOST_DIGITS + 1}}}")
_CONTAINERS = frozenset({dict, list})
_STRING = re.compile(r'"(?:[^"\\]|\\.)*+"', re.DOTALL)
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def parse_json(data: bytes, *, most_values: int = MOST_JSON_VALUES) -> object:
    """Parse a JSON document.

    Args:
        data: UTF-8 without a byte order mark.
        most_values: the largest `most_values_in` that is parsed.

    Raises:
        ValueError: it is not JSON, a key is given twice, a number is infinite or has more than 64 digits, a string
            holds half of a surrogate pair, or it is nested more than 64 levels deep. The text is a whole sentence and
            quotes nothing of the document that is longer than a few characters.
    """
    if most_values_in(data) > most_values:
        raise ValueError(f"it holds more than {most_values} values")
    text = data.decode("utf-8")
    zeros = data.translate(_DIGITS_ARE_0)
    many_digits = b"0" * (_MOST_DIGITS + 1) in zeros
    large_exponent = b"e000" in zeros or b"e+000" in zeros
    if many_digits and any(_MANY_DIGITS.search(part) for part in _outside_strings(text)):
        raise ValueError(f"a number has more than {_MOST_DIGITS} digits")
    try:
        value: object = json.loads(
            text,
            object_pairs_hook=_unique_keys,
            parse_constant=_refuse_constant,
            parse_float=_finite_float if large_exponent else None,
        )
    except RecursionError:
        raise ValueError(f"it is nested more than {_MOST_LEVELS} levels deep") from None
    has_surrogates = _SURROGATE.search(text) is not None
    for level, values in enumerate(_levels(value)):
        if level == _MOST_LEVELS:
            raise ValueError(f"it is nested more than {_MOST_LEVELS} levels deep")
        if has_surrogates and not all(_is_text(string) for each in values for string in _strings(each)):
            raise ValueError("a string holds half of a surrogate pair, which is no character")
    return value


def parse_json_object(data: bytes, *, most_values: int = MOST_JSON_VALUES) -> dict[str, object]:
    """Parse a JSON document that is an object; see `parse_json`.

    Raises:
        ValueError: also when it holds something else.
    """
    value = parse_json(data, most_values=most_values)
    if not isinstance(value, dict):
        raise ValueError("it is not a JSON object")
    return value


def most_values_in(data: bytes) -> int:
    """Return how many values a document can hold, keys excluded: its commas and opening brackets, also in strings."""
    return sum(data.count(mark) for mark in (b",", b"[", b"{"))


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    keys = dict(pairs)
    if len(keys) != len(pairs):
        raise ValueError("a key is given twice in one object")
    return keys


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _outside_strings(text: str) -> Iterator[str]:
    """Yield the parts of a JSON text between its strings."""
    end = 0
    for string in _STRING.finditer(text):
        yield text[end : string.start()]
        end = string.end()
    yield text[end:]


def _finite_float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("a number is too large for a float")
    return value


def _levels(value: object) -> Iterator[list[object]]:
    """Yield the document, then every object and list one level deeper, and so on."""
    level: list[Any] = [value]
    while level:
        yield level
        level = [  # by type, not by isinstance, which takes twice as long: the parser makes no other objects and lists
            inner
            for outer in level
            if type(outer) in _CONTAINERS
            for inner in (outer.values() if type(outer) is dict else outer)
            if type(inner) in _CONTAINERS
        ]


def _items(value: object) -> Iterator[object]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value


def _strings(value: object) -> Iterator[str]:
    """Yield the strings directly in a value: itself, its keys, its items."""
    if isinstance(value, str):
        yield value
    if isinstance(value, dict):
        yield from value
    yield from (item for item in _items(value) if isinstance(item, str))


def _is_text(string: str) -> bool:
    try:
        string.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True
