"""The store that machines share, addressed by a URL: a folder, or what fsspec opens, such as s3://bucket/folder.

A name is a relative path with '/'. Writing is atomic: a reader sees the old content, the new one or nothing. `create`
is the one operation that tells two writers apart.
"""

import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from packager.errors import MachineError, StateError
from packager.system.files import TEMPORARY_PREFIX, disk_errors, fsync_folder, write_atomic


class Store(Protocol):
    """Files by name."""

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, None if there is none."""

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


def open_store(url: str) -> Store:
    """Open the store at a URL, or in a folder.

    Raises:
        MachineError: a package that the URL needs is not installed.
    """
    scheme, separator, rest = url.partition("://")
    if not separator or scheme == "file":
        return FolderStore(Path(rest if separator else url).absolute())
    return RemoteStore(url)


def _checked(name: str) -> str:
    """Refuse a name that leads out of the store."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise StateError("a name leads out of the store", where=repr(name))
    return name


class FolderStore:
    """A folder that all machines mount at the same path: NFS 4, Lustre, a disk of one machine."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def _path(self, name: str) -> Path:
        return self._root / _checked(name)

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, None if there is none."""
        try:
            return self._path(name).read_bytes()
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write a file, or replace it."""
        path = self._path(name)
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, data)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless there is one of this name: a hard link is made or refused at once, over NFS too."""
        path = self._path(name)
        with disk_errors(path):
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
            return True
        finally:
            Path(temporary).unlink(missing_ok=True)

    def size_bytes(self, name: str) -> int | None:
        """Return the size of a file, None if there is none."""
        try:
            return self._path(name).stat().st_size
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> list[str]:
        """Return the names of all files below a folder, sorted; unfinished ones are left out."""
        root = self._path(folder) if folder else self._root
        found = (path for path in root.rglob("*") if not path.name.startswith(TEMPORARY_PREFIX) and path.is_file())
        return sorted(path.relative_to(self._root).as_posix() for path in found)

    def put(self, path: Path, name: str) -> None:
        """Copy a local file into the store."""
        target = self._path(name)
        with disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy(path, target)

    def get(self, name: str, path: Path) -> None:
        """Copy a file of the store to a local path."""
        try:
            with disk_errors(path):
                path.parent.mkdir(parents=True, exist_ok=True)
                _copy(self._path(name), path)
        except FileNotFoundError as error:
            raise _missing(name) from error

    def delete(self, folder: str) -> None:
        """Delete all files below a folder."""
        shutil.rmtree(self._path(folder), ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    """Copy a file so that its target is whole or not there."""
    descriptor, temporary = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=target.parent)
    try:
        with source.open("rb") as reader, os.fdopen(descriptor, "wb") as writer:
            shutil.copyfileobj(reader, writer, 1 << 22)
            writer.flush()
            os.fchmod(writer.fileno(), 0o644)
            os.fsync(writer.fileno())
        Path(temporary).replace(target)
        fsync_folder(target.parent)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _missing(name: str) -> StateError:
    hint = "run the same command again: what is missing is made again"
    return StateError("a file is not in the store", where=name, hint=hint)


class RemoteStore:
    """What fsspec opens by a URL. `create` asks the service to refuse an existing object (S3: If-None-Match)."""

    def __init__(self, url: str) -> None:
        self._files: Any
        try:
            import fsspec

            self._files, self._root = fsspec.core.url_to_fs(url)
        except ImportError as error:
            hint = "pip install fsspec, and s3fs for s3://"
            raise MachineError("the store cannot be opened", where=url, why=str(error), hint=hint) from error

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{_checked(name)}"

    def read(self, name: str) -> bytes | None:
        """Return the content of an object, None if there is none."""
        try:
            return bytes(self._files.cat_file(self._path(name)))
        except FileNotFoundError:
            return None

    def write(self, name: str, data: bytes) -> None:
        """Write an object, or replace it: services make it visible when it is whole."""
        self._files.pipe_file(self._path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless there is one of this name; return whether it was written."""
        try:
            self._files.pipe_file(self._path(name), data, mode="create")
        except FileExistsError:
            return False
        return True

    def size_bytes(self, name: str) -> int | None:
        """Return the size of an object, None if there is none."""
        self._files.invalidate_cache()
        try:
            return int(self._files.info(self._path(name))["size"])
        except FileNotFoundError:
            return None

    def names(self, folder: str) -> list[str]:
        """Return the names of all objects below a folder, sorted."""
        self._files.invalidate_cache()
        root = self._root.rstrip("/")
        with suppress(FileNotFoundError):
            found = self._files.find(f"{root}/{_checked(folder)}" if folder else root)
            return sorted(path[len(root) + 1 :] for path in found)
        return []

    def put(self, path: Path, name: str) -> None:
        """Copy a local file into the store."""
        self._files.put_file(str(path), self._path(name))

    def get(self, name: str, path: Path) -> None:
        """Copy an object to a local path."""
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._files.get_file(self._path(name), str(path))
        except FileNotFoundError as error:
            raise _missing(name) from error

    def delete(self, folder: str) -> None:
        """Delete all objects below a folder."""
        with suppress(FileNotFoundError):
            self._files.rm(self._path(folder), recursive=True)
