"""The card's picture: four files or none, and in them nothing but a picture.

A reader's browser opens them. A PNG may hold texts that nobody sees, an SVG scripts and addresses.
"""

import zlib
from xml.parsers import expat

from packager.model.model_folder import read_inside
from packager.prove.audit.files import Listing
from packager.prove.audit.finding import Findings
from packager.receipt import PICTURE_FILES

_MOST_BYTES = 2_000_000
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"sBIT", b"sRGB", b"gAMA", b"pHYs", b"IDAT", b"IEND"})
# Length, name and checksum.
_CHUNK_BYTES = 12
_ELEMENTS = frozenset({"svg", "defs", "style", "g", "path", "clipPath", "rect", "use"})


def check_pictures(listing: Listing, findings: Findings) -> None:
    """Check the files that the card shows as its picture."""
    present = [name for name in PICTURE_FILES if listing.has(name)]
    for name in PICTURE_FILES if present else ():
        if name not in present:
            findings.add("picture-damaged", name, f"there is {present[0]}, and not this file")
        elif name in listing.sizes and (problem := _problem(listing, name)):
            findings.add("picture-damaged", name, problem)


def _problem(listing: Listing, name: str) -> str:
    if listing.sizes[name] > _MOST_BYTES:
        return f"{listing.sizes[name]} bytes are too many for a picture"
    try:
        data = read_inside(listing.folder, name, _MOST_BYTES)
    except OSError as error:
        return f"it cannot be read: {error.strerror or error}"
    return _png_problem(data) if name.endswith(".png") else _svg_problem(data)


def _png_problem(data: bytes) -> str:
    """Return what is wrong with a PNG's chunks, or ""; its pixels are not decoded."""
    if not data.startswith(_SIGNATURE):
        return "it is not a PNG file"
    position, name = len(_SIGNATURE), b""
    while position < len(data):
        if name == b"IEND":
            return "it goes on after the picture's end"
        size = int.from_bytes(data[position : position + 4])
        end = position + _CHUNK_BYTES + size
        name, content = data[position + 4 : position + 8], data[position + 8 : end - 4]
        if end > len(data) or zlib.crc32(name + content) != int.from_bytes(data[end - 4 : end]):
            return "a part of it is cut off or damaged"
        if name not in _CHUNKS:
            return f"it holds more than a picture: {name!r}"
        position = end
    return "" if name == b"IEND" else "its end is missing"


def _svg_problem(data: bytes) -> str:
    """Return why an SVG holds more than shapes, or ""."""
    found: list[str] = []
    depth = 0

    def start(element: str, attributes: dict[str, str]) -> None:
        nonlocal depth
        if element not in _ELEMENTS or (depth == 0) is not (element == "svg"):
            found.append(f"the element {element!r} is no part of a drawing")
        depth += 1
        for key, value in attributes.items():
            inside = value.startswith("#") if key.endswith("href") else _refers_inside(value)
            if key.lower().startswith("on") or (not inside and not key.startswith("xmlns")):
                found.append(f"the attribute {key!r} runs or loads something")

    def end(_: str) -> None:
        nonlocal depth
        depth -= 1

    def text(content: str) -> None:
        if not _refers_inside(content):
            found.append("its style loads something")

    def refuse(*_: object) -> None:
        raise ValueError("it declares an entity or asks for a program")

    parser = expat.ParserCreate()
    parser.buffer_text = True
    parser.StartElementHandler, parser.EndElementHandler, parser.CharacterDataHandler = start, end, text
    parser.EntityDeclHandler = parser.ProcessingInstructionHandler = refuse
    try:
        parser.Parse(data, True)
    except (expat.ExpatError, ValueError) as error:
        return f"it is not an SVG drawing: {error}"
    return found[0] if found else ""


def _refers_inside(text: str) -> bool:
    """Return whether CSS or an attribute refers to nothing outside the file."""
    plain = "".join(text.split()).lower()
    return "\\" not in plain and "@" not in plain and plain.count("url(") == plain.count("url(#")
