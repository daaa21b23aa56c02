"""Where branches are published: one small port, and the values that cross it.

A target holds branches; a branch holds exactly the files of its head commit. What is to be done is decided elsewhere
(`publish.py`, `rollback.py`, `published.py`) from what a target says, so a target never compares anything. What
identifies a stored file is whatever the target can answer without reading its content: git knows blob ids, git-lfs and
the Hub the sha256 of large files and blob ids of the rest.
"""

import hashlib
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from packager.errors import PublishError
from packager.system.files import TEMPORARY_PREFIX, sha256_file

# Git keeps smaller files as they are, and larger ones by git-lfs, as the Hub does.
LARGE_BYTES = 10_000_000
# Wherever a host draws that line, so large a file is beyond it, and nobody asks for its blob id.
NEVER_IN_GIT_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 20
_LOST_IN_A_CLONE = {"Cc", "Cs", "Zl", "Zp"}  # control, surrogate, line and paragraph separators


@dataclass(frozen=True, kw_only=True)
class LocalFile:
    """A file to publish, with the names git and the Hub know its content by.

    Attributes:
        path: where it lies.
        size_bytes: its length.
        sha256: digest of the content.
        blob_id: git's id of the content (sha1 over a header and the content); "" for a very large file, where the
            target has no use for it.
    """

    path: Path
    size_bytes: int
    sha256: str
    blob_id: str


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file of a published branch; `sha256` or `blob_id` is "" where the target does not know it.

    Both are "" for what is no ordinary file (a symbolic link, a submodule, an executable): it equals nothing of ours.
    """

    size_bytes: int
    sha256: str = ""
    blob_id: str = ""

    def holds(self, other: "LocalFile | StoredFile") -> bool:
        """Return whether the content is that of another file, by the strongest digest that is known of both."""
        if self.size_bytes != other.size_bytes:
            return False
        return self.sha256 == other.sha256 if self.sha256 and other.sha256 else self.blob_id == other.blob_id


def same_files(one: Mapping[str, StoredFile], other: Mapping[str, StoredFile]) -> bool:
    """Return whether two commits hold the same files."""
    return one.keys() == other.keys() and all(one[name].holds(other[name]) for name in one)


@dataclass(frozen=True, kw_only=True)
class BranchState:
    """A published branch: its head and the files there.

    Attributes:
        commit: the head, 40 hex digits.
        foreign_author: who made the head, "" when it was this program.
        files: by name, with '/' between folders.
        repository: whose branch it is, where each variant has a repository of its own; else "".
    """

    commit: str
    foreign_author: str
    files: Mapping[str, StoredFile]
    repository: str = ""


@dataclass(frozen=True, kw_only=True)
class CommitRecord:
    """A commit of a branch's history.

    Attributes:
        commit: 40 hex digits.
        author: who made it, "" when it was this program.
        title: its message's first line.
        message: the whole of it, title and trailers, without line ends at the end.
        time_s: when, in seconds since 1970.
    """

    commit: str
    author: str
    title: str
    message: str
    time_s: int


class HeadMovedError(PublishError):
    """A branch's head is not what it was when the plan was made: somebody else committed meanwhile."""


