"""The git target: branches of any git remote, by https, ssh or a path.

A staging repository, a cache that may be deleted at any time, holds what was read and what is about to be sent. A
branch moves by a push with a lease on its old head, which the remote compares and swaps: no lock is needed there, and a
killed publish leaves every branch at its old or its new commit.

Files from LARGE_BYTES on are kept by git-lfs: the tree has a pointer, and a `.gitattributes` that names exactly these
files. Unless the manifest brings one of its own, that file is the target's and no file of the branch.
"""

import os
import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from packager.errors import MachineError, PublishError
from packager.publish.targets import (
    LARGE_BYTES,
    BranchState,
    CommitRecord,
    HeadMovedError,
    LocalFile,
    StoredFile,
    require_unchanged,
)
from packager.publish.targets.git_lfs import (
    MARK,
    attributes,
    attributes_line,
    by_attributes,
    hashed,
    link_or_copy,
    object_path,
    pointer,
    read_files,
)
from packager.publish.targets.git_remote import RemoteGit, create_bare, folder_of
from packager.publish.targets.git_staging import Staging
from packager.receipt import GIT_ATTRIBUTES
from packager.system.files import LOCK_WAIT_S, TEMPORARY_PREFIX, copy_atomic, disk_errors
from packager.variant import MAIN

_READ = "refs/published"  # where the staging repository keeps the heads that it read
_HEADS = f"+refs/heads/*:{_READ}/*"
_FETCH = ("fetch", "--quiet", "--no-tags", "--no-write-fetch-head")
_WHOLE = f"--depth={2**31 - 1}"
_NOT_GIVEN_OUT = r"not our ref|unadvertised object|not a valid object"  # some servers: nothing but branches' heads
_LFS_HINT = "install git-lfs (apt-get install git-lfs, brew install git-lfs or https://git-lfs.com) and run again"


