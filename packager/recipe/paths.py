"""Resolve paths of a recipe: relative to its folder, never outside it, not even through a symbolic link."""

import difflib
import os
from pathlib import Path

from packager.system.text import quoted


def locate(folder: Path, relative: str) -> Path | None:
    """Return the real path of `relative` below `folder`, or None when a link or `..` leads outside.

    The path need not exist.
    """
    root = Path(os.path.realpath(folder))
    path = Path(os.path.realpath(root / relative))
    return path if path.is_relative_to(root) else None


def path_problem(folder: Path, relative: str, *, directory: bool = False) -> tuple[str, str]:
    """Return why `relative` cannot be read as a file (or a folder), and a hint; two empty texts when it can."""
    path = locate(folder, relative)
    kind = "folder" if directory else "file"
    if path is None:
        return (
            f"{quoted(relative)} leaves the recipe's folder through a symbolic link",
            f"put a copy of the {kind} there",
        )
    # os.path answers False where Path.is_file raises: a name that is too long, a folder without permission.
    if os.path.isdir(path) if directory else os.path.isfile(path):  # noqa: PTH112, PTH113
        return "", ""
    if os.path.exists(path):  # noqa: PTH110
        return f"{quoted(relative)} is not a {kind}", ""
    return f"there is no {kind} {quoted(relative)} in the recipe's folder", _similar(path)


def _similar(path: Path) -> str:
    try:
        names = os.listdir(path.parent)  # noqa: PTH208, only names are wanted
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {quoted(close[0])}?" if close else ""
