"""The local target: an ordinary git repository with one branch per variant and `main` checked out.

A branch moves by compare-and-swap: a killed publish leaves every branch at its old or its new commit. Only the checkout
of `main` takes several steps: a journal in `.git` names both commits, and the next run finishes the checkout. The
journal exists from the first effect to the last, so lock files found beside it belong to no living process.

People push to it as to any repository, to `main`, too: git then changes the files of its checkout, and refuses the push
where they differ from its head, as those of an unfinished publish do (git 2.39, builtin/receive-pack.c,
`push_to_deploy`). A head that another author made becomes the parent of the new commit: it stays in the history, and
the plan names it.
"""

import json
import os
import re
import shutil
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath

from packager.errors import PublishError, StateError
from packager.publish.targets import NO_FILES, BranchState, CommitRecord, LocalFile, StoredFile, read_local_file
from packager.publish.targets.git_locks import (
    DEFAULT_WAITS,
    GitWaits,
    acquire,
    git_locks,
    publisher_lock,
    remove_partial_objects,
    remove_stale_locks,
)
from packager.publish.targets.git_process import GitProcess
from packager.publish.targets.git_tags import make_tag, read_tag
from packager.publish.targets.git_view import ATTRIBUTES, PUSHES, ViewedGit
from packager.system.files import (
    TEMPORARY_PREFIX,
    disk_errors,
    fsync_folder,
    remove_leftovers,
    write_atomic,
)
from packager.system.text import printable
from packager.variant import MAIN

_MAX_JOURNAL_BYTES = 4096
_STATUS_COMMAND = ("status", "--porcelain=v1", "-z", "--untracked-files=all", "--no-renames", "--ignore-submodules=all")
# What `_create` has set in every version: nobody else has changed a configuration that has it and no other section.
_MADE_HERE = re.compile(rb"\[core\]\n(\t[A-Za-z]+ = [a-z0-9]+\n)*\tautocrlf = false\n")
_STATUS = {"??": "untracked", " D": "deleted", "D ": "deleted"}


@dataclass(frozen=True, kw_only=True)
class _Checkout:
    """A change of the worktree from the commit `old` (None: an empty worktree) to `new`."""

    old: str | None
    new: str


