"""Reads of a model repository on the Hub: branches, tags, files, commits and contents, with retries."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from http import HTTPStatus
from pathlib import Path

from pydantic import ValidationError

from packager.errors import PublishError
from packager.publish.targets import BranchState, CommitRecord, StoredFile
from packager.publish.targets.hub_answers import References, read_commits, read_references, read_tree
from packager.publish.targets.hub_calls import RetryPolicy
from packager.publish.targets.hub_client import read_content
from packager.receipt import GIT_ATTRIBUTES, PROVENANCE, UNLISTED_FILES, FileRecord, Provenance
from packager.system.files import atomic_file
from packager.system.parallel import in_parallel

_MAX_RECORD_BYTES = 4 << 20


class HubReader:
    """A repository that is only read.

    Args:
        repository_id: namespace/name.
        retry: runs every request.
    """

    def __init__(self, repository_id: str, retry: RetryPolicy) -> None:
        self._id, self._retry = repository_id, retry

    def references(self) -> References:
        """Return the branches and tags; none if the repository does not exist.

        A 404 without the Hub's code for the cause counts as "does not exist", too: other servers send no code. To make
        a repository is safe in any case: the server refuses to make it twice.
        """
        from huggingface_hub import errors as hub

        def read() -> References:
            try:
                return read_references(self._id)
            except hub.GatedRepoError:
                raise
            except hub.RepositoryNotFoundError:
                return References(branches={}, tags={})
            except hub.HfHubHTTPError as error:
                if error.response.status_code == HTTPStatus.NOT_FOUND:
                    return References(branches={}, tags={})
                raise

        return self._retry.call("listing branches", read)

    def heads(self) -> Mapping[str, str]:
        """Return every branch's head commit."""
        return self.references().branches

    def files(self, commit: str) -> Mapping[str, StoredFile]:
        """Return a commit's files without `.gitattributes`.

        The Hub creates that file and reads from it which files are large; publishing never changes it.
        """
        found = self._retry.call(f"listing the files of {commit[:12]}", lambda: read_tree(self._id, commit))
        return {name: file for name, file in found.items() if name != GIT_ATTRIBUTES}

    def commits(self, revision: str, *, newest: int = 0) -> Sequence[CommitRecord]:
        """Return the commits that lead to a revision, newest first, or only so many of the newest."""
        what = f"listing commits of {revision[:40]}"
        return self._retry.call(what, lambda: read_commits(self._id, revision, newest=newest))

    def history(self, branch: str) -> Sequence[CommitRecord]:
        """Return a branch's commits; the authors are "" where this program made the files."""
        records = self.commits(branch)
        foreign = [record for record in records if record.author] if _without_descriptions(records) else []
        ours = in_parallel(lambda record: self.is_ours(record.commit, self.files(record.commit)), foreign)
        made_here = {record.commit for record, is_ours in zip(foreign, ours, strict=True) if is_ours}
        return [replace(record, author="") if record.commit in made_here else record for record in records]

    def state(self, commit: str) -> BranchState:
        """Return a branch's state by its head."""
        (record,) = self.commits(commit, newest=1)
        files = self.files(commit)
        unclear = record.author and PROVENANCE in files and _without_descriptions(self.commits(commit))
        author = "" if unclear and self.is_ours(commit, files) else record.author
        return BranchState(commit=commit, foreign_author=author, files=files)

    def is_ours(self, commit: str, files: Mapping[str, StoredFile]) -> bool:
        """Return whether a commit has exactly the files that its provenance.json lists.

        Some servers drop the description of a commit, where this program names itself. Where descriptions are kept,
        such a commit is not ours: another writer may have replaced the files and the record together.
        """
        record = files.get(PROVENANCE)
        if record is None or record.size_bytes > _MAX_RECORD_BYTES:
            return False
        try:
            listed = Provenance.model_validate_json(self.content(commit, PROVENANCE, size=record.size_bytes)).files
        except ValidationError:
            return False
        if files.keys() - UNLISTED_FILES != listed.keys() - UNLISTED_FILES:
            return False
        return all(self._holds(commit, name, files[name], entry) for name, entry in listed.items() if name in files)

    def _holds(self, commit: str, name: str, stored: StoredFile, entry: FileRecord) -> bool:
        if stored.size_bytes != entry.size_bytes:
            return False
        if stored.sha256:
            return stored.sha256 == entry.sha256
        return hashlib.sha256(self.content(commit, name, size=stored.size_bytes)).hexdigest() == entry.sha256

    def content(self, commit: str, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Return a file's content, or a part of it by a ranged request."""
        if size == 0:
            return b""  # HTTP has no empty range

        def read() -> bytes:
            parts: list[bytes] = []
            for chunk in read_content(self._id, commit, name, start=start, size=size):
                parts.append(chunk)
                if size is not None and sum(map(len, parts)) > size:
                    break  # a server without ranges sends the whole file
            data = b"".join(parts)
            return data if size is None else data[:size]

        return self._retry.call(f"reading {name}", read)

    def small_file(self, commit: str, name: str, file: StoredFile) -> bytes:
        """Return the content of a file in git.

        Raises:
            PublishError: the server sends other content than it lists.
        """
        data = self.content(commit, name, size=file.size_bytes)
        blob_id = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        if blob_id != file.blob_id:
            raise PublishError(f"{name} of {commit[:12]} is not the file that the server lists", where=self._id)
        return data

    def download(self, commit: str, name: str, path: Path) -> None:
        """Write a file's content to `path`, whole or not at all."""

        def download() -> None:
            with atomic_file(path) as stream:
                for chunk in read_content(self._id, commit, name):
                    stream.write(chunk)

        self._retry.call(f"downloading {name}", download)


def _without_descriptions(records: Sequence[CommitRecord]) -> bool:
    """Return whether no commit of a history has a description: the server drops them, or repeats the title."""
    return all(record.message.removeprefix(record.title).strip() in ("", record.title) for record in records)
