"""The Hub as a target: one atomic commit per branch, and nothing sent twice.

The bytes of large files go first; then one commit names them all, on top of the head that the plan was made from, so
that a branch changes as a whole or not at all and nobody else's work is overwritten. A commit whose answer was lost is
found by what the branch holds then. huggingface_hub is imported when first needed.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packager import __version__
from packager.errors import PublishError
from packager.publish.targets import (
    BranchState,
    CommitRecord,
    HeadMovedError,
    LocalFile,
    StoredFile,
    require_unchanged,
    same_files,
)
from packager.publish.targets.hub_calls import RETRY_LIMIT_S, RetryPolicy
from packager.publish.targets.hub_client import hub_api, newest_commit, read_content
from packager.receipt import GIT_ATTRIBUTES
from packager.system.files import atomic_file
from packager.system.parallel import in_parallel
from packager.system.text import format_bytes
from packager.variant import MAIN

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete, HfApi
    from huggingface_hub.hf_api import GitCommitInfo

    Operation = CommitOperationAdd | CommitOperationCopy | CommitOperationDelete

# Which files are large is the repository's own business: a new one has this file, and it stays as it is.
# The last line of our commits' messages: the Hub says whose token it was, not which program's.
_TRAILER = "Published-by: gptq-packager"


@dataclass(frozen=True, kw_only=True)
class NewRepository:
    """How a repository is made, if there is none.

    Attributes:
        visibility: who may see it.
        gated: whether readers must ask for access; "auto" grants it at once.
    """

    visibility: Literal["public", "private"] = "public"
    gated: Literal["auto", "manual"] | None = None


class HubTarget:
    """A model repository on the Hub.

    The token is the client's: HF_TOKEN, the login of `hf auth login`, or GitHub's identity of a CI job.

    Args:
        repository_id: namespace/name.
        new: how to make the repository if there is none.
        log: gets a line when something has to be waited for.
        retry_limit_s: seconds that one call may be waited for.
    """

    def __init__(
        self,
        repository_id: str,
        *,
        new: NewRepository | None = None,
        log: Callable[[str], None] = lambda _: None,
        retry_limit_s: float = RETRY_LIMIT_S,
    ) -> None:
        self._id, self._new, self._log = repository_id, new or NewRepository(), log
        self._retry_limit_s = retry_limit_s
        self._gated = False

    @property
    def where(self) -> str:
        """The repository's page."""
        return f"{self._api.endpoint}/{self._id}"

    @property
    def is_public(self) -> bool:
        """Yes: a private repository, too, is read by others than this machine."""
        return True

    @property
    def identifies_by_blob(self) -> bool:
        """No: the Hub knows large files by their sha256."""
        return False

    @cached_property
    def _api(self) -> "HfApi":
        return hub_api()

    @cached_property
    def _retry(self) -> RetryPolicy:
        return RetryPolicy(self.where, self._log, limit_s=self._retry_limit_s)

    def read_branches(self) -> Mapping[str, BranchState]:
        """Return every branch; one that holds nothing but .gitattributes has no files."""
        heads = self._heads()
        return dict(zip(heads, in_parallel(self._state, heads.values()), strict=True))

    def read_back(self, commit: str) -> Mapping[str, StoredFile]:
        """Return a commit's files as the Hub lists them: sha256 and size of large ones, blob ids of the rest."""
        from huggingface_hub.hf_api import RepoFile

        entries = self._retry.call(
            f"listing the files of {commit[:12]}",
            lambda: list(self._api.list_repo_tree(self._id, recursive=True, revision=commit)),
        )
        return {
            entry.path: StoredFile(size_bytes=entry.lfs.size, sha256=entry.lfs.sha256)
            if entry.lfs
            else StoredFile(size_bytes=entry.size, blob_id=entry.blob_id)
            for entry in entries
            if isinstance(entry, RepoFile) and entry.path != GIT_ATTRIBUTES
        }

    def read_bytes(self, commit: str, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Return a file's content, or the part of it that is asked for by a ranged request."""
        with_range = start > 0 or size is not None
        end = "" if size is None else str(start + size - 1)
        headers = {"Range": f"bytes={start}-{end}"} if with_range else {}

        def read() -> bytes:
            parts: list[bytes] = []
            for chunk in read_content(self._id, commit, name, headers):
                parts.append(chunk)
                if size is not None and sum(map(len, parts)) > size:
                    break  # a server that does not know ranges would send the whole file
            data = b"".join(parts)
            return data if size is None else data[:size]

        return self._retry.call(f"reading {name}", read)

    def export(self, commit: str, name: str, path: Path) -> None:
        """Download a file."""

        def download() -> None:
            with atomic_file(path) as stream:
                for chunk in read_content(self._id, commit, name, {}):
                    stream.write(chunk)

        self._retry.call(f"downloading {name}", download)

    def history(self, branch: str) -> Sequence[CommitRecord]:
        """Return a branch's commits."""
        if branch not in self._heads():
            return ()
        return [
            CommitRecord(
                commit=entry.commit_id,
                author=_author(entry.message, entry.authors),
                title=entry.title,
                message=f"{entry.title}\n\n{entry.message}".strip(),
                time_s=int(entry.created_at.timestamp()),
            )
            for entry in self._commits(branch)
        ]

    def check(self, changing: Collection[str]) -> None:
        """Raise unless there is a token that may write.

        Raises:
            PublishError: there is none, the Hub does not know it, or it is for reading only.
        """
        if not changing:
            return
        account = self._retry.call("asking whose token this is", self._whoami)
        role = account.get("auth", {}).get("accessToken", {}).get("role", "")
        if role == "read":
            raise PublishError(
                "the token is for reading only",
                where=self.where,
                hint="make one that may write at https://huggingface.co/settings/tokens and set HF_TOKEN to it",
            )

    @contextmanager
    def exclusive(self) -> Iterator[Sequence[str]]:
        """Nothing is locked: each commit names the head that it is made on, and fails if that has moved."""
        yield ()

    def commit(self, branch: str, files: Mapping[str, LocalFile], *, parent: str | None, message: str) -> str:
        """Upload what the repository lacks, then make one commit that also removes what is not in `files`."""
        from huggingface_hub import CommitOperationDelete

        head = parent or self._new_branch(branch)
        self._gate()
        stored = self.read_back(head)
        lacking = {name: file for name, file in files.items() if name not in stored or not stored[name].holds(file)}
        additions = [_addition(name, file) for name, file in lacking.items()]
        if additions:
            size = format_bytes(sum(addition.upload_info.size for addition in additions))
            self._log(f"{self._id} {branch}: sending what the Hub lacks of {size}")
            self._retry.call(
                f"uploading the files of {branch}",
                lambda: self._api.preupload_lfs_files(self._id, additions, revision=branch, free_memory=False),
            )
            for file in lacking.values():  # or it would be published under the digest of what was there before
                require_unchanged(file)
        stale = [CommitOperationDelete(name, is_folder=False) for name in sorted(stored.keys() - files.keys())]
        wanted = {name: _stored(file) for name, file in files.items()}
        return self._advance(branch, [*additions, *stale], wanted, parent=head, message=message)

    def restore(self, branch: str, commit: str, *, parent: str, message: str) -> str:
        """Make one commit with the files of an earlier one; the Hub copies the large ones by itself."""
        from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

        wanted, stored = self.read_back(commit), self.read_back(parent)
        copies = [
            CommitOperationCopy(src_path_in_repo=name, path_in_repo=name, src_revision=commit)
            if file.sha256
            else CommitOperationAdd(path_in_repo=name, path_or_fileobj=self.read_bytes(commit, name))
            for name, file in wanted.items()
            if stored.get(name) != file
        ]
        stale = [CommitOperationDelete(name, is_folder=False) for name in sorted(stored.keys() - wanted.keys())]
        return self._advance(branch, [*copies, *stale], wanted, parent=parent, message=message)

    def read_tag(self, name: str) -> Mapping[str, str]:
        """Return the commit that a tag names."""
        refs = self._retry.call("listing tags", lambda: self._api.list_repo_refs(self._id)) if self._heads() else None
        return {MAIN: next((ref.target_commit for ref in refs.tags if ref.name == name), "") if refs else ""}

    def tag(self, name: str, commits: Mapping[str, str]) -> None:
        """Make a tag on the Hub."""
        found, commit = self.read_tag(name)[MAIN], commits[MAIN]
        if found and found != commit:
            raise PublishError(f"the tag {name} exists and names {found[:12]}", where=self.where)
        if not found:
            make = self._api.create_tag
            self._retry.call(f"tagging {name}", lambda: make(self._id, tag=name, revision=commit, exist_ok=True))

    def _whoami(self) -> Mapping[str, Any]:
        """Return what the Hub says of the token; nothing if it may be used without being allowed to ask that."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return self._api.whoami(cache=True)
        except HfHubHTTPError as error:
            if error.response.status_code == HTTPStatus.FORBIDDEN:
                return {}
            raise

    def _heads(self) -> dict[str, str]:
        """Return every branch's head commit; none if there is no repository."""
        from huggingface_hub import errors as hub

        def read() -> dict[str, str]:
            try:
                refs = self._api.list_repo_refs(self._id)
            except hub.GatedRepoError:
                raise
            except hub.RepositoryNotFoundError:
                return {}
            return {ref.name: ref.target_commit for ref in refs.branches}

        return self._retry.call("listing branches", read)

    def _state(self, commit: str) -> BranchState:
        entry = self._retry.call(f"asking who made {commit[:12]}", lambda: newest_commit(self._id, commit))
        author = _author(entry["message"], [author["user"] for author in entry["authors"]])
        return BranchState(commit=commit, foreign_author=author, files=self.read_back(commit))

    def _commits(self, revision: str) -> "Sequence[GitCommitInfo]":
        read = self._api.list_repo_commits
        return self._retry.call(f"listing commits of {revision[:40]}", lambda: read(self._id, revision=revision))

    def _new_branch(self, branch: str) -> str:
        """Make a branch, and the repository if there is none; return its head, which holds no file of anybody's.

        Raises:
            HeadMovedError: somebody else has put files there.
        """
        heads = self._heads()
        if not heads:
            self._new_repository()
            heads = self._heads()
        if branch not in heads:
            # Without a starting point the Hub copies main, weights and all.
            first = self._commits(MAIN)[-1].commit_id
            make = self._api.create_branch
            self._retry.call(
                f"making the branch {branch}", lambda: make(self._id, branch=branch, revision=first, exist_ok=True)
            )
            if self._heads().get(branch) != first:
                raise HeadMovedError(f"{branch} is there now", where=self.where)
            return self._emptied(branch, first)
        if self.read_back(heads[branch]):
            raise HeadMovedError(f"{branch} is there now", where=self.where)
        return heads[branch]

    def _emptied(self, branch: str, first: str) -> str:
        """Return the head of a branch that was just made at the first commit, without the files of that one.

        A first commit has files if the history was squashed, or began with a push.
        """
        from huggingface_hub import CommitOperationDelete

        files = self.read_back(first)
        if not files:
            return first
        deletions = [CommitOperationDelete(name, is_folder=False) for name in sorted(files)]
        return self._advance(branch, deletions, {}, parent=first, message=f"{branch}: begins empty")

    def _new_repository(self) -> None:
        private = self._new.visibility == "private"
        self._retry.call(
            "making the repository", lambda: self._api.create_repo(self._id, private=private, exist_ok=True)
        )

    def _gate(self) -> None:
        """Gate a repository that is being made; a killed run may have made it and not come to this."""
        gated = self._new.gated
        if gated is not None and not self._gated and not self.read_back(self._heads()[MAIN]):
            self._retry.call("gating the repository", lambda: self._api.update_repo_settings(self._id, gated=gated))
        self._gated = True

    def _advance(
        self,
        branch: str,
        operations: "Sequence[Operation]",
        wanted: Mapping[str, StoredFile],
        *,
        parent: str,
        message: str,
    ) -> str:
        """Make the commit; one that landed although nothing or an error was heard of it counts."""
        title, _, body = message.partition("\n")
        description = "\n\n".join(filter(None, [body.strip(), f"{_TRAILER} {__version__}"]))

        def attempt() -> str:
            try:
                made = self._api.create_commit(
                    self._id,
                    operations,
                    commit_message=title,
                    commit_description=description,
                    revision=branch,
                    parent_commit=parent,
                )
            except Exception:  # whatever was heard, or not, only the branch knows; what has not landed is raised again
                if landed := self._landed(branch, wanted, parent=parent):
                    return landed
                raise
            return str(made.oid)

        return self._retry.call(f"committing {branch}", attempt)

    def _landed(self, branch: str, wanted: Mapping[str, StoredFile], *, parent: str) -> str:
        """Return the branch's head if it holds what was to be committed, "" if it has not moved.

        Raises:
            HeadMovedError: it holds something else.
        """
        head = self._heads().get(branch, "")
        if head in (parent, ""):
            return ""
        if not same_files(self.read_back(head), wanted):
            raise HeadMovedError(f"{branch} moved", where=self.where)
        self._log(f"{branch}: the answer was lost, the commit had landed")
        return head


def _stored(file: LocalFile) -> StoredFile:
    return StoredFile(size_bytes=file.size_bytes, sha256=file.sha256, blob_id=file.blob_id)


def _addition(name: str, file: LocalFile) -> "CommitOperationAdd":
    """Return the operation that adds a file, whose digest is known: the client need not read it for that."""
    from huggingface_hub import CommitOperationAdd

    require_unchanged(file)
    operation = CommitOperationAdd(path_in_repo=name, path_or_fileobj=file.path)
    operation.upload_info.sha256 = bytes.fromhex(file.sha256)
    return operation


def _author(message: str, authors: Sequence[str]) -> str:
    """Return who made a commit, "" when it was this program."""
    return "" if _TRAILER in message else ", ".join(authors) or "somebody"
