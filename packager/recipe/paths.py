"""Resolve paths of a recipe: relative to its folder, never outside it, not even through a symbolic link.

The base model's folder alone may be elsewhere, where the recipe says so by an absolute path or by `~/`.
"""

import difflib
import os
import re
from pathlib import Path, PurePosixPath
from typing import Annotated

from pydantic import AfterValidator, Field

from packager.system.text import quoted


def _relative_path(value: str) -> str:
    if not _stays_inside(value):
        raise ValueError("must be relative to the recipe's folder and may not leave it")
    return value


def _folder_path(value: str) -> str:
    if not _stays_inside(value[1:].lstrip("/") if is_elsewhere(value) else value):
        raise ValueError("must be relative to the recipe's folder, absolute, or begin with ~/, and without '..'")
    return value


def _stays_inside(value: str) -> bool:
    if len(value) > _MOST_CHARACTERS or not value.isprintable():
        raise ValueError(f"must have at most {_MOST_CHARACTERS} characters, all of them printable")
    path = PurePosixPath(value)
    return not (
        not value or path.is_absolute() or ".." in path.parts or "\\" in value or re.match("[A-Za-z]:|~", value)
    )


_MOST_CHARACTERS = 400
RelativePath = Annotated[str, AfterValidator(_relative_path), Field(description="relative to the recipe's folder")]
FolderPath = Annotated[
    str,
    AfterValidator(_folder_path),
    Field(description="relative to the recipe's folder, absolute, or ~/ and a path below the home folder"),
]


def locate(folder: Path, relative: str) -> Path | None:
    """Return the real path of `relative` below `folder`, or None when a link or `..` leads outside.

    The path need not exist.
    """
    root = Path(os.path.realpath(folder))
    path = Path(os.path.realpath(root / relative))
    return path if path.is_relative_to(root) else None


def locate_base(folder: Path, path: str) -> Path | None:
    """Return the real path of the base model's folder; None when a relative one leads out of the recipe's folder."""
    if not is_elsewhere(path):
        return locate(folder, path)
    return Path(os.path.realpath(os.path.expanduser(path)))  # noqa: PTH111, no home folder is no error here


def is_elsewhere(path: str) -> bool:
    """Return whether a path is absolute or below the home folder: information about one machine."""
    return path.startswith(("/", "~/"))


def path_problem(folder: Path, relative: str, *, directory: bool = False) -> tuple[str, str]:
    """Return why a file, or the base model's folder, cannot be read, and a hint; two empty texts when it can."""
    path = locate_base(folder, relative) if directory else locate(folder, relative)
    kind = "folder" if directory else "file"
    if path is None:
        return (
            f"{quoted(relative)} leaves the recipe's folder through a symbolic link",
            "write the absolute path of the folder" if directory else "put a copy of the file there",
        )
    # os.path answers False where Path.is_file raises: a name that is too long, a folder without permission.
    if os.path.isdir(path) if directory else os.path.isfile(path):  # noqa: PTH112, PTH113
        return "", ""
    if os.path.exists(path):  # noqa: PTH110
        hint = "name the folder that holds the files" if directory else "name a file in that folder"
        return f"{quoted(relative)} is not a {kind}", hint
    inside = "" if directory and is_elsewhere(relative) else " in the recipe's folder"
    return f"there is no {kind} {quoted(relative)}{inside}", _similar(path)


def _similar(path: Path) -> str:
    try:
        names = os.listdir(path.parent)  # noqa: PTH208, only names are wanted
    except OSError:
        return ""
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean {quoted(close[0])}?" if close else ""