class LocalTarget:
    """A git repository below a folder, where people and Hub servers can read it.

    Args:
        root: the folder that serves as a hub, e.g. dist/hub.
        repository_id: namespace/name.
        waits: waiting times for locks.
    """

    def __init__(self, root: Path, repository_id: str, *, waits: GitWaits = DEFAULT_WAITS) -> None:
        self._folder = (root / "models" / repository_id).absolute()
        self._waits = waits
        self._git = ViewedGit(self._folder)
        self._journal = self._git.git_folder / "packager-publishing.json"

    @property
    def where(self) -> str:
        """The repository's folder."""
        return str(self._folder)

    @property
    def is_public(self) -> bool:
        """No: the repository is a folder of this machine."""
        return False

    @property
    def identifies_by_blob(self) -> bool:
        """Yes: blob ids are git's only digests."""
        return True

    def read_branches(self) -> Mapping[str, BranchState]:
        """Return every branch with its files."""
        if not self._exists():
            return {}
        return {
            branch: BranchState(commit=commit, foreign_author=committer, files=self._git.files(commit))
            for branch, (commit, committer) in self._git.heads().items()
        }

    def check(self, changing: Collection[str]) -> None:
        """Raise unless these branches could be written now.

        Raises:
            MachineError: git is missing or too old.
            PublishError: the path holds something else, another git process holds a lock, or a branch is checked out.
            StateError: the worktree of main was edited.
        """
        self._git.check()
        if not self._exists():
            return
        if not self._journal.exists() and (locks := git_locks(self._git.git_folder)):
            raise PublishError(
                "another git process is at work in the repository",
                where=str(locks[0]),
                hint="wait until it ends; if no git process runs, it was killed: delete that file",
            )
        self._check_worktrees(changing)
        self._check_unedited(self._unfinished_checkout())

    @contextmanager
    def exclusive(self) -> Iterator[Sequence[str]]:
        """Lock out other publishers; create the repository, or repair the traces of a killed publish.

        Raises:
            PublishError: another publisher is at work.
        """
        self._git.check()
        self._exists()
        lock = publisher_lock(self._folder)
        with disk_errors(self._folder.parent):
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            acquire(lock, self._waits.publisher_s, where=self.where)
        try:
            with disk_errors(self._folder):
                notes = self._recover() if self._exists() else self._create()
                (self._git.git_folder / "logs").mkdir(exist_ok=True)
                self._git.look()
            yield notes
            self._journal.unlink(missing_ok=True)
        finally:
            lock.release()

    def commit(self, branch: str, files: Mapping[str, LocalFile], *, parent: str | None, message: str) -> str:
        """Put one commit that holds exactly `files` on top of `parent`; a commit of main is checked out."""
        with disk_errors(self._folder):
            self._write_journal(None)
            self._git.store(files)
            return self._advance(branch, self._git.commit(files, parent=parent, message=message), parent=parent)

    def _advance(self, branch: str, commit: str, *, parent: str | None) -> str:
        """Move a branch's head to `commit`; a commit of main is checked out."""
        checkout = _Checkout(old=parent, new=commit) if branch == MAIN else None
        if checkout is not None:
            self._check_stays_inside(checkout)
        self._write_journal(checkout)
        self._git.move_branch(branch, commit, parent=parent)
        if checkout is not None:
            self._check_out(checkout)
            self._write_journal(None)
        return commit

    def restore(
        self, branch: str, commit: str, *, parent: str, message: str, replacing: Mapping[str, LocalFile] = NO_FILES
    ) -> str:
        """Put a commit with the files of an earlier one on top of `parent`; a commit of main is checked out."""
        with disk_errors(self._folder):
            made = self._git.commit_again(commit, parent=parent, message=message, replacing=replacing)
            return self._advance(branch, made, parent=parent)

    def remove(self, branch: str, *, head: str) -> str:
        """Delete a branch, unless its head has moved; main stays, its files are in the worktree."""
        if branch == MAIN:
            raise PublishError(f"{MAIN} is checked out and stays as it is", where=self.where)
        with disk_errors(self._folder):
            self._git.run("update-ref", "-d", f"refs/heads/{branch}", head)
        return "the new branch was deleted again"

    def read_back(self, commit: str) -> Mapping[str, StoredFile]:
        """Return a commit's files with the sha256 of the repository's blobs, computed now."""
        return self._git.hashed(self._git.files(commit))

    def read_bytes(self, commit: str, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Return a blob's content, or a part of it."""
        return self._git.read_blob(self._stored(commit, name), start=start, size=size)

    def export(self, commit: str, name: str, path: Path) -> None:
        """Write a blob's content to `path`."""
        self._git.export_blob(self._stored(commit, name), path)

    def history(self, branch: str) -> Sequence[CommitRecord]:
        """Return a branch's commits."""
        return self._git.history(f"refs/heads/{branch}") if branch in self._git.heads() else ()

    def read_tag(self, name: str) -> Mapping[str, str]:
        """Return the commit that a tag names."""
        return {MAIN: read_tag(self._git, name) if self._exists() else ""}

    def tag(self, name: str, commits: Mapping[str, str], notes: str) -> None:
        """Make an annotated tag."""
        make_tag(self._git, name, commits[MAIN], notes)

    def _stored(self, commit: str, name: str) -> str:
        """Return the blob id of a commit's file."""
        stored = self._git.files(commit).get(name)
        if stored is None or not stored.blob_id:
            raise PublishError(f"{commit[:12]} has no file {name}", where=self.where)
        return stored.blob_id

    def _exists(self) -> bool:
        """Return whether the repository exists; anything else at its path is an error."""
        folder = self._folder
        if not os.path.lexists(folder) or (folder.is_dir() and not folder.is_symlink() and not any(folder.iterdir())):
            return False
        self._git.look()
        return True

    def _create(self) -> Sequence[str]:
        """Make an empty repository under a temporary name and rename it."""
        temporary = self._folder.with_name(f"{TEMPORARY_PREFIX}{self._folder.name}")
        notes = (
            [f"removed an unfinished repository of a killed publish: {temporary.name}"] if temporary.exists() else []
        )
        shutil.rmtree(temporary, ignore_errors=True)
        git = GitProcess(temporary)
        temporary.mkdir()
        git.run("init", "--quiet", "--template=", f"--initial-branch={MAIN}")
        git.run("config", "core.autocrlf", "false")
        config = git.git_folder / "config"
        write_atomic(config, config.read_bytes() + PUSHES)
        write_atomic(git.git_folder / "info" / "attributes", ATTRIBUTES)
        temporary.rename(self._folder)
        fsync_folder(self._folder.parent)
        return notes

    def _recover(self) -> Sequence[str]:
        """Repair the traces of an unfinished publish; return one note per repair."""
        attributes = self._git.git_folder / "info" / "attributes"
        if not attributes.exists():
            write_atomic(attributes, ATTRIBUTES)
        remove_leftovers(self._git.git_folder)
        notes = []
        config = self._git.git_folder / "config"
        if _MADE_HERE.fullmatch(data := config.read_bytes()):  # by an earlier version
            write_atomic(config, data + PUSHES)
            notes.append(f"a push to {MAIN} changes its files from now on; it was refused before")
        if not self._journal.exists():
            return notes
        notes.append("an earlier publish did not finish")
        stale = remove_stale_locks(lambda: git_locks(self._git.git_folder), self._waits.orphan_s)
        notes += [f"removed its stale lock {path.relative_to(self._folder)}" for path in stale]
        remove_partial_objects(self._git.git_folder)
        if checkout := self._unfinished_checkout():
            self._check_unedited(checkout)
            self._check_out(checkout)
            notes.append(f"finished its checkout of {MAIN} at {checkout.new[:12]}")
        self._journal.unlink()
        return notes

    def _write_journal(self, checkout: _Checkout | None) -> None:
        write_atomic(self._journal, json.dumps({"checkout": asdict(checkout) if checkout else None}).encode())

    def _unfinished_checkout(self) -> _Checkout | None:
        """Return the checkout that a killed publish began, None if main's head is not its commit."""
        try:
            with self._journal.open("rb") as stream:
                checkout = _read_journal(stream.read(_MAX_JOURNAL_BYTES))
        except FileNotFoundError:
            return None
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as error:
            raise PublishError(
                "the journal of an unfinished publish is damaged",
                where=str(self._journal),
                why=printable(str(error)),
                hint="delete it, then run again: the worktree is compared with its head first",
            ) from error
        head = self._git.heads().get(MAIN, ("", ""))[0]
        return checkout if checkout and checkout.new == head else None

    def _check_worktrees(self, changing: Collection[str]) -> None:
        """Raise if main is not checked out, or a linked worktree has a changing branch checked out."""
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
        """Raise if main's worktree holds other files than its head, apart from an unfinished checkout's."""
        listing = self._git.run(*_STATUS_COMMAND)
        entries = [(entry[:2], entry[3:]) for entry in listing.split("\0")[:-1]]
        ours = self._of_checkout(checkout, {name for _, name in entries}) if checkout else set()
        edited = [
            f"{name} ({_STATUS.get(state, 'edited')})"
            for state, name in entries
            if name not in ours and not any(part.startswith(TEMPORARY_PREFIX) for part in name.split("/"))
        ]
        if edited:
            raise StateError(
                f"the files of {MAIN} were edited in the published repository",
                where=self.where,
                why=", ".join(edited),
                hint=f"nothing was changed; `git -C '{self.where}' stash --include-untracked` puts the edits aside",
            )

    def _of_checkout(self, checkout: _Checkout, names: Collection[str]) -> set[str]:
        """Return those of `names` that `checkout` changes and whose content is that of its old or its new commit."""
        old, new = self._git.files(checkout.old), self._git.files(checkout.new)
        found = set()
        for name in names:
            path, ends = self._folder / name, {files[name].blob_id for files in (old, new) if name in files}
            if old.get(name) == new.get(name):
                continue
            if not _is_file(path) or (not path.is_symlink() and read_local_file(path).blob_id in ends):
                found.add(name)
        return found

    def _check_stays_inside(self, checkout: _Checkout) -> None:
        """Raise PublishError if a checkout would write or delete anything outside the worktree, or cannot be made."""
        old, new = self._git.files(checkout.old), self._git.files(checkout.new)
        for commit, files in ((checkout.old, old), (checkout.new, new)):
            folders = {str(folder) for name in files for folder in PurePosixPath(name).parents[:-1]}
            wrong = [name for name in files if _leads_out(name) or name in folders]
            wrong += [name for name, file in files.items() if files is new and not file.blob_id]
            if wrong:
                raise PublishError(
                    f"{(commit or '')[:12]} cannot be checked out",
                    where=self.where,
                    why=f"{printable(wrong[0])} leads out of the repository, or is no ordinary file",
                    hint="this program did not make that commit: go back to another one",
                )
            if links := [name for name in sorted(folders - old.keys()) if (self._folder / name).is_symlink()]:
                raise PublishError(
                    f"a folder of {MAIN} is a link to another place",
                    where=printable(str(self._folder / links[0])),
                    why="files would be written there",
                    hint="delete the link",
                )

    def _check_out(self, checkout: _Checkout) -> None:
        """Change worktree and index from one commit to another; repeating it after a kill is safe."""
        self._check_stays_inside(checkout)
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


def _read_journal(data: bytes) -> _Checkout | None:
    """Return the checkout that a journal names; a journal may be of any content."""
    entry = json.loads(data)["checkout"]
    if entry is None:
        return None
    checkout = _Checkout(**entry)
    if not all(re.fullmatch("[0-9a-f]{40}", commit) for commit in (checkout.new, checkout.old or checkout.new)):
        raise ValueError("it names no commits")
    return checkout


def _leads_out(name: str) -> bool:
    """Return whether a name of a commit's file leads out of the worktree or into git's folder, on any file system."""
    visible = "".join(character for character in name.lower() if unicodedata.category(character) != "Cf")
    return any(part.rstrip(". ") in ("", ".git", "git~1") for part in visible.split("/"))


def _is_file(path: Path) -> bool:
    """Return whether the path is a file or a link; a folder of that name, or a file as its parent, is not."""
    return path.is_symlink() or path.is_file()
