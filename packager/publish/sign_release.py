"""Sign a release: one statement per branch over its files, and one on main over the branches' statements."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from packager.errors import PublishError
from packager.publish.signing_keys import Signer, TrustedKeys
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
        signer: signs; None publishes without statements.
        trusted: other keys that may have signed the present release, after a change of keys.
        unsigned: whether a signed repository may become an unsigned one.
    """

    signer: Signer | None = None
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
            signed[branch] = {**manifest, ATTESTATION: self._write(branch, ATTESTATION, statement)}
        release = self._release(statements, target, remote)
        signed[MAIN] = {**signed[MAIN], RELEASE_ATTESTATION: self._write(MAIN, RELEASE_ATTESTATION, release)}
        return signed

    def _branch_statement(self, branch: str, manifest: Mapping[str, LocalFile]) -> bytes:
        provenance = None
        if PROVENANCE in manifest:
            try:
                provenance = Provenance.model_validate_json(manifest[PROVENANCE].path.read_bytes())
            except (OSError, ValidationError) as error:
                where = str(manifest[PROVENANCE].path)
                raise PublishError("the record cannot be read, so the branch is not signed", where=where) from error
        digests = {name: file.sha256 for name, file in manifest.items() if name == PROVENANCE or _is_listed(name)}
        return branch_statement(BranchStatement(repository=self._repository, branch=branch, files=digests), provenance)

    def _release(self, statements: Mapping[str, str], target: Target, remote: Mapping[str, BranchState]) -> bytes:
        """Return the release statement: the present one, or the next."""
        state = remote.get(MAIN)
        if state is None or RELEASE_ATTESTATION not in state.files:
            return self._next(statements, "", 0)
        payload, keyid, before = self._present(target, state.commit)
        latest_payload, latest = self._before_rollbacks(target, payload, before)
        kept = {name: sha256 for name, sha256 in before.branches.items() if name in remote}
        wanted = {**kept, **statements}
        same_signer = self._keys.signer is not None and keyid == self._keys.signer.keyid
        if same_signer and wanted == before.branches and latest is before:
            return payload
        return self._next(wanted, digest(latest_payload), latest.release)

    def _present(self, target: Target, commit: str) -> tuple[bytes, str, ReleaseStatement]:
        data = target.read_bytes(commit, RELEASE_ATTESTATION, size=MAX_ENVELOPE_BYTES + 1)
        return present_release(data, self._keys.accepted, self._repository, target.where)

    def _before_rollbacks(
        self, target: Target, payload: bytes, release: ReleaseStatement
    ) -> tuple[bytes, ReleaseStatement]:
        """Return the latest release, which rollbacks have replaced by an earlier one: its number is not used twice."""
        records = target.history(MAIN)
        by_id = {record.commit: record for record in records}
        record = records[0] if records else None
        while record and not record.author and (replaced := _REPLACED.search(record.message)):
            record = by_id.pop(replaced[1], None)
            if record and RELEASE_ATTESTATION in target.read_back(record.commit):
                found, _, other = self._present(target, record.commit)
                if other.release > release.release:
                    payload, release = found, other
        return payload, release

    def _next(self, statements: Mapping[str, str], previous: str, number: int) -> bytes:
        release = ReleaseStatement(
            repository=self._repository, release=number + 1, previous=previous, branches=dict(statements)
        )
        return release_statement(release)

    def _write(self, branch: str, name: str, statement: bytes) -> LocalFile:
        if self._keys.signer is None:
            raise PublishError("there is no key to sign with")
        path = self._folder / branch / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self._keys.signer.sign(statement))
        return read_local_file(path)


def present_release(
    data: bytes, accepted: TrustedKeys, repository: str, where: str
) -> tuple[bytes, str, ReleaseStatement]:
    """Return the payload, the signer and the content of the repository's release statement.

    Raises:
        PublishError: the statement is damaged, of another repository, or signed by a key that is not accepted.
    """
    try:
        payload, keyid = accepted.opened(data)
        release = read_release_statement(payload)
        if release.repository != repository:
            raise StatementError(f"it is of the repository {release.repository[:100]!r}, not {repository!r}")
    except StatementError as error:
        raise PublishError(
            "the repository's release statement is not accepted, so the next one cannot follow it",
            where=f"{where}: {MAIN}: {RELEASE_ATTESTATION}",
            why=str(error),
            hint="after a change of keys, give the old public key with --trusted-key; if others changed the "
            "repository, put it back with packager rollback first",
        ) from error
    return payload, keyid, release


def signed_without_key(where: str) -> PublishError:
    """Return the error for a change of a signed repository without a key."""
    return PublishError(
        "the repository is signed, and there is no key to sign with",
        where=where,
        why="readers who trust the key would find statements that do not fit, or none",
        hint="give the key with --sign-key; --unsigned leaves the signatures out",
    )


def _is_listed(name: str) -> bool:
    return name not in UNLISTED_FILES
