"""Temporary folders that do not stay behind: if their process is killed, the next run removes them.

A process locks each folder that it makes. The system opens the lock when the process ends, however it ends, so a folder
without a lock has no owner. Python's tempfile leaves the folders of a killed process where they are.
"""

import os
import re
import shutil
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self

_SUFFIX = ".locked"
_NAME = re.compile(rf"packager-[a-z]+-[a-z0-9_]+{re.escape(_SUFFIX)}")
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_searched: set[Path] = set()


class ScratchFolder:
    """A new temporary folder, for its owner only.

    The first one that a process makes in a place also removes those there whose processes were killed.

    Args:
        purpose: a word for the folder's name.
        within: the folder in which it is made; by default the system's folder for temporary files.
    """

    def __init__(self, purpose: str, within: Path | None = None) -> None:
        parent = within or Path(tempfile.gettempdir())
        if parent not in _searched:
            _searched.add(parent)
            remove_abandoned(parent)
        self.path, self._lock = _make(purpose, parent)

    def remove(self) -> None:
        """Remove the folder with its content; what cannot be removed stays."""
        _remove(self.path)
        if self._lock >= 0:
            os.close(self._lock)
        self._lock = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _make(purpose: str, parent: Path) -> tuple[Path, int]:
    """Make a folder and lock it; return its path and the descriptor that holds the lock."""
    import fcntl  # POSIX only: importing this module works everywhere

    while True:
        path = Path(tempfile.mkdtemp(prefix=f"packager-{purpose}-", suffix=_SUFFIX, dir=parent))
        with suppress(FileNotFoundError):
            descriptor = os.open(path, _FOLDER_FLAGS)
            with suppress(OSError):  # a file system without locks: no other process can lock the folder either
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            if path.exists():
                return path, descriptor
            os.close(descriptor)
        # Another process took the folder for an abandoned one, before it had its lock.


def remove_abandoned(parent: Path) -> None:
    """Remove the scratch folders of this user in `parent` whose processes have ended."""
    import fcntl

    with os.scandir(parent) as entries:
        names = [entry.name for entry in entries if _NAME.fullmatch(entry.name)]
    for name in names:
        with suppress(OSError), ExitStack() as stack:  # of another user, locked, or just removed
            descriptor = os.open(parent / name, _FOLDER_FLAGS)
            stack.callback(os.close, descriptor)
            if os.fstat(descriptor).st_uid == os.getuid():
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(parent / name)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():  # it holds folders that their owner may not change
        for path, names, _ in os.walk(folder):
            for name in names:
                if not Path(path, name).is_symlink():
                    Path(path, name).chmod(0o700)
        shutil.rmtree(folder, ignore_errors=True)
