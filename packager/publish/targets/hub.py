"""The Hub as a target: one atomic commit per branch, and no file uploaded twice.

Large files are uploaded first. Then one commit on top of the planned head names all files: a branch changes as a whole
or not at all, and no other commit is overwritten. If the answer to a commit is lost, the branch's files show whether
the commit was made. huggingface_hub is imported when first needed.
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

# The last line of this program's commit messages: the Hub names the token's account, not the program.
_TRAILER = "Published-by: gptq-packager"


@dataclass(frozen=True, kw_only=True)
class NewRepository:
    """The settings of a repository that does not exist yet.

    Attributes:
        visibility: whether everyone may see it.
        gated: whether readers must ask for access; "auto" grants it at once.
    """

    visibility: Literal["public", "private"] = "public"
    gated: Literal["auto", "manual"] | None = None


class HubTarget:
    """A model repository on the Hub.

    The client finds the token: HF_TOKEN, the login of `hf auth login`, or a CI job's identity on GitHub.

    Args:
        repository_id: namespace/name.
        new: settings of the repository if it does not exist.
        log: gets a line per wait.
        retry_limit_s: total seconds of waiting per call.
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
        """Yes: other people may read a private repository, too."""
        return True

    @property
    def identifies_by_blob(self) -> bool:
        """No: the Hub identifies large files by sha256."""
        return False

    @cached_property
    def _api(self) -> "HfApi":
        return hub_api()

    @cached_property
    def _retry(self) -> RetryPolicy:
        return RetryPolicy(self.where, self._log, limit_s=self._retry_limit_s)

    def read_branches(self) -> Mapping[str, BranchState]:
        """Return every branch; a branch with only .gitattributes has no files."""
        heads = self._heads()
        return dict(zip(heads, in_parallel(self._state, heads.values()), strict=True))

    def read_back(self, commit: str) -> Mapping[str, StoredFile]:
        """Return a commit's files as the Hub lists them: sha256 and size of large files, blob ids of small ones.

        `.gitattributes` is left out: the Hub creates it and reads from it which files are large; it never changes.
        """
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
        """Return a file's content, or a part of it by a ranged request."""
        with_range = start > 0 or size is not None
        end = "" if size is None else str(start + size - 1)
        headers = {"Range": f"bytes={start}-{end}"} if with_range else {}

        def read() -> bytes:
            parts: list[bytes] = []
            for chunk in read_content(self._id, commit, name, headers):
                parts.append(chunk)
                if size is not None and sum(map(len, parts)) > size:
                    break  # a server without ranges sends the whole file
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
        """Raise unless the token may write.

        Raises:
            PublishError: there is no token, the Hub does not know it, or it is for reading only.
        """
        if not changing:
            return
        account = self._retry.call("reading the token's account", self._whoami)
        role = account.get("auth", {}).get("accessToken", {}).get("role", "")
        if role == "read":
            raise PublishError(
                "the token is for reading only",
                where=self.where,
                hint="make a token that may write at https://huggingface.co/settings/tokens and set HF_TOKEN to it",
            )

    @contextmanager
    def exclusive(self) -> Iterator[Sequence[str]]:
        """Lock nothing: each commit names its parent, and fails if the branch's head has moved."""
        yield ()

    def commit(self, branch: str, files: Mapping[str, LocalFile], *, parent: str | None, message: str) -> str:
        """Upload the files that the repository lacks, then make one commit that also removes all other files."""
        from huggingface_hub import CommitOperationDelete

        head = parent or self._new_branch(branch)
        self._gate()
        stored = self.read_back(head)
        lacking = {name: file for name, file in files.items() if name not in stored or not stored[name].holds(file)}
        additions = [_addition(name, file) for name, file in lacking.items()]
        if additions:
            size = format_bytes(sum(addition.upload_info.size for addition in additions))
            self._log(f"{self._id} {branch}: uploading the files of {size} that the Hub lacks")
            self._retry.call(
                f"uploading the files of {branch}",
                lambda: self._api.preupload_lfs_files(self._id, additions, revision=branch, free_memory=False),
            )
            for file in lacking.values():  # else it would be published under its old digest
                require_unchanged(file)
        stale = [CommitOperationDelete(name, is_folder=False) for name in sorted(stored.keys() - files.keys())]
        wanted = {name: _stored(file) for name, file in files.items()}
        return self._advance(branch, [*additions, *stale], wanted, parent=head, message=message)

    def restore(self, branch: str, commit: str, *, parent: str, message: str) -> str:
        """Make one commit with the files of an earlier one; the Hub copies large files itself."""
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
        """Return the account of the token; nothing if the token may not read it, which does not prevent writing."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return self._api.whoami(cache=True)
        except HfHubHTTPError as error:
            if error.response.status_code == HTTPStatus.FORBIDDEN:
                return {}
            raise

    def _heads(self) -> dict[str, str]:
        """Return every branch's head commit; none if the repository does not exist."""
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
        entry = self._retry.call(f"reading the author of {commit[:12]}", lambda: newest_commit(self._id, commit))
        author = _author(entry["message"], [author["user"] for author in entry["authors"]])
        return BranchState(commit=commit, foreign_author=author, files=self.read_back(commit))

    def _commits(self, revision: str) -> "Sequence[GitCommitInfo]":
        read = self._api.list_repo_commits
        return self._retry.call(f"listing commits of {revision[:40]}", lambda: read(self._id, revision=revision))

    def _new_branch(self, branch: str) -> str:
        """Make an empty branch, and the repository if it does not exist; return the branch's head.

        Raises:
            HeadMovedError: another publisher has made the branch and put files there.
        """
        heads = self._heads()
        if not heads:
            self._new_repository()
            heads = self._heads()
        if branch not in heads:
            # Without `revision` the Hub would copy main with its weights.
            first = self._commits(MAIN)[-1].commit_id
            make = self._api.create_branch
            self._retry.call(
                f"making the branch {branch}", lambda: make(self._id, branch=branch, revision=first, exist_ok=True)
            )
            if self._heads().get(branch) != first:
                raise HeadMovedError(f"{branch} exists now", where=self.where)
            return self._emptied(branch, first)
        if self.read_back(heads[branch]):
            raise HeadMovedError(f"{branch} exists now", where=self.where)
        return heads[branch]

    def _emptied(self, branch: str, first: str) -> str:
        """Remove the files of a branch that was just made at the repository's first commit; return the new head.

        The first commit has files if the history was squashed or began with a push.
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
        """Gate a repository without published files: a new one, or one that a killed publish made."""
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
        """Make the commit and return its id, also if the commit was made but its answer was lost."""
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
            except Exception:  # the commit may exist in spite of the error: only the branch shows it
                if landed := self._landed(branch, wanted, parent=parent):
                    return landed
                raise
            return str(made.oid)

        return self._retry.call(f"committing {branch}", attempt)

    def _landed(self, branch: str, wanted: Mapping[str, StoredFile], *, parent: str) -> str:
        """Return the branch's head if it holds the `wanted` files, "" if the head has not moved.

        Raises:
            HeadMovedError: the branch holds other files.
        """
        head = self._heads().get(branch, "")
        if head in (parent, ""):
            return ""
        if not same_files(self.read_back(head), wanted):
            raise HeadMovedError(f"{branch} moved", where=self.where)
        self._log(f"{branch}: the Hub's answer was lost, but the commit was made")
        return head


def _stored(file: LocalFile) -> StoredFile:
    return StoredFile(size_bytes=file.size_bytes, sha256=file.sha256, blob_id=file.blob_id)


def _addition(name: str, file: LocalFile) -> "CommitOperationAdd":
    """Return the operation that adds a file, with the known digest: the client need not hash the file."""
    from huggingface_hub import CommitOperationAdd

    require_unchanged(file)
    operation = CommitOperationAdd(path_in_repo=name, path_or_fileobj=file.path)
    operation.upload_info.sha256 = bytes.fromhex(file.sha256)
    return operation


def _author(message: str, authors: Sequence[str]) -> str:
    """Return a commit's author, "" if this program made it."""
    return "" if _TRAILER in message else ", ".join(authors) or "an unknown author"
