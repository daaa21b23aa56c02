"""The Hub as a target: one atomic commit per branch, and no file uploaded twice.

Large files are uploaded first. Then one commit on top of the planned head names all files: a branch changes as a whole
or not at all, and no other commit is overwritten. huggingface_hub is imported when first needed.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from packager.errors import PublishError, without_secrets
from packager.publish.targets import (
    NO_FILES,
    BranchState,
    CommitRecord,
    HeadMovedError,
    LocalFile,
    StoredFile,
    require_unchanged,
)
from packager.publish.targets.hub_answers import commit_id
from packager.publish.targets.hub_calls import RETRY_LIMIT_S, RetryPolicy
from packager.publish.targets.hub_client import hub_api
from packager.publish.targets.hub_commits import HubCommits
from packager.publish.targets.hub_reader import HubReader
from packager.system.parallel import in_parallel
from packager.system.text import format_bytes
from packager.variant import MAIN

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi


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
        return without_secrets(f"{self._api.endpoint}/{self._id}")

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

    @cached_property
    def _reader(self) -> HubReader:
        return HubReader(self._id, self._retry)

    @cached_property
    def _commits(self) -> HubCommits:
        return HubCommits(self._id, self.where, self._reader, self._retry, self._log)

    def read_branches(self) -> Mapping[str, BranchState]:
        """Return every branch; a branch with only .gitattributes has no files."""
        heads = self._heads()
        return dict(zip(heads, in_parallel(self._reader.state, heads.values()), strict=True))

    def read_back(self, commit: str) -> Mapping[str, StoredFile]:
        """Return a commit's files as the Hub lists them: sha256 and size of large files, blob ids of small ones."""
        return self._reader.files(commit)

    def read_bytes(self, commit: str, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        """Return a file's content, or a part of it by a ranged request."""
        return self._reader.content(commit, name, start=start, size=size)

    def export(self, commit: str, name: str, path: Path) -> None:
        """Download a file."""
        self._reader.download(commit, name, path)

    def history(self, branch: str) -> Sequence[CommitRecord]:
        """Return a branch's commits."""
        return self._reader.history(branch) if branch in self._heads() else ()

    def check(self, changing: Collection[str]) -> None:
        """Raise unless the token may write.

        Raises:
            PublishError: there is no token, the Hub does not know it, or it is for reading only.
        """
        if not changing:
            return
        account = self._retry.call("reading the token's account", self._whoami)
        if _role(account) == "read":
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

        def send(title: str, description: str) -> str:
            made = self._api.create_commit(
                self._id,
                [*additions, *stale],
                commit_message=title,
                commit_description=description,
                revision=branch,
                parent_commit=head,
            )
            return commit_id(made.oid)

        wanted = {name: _stored(file) for name, file in files.items()}
        return self._commits.make(branch, send, wanted, parent=head, message=message)

    def restore(
        self, branch: str, commit: str, *, parent: str, message: str, replacing: Mapping[str, LocalFile] = NO_FILES
    ) -> str:
        """Make one commit with the files of an earlier one."""
        contents = {name: file.path.read_bytes() for name, file in replacing.items()}
        return self._commits.restore(branch, commit, parent=parent, message=message, replacing=contents)

    def remove(self, branch: str, *, head: str) -> str:
        """Delete a branch; the files of main are removed instead: a repository keeps its main."""
        if self._heads().get(branch) != head:
            raise HeadMovedError(f"{branch} moved", where=self.where)
        if branch == MAIN:
            made = self._commits.empty(branch, parent=head, message=f"{branch}: its files were stored wrongly")
            return f"its files were removed again, in {made[:12]}"
        self._retry.call(f"deleting {branch}", lambda: self._api.delete_branch(self._id, branch=branch))
        return "the new branch was deleted again"

    def read_tag(self, name: str) -> Mapping[str, str]:
        """Return the commit that a tag names."""
        return {MAIN: self._reader.references().tags.get(name, "")}

    def tag(self, name: str, commits: Mapping[str, str], notes: str) -> None:
        """Make a tag on the Hub."""
        found, commit = self.read_tag(name)[MAIN], commits[MAIN]
        if found and found != commit:
            raise PublishError(f"the tag {name} exists and names {found[:12]}", where=self.where)
        if not found:

            def make() -> None:
                self._api.create_tag(self._id, tag=name, revision=commit, tag_message=notes, exist_ok=True)

            self._retry.call(f"tagging {name}", make)

    def _whoami(self) -> Mapping[str, Any]:
        """Return the account of the token; nothing if the token may not read it, which does not prevent writing."""
        from huggingface_hub.errors import HfHubHTTPError

        try:
            return self._api.whoami(cache=True)
        except HfHubHTTPError as error:
            if error.response.status_code == HTTPStatus.FORBIDDEN:
                return {}
            raise

    def _heads(self) -> Mapping[str, str]:
        return self._reader.heads()

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
            first = self._reader.commits(MAIN)[-1].commit
            make = self._api.create_branch
            self._retry.call(
                f"making the branch {branch}", lambda: make(self._id, branch=branch, revision=first, exist_ok=True)
            )
            if self._heads().get(branch) != first:
                raise HeadMovedError(f"{branch} exists now", where=self.where)
            # The first commit has files if the history was squashed or began with a push.
            return self._commits.empty(branch, parent=first, message=f"{branch}: begins empty")
        if self.read_back(heads[branch]):
            raise HeadMovedError(f"{branch} exists now", where=self.where)
        return heads[branch]

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


def _stored(file: LocalFile) -> StoredFile:
    return StoredFile(size_bytes=file.size_bytes, sha256=file.sha256, blob_id=file.blob_id)


def _addition(name: str, file: LocalFile) -> "CommitOperationAdd":
    """Return the operation that adds a file, with the known digest: the client need not hash the file."""
    from huggingface_hub import CommitOperationAdd

    require_unchanged(file)
    operation = CommitOperationAdd(path_in_repo=name, path_or_fileobj=file.path)
    operation.upload_info.sha256 = bytes.fromhex(file.sha256)
    return operation


def _role(account: Mapping[str, Any]) -> str:
    """Return what a token may do, "" if the answer does not name it: the server decides."""
    value: object = account
    for key in ("auth", "accessToken", "role"):
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, str) else ""
