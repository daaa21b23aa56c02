"""Sign a release: one statement per branch over its files, and one on main over the branches' statements."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from packager.errors import PublishError
from packager.publish.release_history import (
    ReleaseHistory,
    described,
    read_release_history,
    removed_signature,
    signed_branches,
    unfit_branches,
)
from packager.publish.signing_keys import PlanningSigner, Signer, TrustedKeys
from packager.publish.statements import (
    MAX_ENVELOPE_BYTES,
    BranchStatement,
    ReleaseStatement,
    branch_statement,
    digest,
    read_release_statement,
    release_statement,
)
from packager.publish.targets import BranchState, LocalFile, Target, read_local_file
from packager.receipt import ATTESTATION, PROVENANCE, RELEASE_ATTESTATION, UNLISTED_FILES, Provenance
from packager.system.text import printable
from packager.variant import MAIN

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


@dataclass(frozen=True, kw_only=True)
class SignedFiles:
    """The files of a publish, and one line for each thing that readers with a key will report."""

    files: Files
    warnings: tuple[str, ...]


class ReleaseSigner:
    """Adds the signed statements to the files of a publish.

    Args:
        repository: the repository's id, which the statements name.
        keys: the keys.
        folder: gets the statements; it must exist until the publish ends.
    """

    def __init__(self, repository: str, keys: SigningKeys, folder: Path) -> None:
        self._repository, self._keys, self._folder = repository, keys, folder

    def signed(self, files: Files, target: Target, remote: Mapping[str, BranchState]) -> SignedFiles:
        """Return the files with a statement for each branch and, on main, the release statement.

        The release statement of the repository is kept if it names the same statements and has the same signer: the
        same files give the same bytes. Else the number of the release rises by one.

        Raises:
            PublishError: the repository is signed and there is no key or another one, or main is not among `files`.
        """
        if self._keys.signer is None:
            return SignedFiles(files=files, warnings=self._unsigned(files, target, remote))
        if MAIN not in files:
            raise PublishError(f"a signed release needs {MAIN} among its branches", where=target.where)
        signed, statements = {}, {}
        for branch, manifest in files.items():
            statement = self._branch_statement(branch, manifest)
            statements[branch] = digest(statement)
            present = self._stored(ATTESTATION, remote.get(branch), target)
            signed[branch] = {**manifest, ATTESTATION: self._write(branch, ATTESTATION, statement, present)}
        history = read_release_history(target, remote, self._keys.accepted, self._repository)
        release = self._release(statements, history, remote)
        present = self._stored(RELEASE_ATTESTATION, remote.get(MAIN), target)
        signed[MAIN] = {**signed[MAIN], RELEASE_ATTESTATION: self._write(MAIN, RELEASE_ATTESTATION, release, present)}
        return SignedFiles(files=signed, warnings=tuple(_warnings(files, release, history, target, remote)))

    def _unsigned(self, files: Files, target: Target, remote: Mapping[str, BranchState]) -> tuple[str, ...]:
        """Return what an unsigned publish does to a signed repository.

        Raises:
            PublishError: the repository is signed, or was until others changed it, and nobody asked to change that.
        """
        heads = [f"{printable(name)} {remote[name].commit[:12]}" for name in signed_branches(remote)]
        if not self._keys.unsigned and (why := ", ".join(heads) or removed_signature(target, remote)):
            raise signed_without_key(target.where, f"signed heads: {why}" if heads else why)
        stay = [printable(name) for name in signed_branches(remote) if name not in files]
        lines = [f"this publish is not signed: readers with the key will report it; signed now: {', '.join(heads)}"]
        if stay:
            lines.append(
                f"{', '.join(stay)} stays signed beside unsigned branches, which verify-published reports: publish it "
                "from this recipe, or delete it"
            )
        return tuple(lines) if heads else ()

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

    def _release(
        self, statements: Mapping[str, str], history: ReleaseHistory, remote: Mapping[str, BranchState]
    ) -> bytes:
        """Return the release statement: the present one, or the next."""
        present, newest, latest = history.present, history.newest, history.latest
        if newest is None or latest is None:
            return self._next(statements, "", 0)
        kept = {name: sha256 for name, sha256 in newest.content.branches.items() if name in remote}
        wanted = {**kept, **statements}
        same_signer = self._keys.signer is not None and newest.keyid == self._keys.signer.keyid
        if present and same_signer and wanted == present.content.branches and latest is present:
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


def _warnings(
    files: Files, release: bytes, history: ReleaseHistory, target: Target, remote: Mapping[str, BranchState]
) -> Iterator[str]:
    """Yield a line for each unsigned commit or branch beside the signed ones."""
    content = read_release_statement(release)
    if history.unread:
        yield (
            f"{MAIN}: its {history.unread:,} oldest commits were not searched for an earlier release, so this is "
            f"release {content.release}"
        )
    if history.unsigned and history.newest:
        newest, more = history.unsigned[0], len(history.unsigned) - 1
        yield (
            f"{MAIN}: {described(newest)}{f' and {more} more' if more else ''} came after release "
            f"{history.newest.content.release} without a signature; release {content.release} follows it, and "
            "verify-published names the unsigned commits"
        )
    known = history.newest.content.branches if history.newest else {}
    for name in sorted(known.keys() & remote.keys() & files.keys() - {MAIN}):
        if ATTESTATION not in remote[name].files:
            author = remote[name].foreign_author
            head = f"{remote[name].commit[:12]}{f' by {printable(author)}' if author else ''}"
            yield f"{printable(name)}: its head {head} is not signed, and was before: this publish replaces its files"
    yield from unfit_branches(content, remote, target, remote.keys() - files.keys())


def signed_without_key(where: str, why: str) -> PublishError:
    """Return the error for a change of a signed repository without a key."""
    return PublishError(
        "the repository is signed, and there is no key to sign with",
        where=where,
        why=f"{why}; readers who trust the key would find statements that do not fit, or none",
        hint="give the key with --sign-key; --unsigned leaves the signatures out",
    )


def is_signed(name: str) -> bool:
    """Return whether the statement of a branch lists a file of this name."""
    return name == PROVENANCE or name not in UNLISTED_FILES
