"""Put branches back to what they held before, each by a new commit: what was published stays in the history.

Which commit a branch goes back to:

* A branch given by name goes to the commit before its head.
* The whole release goes to the one before it. Publishing ends with main, so the commit before main's head is the end
  of the release before, and every branch gets what it held at that time: branches that the latest release did not
  change stay as they are, and those that it made are left alone, as there is nothing before them. If a publish did not
  get as far as main, variants have heads younger than main's; then only that publish is undone and main stays. The
  order of events is that of the commits' times, in whole seconds.

Every commit made here ends with trailers that name the head that it takes the place of, the commit whose files it
holds, and, for a whole release, the commit of main that the release goes back to:

    Rollback-of: <commit>
    Rollback-to: <commit>
    Rollback-release: <commit>

A rollback that was killed is run again and finishes: as long as nothing was published after them, the youngest heads
with `Rollback-release` say where the release goes, and a branch whose head is a rollback to its commit is done. Done
twice, it changes nothing. `again` goes one further back, and only once the last rollback is complete. A rollback counts
as the commit whose files it holds wherever "the commit before" is looked for, so nothing goes forward by accident.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

from packager.errors import PublishError
from packager.publish.published.states import published_states
from packager.publish.rollback.history import trailers
from packager.publish.rollback.plan import BranchRollback, RollbackPlan, RollbackRequest, plan_rollback
from packager.publish.targets import HeadMovedError, Target
from packager.system.text import printable


@dataclass(frozen=True, kw_only=True)
class RollbackOutcome:
    """What became of one branch: its head afterwards, and the seconds."""

    plan: BranchRollback
    commit: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class RollbackReport:
    """What was done to a repository, in order, and what was put right before that."""

    plan: RollbackPlan
    outcomes: tuple[RollbackOutcome, ...]
    notes: tuple[str, ...]
    dry_run: bool


def rollback(
    target: Target,
    request: RollbackRequest,
    report: Callable[[str], None],
    *,
    dry_run: bool = False,
    show_plan: Callable[[RollbackPlan], None] = lambda _: None,
    confirm: Callable[[RollbackPlan], None] = lambda _: None,
) -> RollbackReport:
    """Put branches of `target` back.

    Args:
        target: the repository.
        request: which branches, and how far.
        report: gets one line per branch and one per thing put right after a killed run.
        dry_run: plan and check, write nothing.
        show_plan: gets the plan before the first effect; not called for a dry run, whose report holds it.
        confirm: called if anything would change, after `show_plan` and before the first effect; raises to stop.

    Raises:
        HeadMovedError: somebody else committed meanwhile; branches before this one in the plan are done.
        PublishError: there is nothing to go back to, or the target refused or did not store what it was told to.
    """
    if dry_run:
        plan = plan_rollback(target, request)
        target.check(plan.changing)
        outcomes = [RollbackOutcome(plan=entry, commit=entry.head.commit, seconds=0.0) for entry in plan.branches]
        return RollbackReport(plan=plan, outcomes=tuple(outcomes), notes=(), dry_run=True)
    published_states(target)  # or an empty repository would be made
    outcomes = []
    with target.exclusive() as notes:
        for note in notes:
            report(note)
        plan = plan_rollback(target, request)
        show_plan(plan)
        target.check(plan.changing)
        if plan.changing:
            confirm(plan)
        for entry in plan.branches:
            outcome = _restore(entry, plan, target)
            report(outcome_line(outcome))
            outcomes.append(outcome)
    return RollbackReport(plan=plan, outcomes=tuple(outcomes), notes=tuple(notes), dry_run=False)


def outcome_line(outcome: RollbackOutcome) -> str:
    """Return the one line that says what became of a branch."""
    plan = outcome.plan
    if plan.action != "restore" or plan.to is None:
        return f"{printable(plan.branch)}: {plan.action}: {plan.reason}"
    changes = f"{len(plan.added)} added, {len(plan.changed)} changed, {len(plan.removed)} removed"
    back = f"back to {plan.to.commit[:12]} at {outcome.commit[:12]}"
    return f"{printable(plan.branch)}: {back}, files: {changes}, {outcome.seconds:.1f} s"


def _restore(entry: BranchRollback, plan: RollbackPlan, target: Target) -> RollbackOutcome:
    if entry.action != "restore" or entry.to is None:
        return RollbackOutcome(plan=entry, commit=entry.head.commit, seconds=0.0)
    started = time.monotonic()
    title = entry.to.title.removeprefix(f"{entry.branch}: ")
    title = printable(f"{entry.branch}: back to {entry.to.commit[:12]}, {title}")[:200]
    message = "\n\n".join([title, trailers(entry.head, entry.to, plan.release)])
    try:
        commit = target.restore(entry.branch, entry.to.commit, parent=entry.head.commit, message=message)
    except HeadMovedError as error:
        raise HeadMovedError(
            f"{entry.branch} moved while it was being put back",
            where=target.where,
            why=error.why or f"its head is no longer {entry.head.commit[:12]}",
            hint="look at what is there now, then run again: branches that are done are not put back twice",
        ) from error
    stored = target.read_back(commit)
    if wrong := sorted(
        name
        for name in stored.keys() | entry.files.keys()
        if name not in stored or name not in entry.files or not stored[name].holds(entry.files[name])
    ):
        raise PublishError(
            f"{entry.branch} was put back and does not hold what {entry.to.commit[:12]} holds",
            where=target.where,
            why=printable(", ".join(wrong)),
            hint="run again with --to; if that does not help, check the repository (git fsck, where it is a folder)",
        )
    return RollbackOutcome(plan=entry, commit=commit, seconds=time.monotonic() - started)


__all__ = [
    "BranchRollback",
    "RollbackOutcome",
    "RollbackPlan",
    "RollbackReport",
    "RollbackRequest",
    "outcome_line",
    "rollback",
]
