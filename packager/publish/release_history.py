"""The release statements of main's commits: which release is the latest, and what lies unsigned beside signed files.

A number is never used twice, and the next statement names the latest one, also if main's head has none or an older one:
somebody committed without a key, or a rollback brought the files of an earlier release back.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

from packager.errors import PublishError
from packager.publish.signing_keys import TrustedKeys
from packager.publish.statements import (
    MAX_ENVELOPE_BYTES,
    ReleaseStatement,
    StatementError,
    digest,
    read_branch_statement,
    read_envelope,
    read_release_statement,
)
from packager.publish.targets import BranchState, CommitRecord, StoredFile, Target
from packager.receipt import ATTESTATION, GIT_ATTRIBUTES, RELEASE_ATTESTATION, STATEMENTS
from packager.system.text import printable
from packager.variant import MAIN

_ROLLBACK = re.compile(r"(?m)^Rollback-of: [0-9a-f]{40}$")
# Commits of main that are read, newest first: each is a request to the Hub, and a history may have any length.
_SEARCHED, _SEARCHED_WITHOUT_KEY = 500, 50
States = Mapping[str, BranchState]


@dataclass(frozen=True, kw_only=True)
class StoredRelease:
    """A release statement of a repository: its bytes, the id of the accepted key that signed it, and its content."""

    payload: bytes
    keyid: str
    content: ReleaseStatement


@dataclass(frozen=True, kw_only=True)
class ReleaseHistory:
    """The releases that main's commits name, as far as the next release depends on them.

    Attributes:
        present: the release of main's head, None if the head has no release statement.
        newest: the release of the newest commit that has one, None if no commit has one.
        latest: the release with the highest number, which a rollback may have replaced.
        unsigned: the commits after that of `newest`, newest first: they hold files, and no key signed them.
        unread: how many older commits were not read, and no signed one had been found.
    """

    present: StoredRelease | None = None
    newest: StoredRelease | None = None
    latest: StoredRelease | None = None
    unsigned: tuple[CommitRecord, ...] = ()
    unread: int = 0


def read_release_history(
    target: Target, states: States, accepted: TrustedKeys, repository: str = "", *, head_may_be_any: bool = False
) -> ReleaseHistory:
    """Return the releases of main, from its head back to the newest commit that this program signed as a new release.

    A statement that is not accepted counts as none, so that no commit stops the releases after it; but a change of keys
    must be said.

    Args:
        target: the repository.
        states: its branches.
        accepted: the keys that may have signed.
        repository: the id that the statements must have, "" for any.
        head_may_be_any: whether that holds for the head's statement, too: a rollback replaces it.

    Raises:
        PublishError: a statement is damaged, of another repository, or signed by a key that is not accepted; and it is
            the head's, or there is no accepted one and this program made its commit.
    """
    if MAIN not in states:
        return ReleaseHistory()
    present: StoredRelease | None = None
    newest: StoredRelease | None = None
    latest: StoredRelease | None = None
    refused: PublishError | None = None
    unsigned: list[CommitRecord] = []
    records = target.history(MAIN)
    for record in records[:_SEARCHED]:
        is_head = record.commit == states[MAIN].commit
        files = target.read_back(record.commit)
        try:
            release = _read_release(target, record.commit, files, accepted, repository)
        except StatementError as error:
            problem = _refusal(target, record, error)
            if is_head and not head_may_be_any:
                raise problem from error
            refused = refused or (None if record.author else problem)
            release = None
        if release is None:
            if newest is None and files.keys() - {GIT_ATTRIBUTES}:
                unsigned.append(record)
            continue
        present = release if is_head else present
        newest = newest or release
        if latest is None or release.content.release > latest.content.release:
            latest = release
        if not record.author and not _ROLLBACK.search(record.message):
            break
    if newest is None and refused:
        raise refused
    unread = 0 if newest else max(0, len(records) - _SEARCHED)
    after = tuple(unsigned) if newest else ()
    return ReleaseHistory(present=present, newest=newest, latest=latest, unsigned=after, unread=unread)


def signed_branches(states: States) -> tuple[str, ...]:
    """Return the branches whose heads have a signed statement, valid or not."""
    return tuple(sorted(name for name, state in states.items() if STATEMENTS & state.files.keys()))


def removed_signature(target: Target, states: States) -> str:
    """Return which foreign commits took the release statement off main, "" if none did.

    A head of this program is another case: its publisher asked for a repository without signatures.
    """
    if MAIN not in states or not states[MAIN].foreign_author:
        return ""
    removing: CommitRecord | None = None
    for record in target.history(MAIN)[:_SEARCHED_WITHOUT_KEY]:
        if RELEASE_ATTESTATION in target.read_back(record.commit):
            return f"{described(removing)} removed the release statement of {record.commit[:12]}" if removing else ""
        if not record.author:
            return ""
        removing = record
    return ""


def unfit_branches(release: ReleaseStatement, states: States, target: Target, names: Iterable[str]) -> Iterator[str]:
    """Yield one line per branch that readers of a release will find unsigned or changed, with what to do.

    Args:
        release: the release that main has afterwards.
        states: the branches of the repository.
        target: the repository.
        names: the branches that stay as they are.
    """
    for name in sorted(names):
        if problem := _unfit(release, name, states[name], target):
            author = states[name].foreign_author
            head = f"{states[name].commit[:12]}{f' by {printable(author)}' if author else ''}"
            yield (
                f"{printable(name)} stays at {head}, and {problem}: readers with the key report it; put it back with "
                f"packager rollback --branch {printable(name)}, publish it from this recipe, or delete it"
            )


def described(record: CommitRecord) -> str:
    """Return a commit's id, title and author in one line."""
    author = f" by {printable(record.author)}" if record.author else ""
    return f"{record.commit[:12]} ({printable(record.title)}){author}"


