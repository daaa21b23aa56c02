"""Check the signed statements of a repository with the public keys that a reader trusts; no network is needed.

A branch's statement must name this repository, this branch and the digests that the other checks compare the files
with. The release statement on main must name the statement of every branch: a branch that was replaced by its own
earlier state has a valid statement, but not the one that the release names.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from packager.errors import PublishError
from packager.publish.published.finding import Collector
from packager.publish.published.reading import Branch
from packager.publish.signing_keys import TrustedKeys
from packager.publish.statements import (
    MAX_ENVELOPE_BYTES,
    StatementError,
    digest,
    read_branch_statement,
    read_release_statement,
)
from packager.publish.targets import BranchState
from packager.receipt import ATTESTATION, PROVENANCE, RELEASE_ATTESTATION, STATEMENTS, Provenance
from packager.system.text import shown
from packager.variant import MAIN

_Statement = TypeVar("_Statement")
_AGAIN_NAMED = 5  # files of a statement that are named in one message


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What a reader trusts.

    Attributes:
        keys: the public keys.
        min_release: the number of the latest release that the reader knows; an earlier one is an error.
    """

    keys: TrustedKeys
    min_release: int = 1


@dataclass(frozen=True, kw_only=True)
class SignedStatement:
    """A statement that a trusted key signed: the key's id and the statement's sha256."""

    keyid: str
    sha256: str


@dataclass(frozen=True, kw_only=True)
class SignedRelease:
    """A release statement that a trusted key signed: the key's id, the statement's sha256 and the release's number."""

    keyid: str
    sha256: str
    number: int


def check_branch_statement(
    branch: Branch, provenance: Provenance, provenance_sha256: str, trust: Trust, found: Collector
) -> SignedStatement | None:
    """Compare a branch's statement with its record; return the signer if the statement is signed and fits."""
    signed = _signed(branch, ATTESTATION, read_branch_statement, trust, found)
    if signed is None:
        return None
    statement = signed.statement
    wanted = {PROVENANCE: provenance_sha256, **{name: record.sha256 for name, record in provenance.files.items()}}
    place = provenance.place
    problems = []
    if statement.repository != place.repository:
        problems.append(f"it is of the repository {shown(statement.repository)}, the record of {place.repository}")
    if statement.branch != branch.name:
        problems.append(f"it is of the branch {shown(statement.branch)}, this is {branch.name}")
    names = sorted(wanted.keys() | statement.files.keys())
    differing = [name for name in names if wanted.get(name) != statement.files.get(name)]
    if differing:
        more = f" and {len(differing) - _AGAIN_NAMED:,} more" if len(differing) > _AGAIN_NAMED else ""
        problems.append(f"other files were signed: {', '.join(map(shown, differing[:_AGAIN_NAMED]))}{more}")
    for problem in problems:
        found.add("statement-differs", ATTESTATION, problem)
    return None if problems else SignedStatement(keyid=signed.keyid, sha256=signed.sha256)


def check_release_statement(
    main: Branch | None,
    repository: str,
    signed: Mapping[str, SignedStatement | None],
    existing: Sequence[str],
    trust: Trust,
    found: Collector,
) -> SignedRelease | None:
    """Compare the release statement of main with the branches' statements.

    Args:
        main: main's head, None if the repository has no main.
        repository: the repository's id, as the branches' statements have it; "" if none has a record.
        signed: the checked branches.
        existing: all branches of the repository.
        trust: the reader's keys and the release that the reader knows.
        found: gets the findings.
    """
    opened = _signed(main, RELEASE_ATTESTATION, read_release_statement, trust, found) if main else None
    if opened is None:
        return None
    release = opened.statement
    where, number = RELEASE_ATTESTATION, f"release {release.release}"
    if repository and release.repository != repository:
        found.add("statement-differs", where, f"it is of the repository {shown(release.repository)}")
    for name in sorted(release.branches.keys() - set(existing)):
        found.add("release-differs", where, f"{number} has the branch {shown(name)}, the repository lacks it")
    for name in sorted(set(existing) - release.branches.keys()):
        found.add("release-differs", where, f"{number} does not have the branch {shown(name)}")
    for name in sorted(signed.keys() & release.branches.keys()):
        statement = signed[name]
        if statement and statement.sha256 != release.branches[name]:
            message = f"{shown(name)} has a valid statement of another release, not the one of {number}"
            found.add("release-differs", where, message)
    if release.release < trust.min_release:
        found.add("release-old", where, f"this is {number}, release {trust.min_release} is known")
    return SignedRelease(keyid=opened.keyid, sha256=opened.sha256, number=release.release)


def check_statements_present(branch: str, states: Mapping[str, BranchState], found: Collector) -> None:
    """Report a branch that is unsigned in a repository with signed branches; nobody's key is needed to see that."""
    state, main = states[branch], states.get(MAIN)
    others = [name for name in sorted(states) if STATEMENTS & states[name].files.keys() and name != branch]
    author = f" by {state.foreign_author}" if state.foreign_author else ""
    head = f"the head {state.commit[:12]}{author} is not signed"
    if ATTESTATION not in state.files and (others or RELEASE_ATTESTATION in state.files):
        named = ", ".join(map(shown, others[:_AGAIN_NAMED])) or f"its {RELEASE_ATTESTATION}"
        found.add("signature-missing", ATTESTATION, f"{head}, and {named} is")
    elif branch == MAIN and ATTESTATION in state.files and RELEASE_ATTESTATION not in state.files:
        found.add("signature-missing", RELEASE_ATTESTATION, f"{head} as a release, and its files are")
    elif main is None and ATTESTATION in state.files:
        found.add("signature-missing", RELEASE_ATTESTATION, f"the repository has no {MAIN}, which names the release")


@dataclass(frozen=True, kw_only=True)
class _Signed(Generic[_Statement]):
    """A parsed statement, the id of the trusted key that signed it, and its sha256."""

    statement: _Statement
    keyid: str
    sha256: str


def _signed(
    branch: Branch, name: str, parse: Callable[[bytes], _Statement], trust: Trust, found: Collector
) -> _Signed[_Statement] | None:
    """Return the statement in one of a branch's files; report a file that is missing, unreadable or not signed."""
    if name not in branch.stored:
        found.add("signature-missing", name, f"a trusted key is given, and the head {branch.commit[:12]} is not signed")
        return None
    try:
        payload, keyid = trust.keys.opened(branch.read(name, MAX_ENVELOPE_BYTES + 1))
        return _Signed(statement=parse(payload), keyid=keyid, sha256=digest(payload))
    except StatementError as error:
        found.add("signature-invalid", name, str(error))
    except PublishError as error:
        found.add("branch-unreadable", name, error.brief)
    return None
