"""Text for people: sizes with their units, and values of untrusted files made safe to print. GB is 10^9 bytes."""

import json
import re
from collections.abc import Iterable

from packager.errors import without_secrets

BYTE_UNITS = {"GB": 10**9, "MB": 10**6, "kB": 10**3, "B": 1}
_MAX_MESSAGE = 600
_MAX_VALUE = 80
_MAX_QUOTED = 60

# Characters that a reader cannot see and that change, hide or reorder what is read: controls, the format characters and
# fillers that Unicode lists as Default_Ignorable_Code_Point, bidi marks, tags (U+E0000), surrogates, private use,
# noncharacters, the blank Braille pattern. Joiners are left between two letters of the scripts that spell with them
# and inside emoji; the two variation selectors of emoji are left after a symbol, one each.
_ALWAYS_HIDDEN = (
    r"\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b\u200e\u200f"
    r"\u2028-\u202e\u2060-\u206f\u2800\u3164\ud800-\uf8ff\ufdd0-\ufdef\ufe00-\ufe0d\ufeff\uffa0\ufff0-\ufffb"
    r"\ufffe\uffff\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U0010ffff"
)
_JOINED = r"\u0600-\u1fff\u2190-\u2bff\U0001f000-\U0001faff"
_SYMBOL = r"#*0-9\xa9\xae\u203c-\u3299\U0001f000-\U0001faff"
HIDDEN = re.compile(
    rf"[{_ALWAYS_HIDDEN}]|(?<![{_JOINED}\ufe0f])[\u200c\u200d]|[\u200c\u200d](?![{_JOINED}])|(?<![{_SYMBOL}])[\ufe0e\ufe0f]"
)


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


def reveal(text: str) -> str:
    """Return text with every hidden character, tabs and line feeds apart, written as an escape."""
    return HIDDEN.sub(lambda match: escaped(match.group()), text)


def escaped(char: str) -> str:
    """Return a character's escape as Python and JSON write it: four hex digits, or eight."""
    return f"\\u{ord(char):04x}" if ord(char) < 0x10000 else f"\\U{ord(char):08x}"


def printable(text: str) -> str:
    """Return text from an untrusted file as one bounded line that any terminal and any JSON writer accepts.

    No address in it has a password.
    """
    safe = without_secrets(text[: 2 * _MAX_MESSAGE])  # before it is cut: a cut may leave a password without its @
    encodable = safe[:_MAX_MESSAGE].encode("utf-8", "backslashreplace").decode("utf-8")
    line = reveal("".join(char if char.isprintable() else repr(char)[1:-1] for char in encodable))
    return line if len(safe) <= _MAX_MESSAGE else f"{line}..."


def printable_lines(text: str) -> str:
    """Return text with its line breaks, but without characters that move the cursor or hide words, and passwords."""
    safe = without_secrets(text).expandtabs(4)
    return reveal("".join(char if char.isprintable() or char == "\n" else repr(char)[1:-1] for char in safe))


def quoted(text: str) -> str:
    """Return a text in quotes, escaped, cut to 60 characters."""
    return reveal(repr(text if len(text) <= _MAX_QUOTED else text[: _MAX_QUOTED - 3] + "..."))


def shown(value: object) -> str:
    """Return a value of an untrusted JSON or YAML file: scalars in JSON's spelling, lists and objects by their kind."""
    if isinstance(value, int) and abs(value) >= 1 << 63:
        return "a huge number"
    if not isinstance(value, str | int | float | None):
        return "an object" if isinstance(value, dict) else f"a {type(value).__name__}"
    text = json.dumps(value)
    return text if len(text) <= _MAX_VALUE else f"{text[:_MAX_VALUE]}..."


def shown_address(address: str) -> str:
    """Return an address that somebody gave, as it may be shown, also without a scheme (user:password@host:path)."""
    user, at, rest = address.rpartition("@")
    return printable(rest if at and ":" in user and "://" not in address else address)


def has_credentials(url: str) -> bool:
    """Return whether a URL contains a password, or may contain one, and must not be shown or stored."""
    return without_secrets(url) != url


def rough_time(seconds: float) -> str:
    """Return a time as people say it: 12 s, 3 min 20 s, 5 h 10 min."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def joined_by_and(words: Iterable[object]) -> str:
    """Return words as a list in a sentence: `4`, `4 and 8`, `2, 4 and 8`."""
    *first, last = map(str, words)
    return f"{', '.join(first)} and {last}" if first else last
