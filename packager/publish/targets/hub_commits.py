"""Commits on the Hub: each moves a branch from a known head, and is checked afterwards.

If the answer to a commit is lost, the branch's files show whether the commit was made. The Hub compares a commit's
parent with the branch's head; other servers do not, so the new commit's parent is compared here.
"""

import hashlib
from collections.abc import Callable, Mapping
from types import MappingProxyType

from packager import __version__
from packager.errors import PublishError
from packager.publish.targets import CommitRecord, HeadMovedError, StoredFile, same_files
from packager.publish.targets.hub_answers import TRAILER
from packager.publish.targets.hub_calls import RetryPolicy
from packager.publish.targets.hub_client import deletion, post_commit, stored_operation
from packager.publish.targets.hub_reader import HubReader
from packager.system.text import printable

_NO_CONTENTS: Mapping[str, bytes] = MappingProxyType({})


class HubCommits:
    """Makes commits in one repository.

    Args:
        repository_id: namespace/name.
        where: the repository's page, for messages.
        reader: reads the repository.
        retry: runs every request.
        log: gets a line about an answer that was lost, and about a server that drops descriptions.
    """

    def __init__(
        self, repository_id: str, where: str, reader: HubReader, retry: RetryPolicy, log: Callable[[str], None]
    ) -> None:
        self._id, self._where, self._reader, self._retry, self._log = repository_id, where, reader, retry, log
        self._drops_descriptions = False

    def make(
        self,
        branch: str,
        send: Callable[[str, str], str],
        wanted: Mapping[str, StoredFile],
        *,
        parent: str,
        message: str,
        put_back: bool = True,
    ) -> str:
        """Make a commit and return its id, also if the commit was made but its answer was lost.

        Args:
            branch: the branch's name.
            send: makes the commit from a title and a description, and returns its id.
            wanted: all files of the branch after the commit.
            parent: the branch's head.
            message: the commit's message.
            put_back: whether to restore the files of a commit that came between.

        Raises:
            HeadMovedError: the branch's head is not `parent`, or another commit came between.
        """
        title, _, body = message.partition("\n")
        description = "\n\n".join(filter(None, [body.strip(), f"{TRAILER} {__version__}"]))
        answered: list[str] = []

        def attempt() -> str:
            try:
                made = send(title, description)
            except Exception:  # the commit may exist in spite of the error: only the branch shows it
                if landed := self._landed(branch, wanted, parent=parent):
                    return landed
                raise
            answered.append(made)
            return made

        made = self._retry.call(f"committing {branch}", attempt)
        if answered:
            self._check_place(branch, made, parent=parent, put_back=put_back)
        return made

    def restore(
        self,
        branch: str,
        commit: str,
        *,
        parent: str,
        message: str,
        put_back: bool = True,
        replacing: Mapping[str, bytes] = _NO_CONTENTS,
    ) -> str:
        """Make one commit with the files of an earlier one, small ones replaced; the repository has the large files."""
        new = {name: _small(content) for name, content in replacing.items()}
        wanted, stored = {**self._reader.files(commit), **new}, self._reader.files(parent)
        lacking = {name: file for name, file in wanted.items() if stored.get(name) != file}
        contents = {
            name: replacing[name] if name in new else self._reader.small_file(commit, name, file)
            for name, file in lacking.items()
            if not file.sha256
        }
        operations = [stored_operation(name, file, contents.get(name, b"")) for name, file in lacking.items()]
        operations += [deletion(name) for name in sorted(stored.keys() - wanted.keys())]
        if not operations:
            return parent

        def send(title: str, description: str) -> str:
            return post_commit(self._id, branch, operations, title=title, description=description, parent=parent)

        return self.make(branch, send, wanted, parent=parent, message=message, put_back=put_back)

    def empty(self, branch: str, *, parent: str, message: str) -> str:
        """Make one commit that removes every file but .gitattributes; return the head if there are none."""
        names = sorted(self._reader.files(parent))
        if not names:
            return parent
        operations = [deletion(name) for name in names]

        def send(title: str, description: str) -> str:
            return post_commit(self._id, branch, operations, title=title, description=description, parent=parent)

        return self.make(branch, send, {}, parent=parent, message=message)

    def _landed(self, branch: str, wanted: Mapping[str, StoredFile], *, parent: str) -> str:
        """Return the branch's head if it holds the `wanted` files, "" if the head has not moved.

        Raises:
            HeadMovedError: the branch holds other files.
        """
        head = self._reader.heads().get(branch, "")
        if head in (parent, ""):
            return ""
        if not same_files(self._reader.files(head), wanted):
            raise HeadMovedError(f"{branch} moved", where=self._where)
        self._log(f"{branch}: the Hub's answer was lost, but the commit was made")
        return head

    def _check_place(self, branch: str, made: str, *, parent: str, put_back: bool) -> None:
        """Compare a new commit's parent with the one asked for."""
        if made == parent:
            raise PublishError(
                f"{branch}: the server made no commit",
                where=self._where,
                why="it takes the changed files for ones that it has: some servers skip a file that is equal on "
                "another branch",
                hint="the branch was not changed; publish to the Hub, or to a git remote (repository.url)",
            )
        commit, *earlier = self._reader.commits(made, newest=2)
        if TRAILER not in commit.message and not self._drops_descriptions:
            self._drops_descriptions = True
            self._log(
                f"{self._where}: the server drops the descriptions of commits: packager knows its commits by "
                "provenance.json, and a second rollback has to name its commit with --to"
            )
        if [record.commit for record in earlier] != [parent]:
            raise self._came_between(branch, made, earlier[0] if earlier else None, put_back=put_back)

    def _came_between(self, branch: str, made: str, between: CommitRecord | None, *, put_back: bool) -> HeadMovedError:
        """Restore the files of a commit that came between, and return the error."""
        why = "this server does not compare the parent of a commit"
        if between is None:
            why = f"{made[:12]} has no parent: {why}"
        else:
            author = printable(between.author) if between.author else "packager"
            why = f"{between.commit[:12]} by {author} came between, and {why}"
        if between is not None and put_back:
            trailers = f"Rollback-of: {made}\nRollback-to: {between.commit}"
            message = f"{branch}: back to {between.commit[:12]}, which came between\n\n{trailers}"
            try:
                head = self.restore(branch, between.commit, parent=made, message=message, put_back=False)
                why += f"; the branch has the files of {between.commit[:12]} again, in {head[:12]}"
            except PublishError as error:
                why += f"; putting back the files of {between.commit[:12]} failed: {error.what}"
        return HeadMovedError(f"{branch} moved", where=self._where, why=why)


def _small(content: bytes) -> StoredFile:
    """Return a small file as the Hub lists it."""
    blob_id = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    return StoredFile(size_bytes=len(content), blob_id=blob_id)
