"""Text for people: sizes with their units, and values of untrusted files made safe to print. GB is 10^9 bytes."""

import json
from urllib.parse import urlsplit

BYTE_UNITS = {"GB": 10**9, "MB": 10**6, "kB": 10**3, "B": 1}
_MAX_MESSAGE = 600
_MAX_VALUE = 80
_MAX_QUOTED = 60


def format_bytes(size_bytes: int) -> str:
    """Return a size in decimal units, e.g. `8.12 MB`."""
    for unit, factor in BYTE_UNITS.items():
        if size_bytes >= factor > 1:
            return f"{size_bytes / factor:.2f} {unit}"
    return f"{size_bytes} B"


def gigabytes(size_bytes: int) -> str:
    """Return a size in GB (10^9 bytes) without the unit, for a column or a sentence that names it."""
    return f"{size_bytes / 1e9:.2f}"


def gibibytes(size_bytes: int) -> str:
    """Return a size in GiB (2^30 bytes) without the unit: the memory of GPUs is sold in GiB."""
    return f"{size_bytes / 2**30:.1f}"


def printable(text: str) -> str:
    """Return text from an untrusted file as one bounded line that any terminal and any JSON writer accepts."""
    escaped = text[:_MAX_MESSAGE].encode("utf-8", "backslashreplace").decode("utf-8")
    line = "".join(char if char.isprintable() else repr(char)[1:-1] for char in escaped)
    return line if len(text) <= _MAX_MESSAGE else f"{line}..."


def printable_lines(text: str) -> str:
    """Return text with its line breaks, but without characters that move the cursor or hide words."""
    return "".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in text.expandtabs(4))


def quoted(text: str) -> str:
    """Return a text in quotes, escaped, cut to 60 characters."""
    return repr(text if len(text) <= _MAX_QUOTED else text[: _MAX_QUOTED - 3] + "...")


def shown(value: object) -> str:
    """Return a value of an untrusted JSON or YAML file: scalars in JSON's spelling, lists and objects by their kind."""
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return "a huge number"
    if not isinstance(value, str | int | float | None):
        return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"
    text = json.dumps(value)
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}..."


def has_credentials(url: str) -> bool:
    """Return whether a URL contains a password, or may contain one, and must not be shown or stored."""
    parts = urlsplit(url)
    return parts.password is not None or (
        parts.scheme.startswith("http") and ("@" in parts.netloc or bool(parts.query))
    )