class Target(Protocol):
    """A repository that branches are published to.

    Whatever is read of a commit holds for ever; only `read_branches` gives another answer the next time.
    """

    @property
    def where(self) -> str:
        """The repository as people know it: a folder or an address."""

    @property
    def is_public(self) -> bool:
        """Whether others may see at once what is published: then a person is asked first."""

    @property
    def names_by_blob(self) -> bool:
        """Whether large files, too, are told apart by their blob ids."""

    def read_branches(self) -> Mapping[str, BranchState]:
        """Return every branch that is there; nothing is written, and none is there before the first publish."""

    def read_back(self, commit: str) -> Mapping[str, StoredFile]:
        """Return a commit's files anew, by the strongest digests the repository can answer of what it stores."""

    def read_bytes(self, commit: str, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Return a stored file's content, or `size` bytes of it from `start` on; the rest need not travel.

        Raises:
            PublishError: there is no such file.
        """

    def export(self, commit: str, name: str, path: Path) -> None:
        """Write a stored file's content to `path`, whole or not at all."""

    def history(self, branch: str) -> Sequence[CommitRecord]:
        """Return a branch's commits, the newest first, following first parents; none if it is not there."""

    def check(self, changing: Collection[str]) -> None:
        """Raise unless the branches named could be written now; nothing is written."""

    def exclusive(self) -> AbstractContextManager[Sequence[str]]:
        """Keep other publishers out and put right what a killed one left, which the value describes in sentences."""

    def commit(self, branch: str, files: Mapping[str, LocalFile], *, parent: str | None, message: str) -> str:
        """Make `files` the whole content of `branch` in one commit on top of `parent`, and return its id.

        Raises:
            HeadMovedError: the branch's head is no longer `parent` (None: it was not there).
            PublishError: the target refused, or a file is no longer what it was.
        """

    def restore(self, branch: str, commit: str, *, parent: str, message: str) -> str:
        """Make the files of an earlier `commit` the whole content of `branch` in one new commit on top of `parent`.

        Nothing is uploaded: the repository has all of it.

        Raises:
            HeadMovedError: the branch's head is no longer `parent`.
        """

    def read_tag(self, name: str) -> Mapping[str, str]:
        """Return the commit that a tag names, "" if it is not there.

        By branch: `main`; or every branch, where each has a repository of its own, and tags of its own.
        """

    def tag(self, name: str, commits: Mapping[str, str]) -> None:
        """Give commits a name for good, by branch as `read_tag` has them; the same again is fine.

        Raises:
            PublishError: the name is taken by another commit.
        """


def read_local_file(path: Path, *, blob_id: bool = True) -> LocalFile:
    """Return `path` with its digests, computed in one pass; a very large file's blob id only if it is asked for."""
    size_bytes = path.stat().st_size
    if not blob_id and size_bytes >= NEVER_IN_GIT_BYTES:
        return LocalFile(path=path, size_bytes=size_bytes, sha256=sha256_file(path), blob_id="")
    sha256 = hashlib.sha256()
    blob = hashlib.sha1(b"blob %d\0" % size_bytes, usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            sha256.update(chunk)
            blob.update(chunk)
    return LocalFile(path=path, size_bytes=size_bytes, sha256=sha256.hexdigest(), blob_id=blob.hexdigest())


def require_unchanged(file: LocalFile) -> None:
    """Raise PublishError unless a file still has the content that was compared and planned with.

    That costs nothing where its times say that it was not written to.
    """
    if sha256_file(file.path) != file.sha256:
        raise changed_meanwhile(file.path)


def changed_meanwhile(path: Path) -> PublishError:
    """Return the error for a file whose content is no longer what was compared and planned with."""
    return PublishError(
        "the file changed while it was being published",
        where=str(path),
        hint="stop whatever writes to the output folder, build the branch again, then publish",
    )


def file_name_problem(name: str) -> str:
    """Return why a file cannot be published under `name`, or "" when it can."""
    parts = name.split("/")
    problem = ""
    if any(part in ("", ".", "..") for part in parts):
        problem = "a name is relative, and no part of it is empty, '.' or '..'"
    elif "\\" in name or any(unicodedata.category(character) in _LOST_IN_A_CLONE for character in name):
        problem = "control characters, line ends, undecodable bytes and backslashes do not survive a clone"
    elif any(part.lower().rstrip(". ") in (".git", "git~1") for part in parts):
        problem = "git keeps its own files under that name"
    elif any(part.startswith(TEMPORARY_PREFIX) for part in parts):
        problem = f"names that start with {TEMPORARY_PREFIX} are leftovers of killed runs, deleted at any time"
    return problem
