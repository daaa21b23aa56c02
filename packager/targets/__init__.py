"""Where branches are published: one small port, and the values that cross it.

A target holds branches; a branch holds exactly the files of its head commit. `publish.py` decides what to do from
`read_branches` alone, so a target never compares anything. What identifies a stored file is whatever the target can
answer without reading its content: git knows blob ids, the Hub the sha256 of large files and blob ids of the rest.
"""

import hashlib
import unicodedata
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from packager.files import TEMPORARY_PREFIX
from packager.receipt import FileRecord

_CHUNK_BYTES = 1 << 20
_LOST_IN_A_CLONE = {"Cc", "Cs", "Zl", "Zp"}  # control, surrogate, line and paragraph separators


@dataclass(frozen=True, kw_only=True)
class LocalFile:
    """A file to publish, with both names git and the Hub know its content by.

    Attributes:
        path: where it lies.
        size_bytes: its length.
        sha256: digest of the content.
        blob_id: git's id of the content (sha1 over a header and the content).
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

    def holds(self, file: LocalFile) -> bool:
        """Return whether the stored content is `file`'s content, by the strongest digest the target knows."""
        if self.size_bytes != file.size_bytes:
            return False
        return self.sha256 == file.sha256 if self.sha256 else self.blob_id == file.blob_id


@dataclass(frozen=True, kw_only=True)
class BranchState:
    """A published branch: its head and the files there.

    Attributes:
        commit: the head, 40 hex digits.
        foreign_author: who made the head, "" when it was this program.
        files: by name, with '/' between folders.
    """

    commit: str
    foreign_author: str
    files: Mapping[str, StoredFile]


class Target(Protocol):
    """A repository that branches are published to."""

    @property
    def where(self) -> str:
        """The repository as people know it: a folder or an address."""

    def read_branches(self) -> Mapping[str, BranchState]:
        """Return every branch that is there; nothing is written, and none is there before the first publish."""

    def check(self, changing: Collection[str]) -> None:
        """Raise unless the branches named could be written now; nothing is written."""

    def exclusive(self) -> AbstractContextManager[Sequence[str]]:
        """Keep other publishers out and put right what a killed one left, which the value describes in sentences."""

    def commit(self, branch: str, files: Mapping[str, LocalFile], *, parent: str | None, message: str) -> str:
        """Make `files` the whole content of `branch` in one commit on top of `parent`, and return its id.

        Raises:
            PublishError: the branch's head is no longer `parent` (None: it was not there).
        """

    def read_records(self, commit: str) -> Mapping[str, FileRecord]:
        """Return size and sha256 of a commit's files, computed from what the repository stores."""


def read_local_file(path: Path) -> LocalFile:
    """Return `path` with its digests, computed in one pass."""
    size_bytes = path.stat().st_size
    sha256 = hashlib.sha256()
    blob = hashlib.sha1(b"blob %d\0" % size_bytes, usedforsecurity=False)
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            sha256.update(chunk)
            blob.update(chunk)
    return LocalFile(path=path, size_bytes=size_bytes, sha256=sha256.hexdigest(), blob_id=blob.hexdigest())


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
