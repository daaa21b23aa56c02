"""The local target: an ordinary git repository with one branch per variant and `main` checked out.

A branch moves by compare-and-swap, so a killed publish leaves every branch at its old or its new commit. Only the
worktree of `main` takes several steps: a journal in `.git` names both commits, and the next run finishes the checkout.
The journal is there from the first effect to the last, so lock files found beside it belong to no living process.

A head that somebody else made is kept as the parent of ours: their work stays in the history, and the plan names it.
"""

import json
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from filelock import FileLock, Timeout

from packager.errors import PublishError, StateError
from packager.publish.targets import BranchState, CommitRecord, LocalFile, StoredFile, read_local_file
from packager.publish.targets.git_process import GitProcess
from packager.system.files import (
    LOCK_WAIT_S,
    TEMPORARY_PREFIX,
    disk_errors,
    fsync_folder,
    remove_leftovers,
    write_atomic,
)
from packager.variant import MAIN

# A killed publisher's git outlives it by milliseconds: it holds a lock only to move a branch.
_ORPHAN_WAIT_S = 2.0
# The bytes of a branch are its files: no line ends, filters or encodings, whatever .gitattributes a branch carries.
_ATTRIBUTES = b"* -text -filter -ident -working-tree-encoding\n"
_STATUS = {"??": "not one of ours", " D": "deleted", "D ": "deleted"}


@dataclass(frozen=True, kw_only=True)
class _Checkout:
    """The worktree goes from the commit `old` (None: nothing) to `new`."""

    old: str | None
    new: str


