"""Read files of a model's folder that others made: never outside the folder, never waiting, never more than expected.

A folder that was cloned or downloaded may hold links to files of this machine, FIFOs and devices, which block a reader
or never end. Links are followed inside the folder only, or from a snapshot of the Hub's cache to its blobs.
"""

import errno
import os
from pathlib import Path
from typing import BinaryIO

from packager.system.files import open_regular
from packager.system.posix import open_flags

_OPENS_FOLDERS = os.open in os.supports_dir_fd
_FOLDER_FLAGS = open_flags("O_RDONLY", "O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC")


def link_problem(folder: Path, link: Path) -> str:
    """Return why a link in a model's folder is not followed, or "".

    Args:
        folder: the model's folder.
        link: a symbolic link below it, or a path through one.
    """
    try:
        target = link.resolve(strict=True)
    except (OSError, RuntimeError, ValueError):  # a loop is a RuntimeError before Python 3.13
        return "the link leads nowhere"
    if target.is_dir():
        return "the link leads to a folder"
    return "" if _trusted_root(folder.resolve(), target) else "the link leads out of the folder"


def _trusted_root(folder: Path, target: Path) -> Path | None:
    """Return the folder below which a real path may be read: the model's folder, or its Hub cache; None for neither."""
    if target.is_relative_to(folder):
        return folder
    # The Hub client's cache: blobs of the repository, or, since huggingface_hub 2, of all repositories together.
    model = folder.parent.parent
    if folder.parent.name != "snapshots" or not model.name.startswith("models--"):
        return None
    if target.parent == model / "blobs":
        return model
    return model.parent / "blobs" if target.parent.parent == model.parent / "blobs" else None


def open_inside(folder: Path, name: str) -> BinaryIO:
    """Open a regular file of a model's folder.

    The path is resolved first; then every part of it is opened relative to the part before, and none may be a link, so
    that what is swapped for a link in the meantime is not followed. Windows opens no folders, but makes links only for
    administrators and developers: there the resolved path is opened as a whole.

    Args:
        folder: the model's folder.
        name: relative, with '/'; not below another folder through `..`.

    Raises:
        OSError: there is no such file, it is no regular file, or a link leads out of the folder; see `strerror`.
    """
    path = folder / name
    if problem := name_problem(name):
        raise OSError(errno.EINVAL, problem, str(folder))
    try:
        root, target = folder.resolve(), path.resolve(strict=True)
    except (RuntimeError, ValueError) as error:
        raise OSError(errno.ELOOP, "the link leads nowhere", str(path)) from error
    trusted = _trusted_root(root, target)
    if trusted is None:
        raise OSError(errno.ELOOP, "the link leads out of the folder", str(path))
    parts = target.relative_to(trusted).parts
    if not parts:
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not _OPENS_FOLDERS:
        return open_regular(target, shown=path)
    descriptor = os.open(trusted, _FOLDER_FLAGS)
    try:
        for part in parts[:-1]:
            outer = descriptor
            descriptor = os.open(part, _FOLDER_FLAGS, dir_fd=outer)
            os.close(outer)
        return open_regular(Path(parts[-1]), folder_descriptor=descriptor, shown=path)
    finally:
        os.close(descriptor)


def open_model_file(path: Path) -> BinaryIO:
    """Open a regular file under its own name; a link is followed.

    Raises:
        OSError: there is no such file, or it is no regular file, e.g. a FIFO, which would block the open.
    """
    return open_regular(Path(os.path.realpath(path)), shown=path)


def name_problem(name: str) -> str:
    r"""Return why a name that a model gives, e.g. in an index, cannot be a file of its folder, or ""."""
    if not name or "\0" in name or "\\" in name or any(part in ("", ".", "..") for part in name.split("/")):
        return "the name does not stay in the folder"
    return ""


def read_inside(folder: Path, name: str, most_bytes: int) -> bytes:
    """Return the content of a file of a model's folder.

    Raises:
        OSError: see `open_inside`; or it is larger than `most_bytes`.
    """
    with open_inside(folder, name) as stream:
        size = os.fstat(stream.fileno()).st_size
        data = stream.read(most_bytes + 1) if size <= most_bytes else b""
    if size > most_bytes or len(data) > most_bytes:
        raise OSError(errno.EFBIG, f"it is larger than {most_bytes} bytes", str(folder / name))
    return data
