"""The store that machines share, addressed by a URL: a folder, or s3://bucket/folder, which fsspec opens.

A name is a relative path with '/'. Writing is atomic: a reader sees the old content, the new one or nothing. `create`
is the one operation that tells two writers apart. What a file system or a service answers otherwise, such as a stale
handle or a 503, is a MachineError: it may pass.
"""

import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Final, Protocol

from packager.errors import MachineError, PackagerError, StateError, UsageError
from packager.system.files import TEMPORARY_PREFIX, disk_errors, fsync_folder, open_regular, write_atomic

# Whose `create` is one request, which the service refuses where the object is: s3fs 2024.12 and later (PUT with
# If-None-Match), and fsspec's dictionary of one process. Elsewhere fsspec itself looks first and then writes.
_CREATING: Final = ("s3", "s3a", "memory")
# A URL with a character too few, s3:/bucket for example. A single letter before the colon is a disk of Windows.
_MISTYPED: Final = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:|s3a?//")
_REFUSED: Final = (409, 412)  # S3: somebody writes this object just now; the object is there


class Store(Protocol):
    """Files by name. Each method raises MachineError where the store does not do it now: another time it may."""

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
        UsageError: this kind of store lets two writers create the same file.
        MachineError: a package that the URL needs is not installed, or the store cannot be opened.
    """
    scheme, separator, rest = url.partition("://")
    if not separator and _MISTYPED.match(url):
        raise UsageError(
            "the store is neither a URL nor surely a folder",
            where=url,
            why="as a folder it would lie in the working folder, and each machine would have one of its own",
            hint=f"write s3://bucket/folder, or ./{url} for a folder of this name",
        )
    if not separator or scheme == "file":
        return FolderStore(Path(rest if separator else url).absolute())
    if scheme not in _CREATING:
        raise UsageError(
            "this kind of store cannot be shared by runs",
            where=f"{scheme}://",
            why="nothing here creates a file there only if there is none: of two runs that claim a recipe at once both "
            "would have it",
            hint="give a folder that all machines share, or s3://bucket/folder",
        )
    return RemoteStore(url)


def check_creates(store: Store) -> None:
    """Refuse a store that lets two writers create the same file: two runs would have one recipe.

    Services that speak S3 without If-None-Match do so, and s3fs before 2024.12, which does not send it.

    Raises:
        UsageError: this is such a store.
        MachineError: it cannot be used now.
    """
    folder = f".probe-{secrets.token_hex(8)}"
    created: list[bool] = []
    try:
        for data in (b"first", b"second"):
            created.append(store.create(f"{folder}/file", data))  # noqa: PERF401 - the first counts where the second fails
    finally:
        if created:  # a store that does not answer is not asked again, which would hold up a Ctrl-C for minutes
            store.delete(folder)
    if created[1]:  # the first one may be refused, after an answer that was lost: see `RemoteStore.create`
        raise UsageError(
            "the store does not tell two writers apart",
            why="it let a file be created that was there: of two runs that claim a recipe at once both would have it",
            hint="use s3fs 2024.12 or later, and a service with conditional writes (S3: If-None-Match), or a folder",
        )


def _checked(name: str) -> str:
    """Refuse a name that leads out of the store."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or ".." in parts or "\\" in name or "\0" in name:
        raise StateError("a name leads out of the store", where=repr(name))
    return name


@contextmanager
def _translated(where: str) -> Iterator[None]:
    """Translate what a store raises; every service behind fsspec has errors of its own."""
    try:
        yield
    except PackagerError:
        raise
    except Exception as error:
        raise MachineError(
            "the store cannot be used now",
            where=where,
            why=f"{type(error).__name__}: {error}",
            hint="if it does not pass, check the network, the rights and the URL of the store",
        ) from error


