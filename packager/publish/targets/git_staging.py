"""The staging repository of the git target: a cache of the remote that may be deleted and repairs itself.

The folder may have come with others, in an unpacked `dist`. Whenever it is opened, it gets a configuration of ours
again and loses all that a staging repository does not have: hooks, attributes, refs of other kinds.
"""

import os
import re
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
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
from packager.publish.targets.git_remote import RemoteGit, is_absent
from packager.publish.targets.git_view import GitView, require_plain
from packager.system.files import TEMPORARY_PREFIX, disk_errors, remove_leftovers, write_atomic
from packager.variant import MAIN

VIEW = "packager-remote"  # in the staging folder: a view of a remote that is a folder
_MARK = "packager-staging"
_PUSHING = "packager-pushing"
_FOLDER_ENTRIES = {".git", VIEW, _MARK, "packager-askpass"}
_GIT_ENTRIES = {"HEAD", "config", "lfs", "objects", "refs", "shallow", _PUSHING}
_CONFIG = b"[core]\n\trepositoryFormatVersion = 0\n\tbare = false\n"
_HEAD = f"ref: refs/heads/{MAIN}\n".encode()  # a branch without commits: git-lfs obeys a `.lfsconfig` of HEAD
_MAX_RECORD_BYTES = 4096


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
        self._pushing = git.git_folder / _PUSHING
        self._view = GitView(git_folder(remote), self.folder / VIEW) if remote else None
        self._has_looked = False

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
                if self._remote and not self._has_looked and not is_absent(self._remote):
                    self.look()  # another publisher may have made the repository
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

    def look(self) -> None:
        """Bring the view of a remote that is a folder up to date; without it git finds no repository there.

        Raises:
            PublishError: as `GitView.lay`.
        """
        if self._view and self._remote:
            self._view.repository = git_folder(self._remote)
            self._view.lay(self._git)
            self._has_looked = True

    def require_no_hooks(self) -> None:
        """Raise PublishError if the remote is a folder with hooks that a push would run."""
        if self._view:
            self._view.require_no_hooks()

    def _prepare(self) -> list[str]:
        """Make the repository, or repair the traces of a killed publish; return one note per repair."""
        folder, mark, notes = self._git.git_folder, self.folder / _MARK, []
        # A publish that was killed while it wrote the mark has left its temporary file, and nothing else.
        if self.folder.exists() and not mark.exists() and any(map(_is_no_leftover, self.folder.iterdir())):
            hint = "give another folder"
            raise PublishError("the staging folder holds something else", where=str(self.folder), hint=hint)
        write_atomic(mark, b"A cache of a published repository; it may be deleted at any time.\n")
        remove_leftovers(self.folder)
        _remove_others(self.folder, _FOLDER_ENTRIES)
        if self._remote and not is_absent(self._remote):
            require_plain(git_folder(self._remote))
        if self._remote and (ref := self._unfinished_push()):
            lock = git_folder(self._remote) / f"{ref}.lock"
            notes += self._unlock(lambda: [lock] if lock.exists() else [])
            self._pushing.unlink()
        if os.path.lexists(folder):
            notes += self._unlock(lambda: git_locks(folder))
            if not self._is_whole():
                notes.append("the staging folder was incomplete: it is made again")
                shutil.rmtree(folder) if folder.is_dir() and not folder.is_symlink() else folder.unlink()
        if not folder.exists():
            self._git.run("init", "--quiet", "--template=", f"--initial-branch={MAIN}")
            self._own()
        self._git.write_askpass()
        self._has_looked = False
        return notes

    def _is_whole(self) -> bool:
        """Return whether the repository is as this class makes it and has every object that it should; tidy it."""
        try:
            require_plain(self._git.git_folder)
        except PublishError:
            return False
        remove_leftovers(self._git.git_folder)
        remove_partial_objects(self._git.git_folder)
        self._own()
        return not self._git.attempt("rev-list", "--objects", "--quiet", "--all").status

    def _own(self) -> None:
        """Give the repository a configuration of ours, and remove all that a staging repository does not have."""
        folder = self._git.git_folder
        _remove_others(folder, _GIT_ENTRIES)
        _remove_others(folder / "refs", {"published"})
        for name, data in (("config", _CONFIG), ("HEAD", _HEAD)):
            if not (folder / name).is_file() or (folder / name).read_bytes() != data:
                write_atomic(folder / name, data)

    def _unfinished_push(self) -> str:
        """Return the ref of a push that did not end, "" if there is none; the record may be of any content."""
        if not self._pushing.is_file():
            return ""
        with self._pushing.open("rb") as stream:
            ref = stream.read(_MAX_RECORD_BYTES).decode("utf-8", "replace")
        inside = re.fullmatch(r"refs/heads/[^\0]+", ref) and not {"", ".", ".."} & set(ref.split("/"))
        return ref if inside else ""

    def _unlock(self, find_locks: Callable[[], Sequence[Path]]) -> list[str]:
        stale = remove_stale_locks(find_locks, self._waits.orphan_s)
        return [f"removed the stale lock {path} of a killed publish" for path in stale]


def _is_no_leftover(path: Path) -> bool:
    return not path.name.startswith(TEMPORARY_PREFIX)


def _remove_others(folder: Path, kept: Collection[str]) -> None:
    """Delete all entries of a folder but some."""
    for path in folder.iterdir():
        if path.name not in kept:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
