"""Sign a rollback: a new release whose statement names the earlier branches, and the release that it replaces.

A rollback signs no new content. Each branch keeps the statement that it had at that time, which a trusted key must have
signed and whose digests must be those of the files; only if another key signs now, the same statement is signed again.
`main` gets a release statement with the next number. So a reader with `--min-release` accepts the rollback as the
newest release, and a branch that somebody set back does not fit it.
"""

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path

from packager.errors import PublishError
from packager.publish.release_history import ReleaseHistory, States, described, read_release_history, unfit_branches
from packager.publish.rollback.plan import BranchRollback, RollbackPlan, with_files
from packager.publish.sign_release import SigningKeys, is_signed
from packager.publish.signing_keys import PlanningSigner, Signer
from packager.publish.statements import (
    MAX_ENVELOPE_BYTES,
    ReleaseStatement,
    StatementError,
    digest,
    read_branch_statement,
    release_statement,
)
from packager.publish.targets import HeadMovedError, LocalFile, StoredFile, Target, read_local_file
from packager.receipt import ATTESTATION, RELEASE_ATTESTATION
from packager.system.text import printable
from packager.variant import MAIN

_NAMED_COMMITS = 5


class RollbackSigner:
    """Adds signed statements to the plan of a rollback.

    Args:
        signer: the key that signs.
        keys: the keys that may have signed the statements of the repository.
        folder: gets the statements; it must exist until the rollback ends.
    """

    def __init__(self, signer: Signer | PlanningSigner, keys: SigningKeys, folder: Path) -> None:
        self._signer, self._accepted, self._folder = signer, keys.accepted, folder

    def signed(self, plan: RollbackPlan, target: Target, states: States) -> RollbackPlan:
        """Return the plan with the statements of the restored branches, and a release statement on main.

        The release statement is kept if it names the same statements: a second rollback changes nothing.

        Raises:
            PublishError: the repository or a restored branch is not signed by an accepted key, or a statement is not
                that of the branch's files.
        """
        history = read_release_history(target, states, self._accepted, head_may_be_any=True)
        newest, latest = history.newest, history.latest
        if newest is None or latest is None:
            raise PublishError(
                "no commit has a signed release, so no signed release can follow it by a rollback",
                where=f"{target.where}: {MAIN}",
                hint="leave out --sign-key, or build and publish the earlier recipe with --sign-key",
            )
        content = newest.content
        statements = {name: sha256 for name, sha256 in content.branches.items() if name in states}
        entries = []
        for entry in plan.branches:
            # A branch that no release names stays as it is, with a warning.
            if entry.action == "restore" or (entry.action == "done" and entry.branch in content.branches):
                statement, keyid = self._statement(entry, target, content.repository, states)
                statements[entry.branch] = digest(statement)
                if entry.action == "restore" and keyid != self._signer.keyid:
                    entry = self._replacing(entry, ATTESTATION, statement, states)  # noqa: PLW2901
            entries.append(entry)
        staying = states.keys() - {entry.branch for entry in entries if entry.action == "restore"}
        _require_signed_main(states, staying, history, target)
        restored = any(entry.branch == MAIN and entry.action == "restore" for entry in entries)
        if history.present is latest and statements == content.branches and not restored:
            warnings = unfit_branches(content, states, target, staying)
            return replace(plan, branches=tuple(entries), warnings=tuple(warnings))
        release = ReleaseStatement(
            repository=content.repository,
            release=latest.content.release + 1,
            previous=digest(latest.payload),
            branches=statements,
        )
        others = [entry for entry in entries if entry.branch != MAIN]
        (found,) = [entry for entry in entries if entry.branch == MAIN] or [_signing_entry(target, states)]
        if found.action != "restore":
            found = replace(found, action="sign", to=found.head, reason="")
        found = self._replacing(found, RELEASE_ATTESTATION, release_statement(release), states)
        warnings = unfit_branches(release, states, target, staying)
        return replace(plan, branches=(*others, found), signs=release.release, warnings=tuple(warnings))

    def _statement(self, entry: BranchRollback, target: Target, repository: str, states: States) -> tuple[bytes, str]:
        """Return the statement that a branch has after the rollback, and the id of the key that signed it."""
        goal = entry.to if entry.action == "restore" and entry.to else entry.head
        files = entry.files if entry.action == "restore" else states[entry.branch].files
        try:
            if ATTESTATION not in files:
                raise StatementError("these files were never signed")
            payload, keyid = self._accepted.opened(
                target.read_bytes(goal.commit, ATTESTATION, size=MAX_ENVELOPE_BYTES + 1)
            )
            statement = read_branch_statement(payload)
            if (statement.repository, statement.branch) != (repository, entry.branch):
                raise StatementError(f"it is of {statement.repository[:100]}, branch {statement.branch[:100]}")
            if entry.action == "restore" and statement.files != _digests(target, goal.commit, entry.files):
                raise StatementError("other files were signed")
        except StatementError as error:
            raise PublishError(
                f"{printable(entry.branch)} has no statement of {goal.commit[:12]} that can be signed again",
                where=target.where,
                why=printable(str(error)),
                hint="a rollback signs only what a trusted key has signed before: give an old public key with "
                "--trusted-key, or put the files back with --unsigned, or build and publish them with --sign-key",
            ) from error
        return payload, keyid

    def _replacing(self, entry: BranchRollback, name: str, statement: bytes, states: States) -> BranchRollback:
        """Return the entry of a branch with a new signed statement."""
        path = self._folder / entry.branch / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(self._signer.sign(statement))
        file, now = read_local_file(path), states[entry.branch].files
        stored = StoredFile(size_bytes=file.size_bytes, sha256=file.sha256, blob_id=file.blob_id)
        replacing: dict[str, LocalFile] = {**entry.replacing, name: file}
        return replace(with_files(entry, now, {**(entry.files or now), name: stored}), replacing=replacing)


def _require_signed_main(states: States, staying: Collection[str], history: ReleaseHistory, target: Target) -> None:
    """Raise PublishError if main keeps files that no key signed: a release over them would fit nothing."""
    if MAIN in staying and ATTESTATION not in states[MAIN].files:
        commits = ", ".join(map(described, history.unsigned[:_NAMED_COMMITS]))
        raise PublishError(
            f"the head of {MAIN} is not signed, and this rollback leaves it there",
            where=target.where,
            why=f"these commits came after the latest signed release: {commits}",
            hint=f"put back {MAIN} as well: --branch {MAIN}, or the whole release without --branch",
        )


def _signing_entry(target: Target, states: States) -> BranchRollback:
    """Return the entry of main if the rollback names other branches only."""
    records = target.history(MAIN)
    if not records or records[0].commit != states[MAIN].commit:
        raise HeadMovedError(f"{MAIN} is moving", where=target.where, hint="run again")
    return BranchRollback(branch=MAIN, action="done", head=records[0])


def _digests(target: Target, commit: str, files: Mapping[str, StoredFile]) -> dict[str, str]:
    """Return the sha256 of the files that a statement lists; small ones are read if the target does not know it."""
    return {
        name: file.sha256 or hashlib.sha256(target.read_bytes(commit, name)).hexdigest()
        for name, file in files.items()
        if is_signed(name)
    }
