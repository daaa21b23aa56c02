"""Sizes as people read them: GB is 10^9 bytes."""


def format_bytes(size_bytes: int) -> str:
    """Return a size in decimal units, e.g. `8.12 MB`."""
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.2f} {unit}"
    return f"{size_bytes} B"
