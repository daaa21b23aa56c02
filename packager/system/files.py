"""Write files atomically, and compute their digests.

Every write goes to a temporary name in the same folder, is fsynced, and is renamed to its final name: a killed process
leaves either the old file or the new one. Names starting with `.tmp-` are leftovers and may always be deleted.
"""

import errno
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from packager.errors import MachineError
from packager.receipt import FileRecord
from packager.system.parallel import in_parallel
from packager.system.posix import open_flags
from packager.system.text import format_bytes

TEMPORARY_PREFIX = ".tmp-"
# If a process is killed while it starts a child, the child holds the locks for an instant.
LOCK_WAIT_S = 2.0
# What programs print of a full disk; the last is git's, of a write that takes no byte (csum-file.c).
FULL_DISK = ("No space left on device", "Disk quota exceeded", "Out of diskspace")
_FULL_BYTES = 1 << 20
# The last four: a folder, a link or a FIFO has the file's place; its name is too long.
_UNWRITABLE = frozenset(
    {
        errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST,
        errno.EISDIR, errno.ELOOP, errno.ENXIO, errno.ENAMETOOLONG,
    }
)  # fmt: skip
_CHUNK_BYTES = 1 << 22
# O_NONBLOCK: a FIFO that took the file's place would block the open until a process writes into it.
_REGULAR_FLAGS = open_flags("O_RDONLY", "O_NOFOLLOW", "O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC")
# File systems record times with a resolution of milliseconds: a file this young may change without a new time.
_SETTLED_NS = 2 * 10**9
# What a file system knows of a file: its device, number, size in bytes, and the times of its content and of its state.
FileIdentity = tuple[int, ...]
_digests: dict[FileIdentity, str] = {}


@contextmanager
def disk_errors(path: Path, *, hint: str = "") -> Iterator[None]:
    """Translate OSErrors met while writing `path`: a full disk, a quota, a size limit, an unwritable folder.

    Args:
        path: what is written.
        hint: the next step for the user if the folder cannot be written.

    Raises:
        MachineError: instead of these OSErrors; others are raised unchanged.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise MachineError(
                "the disk is full",
                where=str(path),
                why=str(error),
                hint="free some space and run the same command again",
            ) from error
        if error.errno == errno.EFBIG:
            raise MachineError(
                "the file system or the shell allows no file of this size",
                where=str(path),
                why=str(error),
                hint="check `ulimit -f`; FAT allows 4 GiB at most; lower checkpoint.max_shard_bytes for smaller files",
            ) from error
        if error.errno in _UNWRITABLE:
            raise MachineError("the folder cannot be written", where=str(path), why=str(error), hint=hint) from error
        raise


def fsync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable (a no-op where folders cannot be opened)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """Yield a stream to write; when the block ends without an error, its bytes appear at `path`, durably.

    Raises:
        MachineError: the disk is full or the folder cannot be written.
    """
    with disk_errors(path), ExitStack() as undo:
        descriptor, temporary = tempfile.mkstemp(prefix=TEMPORARY_PREFIX, dir=path.parent)
        undo.callback(Path(temporary).unlink, missing_ok=True)
        with os.fdopen(descriptor, "wb") as stream:
            if hasattr(os, "fchmod"):  # Windows before Python 3.13 has it not, and no such modes
                os.fchmod(stream.fileno(), 0o644)
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        Path(temporary).replace(path)
        fsync_folder(path.parent)


def open_regular(path: Path, *, folder_descriptor: int | None = None, shown: Path | None = None) -> BinaryIO:
    """Open a file that others made, for reading: not a link to another file, and no pipe that never ends.

    Args:
        path: the file; below an open folder, its name there.
        folder_descriptor: the open folder.
        shown: the path in errors, where it is another one.

    Raises:
        OSError: it is no regular file, or cannot be opened.
    """
    where = str(shown or path)
    # Asked before, because opening a device can have effects, and after, because the file may have been replaced.
    before = os.stat(path, dir_fd=folder_descriptor, follow_symlinks=False)
    if stat.S_ISLNK(before.st_mode):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), where)
    if stat.S_ISDIR(before.st_mode):
        raise OSError(errno.EISDIR, f"it is not a regular file: {os.strerror(errno.EISDIR)}", where)
    if not stat.S_ISREG(before.st_mode):
        raise OSError(errno.EINVAL, "it is not a regular file", where)
    descriptor = os.open(os.fspath(path), _REGULAR_FLAGS, dir_fd=folder_descriptor)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "it is not a regular file", where)
    return os.fdopen(descriptor, "rb")


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` so that readers see the old content or the new one, never a part.

    Raises:
        MachineError: the disk is full or the folder cannot be written.
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as stream:
        stream.write(data)


def copy_atomic(source: Path, target: Path) -> None:
    """Copy one file as atomically as `write_atomic`, in chunks."""
    with source.open("rb") as reader, atomic_file(target) as stream:
        shutil.copyfileobj(reader, stream, _CHUNK_BYTES)


def replace_folder(temporary: Path, folder: Path) -> None:
    """Rename a finished folder to `folder`; an existing one is replaced as a whole, not file by file.

    Raises:
        MachineError: the parent cannot be written.
    """
    old = folder.with_name(f"{TEMPORARY_PREFIX}old-{folder.name}")
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        fsync_folder(temporary)
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.rename(old)
        temporary.rename(folder)
        fsync_folder(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def remove_leftovers(folder: Path) -> None:
    """Delete the temporary files and folders that a killed run left directly inside `folder`."""
    if not folder.is_dir():
        return
    for entry in folder.iterdir():
        if entry.name.startswith(TEMPORARY_PREFIX):
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def remove_leftovers_below(folder: Path) -> None:
    """Delete the temporary files and folders that a killed run left in `folder` and in all folders below it.

    Links to folders are not followed; `folder` itself may be one.
    """
    for parent, _, _ in os.walk(folder):
        remove_leftovers(Path(parent))


def sha256_file(path: Path, on_bytes: Callable[[int], None] | None = None) -> str:
    """Return the sha256 of a file's content, read in chunks; an unchanged file is not read again.

    A digest is cached only if the file's times are old enough for every later change to alter them.

    Args:
        path: the file.
        on_bytes: called with the size of each chunk that was hashed; what it raises ends the reading. The chunks are
            large, so that a thread beside others seldom asks for the interpreter lock.
    """
    with path.open("rb") as stream:
        identity = _identity(stream.fileno())
        if (known := _digests.get(identity)) is not None:
            return known
        settled = time.time_ns() - max(identity[3:]) > _SETTLED_NS
        found = hashlib.file_digest(stream, "sha256") if on_bytes is None else _digest_of(stream, on_bytes)
        digest = found.hexdigest()
        if settled and _identity(stream.fileno()) == identity:
            _digests[identity] = digest
        return digest


def _digest_of(stream: BinaryIO, on_bytes: Callable[[int], None]) -> "hashlib._Hash":
    digest = hashlib.sha256()
    while chunk := stream.read(_CHUNK_BYTES):
        digest.update(chunk)
        on_bytes(len(chunk))
    return digest


def file_identity(path: Path) -> FileIdentity:
    """Return what the file system knows of a file: another one when the file was replaced or written since."""
    with path.open("rb") as stream:
        return _identity(stream.fileno())


def known_digest(path: Path) -> str | None:
    """Return a file's sha256 if this process has computed it, and the file is unchanged."""
    return _digests.get(file_identity(path))


