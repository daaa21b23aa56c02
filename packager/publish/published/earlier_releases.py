"""Look for commits of main that no key signed beside commits that were signed, and for releases that were replaced.

The heads can be checked by their statements. Only the history shows that a release lies unsigned between two signed
ones, that somebody took the statement off, or that an earlier release came back with its earlier number.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

from packager.errors import PublishError
from packager.publish.published.finding import Collector
from packager.publish.published.signatures import SignedRelease, Trust
from packager.publish.release_history import described
from packager.publish.statements import (
    MAX_ENVELOPE_BYTES,
    StatementError,
    digest,
    read_envelope,
    read_release_statement,
)
from packager.publish.targets import CommitRecord, StoredFile, Target
from packager.receipt import GIT_ATTRIBUTES, RELEASE_ATTESTATION
from packager.variant import MAIN

_SEARCHED = 50  # commits of main, newest first; each is a request to the Hub
_SEARCH_S = 30.0
_READ_BYTES = 2 * MAX_ENVELOPE_BYTES  # of all statements of the history


@dataclass(frozen=True, kw_only=True)
class SearchedHistory:
    """How many of main's commits were searched for release statements, and how many there are."""

    searched: int
    commits: int


@dataclass(frozen=True, kw_only=True)
class _Commit:
    """A commit of main: its release, "" for the digest and 0 for the number if nobody signed it."""

    record: CommitRecord
    sha256: str = ""
    number: int = 0


def check_earlier_releases(
    target: Target, trust: Trust | None, release: SignedRelease | None, found: Collector
) -> SearchedHistory:
    """Report the commits of main that are unsigned and younger than a signed one, and releases that were replaced.

    Args:
        target: the repository.
        trust: the keys that must have signed; without keys, any release statement counts as one.
        release: the release of main's head, if a trusted key signed it.
        found: gets the findings.
    """
    try:
        records = target.history(MAIN)
        searched, commits = _read(target, records[:_SEARCHED], trust)
    except PublishError as error:
        found.add("branch-unreadable", "", f"the history of {MAIN}: {error.brief}")
        return SearchedHistory(searched=0, commits=0)
    _report_unsigned(commits, "no trusted key signed it" if trust else "it has no release statement", found)
    if release:
        _report_replaced(commits, release, found)
    return SearchedHistory(searched=searched, commits=len(records))


def _read(target: Target, records: Sequence[CommitRecord], trust: Trust | None) -> tuple[int, list[_Commit]]:
    """Return how many commits were read, and those that hold more than a host's own file.

    Reading ends where it takes too long, or where the statements become too many.
    """
    commits: list[_Commit] = []
    known: dict[StoredFile, tuple[str, int]] = {}
    left_bytes, started = _READ_BYTES, time.monotonic()
    for searched, record in enumerate(records):
        if time.monotonic() - started > _SEARCH_S:
            return searched, commits
        files = target.read_back(record.commit)
        stored = files.get(RELEASE_ATTESTATION)
        if stored and stored not in known:
            if left_bytes < 0:
                return searched, commits
            data = target.read_bytes(record.commit, RELEASE_ATTESTATION, size=MAX_ENVELOPE_BYTES + 1)
            left_bytes -= len(data)  # the size that a server states may be any
            known[stored] = _opened(data, trust)
        if files.keys() - {GIT_ATTRIBUTES}:
            sha256, number = known[stored] if stored else ("", 0)
            commits.append(_Commit(record=record, sha256=sha256, number=number))
    return len(records), commits


def _opened(data: bytes, trust: Trust | None) -> tuple[str, int]:
    """Return the digest and the number of a release statement; "" and 0 if it is none, or no trusted key signed it."""
    try:
        payload = trust.keys.opened(data)[0] if trust else read_envelope(data)[0]
        return digest(payload), read_release_statement(payload).release
    except StatementError:
        return "", 0


def _report_unsigned(commits: Sequence[_Commit], problem: str, found: Collector) -> None:
    """Report each unsigned commit that has an older signed one."""
    unsigned: list[_Commit] = []
    for commit in commits:
        if not commit.sha256:
            unsigned.append(commit)
            continue
        for each in unsigned:
            message = (
                f"commit {described(each.record)} of {MAIN} came after release {commit.number} in "
                f"{commit.record.commit[:12]}, and {problem}"
            )
            found.add("release-unsigned", RELEASE_ATTESTATION, message)
        unsigned = []


def _report_replaced(commits: Sequence[_Commit], release: SignedRelease, found: Collector) -> None:
    """Report the highest number that an earlier commit has, if the head does not have a higher one."""
    others = [commit for commit in commits if commit.sha256 and commit.sha256 != release.sha256]
    latest = max(others, key=lambda commit: commit.number, default=None)
    if latest and latest.number >= release.number:
        message = (
            f"this is release {release.number}, and {MAIN} had release {latest.number} in {latest.record.commit[:12]}"
        )
        found.add("release-set-back", RELEASE_ATTESTATION, message)