def _unfit(release: ReleaseStatement, name: str, state: BranchState, target: Target) -> str:
    """Return what is wrong with a branch; its files are not read, only their names and the head's author."""
    if ATTESTATION not in state.files:
        return "is not signed"
    if name not in release.branches:
        return f"is not in release {release.release}"
    try:
        payload, _ = read_envelope(target.read_bytes(state.commit, ATTESTATION, size=MAX_ENVELOPE_BYTES + 1))
        listed = read_branch_statement(payload).files.keys()
    except StatementError as error:
        return f"its statement is damaged: {printable(str(error))}"
    if digest(payload) != release.branches[name]:
        return f"has another statement than release {release.release} names"
    if listed - state.files.keys():
        return "lacks files that were signed"
    return "was changed after it was signed" if state.foreign_author else ""


def _read_release(
    target: Target, commit: str, files: Mapping[str, StoredFile], accepted: TrustedKeys, repository: str
) -> StoredRelease | None:
    """Return the release statement of a commit, None if it has none.

    Raises:
        StatementError: it is damaged, of another repository, or signed by a key that is not accepted.
    """
    if RELEASE_ATTESTATION not in files:
        return None
    payload, keyid = accepted.opened(target.read_bytes(commit, RELEASE_ATTESTATION, size=MAX_ENVELOPE_BYTES + 1))
    release = read_release_statement(payload)
    if release.repository != (repository or release.repository):
        raise StatementError(f"it is of the repository {release.repository[:100]!r}, not {repository!r}")
    return StoredRelease(payload=payload, keyid=keyid, content=release)


def _refusal(target: Target, record: CommitRecord, error: StatementError) -> PublishError:
    return PublishError(
        "the repository's release statement is not accepted, so the next one cannot follow it",
        where=f"{target.where}: {MAIN}: {RELEASE_ATTESTATION} of {record.commit[:12]}",
        why=printable(str(error)),
        hint="after a change of keys, give the old public key with --trusted-key; if others changed the "
        "repository, put it back with packager rollback first",
    )
