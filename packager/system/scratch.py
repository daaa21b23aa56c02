"""Temporary folders that do not stay behind: if their process is killed, the next run removes them.

A process locks each folder that it makes. The system opens the lock when the process ends, however it ends, so a folder
without a lock has no owner. Python's tempfile leaves the folders of a killed process where they are.
"""

import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

from packager.system.posix import FolderLock

_SUFFIX = ".locked"
_NAME = re.compile(rf"packager-[a-z]+-[a-z0-9_]+{re.escape(_SUFFIX)}")
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
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


def _make(purpose: str, parent: Path) -> tuple[Path, FolderLock]:
    """Make a folder and lock it; return its path and the lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=f"packager-{purpose}-", suffix=_SUFFIX, dir=parent))
        with suppress(FileNotFoundError):
            lock = FolderLock(path, wait=True)
            if path.exists():
                return path, lock
            lock.release()
        # Another process took the folder for an abandoned one, before it had its lock.


def remove_abandoned(parent: Path) -> None:
    """Remove the scratch folders of this user in `parent` whose processes have ended."""
    with os.scandir(parent) as entries:
        names = [entry.name for entry in entries if _NAME.fullmatch(entry.name)]
    for name in names:
        with suppress(OSError), FolderLock(parent / name, wait=False) as lock:  # of another user, locked, just removed
            if lock.is_own:
                _remove(parent / name)


def _remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    if folder.exists():  # it holds folders that their owner may not change
        for path, names, _ in os.walk(folder):
            for name in names:
                if not Path(path, name).is_symlink():
                    Path(path, name).chmod(0o700)
        shutil.rmtree(folder, ignore_errors=True)