class GitTarget:
    """A git repository that git itself reaches.

    Args:
        url: https://, ssh:// or user@host:path, file:// or a path; without credentials.
        staging: a folder for the cache, for this repository alone.
        token: for https, a token or user:password; only the URL's host gets it.
        log: gets a line when something has to be waited for.

    Raises:
        PublishError: the URL has credentials in it, or is none that can be published to.
    """

    def __init__(
        self, url: str, staging: Path, *, token: str = "", log: Callable[[str], None] = lambda _: None
    ) -> None:
        self._folder = folder_of(url, token)
        self._where = url
        host = "" if self._folder else urlsplit(url).netloc
        self._git = RemoteGit(staging.absolute(), str(self._folder or url), host=host, token=token, log=log)
        self._staging = Staging(self._git, self._folder, url)
        self._trees: dict[str, Mapping[str, StoredFile]] = {}

    @property
    def where(self) -> str:
        """The URL."""
        return self._where

    @property
    def is_public(self) -> bool:
        """Yes: others may read the remote."""
        return True

    @property
    def names_by_blob(self) -> bool:
        """No: git-lfs knows large files by sha256."""
        return False

    def read_branches(self) -> Mapping[str, BranchState]:
        """Fetch the newest commit of every branch."""
        if self._absent():
            return {}
        with self._staging.open():
            if not self._git.reach("ls-remote", "--heads", "origin"):  # of nothing, git fetches nothing, and fails
                return {}
            self._git.reach(*_FETCH, "--prune", "--depth=1", "origin", _HEADS)
            return {
                branch: BranchState(commit=commit, foreign_author=committer, files=self._files(commit))
                for branch, (commit, committer) in self._git.heads(_READ).items()
            }

    def check(self, changing: Collection[str]) -> None:
        """Raise unless the remote would take a push from us, which git asks it without sending anything.

        Raises:
            MachineError: git is missing or too old.
            PublishError: the remote gives no access.
        """
        self._git.check()
        if not changing or self._absent():
            return
        with self._staging.open():
            tree = self._git.run("hash-object", "-w", "-t", "tree", "--stdin").strip()
            commit = self._git.run("commit-tree", tree, "-m", "check").strip()
            self._git.reach("push", "--quiet", "--dry-run", "--force", "origin", f"{commit}:refs/heads/packager-check")

    @contextmanager
    def exclusive(self) -> Iterator[Sequence[str]]:
        """Lock the staging folder, and empty it of what git-lfs has sent at the end.

        That keeps publishers of this machine apart who stage in the same place; of others the push's lease takes care.

        Raises:
            PublishError: another publisher is at work there.
        """
        with self._staging.open(timeout_s=LOCK_WAIT_S) as notes:
            yield notes
            self._staging.forget_objects()

    def commit(self, branch: str, files: Mapping[str, LocalFile], *, parent: str | None, message: str) -> str:
        """Push one commit that holds exactly `files`; what git-lfs keeps is uploaded before.

        Raises:
            MachineError: git-lfs is needed and missing.
        """
        with self._staging.open(), disk_errors(self._staging.folder):
            if self._folder and self._absent():
                create_bare(self._folder)
            self._git.store({name: file for name, file in files.items() if file.size_bytes < LARGE_BYTES})
            large = self._large(files)
            if large and self._git.attempt("lfs", "version").status:
                names = ", ".join(sorted(large))
                raise MachineError("git-lfs is not on the PATH", why=f"it keeps large files: {names}", hint=_LFS_HINT)
            tree = {**files, **{name: self._pointer(file) for name, file in large.items()}}
            if large and GIT_ATTRIBUTES not in files:
                tree[GIT_ATTRIBUTES] = self._written(attributes(large))
            self._based(branch, parent)
            commit = self._git.commit(tree, parent=parent, message=message)
            if large:
                for file in large.values():
                    self._stage(file)
                self._upload({file.sha256 for file in large.values()})
            return self._push(branch, commit, parent=parent)

    def restore(self, branch: str, commit: str, *, parent: str, message: str) -> str:
        """Push a commit with the tree of an earlier one."""
        with self._staging.open():
            self._based(branch, parent)
            self._ensure(commit, self._git)
            return self._push(branch, self._git.commit_again(commit, parent=parent, message=message), parent=parent)

    def read_back(self, commit: str) -> Mapping[str, StoredFile]:
        """Return a commit's files as the remote gives them to somebody who has nothing.

        What git keeps is fetched into an empty repository and hashed there: it is what the remote sent. What git-lfs
        keeps is hashed in the remote's store if that is a folder of this machine. Of another remote the pointers come
        from the fetch, and its server is asked once more about each object that is staged here: it says that it has
        it, or is sent it again.
        """
        with (
            self._staging.open(),
            tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=self._staging.folder) as empty,
        ):
            git = self._git.beside(Path(empty))
            git.run("init", "--quiet", "--template=")
            self._ensure(commit, git)
            files = read_files(git, commit)
            found = {
                name: replace(file, sha256=git.blob_sha256(file.blob_id))
                for name, file in files.items()
                if file.blob_id
            }
            kept = {name: file for name, file in files.items() if not file.blob_id and file.sha256}
            if self._folder:
                kept = {name: hashed(object_path(self._folder, file.sha256)) for name, file in kept.items()}
            elif staged := {
                file.sha256 for file in kept.values() if object_path(self._staging.folder, file.sha256).exists()
            }:
                self._upload(staged)
            return {**files, **found, **kept}

    def read_bytes(self, commit: str, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Return a file's content, or a part of it; from a git-lfs server all of it travels, once."""
        with self._staging.open():
            stored = self._stored(commit, name)
            if stored.blob_id:
                return self._git.read_blob(stored.blob_id, start=start, size=size)
            with self._downloaded(stored).open("rb") as stream:
                stream.seek(start)
                return stream.read(-1 if size is None else size)

    def export(self, commit: str, name: str, path: Path) -> None:
        """Write a file's content to `path`."""
        with self._staging.open():
            stored = self._stored(commit, name)
            if stored.blob_id:
                self._git.export_blob(stored.blob_id, path)
            else:
                copy_atomic(self._downloaded(stored), path)

    def history(self, branch: str) -> Sequence[CommitRecord]:
        """Fetch all of a branch's commits."""
        if self._absent():
            return ()
        with self._staging.open():
            ref = f"refs/heads/{branch}"
            if self._head(ref) is None:
                return ()
            self._git.reach(*_FETCH, _WHOLE, "origin", f"+{ref}:{_READ}/{branch}")
            return self._git.history(f"{_READ}/{branch}")

    def read_tag(self, name: str) -> Mapping[str, str]:
        """Return the commit that a tag names."""
        if self._absent():
            return {MAIN: ""}
        with self._staging.open():
            return {MAIN: self._tagged(f"refs/tags/{name}")}

    def tag(self, name: str, commits: Mapping[str, str]) -> None:
        """Push a lightweight tag."""
        ref, commit = f"refs/tags/{name}", commits[MAIN]
        with self._staging.open():
            if not self._tagged(ref):
                self._ensure(commit, self._git)
                answer = self._git.transfer("push", f"--force-with-lease={ref}:", "origin", f"{commit}:{ref}")
                if answer.status and not self._tagged(ref):
                    raise self._git.refusal("push", answer.words)
            if (found := self._tagged(ref)) != commit:
                raise PublishError(f"the tag {name} is there and names {found[:12]}", where=self.where)

    def _tagged(self, ref: str) -> str:
        """Return the commit that a tag of the remote names, "" if there is none."""
        return self._head(f"{ref}^{{}}") or self._head(ref) or ""

    def _absent(self) -> bool:
        """Return whether the remote is a path where nothing is yet."""
        folder = self._folder
        return folder is not None and (not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())))

    def _head(self, ref: str) -> str | None:
        """Ask the remote what a ref names."""
        lines = self._git.reach("ls-remote", "origin", ref.removesuffix("^{}") + "*").splitlines()
        return next((commit for commit, name in (line.split("\t", 1) for line in lines) if name == ref), None)

    def _push(self, branch: str, commit: str, *, parent: str | None) -> str:
        """Let a branch of the remote be `commit` if it still is `parent`, and return the commit that it is then."""
        ref = f"refs/heads/{branch}"
        self._staging.begin_push(ref)
        lease = f"--force-with-lease={ref}:{parent or ''}"
        answer = self._git.transfer("push", "--quiet", lease, "origin", f"{commit}:{ref}")
        self._staging.end_push()
        if answer.status:
            # What was answered may be about a second try, or be lost: the branch itself knows.
            head = self._head(ref)
            if head == parent:
                raise self._git.refusal("push", answer.words)
            if head is None or not self._same(head, commit):
                raise self._moved(branch)
            commit = head
        self._git.attempt("update-ref", f"{_READ}/{branch}", commit)  # what was read last; it is read anew each time
        return commit

    def _same(self, one: str, other: str) -> bool:
        """Return whether two commits have the same tree and parents."""
        self._ensure(one, self._git)
        headers = (self._git.run("cat-file", "commit", commit).split("\nauthor ", 1)[0] for commit in (one, other))
        return len(set(headers)) == 1

    def _based(self, branch: str, parent: str | None) -> None:
        """Have a branch's head here, to make a commit on top of it."""
        if parent is not None and self._git.attempt("cat-file", "-e", f"{parent}^{{tree}}").status:
            if self._head(f"refs/heads/{branch}") != parent:
                raise self._moved(branch)
            self._ensure(parent, self._git)

    def _moved(self, branch: str) -> HeadMovedError:
        return HeadMovedError(f"{branch} was moved by somebody else", where=self.where)

    def _ensure(self, commit: str, git: RemoteGit) -> None:
        """Fetch a commit that a repository of ours does not hold."""
        known = ("cat-file", "-e", f"{commit}^{{tree}}")
        if not git.attempt(*known).status:
            return
        answer = git.transfer(*_FETCH, "--depth=1", "origin", commit)
        if answer.status:
            if not re.search(_NOT_GIVEN_OUT, answer.words):
                raise git.refusal("fetch", answer.words)
            git.reach(*_FETCH, _WHOLE, "origin", _HEADS)
        if git.attempt(*known).status:
            raise PublishError(f"there is no commit {commit[:12]}", where=self.where)

    def _files(self, commit: str) -> Mapping[str, StoredFile]:
        if commit not in self._trees:
            self._trees[commit] = read_files(self._git, commit)
        return self._trees[commit]

    def _stored(self, commit: str, name: str) -> StoredFile:
        """Return a commit's file, which is one of the ordinary ones."""
        self._ensure(commit, self._git)
        stored = self._files(commit).get(name)
        if stored is None or not (stored.blob_id or stored.sha256):
            raise PublishError(f"{commit[:12]} has no file {name}", where=self.where)
        return stored

    def _large(self, files: Mapping[str, LocalFile]) -> Mapping[str, LocalFile]:
        """Return the files that git-lfs is to keep: the large ones, and what the manifest's own attributes say."""
        large = {name for name, file in files.items() if file.size_bytes >= LARGE_BYTES}
        if not (own := files.get(GIT_ATTRIBUTES)):
            return {name: files[name] for name in large}
        if self._git.read_blob(own.blob_id).startswith(MARK):
            hint = "delete it from what is published: it is written anew where it is needed"
            raise PublishError(f"{GIT_ATTRIBUTES} is this program's, of another branch", where=str(own.path), hint=hint)
        kept = by_attributes(self._git, files)
        if left := sorted(large - kept):
            why = f"it does not give these files to git-lfs, and they are too large for git: {', '.join(left)}"
            hint = f"add {attributes_line(left[0])!r}, or remove it: then one is written"
            raise PublishError(f"{GIT_ATTRIBUTES} is not complete", where=str(own.path), why=why, hint=hint)
        return {name: files[name] for name in kept}

    def _pointer(self, file: LocalFile) -> LocalFile:
        return self._written(pointer(file.sha256, file.size_bytes))

    def _written(self, data: bytes) -> LocalFile:
        """Store a file that is in no folder."""
        blob_id = self._git.run("hash-object", "-w", "--stdin", stdin=data).strip()
        return LocalFile(path=self._staging.folder, size_bytes=len(data), sha256="", blob_id=blob_id)

    def _stage(self, file: LocalFile) -> None:
        """Put a file where git-lfs uploads it from: as a hard link, which costs nothing.

        git-lfs would hard-link it on into a remote of the same file system, where an edit of the folder that is
        published would be an edit of the published repository. Such a remote gets a copy.
        """
        require_unchanged(file)
        path = object_path(self._staging.folder, file.sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._folder and path.exists() and path.stat().st_size == file.size_bytes:
            return
        (copy_atomic if self._folder else link_or_copy)(file.path, path)

    def _upload(self, sha256s: Iterable[str]) -> None:
        """Send what the remote's store does not have."""
        self._git.reach("lfs", "push", "--object-id", "origin", *sorted(sha256s))

    def _downloaded(self, stored: StoredFile) -> Path:
        """Return a file with an object's content, fetched unless it is here."""
        path = (
            object_path(self._folder, stored.sha256)
            if self._folder
            else object_path(self._staging.folder, stored.sha256)
        )
        if not path.exists() and not self._folder:
            self._git.reach("lfs", "smudge", stdin=pointer(stored.sha256, stored.size_bytes), discard=True)
        if not path.exists() or path.stat().st_size != stored.size_bytes:
            raise PublishError(f"git-lfs has no object {stored.sha256}", where=self.where)
        return path
