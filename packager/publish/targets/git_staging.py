"""The staging repository of the git target: a cache of the remote that may be deleted and repairs itself."""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from packager.errors import PublishError
from packager.publish.targets.git_lfs import git_folder
from packager.publish.targets.git_locks import (
    GitWaits,
    acquire,
    git_locks,
    publisher_lock,
    remove_partial_objects,
    remove_stale_locks,
)
from packager.publish.targets.git_remote import RemoteGit
from packager.system.files import disk_errors, remove_leftovers, write_atomic
from packager.variant import MAIN


class Staging:
    """A folder with a repository, used by one process at a time.

    Args:
        git: runs git in the folder.
        remote: the remote's folder, None if the remote is on another machine.
        where: the remote's address, for messages.
        waits: waiting times for locks.
    """

    def __init__(self, git: RemoteGit, remote: Path | None, where: str, waits: GitWaits) -> None:
        self.folder = git.worktree
        self._git, self._remote, self._where, self._waits = git, remote, where, waits
        self._lock = publisher_lock(self.folder)
        self._pushing = git.git_folder / "packager-pushing"

    @contextmanager
    def open(self, timeout_s: float | None = None) -> Iterator[Sequence[str]]:
        """Lock the repository, and make or repair it if necessary; the value is one note per repair.

        Args:
            timeout_s: how long to wait for the lock, `GitWaits.staging_s` by default.

        Raises:
            PublishError: another publisher holds the lock, or the folder holds something else.
        """
        self._git.check()
        with disk_errors(self.folder.parent):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            wait_s = self._waits.staging_s if timeout_s is None else timeout_s
            acquire(self._lock, wait_s, where=self._where, why=f"it uses the staging folder {self.folder}")
        try:
            with disk_errors(self.folder):
                notes = self._prepare() if self._lock.lock_counter == 1 else []
            yield notes
        finally:
            self._lock.release()

    def begin_push(self, ref: str) -> None:
        """Record the ref that a push moves: a killed push into a folder leaves the ref's lock there."""
        write_atomic(self._pushing, ref.encode())

    def end_push(self) -> None:
        """Delete the record: git has ended and holds no lock."""
        self._pushing.unlink(missing_ok=True)

    def forget_objects(self) -> None:
        """Delete the objects of git-lfs: otherwise the folder would keep every published release."""
        shutil.rmtree(self._git.git_folder / "lfs" / "objects", ignore_errors=True)

    def _prepare(self) -> list[str]:
        """Make the repository, or repair the traces of a killed publish; return one note per repair."""
        folder, mark, notes = self._git.git_folder, self.folder / "packager-staging", []
        if self.folder.exists() and not mark.exists() and any(self.folder.iterdir()):
            hint = "give another folder"
            raise PublishError("the staging folder holds something else", where=str(self.folder), hint=hint)
        write_atomic(mark, b"A cache of a published repository; it may be deleted at any time.\n")
        remove_leftovers(self.folder)
        if self._remote and self._pushing.exists():
            ref = self._pushing.read_text(encoding="utf-8")
            lock = git_folder(self._remote) / f"{ref}.lock"
            notes += self._unlock(lambda: [lock] if lock.exists() else [])
            self._pushing.unlink()
        if folder.exists():
            notes += self._unlock(lambda: git_locks(folder))
            remove_leftovers(folder)
            remove_partial_objects(folder)
            if self._git.attempt("rev-list", "--objects", "--quiet", "--all").status:
                notes.append("the staging folder was incomplete: it is made again")
                shutil.rmtree(folder)
        if not folder.exists():
            self._git.run("init", "--quiet", "--template=", f"--initial-branch={MAIN}")
        self._git.write_askpass()
        return notes

    def _unlock(self, find_locks: Callable[[], Sequence[Path]]) -> list[str]:
        stale = remove_stale_locks(find_locks, self._waits.orphan_s)
        return [f"removed the stale lock {path} of a killed publish" for path in stale]
