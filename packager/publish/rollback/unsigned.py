"""Rollbacks without a key: what they do to a repository with signed branches."""

from collections.abc import Iterator
from dataclasses import replace

from packager.errors import PublishError
from packager.publish.release_history import States, signed_branches
from packager.publish.rollback.plan import RollbackPlan
from packager.publish.statements import (
    MAX_ENVELOPE_BYTES,
    StatementError,
    digest,
    read_envelope,
    read_release_statement,
)
from packager.publish.targets import Target
from packager.receipt import ATTESTATION, RELEASE_ATTESTATION, STATEMENTS
from packager.system.text import printable
from packager.variant import MAIN


def without_key(plan: RollbackPlan, target: Target, states: States, *, asked: bool) -> RollbackPlan:
    """Return the plan with what readers will report afterwards.

    Args:
        plan: of a rollback that signs nothing.
        target: the repository.
        states: its branches.
        asked: whether a signed repository may be put back all the same.

    Raises:
        PublishError: the repository is signed, the rollback does more than to bring back the files that the present
            release names, and nobody asked for it.
    """
    signed = signed_branches(states)
    if not plan.changing or (signed and _fits_release(plan, target, states)):
        return plan
    if signed and not asked:
        heads = ", ".join(f"{printable(name)} {states[name].commit[:12]}" for name in signed)
        raise PublishError(
            "the repository is signed, and there is no key to sign the rollback with",
            where=target.where,
            why=f"signed heads: {heads}; without a key the statements of the earlier release come back: readers who "
            "know a later release report it",
            hint="give the key with --sign-key, which signs the restored state as a new release; or put the files back "
            "with --unsigned, and sign a release later",
        )
    return replace(plan, warnings=tuple(_warnings(plan, states, was_signed=bool(signed))))


def _fits_release(plan: RollbackPlan, target: Target, states: States) -> bool:
    """Return whether main stays, and each restored branch gets the statement that main's release names."""
    changed = [entry for entry in plan.branches if entry.branch in plan.changing]
    if any(entry.branch == MAIN for entry in changed) or MAIN not in states:
        return False
    try:
        if RELEASE_ATTESTATION not in states[MAIN].files:
            return False
        release = read_release_statement(_statement(target, states[MAIN].commit, RELEASE_ATTESTATION))
        return all(
            ATTESTATION in entry.files
            and entry.to is not None
            and digest(_statement(target, entry.to.commit, ATTESTATION)) == release.branches.get(entry.branch)
            for entry in changed
        )
    except StatementError:
        return False


def _statement(target: Target, commit: str, name: str) -> bytes:
    return read_envelope(target.read_bytes(commit, name, size=MAX_ENVELOPE_BYTES + 1))[0]


def _warnings(plan: RollbackPlan, states: States, *, was_signed: bool) -> Iterator[str]:
    """Yield what readers will report: an earlier release, and branches that are unsigned beside signed ones."""
    if was_signed:
        yield "this rollback is not signed: readers who know a later release will report it (--min-release)"
    restored = {entry.branch: entry.files for entry in plan.branches if entry.action == "restore"}
    files = {name: restored.get(name, state.files) for name, state in states.items()}
    if not was_signed and not any(STATEMENTS & each.keys() for each in files.values()):
        return
    lacking = {ATTESTATION: [name for name in sorted(files) if ATTESTATION not in files[name]]}
    if RELEASE_ATTESTATION not in files.get(MAIN, {}):
        lacking[RELEASE_ATTESTATION] = [MAIN]
    for name, branches in lacking.items():
        if branches:
            yield f"afterwards {printable(', '.join(branches))} has no {name}: publish with --sign-key to sign again"
