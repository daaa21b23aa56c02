"""Read an untrusted branch: in bounded pieces, and to disk only under names that stay in the folder."""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Protocol

from packager.errors import MachineError, PublishError
from packager.publish.targets import LARGE_BYTES, StoredFile, Target, file_name_problem
from packager.system.files import disk_errors
from packager.system.parallel import in_parallel
from packager.system.text import format_bytes, printable, shown

MAX_FILES = 10_000
_HUGE_BYTES = 1 << 63
_MAX_WEIGHTS_BYTES = 1 << 43  # of one file: what file systems can have as a hole, ext4 included


class Reports(Protocol):
    """Collects findings: those of the audit, or those of a published repository, which have its codes too."""

    def add(self, code: str, where: str, message: str, /) -> None:
        """Report `message` on a file under `code`."""


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A branch that is being checked: its head, its files, and the names that are safe to write to disk."""

    target: Target
    name: str
    commit: str
    stored: Mapping[str, StoredFile]
    safe: frozenset[str]

    def read(self, name: str, size: int) -> bytes:
        """Return a file's first bytes, at most `size`."""
        if self.stored[name].size_bytes <= 0:
            return b""  # HTTP has no empty range and answers with an error
        return self.target.read_bytes(self.commit, name, size=size)[:size]

    def read_part(self, name: str, start: int, size: int) -> bytes:
        """Return `size` bytes of a file from `start` on.

        Raises:
            PublishError: the repository sends fewer.
        """
        data = self.target.read_bytes(self.commit, name, start=start, size=size) if size else b""
        if len(data) != size:
            what = f"{len(data)} bytes came of {name} where {size} were asked for"
            raise PublishError(what, where=self.target.where, why=f"from byte {start} on")
        return data


def bounded(file: StoredFile) -> StoredFile:
    """Return a file with a limited size: a pointer of git-lfs may state a size of 800 digits."""
    return replace(file, size_bytes=min(file.size_bytes, _HUGE_BYTES))


def safe_names(stored: Mapping[str, StoredFile], found: Reports) -> frozenset[str]:
    """Return the ordinary files whose names are safe to write to disk; report the others."""
    safe = set()
    for name, file in sorted(stored.items()):
        if problem := file_name_problem(name):
            found.add("file-name", name, problem)
        elif any(folder.as_posix() in stored for folder in PurePosixPath(name).parents):
            found.add("file-name", name, "the branch has its folder as a file, too")
        elif not (file.sha256 or file.blob_id) or file.size_bytes < 0:
            found.add("not-a-regular-file", name, "a link, a submodule or an executable")
        else:
            safe.add(name)
    return frozenset(safe)


def download(
    branch: Branch, names: Sequence[str], folder: Path, found: Reports, log: Callable[[str], None]
) -> list[str]:
    """Write files of the branch into `folder`; return the names of those that were written.

    Raises:
        MachineError: the folder has no space for the files.
    """
    needed, free = sum(branch.stored[name].size_bytes for name in names), shutil.disk_usage(folder).free
    if needed > free:
        raise MachineError(
            f"the temporary folder has no space for {printable(branch.name)}",
            where=str(folder.parent.parent),
            why=f"{format_bytes(needed)} are needed, {format_bytes(free)} are free",
            hint="set TMPDIR to a folder with more space, or name other branches with --branch",
        )

    def fetch(name: str) -> str:
        size_bytes = branch.stored[name].size_bytes
        log(f"  {printable(branch.name)}: {printable(name)}, {format_bytes(size_bytes)}")
        if size_bytes < LARGE_BYTES:  # at most one byte more than listed: a larger answer is found as changed
            return put(folder / name, branch.read(name, size_bytes + 1))
        return _written(folder / name, lambda path: branch.target.export(branch.commit, name, path))

    problems: dict[str, str] = dict(zip(names, in_parallel(fetch, names), strict=True))
    for name, problem in problems.items():
        if problem:
            found.add("file-name", name, f"it cannot be written to disk: {problem}")
    return [name for name in names if not problems[name]]


def put_header(branch: Branch, name: str, folder: Path, left_bytes: int, found: Reports) -> int | None:
    """Write a weights file up to the end of its header, sparse after it; return the number of bytes read.

    Returns None after reporting a file that cannot be checked. Bytes that are no header are written, too: the audit
    parses them and reports the damage.
    """
    size_bytes = branch.stored[name].size_bytes
    data = branch.read(name, 8) if size_bytes <= _MAX_WEIGHTS_BYTES else b""
    length = int.from_bytes(data, "little")
    readable = len(data) == 8 and length <= size_bytes - 8
    if size_bytes > _MAX_WEIGHTS_BYTES or (readable and length > left_bytes):
        found.add("header-too-large", name, f"a header of {shown(length)} bytes in a file of {shown(size_bytes)}")
        return None
    if readable:
        # From the start of the file: a server without ranges sends these bytes, too.
        data = branch.read(name, 8 + length)
    if problem := put(folder / name, data, size_bytes):
        found.add("file-name", name, f"it cannot be written to disk: {problem}")
        return None
    return len(data)


def put(path: Path, data: bytes, size_bytes: int | None = None) -> str:
    """Write a file, sparse after `data` up to `size_bytes`; return why it could not be written, or ""."""

    def write(path: Path) -> None:
        path.write_bytes(data)
        if size_bytes is not None:
            os.truncate(path, size_bytes)

    return _written(path, write)


def _written(path: Path, write: Callable[[Path], None]) -> str:
    """Return why a file's name cannot be written, or "".

    Raises:
        MachineError: the disk is full or not writable.
    """
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write(path)
    except OSError as error:
        return error.strerror or str(error)
    return ""
