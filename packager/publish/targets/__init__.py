"""The targets that branches are published to: the protocol `Target` and its values.

A target holds branches; a branch holds exactly the files of its head commit. A target only reads and writes: its
callers (`branches.py`, `published/`, `rollback/`) compare and decide. A stored file is identified by the digest that
the target can return without reading the content: git has blob ids; git-lfs and the Hub have the sha256 of large files
and the blob ids of small ones.
"""

import hashlib
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

from packager.errors import PublishError
from packager.system.files import TEMPORARY_PREFIX, sha256_file

# Files from this size on are stored by git-lfs, as on the Hub; git itself stores smaller files.
LARGE_BYTES = 10_000_000
# Every host stores files of this size outside git, whatever its own limit: their blob ids are not needed.
NEVER_IN_GIT_BYTES = 64 << 20
_CHUNK_BYTES = 1 << 20
NO_FILES: Mapping[str, "LocalFile"] = MappingProxyType({})
_LOST_IN_A_CLONE = {"Cc", "Cs", "Zl", "Zp"}  # control, surrogate, line and paragraph separators


@dataclass(frozen=True, kw_only=True)
class LocalFile:
    """A file to publish, with its digests in git and on the Hub.

    Attributes:
        path: the file's path.
        size_bytes: the file's size.
        sha256: digest of the content.
        blob_id: git's id of the content (sha1 over a header and the content); "" for a very large file if the target
            does not need its blob id.
    """

    path: Path
    size_bytes: int
    sha256: str
    blob_id: str


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """A file of a published branch; `sha256` or `blob_id` is "" if the target cannot return it.

    Both are "" for a symbolic link, a submodule or an executable: they equal no file that this program publishes.
    """

    size_bytes: int
    sha256: str = ""
    blob_id: str = ""

    def holds(self, other: "LocalFile | StoredFile") -> bool:
        """Return whether both files have the same content, by the strongest digest that both have."""
        if self.size_bytes != other.size_bytes:
            return False
        return self.sha256 == other.sha256 if self.sha256 and other.sha256 else self.blob_id == other.blob_id


def same_files(one: Mapping[str, StoredFile], other: Mapping[str, StoredFile]) -> bool:
    """Return whether two commits hold the same files."""
    return one.keys() == other.keys() and all(one[name].holds(other[name]) for name in one)


@dataclass(frozen=True, kw_only=True)
class BranchState:
    """A published branch: its head and files.

    Attributes:
        commit: the head, 40 hex digits.
        foreign_author: the head's author, "" if this program made it.
        files: by name, with '/' between folders.
        repository: the branch's repository if each variant has its own repository, else "".
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
        author: the commit's author, "" if this program made it.
        title: the first line of the message.
        message: the whole message with title and trailers, without line ends at its end.
        time_s: the commit's time, in seconds since 1970.
    """

    commit: str
    author: str
    title: str
    message: str
    time_s: int


class HeadMovedError(PublishError):
    """A branch's head is not the planned one: another publisher or a person has made a commit."""


class Target(Protocol):
    """A repository that branches are published to.

    Reads by commit id are immutable and may be cached; `read_branches` is not.
    """

    @property
    def where(self) -> str:
        """The repository's folder or address, for messages."""

    @property
    def is_public(self) -> bool:
        """Whether other people can see a publish at once; then publishing asks for confirmation."""

    @property
    def identifies_by_blob(self) -> bool:
        """Whether large files, too, are identified by their blob ids."""

    def read_branches(self) -> Mapping[str, BranchState]:
        """Return every branch, none before the first publish; write nothing."""

    def read_back(self, commit: str) -> Mapping[str, StoredFile]:
        """Read a commit's files from the repository again, with the strongest digests that it can return."""

    def read_bytes(self, commit: str, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Return a stored file's content, or `size` bytes of it from `start` on; the rest need not be transferred.

        Raises:
            PublishError: the commit has no such file.
        """

    def export(self, commit: str, name: str, path: Path) -> None:
        """Write a stored file's content to `path`, whole or not at all."""

    def history(self, branch: str) -> Sequence[CommitRecord]:
        """Return a branch's commits, newest first, following first parents; none if the branch does not exist."""

    def check(self, changing: Collection[str]) -> None:
        """Raise unless these branches could be written now; write nothing."""

    def exclusive(self) -> AbstractContextManager[Sequence[str]]:
        """Lock out other publishers and repair the traces of a killed one; the value is one note per repair."""

    def commit(self, branch: str, files: Mapping[str, LocalFile], *, parent: str | None, message: str) -> str:
        """Make `files` the whole content of `branch` in one commit on top of `parent`, and return the commit's id.

        Raises:
            HeadMovedError: the branch's head is no longer `parent` (None: the branch must not exist).
            PublishError: the target refused, or a file has changed since it was hashed.
        """

    def restore(
        self, branch: str, commit: str, *, parent: str, message: str, replacing: Mapping[str, LocalFile] = NO_FILES
    ) -> str:
        """Make the files of an earlier `commit` the whole content of `branch` in one new commit on top of `parent`.

        Only `replacing`, small files that replace those of the commit, is uploaded: the repository has the others.

        Raises:
            HeadMovedError: the branch's head is no longer `parent`.
        """

    def remove(self, branch: str, *, head: str) -> str:
        """Remove a branch that was just made and stored wrongly, and return what was done.

        Raises:
            HeadMovedError: the branch's head is not `head`.
            PublishError: the target cannot remove it.
        """

    def read_tag(self, name: str) -> Mapping[str, str]:
        """Return the commit that a tag names, "" if the tag does not exist.

        The keys are branches: `main` alone, or every branch if each has its own repository with its own tags.
        """

    def tag(self, name: str, commits: Mapping[str, str], notes: str) -> None:
        """Tag commits, given by branch as in `read_tag`, with a message; repeating the call is allowed.

        Raises:
            PublishError: the tag names another commit.
        """


def read_local_file(path: Path, *, blob_id: bool = True) -> LocalFile:
    """Hash a file in one pass; without `blob_id`, the blob id of a very large file is left out."""
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
    """Raise PublishError unless a file still has the planned content.

    The file is hashed again only if its size or times have changed.
    """
    if sha256_file(file.path) != file.sha256:
        raise changed_error(file.path)


def changed_error(path: Path) -> PublishError:
    """Return the error for a file that has changed since the plan was made."""
    return PublishError(
        "the file changed while it was being published",
        where=str(path),
        hint="stop the program that writes to the output folder, build the branch again, then publish",
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
