"""The git target: branches of any git remote, by https, ssh or a path.

A staging repository holds fetched objects and those to push; it is a cache and may be deleted at any time. A branch
moves by a push with a lease on its old head, which the remote compares and swaps. So the remote needs no lock, and a
killed publish leaves every branch at its old or its new commit.

git-lfs stores files from LARGE_BYTES on: the tree has a pointer for each, and a `.gitattributes` that names exactly
these files. Unless the manifest has its own `.gitattributes`, that file belongs to the target, not to the branch.
"""

import re
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

from packager.errors import MachineError, PublishError
from packager.publish.targets import (
    LARGE_BYTES,
    NO_FILES,
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
from packager.publish.targets.git_lfs_objects import LfsObjects
from packager.publish.targets.git_locks import DEFAULT_WAITS, GitWaits
from packager.publish.targets.git_remote import RemoteGit, create_bare, folder_of, is_absent
from packager.publish.targets.git_staging import VIEW, Staging
from packager.publish.targets.git_tags import tag_object
from packager.receipt import GIT_ATTRIBUTES
from packager.system.files import TEMPORARY_PREFIX, copy_atomic, disk_errors, remove_leftovers
from packager.variant import MAIN

_READ = "refs/published"  # the staging repository's refs for the heads of the remote
_HEADS = f"+refs/heads/*:{_READ}/*"
_FETCH = ("fetch", "--quiet", "--no-tags", "--no-write-fetch-head")
_WHOLE = f"--depth={2**31 - 1}"
_NOT_SERVED = r"not our ref|unadvertised object|not a valid object"  # some servers send only the heads of branches
_LFS_HINT = "install git-lfs (apt-get install git-lfs, brew install git-lfs or https://git-lfs.com) and run again"


class GitTarget:
    """A git remote.

    Args:
        url: https://, ssh:// or user@host:path, file:// or a path; without credentials.
        staging: a folder for the cache, for this repository alone.
        token: for https, a token or user:password; only the URL's host gets it.
        log: gets a line per wait.
        waits: waiting times for locks and between tries of a transfer.

    Raises:
        PublishError: the URL contains credentials or is not supported.
    """

    def __init__(
        self,
        url: str,
        staging: Path,
        *,
        token: str = "",
        log: Callable[[str], None] = lambda _: None,
        waits: GitWaits = DEFAULT_WAITS,
    ) -> None:
        self._folder = folder_of(url, token)
        self._where = url
        host = "" if self._folder else urlsplit(url).netloc
        self._waits = waits
        view = staging.absolute() / VIEW if self._folder else None
        address = str(self._folder or url)
        self._git = RemoteGit(
            staging.absolute(), address, view=view, host=host, token=token, log=log, retries_s=waits.retries_s
        )
        self._staging = Staging(self._git, self._folder, url, waits)
        self._objects = LfsObjects(self._git, self._folder, url, log)
        self._trees: dict[str, Mapping[str, StoredFile]] = {}

    @property
    def where(self) -> str:
        """The URL."""
        return self._where

    @property
    def is_public(self) -> bool:
        """Yes: other people may read the remote."""
        return True

    @property
    def identifies_by_blob(self) -> bool:
        """No: git-lfs identifies large files by sha256."""
        return False

    def read_branches(self) -> Mapping[str, BranchState]:
        """Fetch the newest commit of every branch."""
        if self._absent():
            return {}
        with self._staging.open():
            # Without branches `git fetch` of a wildcard fails.
            if not self._git.reach("ls-remote", "--heads", "origin"):
                return {}
            self._git.reach(*_FETCH, "--prune", "--depth=1", "origin", _HEADS)
            return {
                branch: BranchState(commit=commit, foreign_author=committer, files=self._files(commit))
                for branch, (commit, committer) in self._git.heads(_READ).items()
            }

    def check(self, changing: Collection[str]) -> None:
        """Raise unless the remote would accept a push; a dry run sends nothing.

        Raises:
            MachineError: git is missing or too old.
            PublishError: the remote gives no access, or is a folder with hooks.
        """
        self._git.check()
        if not changing or self._absent():
            return
        with self._staging.open():
            self._staging.require_no_hooks()
            tree = self._git.run("hash-object", "-w", "-t", "tree", "--stdin").strip()
            commit = self._git.run("commit-tree", tree, "-m", "check").strip()
            self._git.reach("push", "--quiet", "--dry-run", "--force", "origin", f"{commit}:refs/heads/packager-check")

    @contextmanager
    def exclusive(self) -> Iterator[Sequence[str]]:
        """Lock the staging folder, and delete the objects of git-lfs from it at the end.

        The lock excludes publishers with the same staging folder; the lease of a push protects against all others.

        Raises:
            PublishError: another publisher holds the lock.
        """
        with self._staging.open(timeout_s=self._waits.publisher_s) as notes:
            yield notes
            self._staging.forget_objects()

    def commit(self, branch: str, files: Mapping[str, LocalFile], *, parent: str | None, message: str) -> str:
        """Push one commit that holds exactly `files`; the objects of git-lfs are uploaded first.

        Raises:
            MachineError: git-lfs is needed and missing.
        """
        with self._staging.open(), disk_errors(self._staging.folder):
            if self._folder and self._absent():
                create_bare(self._folder)
                self._staging.look()
            self._git.store({name: file for name, file in files.items() if file.size_bytes < LARGE_BYTES})
            large = self._large(files)
            if large and self._git.attempt("lfs", "version").status:
                names = ", ".join(sorted(large))
                raise MachineError("git-lfs is not on the PATH", why=f"it stores large files: {names}", hint=_LFS_HINT)
            tree = {**files, **{name: self._pointer(file) for name, file in large.items()}}
            if large and GIT_ATTRIBUTES not in files:
                tree[GIT_ATTRIBUTES] = self._written(attributes(large))
            self._fetch_parent(branch, parent)
            commit = self._git.commit(tree, parent=parent, message=message)
            if large:
                for file in large.values():
                    self._stage(file)
                if not self._folder:
                    self._upload({file.sha256 for file in large.values()})
            return self._push(branch, commit, parent=parent)

    def restore(
        self, branch: str, commit: str, *, parent: str, message: str, replacing: Mapping[str, LocalFile] = NO_FILES
    ) -> str:
        """Push a commit with the files of an earlier one."""
        with self._staging.open():
            self._fetch_parent(branch, parent)
            self._ensure(commit, self._git)
            made = self._git.commit_again(commit, parent=parent, message=message, replacing=replacing)
            return self._push(branch, made, parent=parent)

    def remove(self, branch: str, *, head: str) -> str:
        """Delete a branch of the remote, unless its head has moved."""
        ref = f"refs/heads/{branch}"
        with self._staging.open():
            result = self._git.transfer("push", "--quiet", f"--force-with-lease={ref}:{head}", "origin", f":{ref}")
        if result.status:
            raise self._git.refusal("push", result.stderr)
        return "the new branch was deleted again"

    def read_back(self, commit: str) -> Mapping[str, StoredFile]:
        """Return a commit's files as a new clone would get them from the remote.

        Files in git are fetched into an empty repository and hashed there. Objects of git-lfs are hashed in the
        remote's store if the remote is a folder of this machine. For another remote the pointers come from the fetch,
        and each object that is staged here is pushed once more: the server confirms that it has it, or gets it again.
        """
        with (
            self._staging.open(),
            tempfile.TemporaryDirectory(prefix=TEMPORARY_PREFIX, dir=self._staging.folder) as empty,
        ):
            git = self._git.beside(Path(empty))
            git.run("init", "--quiet", "--template=")
            self._ensure(commit, git)
            files = git.hashed(read_files(git, commit))
            kept = {name: file for name, file in files.items() if not file.blob_id and file.sha256}
            if self._folder:
                kept = {name: hashed(object_path(self._folder, file.sha256)) for name, file in kept.items()}
            elif staged := {
                file.sha256 for file in kept.values() if object_path(self._staging.folder, file.sha256).exists()
            }:
                self._upload(staged)
            return {**files, **kept}

    def read_bytes(self, commit: str, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Return a file's content, or a part of it; git-lfs by ssh sends the whole object, once."""
        with self._staging.open():
            stored = self._stored(commit, name)
            if stored.blob_id:
                return self._git.read_blob(stored.blob_id, start=start, size=size)
            return self._objects.read(stored, start, size)

    def export(self, commit: str, name: str, path: Path) -> None:
        """Write a file's content to `path`."""
        with self._staging.open():
            stored = self._stored(commit, name)
            if stored.blob_id:
                self._git.export_blob(stored.blob_id, path)
            else:
                copy_atomic(self._objects.whole(stored), path)

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

    def tag(self, name: str, commits: Mapping[str, str], notes: str) -> None:
        """Push an annotated tag."""
        ref, commit = f"refs/tags/{name}", commits[MAIN]
        with self._staging.open():
            if not self._tagged(ref):
                self._ensure(commit, self._git)
                made = tag_object(self._git, name, commit, notes)
                result = self._git.transfer("push", f"--force-with-lease={ref}:", "origin", f"{made}:{ref}")
                if result.status and not self._tagged(ref):
                    raise self._git.refusal("push", result.stderr)
            if (found := self._tagged(ref)) != commit:
                raise PublishError(f"the tag {name} exists and names {found[:12]}", where=self.where)

    def _tagged(self, ref: str) -> str:
        """Return the commit that a tag of the remote names, "" if the tag does not exist."""
        return self._head(f"{ref}^{{}}") or self._head(ref) or ""

    def _absent(self) -> bool:
        """Return whether the remote is a path without a repository."""
        return self._folder is not None and is_absent(self._folder)

    def _head(self, ref: str) -> str | None:
        """Return the commit or object that a ref of the remote names, None if the ref does not exist."""
        lines = self._git.reach("ls-remote", "origin", ref.removesuffix("^{}") + "*").splitlines()
        return next((commit for commit, name in (line.split("\t", 1) for line in lines) if name == ref), None)

    def _push(self, branch: str, commit: str, *, parent: str | None) -> str:
        """Move a branch of the remote from `parent` to `commit`, and return its new head.

        The head may be an equal commit of another publisher, with the same tree and parents.
        """
        ref = f"refs/heads/{branch}"
        self._staging.begin_push(ref)
        lease = f"--force-with-lease={ref}:{parent or ''}"
        result = self._git.transfer("push", "--quiet", lease, "origin", f"{commit}:{ref}")
        self._staging.end_push()
        if result.status:
            # The error may belong to a retry after the first try had succeeded: read the branch.
            head = self._head(ref)
            if head == parent:
                raise self._git.refusal("push", result.stderr)
            if head is None or not self._same(head, commit):
                raise self._moved(branch)
            commit = head
        self._git.attempt("update-ref", f"{_READ}/{branch}", commit)  # a cache: each read fetches again
        return commit

    def _same(self, one: str, other: str) -> bool:
        """Return whether two commits have the same tree and parents."""
        self._ensure(one, self._git)
        headers = (self._git.run("cat-file", "commit", commit).split("\nauthor ", 1)[0] for commit in (one, other))
        return len(set(headers)) == 1

    def _fetch_parent(self, branch: str, parent: str | None) -> None:
        """Fetch the parent of a new commit, unless the staging repository has it."""
        if parent is not None and self._git.attempt("cat-file", "-e", f"{parent}^{{tree}}").status:
            if self._head(f"refs/heads/{branch}") != parent:
                raise self._moved(branch)
            self._ensure(parent, self._git)

    def _moved(self, branch: str) -> HeadMovedError:
        return HeadMovedError(f"{branch} moved", where=self.where)

    def _ensure(self, commit: str, git: RemoteGit) -> None:
        """Fetch a commit into a repository on this machine, unless it has the commit."""
        known = ("cat-file", "-e", f"{commit}^{{tree}}")
        if not git.attempt(*known).status:
            return
        result = git.transfer(*_FETCH, "--depth=1", "origin", commit)
        if result.status:
            if not re.search(_NOT_SERVED, result.stderr):
                raise git.refusal("fetch", result.stderr)
            git.reach(*_FETCH, _WHOLE, "origin", _HEADS)
        if git.attempt(*known).status:
            raise PublishError(f"there is no commit {commit[:12]}", where=self.where)

    def _files(self, commit: str) -> Mapping[str, StoredFile]:
        if commit not in self._trees:
            self._trees[commit] = read_files(self._git, commit)
        return self._trees[commit]

    def _stored(self, commit: str, name: str) -> StoredFile:
        """Return an ordinary file of a commit.

        Raises:
            PublishError: the commit has no such file, or it is a link, a submodule or an executable.
        """
        self._ensure(commit, self._git)
        stored = self._files(commit).get(name)
        if stored is None or not (stored.blob_id or stored.sha256):
            raise PublishError(f"{commit[:12]} has no file {name}", where=self.where)
        return stored

    def _large(self, files: Mapping[str, LocalFile]) -> Mapping[str, LocalFile]:
        """Return the files that git-lfs stores: the large ones, and those named by the manifest's attributes."""
        large = {name for name, file in files.items() if file.size_bytes >= LARGE_BYTES}
        if not (own := files.get(GIT_ATTRIBUTES)):
            return {name: files[name] for name in large}
        if self._git.read_blob(own.blob_id).startswith(MARK):
            hint = "delete it from the published folder: publishing writes the file itself if it is needed"
            raise PublishError(f"{GIT_ATTRIBUTES} was written for another branch", where=str(own.path), hint=hint)
        kept = by_attributes(self._git, files)
        if left := sorted(large - kept):
            why = f"it does not name these files for git-lfs, and they are too large for git: {', '.join(left)}"
            hint = f"add {attributes_line(left[0])!r}, or remove the file: publishing then writes one"
            raise PublishError(f"{GIT_ATTRIBUTES} is incomplete", where=str(own.path), why=why, hint=hint)
        return {name: files[name] for name in kept}

    def _pointer(self, file: LocalFile) -> LocalFile:
        return self._written(pointer(file.sha256, file.size_bytes))

    def _written(self, data: bytes) -> LocalFile:
        """Store content that is not in a published folder."""
        blob_id = self._git.run("hash-object", "-w", "--stdin", stdin=data).strip()
        return LocalFile(path=self._staging.folder, size_bytes=len(data), sha256="", blob_id=blob_id)

    def _stage(self, file: LocalFile) -> None:
        """Put a file into the store that git-lfs uploads from, as a hard link, which needs no space.

        If the remote is a folder, the file is copied into that folder's store. git-lfs would obey the settings of the
        folder, and a hard link would let an edit of the published files change the published repository.
        """
        require_unchanged(file)
        path = object_path(self._folder or self._staging.folder, file.sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        if self._folder:
            remove_leftovers(path.parent)
            if not path.exists() or path.stat().st_size != file.size_bytes:
                copy_atomic(file.path, path)
        else:
            link_or_copy(file.path, path)

    def _upload(self, sha256s: Iterable[str]) -> None:
        """Upload the objects that the remote's store lacks."""
        self._git.reach("lfs", "push", "--object-id", "origin", *sorted(sha256s))
