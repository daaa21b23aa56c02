"""Sign a release: one statement per branch over its files, and one on main over the branches' statements."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from packager.errors import PublishError
from packager.publish.signing_keys import PlanningSigner, Signer, TrustedKeys
from packager.publish.statements import (
    MAX_ENVELOPE_BYTES,
    BranchStatement,
    ReleaseStatement,
    StatementError,
    branch_statement,
    digest,
    read_release_statement,
    release_statement,
)
from packager.publish.targets import BranchState, LocalFile, Target, read_local_file
from packager.receipt import ATTESTATION, PROVENANCE, RELEASE_ATTESTATION, UNLISTED_FILES, Provenance
from packager.variant import MAIN

_REPLACED = re.compile(r"(?m)^Rollback-of: ([0-9a-f]{40})$")
Files = Mapping[str, Mapping[str, LocalFile]]


@dataclass(frozen=True, kw_only=True)
class SigningKeys:
    """The keys of a publish.

    Attributes:
        signer: signs, or plans what will be signed; None publishes without statements.
        trusted: other keys that may have signed the present release, after a change of keys.
        unsigned: whether a signed repository may become an unsigned one.
    """

    signer: Signer | PlanningSigner | None = None
    trusted: TrustedKeys = field(default_factory=TrustedKeys)
    unsigned: bool = False

    @property
    def accepted(self) -> TrustedKeys:
        """The keys that may have signed the present release."""
        return self.trusted.with_keys(self.signer.public) if self.signer else self.trusted


class ReleaseSigner:
    """Adds the signed statements to the files of a publish.

    Args:
        repository: the repository's id, which the statements name.
        keys: the keys.
        folder: gets the statements; it must exist until the publish ends.
    """

    def __init__(self, repository: str, keys: SigningKeys, folder: Path) -> None:
        self._repository, self._keys, self._folder = repository, keys, folder

    def signed(self, files: Files, target: Target, remote: Mapping[str, BranchState]) -> Files:
        """Return the files with a statement for each branch and, on main, the release statement.

        The release statement of the repository is kept if it names the same statements and has the same signer: the
        same files give the same bytes. Else the number of the release rises by one.

        Raises:
            PublishError: the repository is signed and there is no key or another one, or main is not among `files`.
        """
        if self._keys.signer is None:
            if not self._keys.unsigned and MAIN in remote and RELEASE_ATTESTATION in remote[MAIN].files:
                raise signed_without_key(target.where)
            return files
        if MAIN not in files:
            raise PublishError(f"a signed release needs {MAIN} among its branches", where=target.where)
        signed, statements = {}, {}
        for branch, manifest in files.items():
            statement = self._branch_statement(branch, manifest)
            statements[branch] = digest(statement)
            present = self._stored(ATTESTATION, remote.get(branch), target)
            signed[branch] = {**manifest, ATTESTATION: self._write(branch, ATTESTATION, statement, present)}
        release = self._release(statements, target, remote)
        present = self._stored(RELEASE_ATTESTATION, remote.get(MAIN), target)
        signed[MAIN] = {**signed[MAIN], RELEASE_ATTESTATION: self._write(MAIN, RELEASE_ATTESTATION, release, present)}
        return signed

    def _stored(self, name: str, state: BranchState | None, target: Target) -> bytes:
        """Return the statement that a branch has, if a plan needs it: a private key signs it again."""
        if isinstance(self._keys.signer, Signer) or state is None or name not in state.files:
            return b""
        return target.read_bytes(state.commit, name, size=MAX_ENVELOPE_BYTES + 1)

    def require_private_key(self) -> None:
        """Raise PublishError if there is the public key of a plan only."""
        if isinstance(self._keys.signer, PlanningSigner):
            raise PublishError("a public key cannot sign", hint="give the private key with --sign-key")

    def _branch_statement(self, branch: str, manifest: Mapping[str, LocalFile]) -> bytes:
        provenance = None
        if PROVENANCE in manifest:
            try:
                provenance = Provenance.model_validate_json(manifest[PROVENANCE].path.read_bytes())
            except (OSError, ValidationError) as error:
                where = str(manifest[PROVENANCE].path)
                raise PublishError("the record cannot be read, so the branch is not signed", where=where) from error
        digests = {name: file.sha256 for name, file in manifest.items() if is_signed(name)}
        return branch_statement(BranchStatement(repository=self._repository, branch=branch, files=digests), provenance)

    def _release(self, statements: Mapping[str, str], target: Target, remote: Mapping[str, BranchState]) -> bytes:
        """Return the release statement: the present one, or the next."""
        state = remote.get(MAIN)
        if state is None or RELEASE_ATTESTATION not in state.files:
            return self._next(statements, "", 0)
        present = read_release(target, state.commit, self._keys.accepted, self._repository)
        latest = latest_release(target, present, self._keys.accepted)
        kept = {name: sha256 for name, sha256 in present.content.branches.items() if name in remote}
        wanted = {**kept, **statements}
        same_signer = self._keys.signer is not None and present.keyid == self._keys.signer.keyid
        if same_signer and wanted == present.content.branches and latest is present:
            return present.payload
        return self._next(wanted, digest(latest.payload), latest.content.release)

    def _next(self, statements: Mapping[str, str], previous: str, number: int) -> bytes:
        release = ReleaseStatement(
            repository=self._repository, release=number + 1, previous=previous, branches=dict(statements)
        )
        return release_statement(release)

    def _write(self, branch: str, name: str, statement: bytes, present: bytes) -> LocalFile:
        if self._keys.signer is None:
            raise PublishError("there is no key to sign with")
        path = self._folder / branch / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self._keys.signer.sign(statement, present))
        return read_local_file(path)


@dataclass(frozen=True, kw_only=True)
class StoredRelease:
    """A release statement of a repository: its bytes, the id of the accepted key that signed it, and its content."""

    payload: bytes
    keyid: str
    content: ReleaseStatement


def read_release(target: Target, commit: str, accepted: TrustedKeys, repository: str = "") -> StoredRelease:
    """Return the release statement in a commit of main.

    Args:
        target: the repository.
        commit: a commit with that file.
        accepted: the keys that may have signed it.
        repository: the id that the statement must have, "" for any.

    Raises:
        PublishError: the statement is damaged, of another repository, or signed by a key that is not accepted.
    """
    data = target.read_bytes(commit, RELEASE_ATTESTATION, size=MAX_ENVELOPE_BYTES + 1)
    try:
        payload, keyid = accepted.opened(data)
        release = read_release_statement(payload)
        if release.repository != (repository or release.repository):
            raise StatementError(f"it is of the repository {release.repository[:100]!r}, not {repository!r}")
    except StatementError as error:
        raise PublishError(
            "the repository's release statement is not accepted, so the next one cannot follow it",
            where=f"{target.where}: {MAIN}: {RELEASE_ATTESTATION}",
            why=str(error),
            hint="after a change of keys, give the old public key with --trusted-key; if others changed the "
            "repository, put it back with packager rollback first",
        ) from error
    return StoredRelease(payload=payload, keyid=keyid, content=release)


def latest_release(target: Target, present: StoredRelease, accepted: TrustedKeys) -> StoredRelease:
    """Return the release with the highest number, which rollbacks may have replaced: no number is used twice."""
    records = target.history(MAIN)
    by_id = {record.commit: record for record in records}
    record, latest = records[0] if records else None, present
    while record and not record.author and (replaced := _REPLACED.search(record.message)):
        record = by_id.pop(replaced[1], None)
        if record and RELEASE_ATTESTATION in target.read_back(record.commit):
            other = read_release(target, record.commit, accepted, present.content.repository)
            if other.content.release > latest.content.release:
                latest = other
    return latest


def signed_without_key(where: str) -> PublishError:
    """Return the error for a change of a signed repository without a key."""
    return PublishError(
        "the repository is signed, and there is no key to sign with",
        where=where,
        why="readers who trust the key would find statements that do not fit, or none",
        hint="give the key with --sign-key; --unsigned leaves the signatures out",
    )


def is_signed(name: str) -> bool:
    """Return whether the statement of a branch lists a file of this name."""
    return name == PROVENANCE or name not in UNLISTED_FILES
