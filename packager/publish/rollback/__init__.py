"""Restore the earlier files of branches, each by a new commit: all published commits stay in the history.

The commit that a branch goes back to:

* A branch given by name goes back to the commit before its head.
* A whole release goes back to the release before it. Publishing ends with main, so the commit before main's head is the
  end of the release before, and every branch gets the files that it had at that time. Branches that the latest release
  did not change keep their heads. Branches that it created are left alone: they have no earlier files. If a publish
  ended before main, variants have younger heads than main; then only that publish is undone, and main keeps its head.
  Events are ordered by the commits' times, in whole seconds.

Every commit of a rollback ends with trailers that name the head that it replaces, the commit whose files it has, and,
for a whole release, the commit of main that the release goes back to:

    Rollback-of: <commit>
    Rollback-to: <commit>
    Rollback-release: <commit>

A killed rollback is run again and finishes. As long as nothing was published after it, the youngest heads with
`Rollback-release` name the release to go back to, and a branch whose head is a rollback to its commit is done. A second
run changes nothing. `further_back` goes one release further back, once the last rollback is complete. In the search for
"the commit before", a rollback counts as the commit whose files it has, so a rollback never goes forward.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from packager.errors import PublishError
from packager.publish.published.states import published_states
from packager.publish.rollback.history import trailers
from packager.publish.rollback.plan import BranchRollback, RollbackPlan, RollbackRequest, plan_rollback
from packager.publish.rollback.signing import RollbackSigner
from packager.publish.rollback.unsigned import without_key
from packager.publish.take_back import take_back
from packager.publish.targets import HeadMovedError, Target
from packager.system.text import printable


@dataclass(frozen=True, kw_only=True)
class RollbackOutcome:
    """The result for one branch: its new head and the time in seconds."""

    plan: BranchRollback
    commit: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RollbackReport:
    """The result for a repository: the branches in order, and notes about repairs after a killed run."""

    plan: RollbackPlan
    outcomes: tuple[RollbackOutcome, ...]
    notes: tuple[str, ...]
    dry_run: bool


def rollback(
    target: Target,
    request: RollbackRequest,
    log: Callable[[str], None],
    *,
    dry_run: bool = False,
    show_plan: Callable[[RollbackPlan], None] = lambda _: None,
    confirm: Callable[[RollbackPlan], None] = lambda _: None,
    signer: RollbackSigner | None = None,
    unsigned: bool = False,
) -> RollbackReport:
    """Restore earlier files of branches of `target`.

    Args:
        target: the repository.
        request: which branches, and how far back.
        log: gets one line per branch and one per repair after a killed run.
        dry_run: plan and check, write nothing.
        show_plan: gets the plan before the first effect; not called in a dry run, whose report holds the plan.
        confirm: called if anything would change, after `show_plan` and before the first effect; raises to stop.
        signer: signs the restored state as a new release.
        unsigned: whether a signed repository may be put back without a key, with its earlier statements.

    Raises:
        HeadMovedError: a branch got another commit; the branches before it in the plan are done.
        PublishError: there is nothing to go back to, the target refused, or it does not hold the restored files.
    """
    if dry_run:
        plan = _planned(target, request, signer, unsigned=unsigned)
        target.check(plan.changing)
        outcomes = [RollbackOutcome(plan=entry, commit=entry.head.commit, seconds=0.0) for entry in plan.branches]
        return RollbackReport(plan=plan, outcomes=tuple(outcomes), notes=(), dry_run=True)
    published_states(target)  # raises before an empty repository is made
    outcomes = []
    with target.exclusive() as notes:
        for note in notes:
            log(note)
        plan = _planned(target, request, signer, unsigned=unsigned)
        show_plan(plan)
        target.check(plan.changing)
        if plan.changing:
            confirm(plan)
        for entry in plan.branches:
            outcome = _restore(entry, plan, target)
            log(rollback_line(outcome))
            outcomes.append(outcome)
    return RollbackReport(plan=plan, outcomes=tuple(outcomes), notes=tuple(notes), dry_run=False)


def _planned(
    target: Target, request: RollbackRequest, signer: RollbackSigner | None, *, unsigned: bool
) -> RollbackPlan:
    """Return the plan; without a key, a signed repository must be put back on purpose."""
    if signer:
        return plan_rollback(target, request, lambda plan, states: signer.signed(plan, target, states))
    return without_key(plan_rollback(target, request), target, target.read_branches(), asked=unsigned)


def rollback_line(outcome: RollbackOutcome) -> str:
    """Return one line with a branch's result."""
    plan = outcome.plan
    if plan.action == "sign":
        return f"{plan.branch}: signed at {outcome.commit[:12]}, {outcome.seconds:.1f} s"
    if plan.action != "restore" or plan.to is None:
        return f"{printable(plan.branch)}: {plan.action}: {plan.reason}"
    changes = f"{len(plan.added)} added, {len(plan.changed)} changed, {len(plan.removed)} removed"
    back = f"back to {plan.to.commit[:12]} at {outcome.commit[:12]}"
    return f"{printable(plan.branch)}: {back}, files: {changes}, {outcome.seconds:.1f} s"


def _restore(entry: BranchRollback, plan: RollbackPlan, target: Target) -> RollbackOutcome:
    if entry.action not in ("restore", "sign") or entry.to is None:
        return RollbackOutcome(plan=entry, commit=entry.head.commit, seconds=0.0)
    started = time.monotonic()
    title = entry.to.title.removeprefix(f"{entry.branch}: ")
    title = printable(f"{entry.branch}: back to {entry.to.commit[:12]}, {title}")[:200]
    if entry.action == "sign":
        title = f"{entry.branch}: sign release {plan.signs}"
    message = "\n\n".join([title, trailers(entry.head, entry.to, plan.release)])
    try:
        commit = target.restore(
            entry.branch, entry.to.commit, parent=entry.head.commit, message=message, replacing=entry.replacing
        )
    except HeadMovedError as error:
        raise HeadMovedError(
            f"{entry.branch} moved while it was being put back",
            where=target.where,
            why=error.why or f"its head is no longer {entry.head.commit[:12]}",
            hint="look at the branch, then run again: branches that are done are not put back twice",
        ) from error
    stored = target.read_back(commit)
    if wrong := sorted(
        name
        for name in stored.keys() | entry.files.keys()
        if name not in stored or name not in entry.files or not stored[name].holds(entry.files[name])
    ):
        raise PublishError(
            f"{entry.branch} was put back and does not hold the files of {entry.to.commit[:12]}",
            where=target.where,
            why=f"{printable(', '.join(wrong))}; {take_back(target, entry.branch, commit, entry.head.commit)}",
            hint="run again with --to; if that does not help, check the repository (git fsck, if it is a folder)",
        )
    return RollbackOutcome(plan=entry, commit=commit, seconds=time.monotonic() - started)


__all__ = [
    "BranchRollback",
    "RollbackOutcome",
    "RollbackPlan",
    "RollbackReport",
    "RollbackRequest",
    "RollbackSigner",
    "rollback",
    "rollback_line",
]
