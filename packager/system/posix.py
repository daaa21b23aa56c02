"""What Linux and macOS have and Windows lacks: locks of folders, limits of processes, ways to open a file."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.errors import MachineError

if TYPE_CHECKING:
    from filelock import BaseFileLock

try:
    import fcntl
except ImportError:
    IS_POSIX = False
else:
    IS_POSIX = True


def require_posix(what: str) -> None:
    """Raise MachineError on a system whose processes have neither groups nor limits.

    Args:
        what: cannot be done there, as the beginning of a sentence.
    """
    if not IS_POSIX:
        raise MachineError(
            f"{what} needs Linux or macOS",
            why="it runs other people's code in processes with limits, which Windows does not have",
            hint="run it in WSL, a container or a CI job; what only plans, audits and publishes runs here, too",
        )


def open_flags(*names: str) -> int:
    """Return flags of `os.open` by their names, without those that this system does not have; files are binary."""
    flags = getattr(os, "O_BINARY", 0)
    for name in names:
        flags |= getattr(os, name, 0)
    return flags


class FolderLock:
    """A lock of a folder, for one process; the system opens it when the process ends, however it ends.

    A file system without locks counts as one where nobody else has the folder. Windows locks a file beside it.

    Args:
        folder: it exists.
        wait: for the process that has the lock.

    Raises:
        OSError: the folder is not there; without `wait`, another process has its lock.
    """

    def __init__(self, folder: Path, *, wait: bool) -> None:
        self._descriptor = -1
        self._file: BaseFileLock | None = None
        if not IS_POSIX:
            self._file = _lock_beside(folder, wait=wait)
            return
        self._descriptor = os.open(folder, open_flags("O_RDONLY", "O_DIRECTORY", "O_NOFOLLOW", "O_CLOEXEC"))
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError:
            if not wait:
                os.close(self._descriptor)
                raise

    @property
    def is_own(self) -> bool:
        """Whether the folder is this user's; on Windows temporary folders are."""
        return self._descriptor < 0 or os.fstat(self._descriptor).st_uid == os.getuid()

    def release(self) -> None:
        """Open the lock; a second call does nothing."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
        if self._file is not None:
            self._file.release()
            self._file = None

    def __enter__(self) -> "FolderLock":
        return self

    def __exit__(self, *_: Any) -> None:
        self.release()


def _lock_beside(folder: Path, *, wait: bool) -> "BaseFileLock":
    from filelock import FileLock, Timeout  # 30 ms, for Windows alone

    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is not there")
    lock = FileLock(f"{folder}.lock", timeout=-1 if wait else 0)
    try:
        lock.acquire()
    except Timeout as error:
        raise BlockingIOError(f"{folder} is locked") from error
    return lock