class FolderStore:
    """A folder that all machines mount at the same path: NFS 4, Lustre, a disk of one machine."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def _path(self, name: str) -> Path:
        return self._root / _checked(name)

    def read(self, name: str) -> bytes | None:
        """Return the content of a file, None if there is none."""
        with _translated(name), suppress(FileNotFoundError), open_regular(self._path(name)) as stream:
            return stream.read()
        return None

    def write(self, name: str, data: bytes) -> None:
        """Write a file, or replace it."""
        path = self._path(name)
        with _translated(name), disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, data)

    def create(self, name: str, data: bytes) -> bool:
        """Write a file unless there is one of this name: a hard link is made or refused at once, over NFS too."""
        path = self._path(name)
        with _translated(name), disk_errors(path):
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
        with _translated(name), suppress(FileNotFoundError):
            return self._path(name).stat().st_size
        return None

    def names(self, folder: str) -> list[str]:
        """Return the names of all files below a folder, sorted; unfinished ones are left out."""
        root = self._path(folder) if folder else self._root
        with _translated(folder):  # rglob leaves out what it cannot read: a lease would seem to be gone
            found = [Path(at, name) for at, _, names in os.walk(root, onerror=_raise_unless_gone) for name in names]
        kept = (path for path in found if not path.name.startswith(TEMPORARY_PREFIX))
        return sorted(path.relative_to(self._root).as_posix() for path in kept)

    def put(self, path: Path, name: str) -> None:
        """Copy a local file into the store."""
        target = self._path(name)
        with _translated(name), disk_errors(target):
            target.parent.mkdir(parents=True, exist_ok=True)
            with open_regular(path) as reader:
                _copy(reader, target)

    def get(self, name: str, path: Path) -> None:
        """Copy a file of the store to a local path."""
        with _translated(name):
            try:
                reader = open_regular(self._path(name))
            except FileNotFoundError as error:
                raise _missing(name) from error
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


def _missing(name: str) -> StateError:
    hint = "run the same command again: what is missing is made again"
    return StateError("a file is not in the store", where=name, hint=hint)


class RemoteStore:
    """What fsspec opens by a URL. `create` asks the service to refuse an existing object (S3: If-None-Match)."""

    def __init__(self, url: str) -> None:
        self._files: Any
        with _translated(url):
            try:
                import fsspec

                # What another machine writes or deletes is seen at once.
                self._files, self._root = fsspec.core.url_to_fs(url, use_listings_cache=False)
            except ImportError as error:
                hint = "pip install 'gptq-packager[s3]', on every machine"
                raise MachineError("the store cannot be opened", where=url, why=str(error), hint=hint) from error

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{_checked(name)}"

    def read(self, name: str) -> bytes | None:
        """Return the content of an object, None if there is none."""
        with _translated(name), suppress(FileNotFoundError):
            return bytes(self._files.cat_file(self._path(name)))
        return None

    def write(self, name: str, data: bytes) -> None:
        """Write an object, or replace it: services make it visible when it is whole."""
        with _translated(name):
            self._files.pipe_file(self._path(name), data)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless there is one of this name; return whether it was written.

        Of a request whose answer was lost, the second try is refused: the object is there, and nobody was told. A lease
        that begins so is taken over like that of a run which has gone silent.
        """
        with _translated(name):
            try:
                self._files.pipe_file(self._path(name), data, mode="create")
            except FileExistsError:
                return False
            except OSError as error:
                # s3fs knows the refusal of AWS by a word that other services leave out.
                answer = getattr(error.__cause__, "response", {}).get("ResponseMetadata", {})
                if answer.get("HTTPStatusCode") in _REFUSED:
                    return False
                raise
        return True

    def size_bytes(self, name: str) -> int | None:
        """Return the size of an object, None if there is none."""
        with _translated(name), suppress(FileNotFoundError):
            return int(self._files.info(self._path(name))["size"])
        return None

    def names(self, folder: str) -> list[str]:
        """Return the names of all objects below a folder, sorted."""
        root = self._root.rstrip("/")
        with _translated(folder), suppress(FileNotFoundError):
            found = self._files.find(f"{root}/{_checked(folder)}" if folder else root)
            return sorted(path[len(root) + 1 :] for path in found)
        return []

    def put(self, path: Path, name: str) -> None:
        """Copy a local file into the store."""
        with _translated(name):
            self._files.put_file(str(path), self._path(name))

    def get(self, name: str, path: Path) -> None:
        """Copy an object to a local path."""
        with _translated(name), disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._files.get_file(self._path(name), str(path))
            except FileNotFoundError as error:
                raise _missing(name) from error

    def delete(self, folder: str) -> None:
        """Delete all objects below a folder."""
        with _translated(folder), suppress(FileNotFoundError):
            self._files.rm(self._path(folder), recursive=True)
