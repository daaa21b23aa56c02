"""The staging repository of the git target: a cache of the remote, that may be deleted at any time and mends itself."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from packager.errors import PublishError
from packager.publish.targets.git_lfs import git_folder
from packager.publish.targets.git_remote import RemoteGit, unlock
from packager.system.files import disk_errors, remove_leftovers, write_atomic
from packager.variant import MAIN

_LOCK_WAIT_S = 10.0


class Staging:
    """A folder with a repository, for one process at a time.

    Args:
        git: works in it.
        remote: the folder that the remote is, None if it is on another machine.
        where: the remote, for people.
    """

    def __init__(self, git: RemoteGit, remote: Path | None, where: str) -> None:
        self.folder = git.worktree
        self._git, self._remote, self._where = git, remote, where
        self._lock = FileLock(str(self.folder.with_name(f".{self.folder.name}.lock")))
        self._pushing = git.git_folder / "packager-pushing"

    @contextmanager
    def open(self, timeout_s: float = _LOCK_WAIT_S) -> Iterator[Sequence[str]]:
        """Have the repository for ourselves, made or put right if need be, which the value describes.

        Raises:
            PublishError: another publisher has it, or the folder holds something else.
        """
        self._git.check()
        with disk_errors(self.folder.parent):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire(timeout=timeout_s)
            except Timeout as error:
                what, hint = "another publisher is at work", "wait until it is done, then run again"
                raise PublishError(what, where=self._where, why=f"it stages in {self.folder}", hint=hint) from error
        try:
            with disk_errors(self.folder):
                notes = self._prepare() if self._lock.lock_counter == 1 else []
            yield notes
        finally:
            self._lock.release()

    def begin_push(self, ref: str) -> None:
        """Write down which ref of the remote is about to move: a killed push leaves its lock in a folder."""
        write_atomic(self._pushing, ref.encode())

    def end_push(self) -> None:
        """Forget that: git has come back, and holds no lock."""
        self._pushing.unlink(missing_ok=True)

    def forget_objects(self) -> None:
        """Delete what git-lfs has sent or fetched: it would keep the space of every release that was ever published."""
        shutil.rmtree(self._git.git_folder / "lfs" / "objects", ignore_errors=True)

    def _prepare(self) -> list[str]:
        """Make the repository, or put right what a killed run left of it."""
        folder, mark, notes = self._git.git_folder, self.folder / "packager-staging", []
        if self.folder.exists() and not mark.exists() and any(self.folder.iterdir()):
            raise PublishError("the staging folder holds something else", where=str(self.folder), hint="name another")
        write_atomic(mark, b"A cache of a published repository; it may be deleted at any time.\n")
        remove_leftovers(self.folder)
        if self._remote and self._pushing.exists():
            ref = self._pushing.read_text(encoding="utf-8")
            notes += unlock([git_folder(self._remote) / f"{ref}.lock"])
            self._pushing.unlink()
        if folder.exists():
            notes += unlock([*folder.glob("*.lock"), *(folder / "refs").rglob("*.lock")])
            remove_leftovers(folder)
            for path in (*folder.glob("objects/*/tmp_obj_*"), *folder.glob("objects/pack/tmp_*")):
                path.unlink(missing_ok=True)
            if self._git.attempt("rev-list", "--objects", "--quiet", "--all").status:
                notes.append("the staging folder was not whole: it is made anew")
                shutil.rmtree(folder)
        if not folder.exists():
            self._git.run("init", "--quiet", "--template=", f"--initial-branch={MAIN}")
        self._git.write_askpass()
        return notes