class LocalTarget:
    """A git repository below a folder, where people and Hub servers can read it.

    Args:
        root: the folder that serves as a hub, e.g. dist/hub.
        repository_id: namespace/name.
    """

    def __init__(self, root: Path, repository_id: str) -> None:
        self._folder = (root / "models" / repository_id).absolute()
        self._git = GitProcess(self._folder)
        self._journal = self._git.git_folder / "packager-publishing.json"
        self._object_format = ""

    @property
    def where(self) -> str:
        """The repository's folder."""
        return str(self._folder)

    @property
    def is_public(self) -> bool:
        """No: it is a folder of this machine."""
        return False

    @property
    def names_by_blob(self) -> bool:
        """Yes: git knows nothing else."""
        return True

    def read_branches(self) -> Mapping[str, BranchState]:
        """Return every branch with its files."""
        if not self._is_there():
            return {}
        return {
            branch: BranchState(commit=commit, foreign_author=committer, files=self._git.files(commit))
            for branch, (commit, committer) in self._git.heads().items()
        }

    def check(self, changing: Collection[str]) -> None:
        """Raise unless the branches named could be written now.

        Raises:
            MachineError: git is missing or too old.
            PublishError: the path, its lock files or its worktrees belong to somebody else.
            StateError: the worktree of main was edited.
        """
        self._git.check()
        if not self._is_there():
            return
        if not self._journal.exists() and (locks := self._lock_files()):
            raise PublishError(
                "another git process is at work in the repository",
                where=str(locks[0]),
                hint="wait for it; if there is none, it was killed: delete that file",
            )
        self._check_worktrees(changing)
        self._check_unedited(self._unfinished_checkout())

    @contextmanager
    def exclusive(self) -> Iterator[Sequence[str]]:
        """Lock out other publishers, create the repository or put right what a killed run left.

        Raises:
            PublishError: another publisher is at work.
        """
        self._git.check()
        self._is_there()
        lock = FileLock(str(self._folder.with_name(f".{self._folder.name}.lock")), timeout=LOCK_WAIT_S)
        with disk_errors(self._folder.parent):
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            try:
                lock.acquire()
            except Timeout as error:
                hint = "wait until it is done, then run again"
                raise PublishError("another publisher is at work", where=self.where, hint=hint) from error
        try:
            with disk_errors(self._folder):
                notes = self._recover() if self._is_there() else self._create()
            yield notes
            self._journal.unlink(missing_ok=True)
        finally:
            lock.release()

    def commit(self, branch: str, files: Mapping[str, LocalFile], *, parent: str | None, message: str) -> str:
        """Put one commit that holds exactly `files` on top of `parent`, and check it out when it is main's."""
        with disk_errors(self._folder):
            self._write_journal(None)
            self._git.store(files)
            return self._advance(branch, self._git.commit(files, parent=parent, message=message), parent=parent)

    def _advance(self, branch: str, commit: str, *, parent: str | None) -> str:
        """Let a branch's head be `commit`, and main's worktree show it."""
        checkout = _Checkout(old=parent, new=commit) if branch == MAIN else None
        self._write_journal(checkout)
        self._git.move_branch(branch, commit, parent=parent)
        if checkout is not None:
            self._check_out(checkout)
            self._write_journal(None)
        return commit

    def restore(self, branch: str, commit: str, *, parent: str, message: str) -> str:
        """Put a commit with the files of an earlier one on top of `parent`, and check it out when it is main's."""
        with disk_errors(self._folder):
            return self._advance(branch, self._git.commit_again(commit, parent=parent, message=message), parent=parent)

    def read_back(self, commit: str) -> Mapping[str, StoredFile]:
        """Return a commit's files with the sha256 of what the repository's blobs hold now."""
        return {
            name: replace(stored, sha256=self._git.blob_sha256(stored.blob_id)) if stored.blob_id else stored
            for name, stored in self._git.files(commit).items()
        }

    def read_bytes(self, commit: str, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Return a blob's content, or a part of it."""
        return self._git.read_blob(self._stored(commit, name), start=start, size=size)

    def export(self, commit: str, name: str, path: Path) -> None:
        """Write a blob's content to `path`."""
        self._git.export_blob(self._stored(commit, name), path)

    def history(self, branch: str) -> Sequence[CommitRecord]:
        """Return a branch's commits."""
        return self._git.history(branch) if branch in self._git.heads() else ()

    def read_tag(self, name: str) -> Mapping[str, str]:
        """Return the commit that a tag names."""
        return {MAIN: self._git.read_tag(name) if self._is_there() else ""}

    def tag(self, name: str, commits: Mapping[str, str]) -> None:
        """Make a lightweight tag."""
        self._git.tag(name, commits[MAIN])

    def _stored(self, commit: str, name: str) -> str:
        """Return the blob id of a commit's file."""
        stored = self._git.files(commit).get(name)
        if stored is None or not stored.blob_id:
            raise PublishError(f"{commit[:12]} has no file {name}", where=self.where)
        return stored.blob_id

    def _is_there(self) -> bool:
        """Return whether the repository exists; whatever else lies at its path is an error."""
        folder = self._folder
        if not os.path.lexists(folder) or (folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())):
            return False
        hint = "move it away, or publish under another root or repository id"
        if not self._git.git_folder.is_dir():
            raise PublishError("something that is no git repository is in the way", where=self.where, hint=hint)
        if not self._object_format:
            self._object_format = self._git.run("rev-parse", "--show-object-format").strip()
        if self._object_format != "sha1":
            what = f"the repository's object format is {self._object_format}, not sha1"
            raise PublishError(what, where=self.where, hint=hint)
        return True

    def _create(self) -> Sequence[str]:
        """Make an empty repository aside and rename it into place."""
        aside = self._folder.with_name(f"{TEMPORARY_PREFIX}{self._folder.name}")
        notes = [f"removed a repository that a killed publish had begun: {aside.name}"] if aside.exists() else []
        shutil.rmtree(aside, ignore_errors=True)
        git = GitProcess(aside)
        aside.mkdir()
        git.run("init", "--quiet", "--template=", f"--initial-branch={MAIN}")
        git.run("config", "core.autocrlf", "false")
        write_atomic(git.git_folder / "info" / "attributes", _ATTRIBUTES)
        aside.rename(self._folder)
        fsync_folder(self._folder.parent)
        return notes

    def _recover(self) -> Sequence[str]:
        """Put right what an unfinished publish left and say what that was."""
        attributes = self._git.git_folder / "info" / "attributes"
        if not attributes.exists():
            write_atomic(attributes, _ATTRIBUTES)
        remove_leftovers(self._git.git_folder)
        if not self._journal.exists():
            return []
        notes = ["an earlier publish did not finish"]
        deadline = time.monotonic() + _ORPHAN_WAIT_S
        while self._lock_files() and time.monotonic() < deadline:
            time.sleep(0.05)
        for path in self._lock_files():
            path.unlink(missing_ok=True)
            notes.append(f"removed its stale lock {path.relative_to(self._folder)}")
        objects = self._git.git_folder / "objects"
        for path in (*objects.glob("*/tmp_obj_*"), *objects.glob("pack/tmp_*")):
            path.unlink(missing_ok=True)
        if checkout := self._unfinished_checkout():
            self._check_unedited(checkout)
            self._check_out(checkout)
            notes.append(f"finished its checkout of {MAIN} at {checkout.new[:12]}")
        self._journal.unlink()
        return notes

    def _lock_files(self) -> Sequence[Path]:
        git_folder = self._git.git_folder
        return sorted((*git_folder.glob("*.lock"), *(git_folder / "refs").rglob("*.lock")))

    def _write_journal(self, checkout: _Checkout | None) -> None:
        write_atomic(self._journal, json.dumps({"checkout": asdict(checkout) if checkout else None}).encode())

    def _unfinished_checkout(self) -> _Checkout | None:
        """Return the checkout that a killed run began, unless main's head is not, or no longer, its commit."""
        try:
            entry = json.loads(self._journal.read_bytes())["checkout"]
        except FileNotFoundError:
            return None
        checkout = _Checkout(**entry) if entry else None
        head = self._git.heads().get(MAIN, ("", ""))[0]
        return checkout if checkout and checkout.new == head else None

    def _check_worktrees(self, changing: Collection[str]) -> None:
        """Raise if a branch would move under a worktree that shows it, or the repository's own does not show main."""
        own, *linked = self._git.run("worktree", "list", "--porcelain").strip().split("\n\n")
        if f"branch refs/heads/{MAIN}" not in own.splitlines():
            hint = f"git -C '{self.where}' switch {MAIN}"
            raise PublishError(f"the repository does not have {MAIN} checked out", where=self.where, hint=hint)
        for lines in (entry.splitlines() for entry in linked):
            shown = [line.removeprefix("branch refs/heads/") for line in lines if line.startswith("branch ")]
            if shown and shown[0] in changing and not any(line.startswith("prunable") for line in lines):
                raise PublishError(
                    f"{shown[0]} would move, and a linked worktree has it checked out",
                    where=lines[0].removeprefix("worktree "),
                    hint="git worktree remove it, or detach its HEAD",
                )

    def _check_unedited(self, checkout: _Checkout | None) -> None:
        """Raise if main's worktree holds anything but its head's files, or either end of an unfinished checkout."""
        listing = self._git.run("status", "--porcelain=v1", "-z", "--untracked-files=all", "--no-renames")
        entries = [(entry[:2], entry[3:]) for entry in listing.split("\0")[:-1]]
        ours = self._half_way(checkout, {name for _, name in entries}) if checkout else set()
        edited = [
            f"{name} ({_STATUS.get(state, 'edited')})"
            for state, name in entries
            if name not in ours and not any(part.startswith(TEMPORARY_PREFIX) for part in name.split("/"))
        ]
        if edited:
            raise StateError(
                f"somebody changed the files of {MAIN} in the published repository",
                where=self.where,
                why=", ".join(edited),
                hint=f"nothing was touched; `git -C '{self.where}' stash --include-untracked` puts the changes aside",
            )

    def _half_way(self, checkout: _Checkout, names: Collection[str]) -> set[str]:
        """Return those of `names` that `checkout` writes or removes and that are at one of its two ends."""
        old, new = self._git.files(checkout.old), self._git.files(checkout.new)
        found = set()
        for name in names:
            path, ends = self._folder / name, {files[name].blob_id for files in (old, new) if name in files}
            if old.get(name) == new.get(name):
                continue
            if not _is_file(path) or (not path.is_symlink() and read_local_file(path).blob_id in ends):
                found.add(name)
        return found

    def _check_out(self, checkout: _Checkout) -> None:
        """Bring worktree and index from one commit to another; running it again after a kill does no harm."""
        old, new = self._git.files(checkout.old), self._git.files(checkout.new)
        for name in old.keys() - new.keys():
            if _is_file(self._folder / name):
                (self._folder / name).unlink()
            self._remove_empty_folders(name)
        for name in sorted(name for name in new if old.get(name) != new[name]):
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            remove_leftovers(path.parent)
            self._git.export_blob(new[name].blob_id, path)
        with self._git.scratch_index() as index:
            self._git.run("read-tree", checkout.new, index=index)
            self._git.run("update-index", "-q", "--refresh", index=index)
            index.replace(self._git.git_folder / "index")

    def _remove_empty_folders(self, name: str) -> None:
        with suppress(OSError):
            for folder in (self._folder / name).parents:
                if folder == self._folder:
                    break
                folder.rmdir()


def _is_file(path: Path) -> bool:
    """Return whether a file is there; a folder there, or a file in its parent's place, holds nothing of that name."""
    return path.is_symlink() or path.is_file()
