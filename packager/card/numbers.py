"""Figures as a card shows them: significant digits, and never a zero that is not one."""

import math

from packager.errors import CardError
from packager.system.text import BYTE_UNITS

_SCIENTIFIC_BELOW = 1e-4
_DIGITS = 3
# A space at which no line of a table breaks.
_SPACE = "\u00a0"
PERCENT = f"{_SPACE}%"


def finite(value: float) -> float:
    """Return a figure that is a number.

    Raises:
        CardError: it is not.
    """
    if not math.isfinite(value):
        raise CardError("a receipt holds a figure that is not a number", why=str(value), hint="build the variant again")
    return value


def decimals(value: float, places: int) -> str:
    """Return a figure with a number of places after the point."""
    return f"{finite(value):.{places}f}"


def percent(fraction: float, places: int = 2, *, signed: bool = False) -> str:
    """Return a fraction in per cent."""
    sign = "+" if signed else ""
    return f"{finite(fraction) * 100:{sign}.{places}f}%"


def digits(value: float, significant: int, *, zeros: bool = False) -> str:
    """Return a figure with as many digits; `zeros`: also those at its end, where the value is known that precisely."""
    return f"{finite(value):{'#' if zeros else ''}.{significant}g}"


def measured(value: float, error: float | None, *, significant: int = 3, signed: bool = False) -> str:
    """Return a figure with twice its standard error: `0.0234 ± 0.0012`, `1.23e-6 ± 0.12e-6`.

    The error has two digits, the figure ends where the error ends, but has two digits at least. Without an error it has
    as many as `significant`.
    """
    twice = None if error is None else 2 * finite(error)
    exponent = math.floor(math.log10(abs(value))) if finite(value) and abs(value) < _SCIENTIFIC_BELOW else 0
    factor, power = 10.0**exponent, f"e{exponent}" if exponent else ""
    parts = [value / factor] if twice is None else [value / factor, twice / factor]
    places = max((_places(part, 2) for part in parts if part), default=0)
    if not twice and value:
        places = _places(parts[0], significant)
    shown = f"{parts[0]:{'+' if signed else ''}.{places}f}{power}"
    return shown if twice is None else f"{shown} ±{_SPACE}{parts[1]:.{places}f}{power}"


def measured_percent(fraction: float, error: float | None, *, signed: bool = False, unit: str = PERCENT) -> str:
    """Return a fraction in per cent with twice its standard error: `95.61 ± 0.12 %`."""
    if error is None:
        return f"{percent(fraction, signed=signed)[:-1]}{unit}"
    return f"{measured(100 * fraction, 100 * error, signed=signed)}{unit}"


def short_size(size_bytes: int) -> str:
    """Return a size with three digits: `7.26 GB`, `39.8 GB`, `110 MB`."""
    unit = size_unit(size_bytes)
    return f"{in_unit(size_bytes, unit)}{_SPACE}{unit}"


def size_unit(size_bytes: int) -> str:
    """Return the unit in which three digits of a size are a number from 1 to 999."""
    # 999.6 MB with three digits is 1.00 GB.
    return next((unit for unit, factor in BYTE_UNITS.items() if size_bytes >= 0.9995 * factor), "B")


def in_unit(size_bytes: int, unit: str) -> str:
    """Return a size with three digits in a unit that a column's heading names."""
    value = size_bytes / BYTE_UNITS[unit]
    return f"{value:.{_places(value, _DIGITS)}f}" if size_bytes and unit != "B" else f"{value:.0f}"


def _places(value: float, significant: int) -> int:
    """Return how many places after the point show so many digits of a value that is not 0."""
    exponent = math.floor(math.log10(abs(value)))
    if float(f"{abs(value):.{significant - 1}e}") >= 10 ** (exponent + 1):  # 9.996 with three digits is 10.0
        exponent += 1
    return max(0, significant - 1 - exponent)