def _identity(descriptor: int) -> FileIdentity:
    status = os.fstat(descriptor)
    return (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def file_record(path: Path) -> FileRecord:
    """Return a file's size and sha256."""
    return FileRecord(size_bytes=path.stat().st_size, sha256=sha256_file(path))


def has_record(path: Path, record: FileRecord) -> bool:
    """Return whether a file has this size and sha256. One of another size is not read: a sparse file can have any."""
    return path.stat().st_size == record.size_bytes and sha256_file(path) == record.sha256


def file_records(paths: Iterable[Path]) -> dict[Path, FileRecord]:
    """Return size and sha256 of several files, in their order; files are hashed in parallel, the largest first."""
    paths = tuple(paths)
    by_size = sorted(paths, key=lambda path: path.stat().st_size, reverse=True)
    found = dict(zip(by_size, in_parallel(file_record, by_size), strict=True))
    return {path: found[path] for path in paths}


def bytes_record(data: bytes) -> FileRecord:
    """Return the size and sha256 of a file with this content."""
    return FileRecord(size_bytes=len(data), sha256=hashlib.sha256(data).hexdigest())


def list_files(folder: Path) -> tuple[str, ...]:
    """Return the names of all files below `folder`, relative, with '/', sorted, without leftovers."""
    return tuple(
        sorted(
            path.relative_to(folder).as_posix()
            for path in folder.rglob("*")
            if path.is_file() and not any(part.startswith(TEMPORARY_PREFIX) for part in path.relative_to(folder).parts)
        )
    )


def failed_for_space(printed: str, folder: Path) -> bool:
    """Return whether a process that failed had no space: it printed so, or the folder's disk is full now.

    Some programs do not print why a write failed. The folder need not exist yet.
    """
    return any(words in printed for words in FULL_DISK) or _free_bytes(folder) < _FULL_BYTES


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.exists())).free


def check_disk(folder: Path, needed_bytes: int) -> None:
    """Check the free space of a folder's file system; the folder need not exist yet.

    Raises:
        MachineError: fewer than `needed_bytes` are free.
    """
    free = _free_bytes(folder)
    if free < needed_bytes:
        raise MachineError(
            "not enough free disk space",
            where=str(folder),
            why=f"{format_bytes(needed_bytes)} needed, {format_bytes(free)} free",
            hint="free some space, or point --dist at another disk",
        )


def reserve(descriptor: int, size_bytes: int) -> None:
    """Set the size of a new file and reserve its space where the file system can, so that a full disk fails early."""
    os.ftruncate(descriptor, size_bytes)
    if not hasattr(os, "posix_fallocate"):
        return
    try:
        os.posix_fallocate(descriptor, 0, size_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
            raise
