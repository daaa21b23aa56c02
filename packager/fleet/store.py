"""The store that machines share: a folder, or what fsspec opens by a URL, such as s3://bucket/folder.

A name is a relative path with '/'. Writing is atomic: a reader sees the old content, the new one or nothing. `create`
is the one operation that tells two writers apart. What a file system or a service answers otherwise, such as a stale
handle or a 503, is a MachineError: it may pass.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import BinaryIO, Protocol

from packager.errors import MachineError, PackagerError, StateError
from packager.system.files import TEMPORARY_PREFIX, disk_errors, fsync_folder, open_regular, write_atomic


class Store(Protocol):
    """Files by name. Each method raises MachineError where the store does not do it now: another time it may.

    Attributes:
        url: the folder, or the URL, of the store.
    """

    url: str

    def read(self, name: str, *, large: bool = False) -> bytes | None:
        """Return the content of a file, None if there is none.

        Args:
            name: of the file.
            large: it may have more than a megabyte, and take its time.
        """

    def write(self, name: str, data: bytes) -> None:
        """Write a file, or replace it."""

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless there is one of this name; return whether it was written."""

    def size_bytes(self, name: str) -> int | None:
        """Return the size of a file, None if there is none."""

    def names(self, folder: str) -> list[str]:
        """Return the names of all files below a folder, sorted."""

    def put(self, path: Path, name: str) -> None:
        """Copy a local file into the store."""

    def get(self, name: str, path: Path) -> None:
        """Copy a file of the store to a local path.

        Raises:
            StateError: there is none.
        """

    def delete(self, folder: str) -> None:
        """Delete all files below a folder."""

    def without_looking(self) -> "Store":
        """Return the same store, opened once more, whose `create` cannot look for the file itself."""


def checked_name(name: str) -> str:
    """Refuse a name that leads out of the store."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise StateError("a name leads out of the store", where=repr(name))
    return name


@contextmanager
def store_errors(url: str, name: str) -> Iterator[None]:
    """Translate what a store raises; every service behind fsspec has errors of its own."""
    try:
        yield
    except PackagerError:
        raise
    except Exception as error:
        raise MachineError(
            "the store cannot be used now",
            where=f"{url.rstrip('/')}/{name}",
            why=f"{type(error).__name__}: {error}",
            hint="if it does not pass, check the network, the rights and the URL of the store",
        ) from error


class FolderStore:
    """A folder that all machines mount at the same path: NFS 4, Lustre, a disk of one machine."""

    def __init__(self, root: Path) -> None:
        self._root, self.url = root, str(root)

    def without_looking(self) -> "FolderStore":
        """Return this store: a link is made or refused by the file system."""
        return self

    def _path(self, name: str) -> Path:
        return self._root / checked_name(name)

    def read(self, name: str, *, large: bool = False) -> bytes | None:  # noqa: ARG002 - a file system has no limit
        """Return the content of a file, None if there is none."""
        with store_errors(self.url, name), suppress(FileNotFoundError), open_regular(self._path(name)) as stream:
            return stream.read()
        return None

    def write(self, name: str, data: bytes) -> None:
        """Write a file, or replace it."""
        path = self._path(name)
        with store_errors(self.url, name), disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, data)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless there is one of this name: a hard link is made or refused at once, over NFS too."""
        path = self._path(name)
        with store_errors(self.url, name), disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            descriptor, temporary = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
            try:
                with os.fdopen(descriptor, "wb") as stream:
                    stream.write(data)
                    stream.flush()
                    os.fsync(stream.fileno())
                try:
                    os.link(temporary, path)
                except FileExistsError:
                    return False
                fsync_folder(path.parent)
            finally:
                Path(temporary).unlink(missing_ok=True)
        return True

    def size_bytes(self, name: str) -> int | None:
        """Return the size of a file, None if there is none."""
        with store_errors(self.url, name), suppress(FileNotFoundError):
            return self._path(name).stat().st_size
        return None

    def names(self, folder: str) -> list[str]:
        """Return the names of all files below a folder, sorted; unfinished ones are left out."""
        root = self._path(folder) if folder else self._root
        with store_errors(self.url, folder):  # rglob leaves out what it cannot read: a lease would seem to be gone
            found = [Path(at, name) for at, _, names in os.walk(root, onerror=_raise_unless_gone) for name in names]
        kept = (path for path in found if not path.name.startswith(TEMPORARY_PREFIX))
        return sorted(path.relative_to(self._root).as_posix() for path in kept)

    def put(self, path: Path, name: str) -> None:
        """Copy a local file into the store."""
        target = self._path(name)
        with store_errors(self.url, name), disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with open_regular(path) as reader:
                _copy(reader, target)

    def get(self, name: str, path: Path) -> None:
        """Copy a file of the store to a local path."""
        with store_errors(self.url, name):
            try:
                reader = open_regular(self._path(name))
            except FileNotFoundError as error:
                raise missing_file(name) from error
            with reader, disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                _copy(reader, path)

    def delete(self, folder: str) -> None:
        """Delete all files below a folder."""
        shutil.rmtree(self._path(folder), ignore_errors=True)


def _raise_unless_gone(error: OSError) -> None:
    """Let a folder be left out that another process deleted meanwhile."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _copy(reader: BinaryIO, target: Path) -> None:
    """Write a file that is open so that its copy is whole or not there."""
    descriptor, temporary = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=target.parent)
    try:
        with os.fdopen(descriptor, "wb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 22)
            writer.flush()
            os.fchmod(writer.fileno(), 0o644)
            os.fsync(writer.fileno())
        Path(temporary).replace(target)
        fsync_folder(target.parent)
    finally:
        Path(temporary).unlink(missing_ok=True)


def missing_file(name: str) -> StateError:
    """Return the error for a file that is not in the store."""
    hint = "run the same command again: what is missing is made again"
    return StateError("a file is not in the store", where=name, hint=hint)
