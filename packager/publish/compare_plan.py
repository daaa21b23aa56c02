"""Compare a saved plan with the present build and repository: a plan that no longer fits publishes nothing.

A publish of the same plan that was killed is finished: a branch that holds exactly its planned files, in a commit of
this program on top of the planned head, is done.
"""

from collections.abc import Iterator
from itertools import pairwise

from packager.errors import PublishError
from packager.publish.plan import BranchPlan, PublishPlan
from packager.publish.saved_plan import PlannedBranch, PlannedFile, PlannedRelease, PublishSubject, SavedPlan
from packager.publish.targets import Target
from packager.system.text import printable

_SHOWN = 20  # differences that one error names
_SUBJECT = {
    "repository": "the repository",
    "target": "the kind of target",
    "address": "the target's address",
    "recipe": "the digest of the recipe",
    "templates": "the digest of the card's templates",
    "tag": "the tag",
}


class StalePlanError(PublishError):
    """A saved plan does not fit the present build or repository."""


def require_same_subject(saved: SavedPlan, subject: PublishSubject, where: str) -> None:
    """Compare what is published, and where, before a file is read.

    Raises:
        StalePlanError: it is another recipe, repository or target than that of the plan.
    """
    _raise_if_any(list(_subject_changes(saved.subject, subject)), where)


def require_as_planned(saved: SavedPlan, now: SavedPlan, plan: PublishPlan, target: Target) -> None:
    """Compare a saved plan with the one that has just been made.

    Args:
        saved: the plan to publish.
        now: the present plan, with its digests.
        plan: the present plan.
        target: the repository.

    Raises:
        StalePlanError: a file, a branch, the key or a final step is another one than planned; all are named.
    """
    found = [*_subject_changes(saved.subject, now.subject), *_release_changes(saved.release, now.release)]
    planned = {each.branch: each for each in saved.branches}
    present = {each.branch: each for each in now.branches}
    found += [f"{branch}: planned, and not in the build" for branch in planned.keys() - present.keys()]
    found += [f"{branch}: in the build, and not planned" for branch in present.keys() - planned.keys()]
    begun = False
    for entry in plan.branches:
        if entry.branch in planned:
            changes = list(_local_changes(planned[entry.branch], present[entry.branch]))
            moved, done = _remote_changes(planned[entry.branch], entry, target, check=not changes)
            found += [*changes, *moved]
            begun = begun or done
    if set(saved.left_alone) != set(now.left_alone):
        was, has = (printable(", ".join(sorted(each)) or "none") for each in (saved.left_alone, now.left_alone))
        found.append(f"the other branches of the repository are {has}, planned: {was}")
    if not begun and not set(now.final_steps) <= set(saved.final_steps):
        steps = printable("; ".join(now.final_steps))
        found.append(f"the final steps are {steps}, planned: {printable('; '.join(saved.final_steps)) or 'none'}")
    _raise_if_any(found, target.where)


def _raise_if_any(found: list[str], where: str) -> None:
    if not found:
        return
    more = [f"and {len(found) - _SHOWN:,} more"] if len(found) > _SHOWN else []
    raise StalePlanError(
        "the plan does not fit any more: nothing was written",
        where=where,
        why="\n    ".join(["since the plan was made, these have changed:", *found[:_SHOWN], *more]),
        hint="look at the changes, then make, approve and publish a new plan: "
        "packager publish RECIPE --dry-run --save-plan FILE",
    )


def _subject_changes(saved: PublishSubject, now: PublishSubject) -> Iterator[str]:
    before, after = saved.model_dump(), now.model_dump()
    for key, noun in _SUBJECT.items():
        if before[key] != after[key]:
            yield f"{noun}: {printable(after[key]) or 'none'}, planned: {printable(before[key]) or 'none'}"


def _release_changes(saved: PlannedRelease | None, now: PlannedRelease | None) -> Iterator[str]:
    if saved is None or now is None:
        if saved is not None or now is not None:
            keys = [each.keyid if each else "none" for each in (now, saved)]
            yield f"the signing key: {keys[0]}, planned: {keys[1]}"
        return
    if saved.keyid != now.keyid:
        yield f"the signing key: {now.keyid}, planned: {saved.keyid}"
    if saved.number != now.number:
        yield f"the number of the release: {now.number}, planned: {saved.number}"
    if saved.statement != now.statement:
        yield f"the statement of the release: sha256 {now.statement}, planned: {saved.statement}"


def _local_changes(planned: PlannedBranch, now: PlannedBranch) -> Iterator[str]:
    """Yield each file of the build that is not the planned one."""
    branch = planned.branch
    for name in sorted(planned.files.keys() | now.files.keys()):
        before, after = planned.files.get(name), now.files.get(name)
        if before != after:
            yield f"{branch}: {printable(name)}: {_described(after)}, planned: {_described(before)}"
    # A branch that a killed publish of this plan has finished gets no commit, so its message is "".
    if now.action != "unchanged" and planned.message != now.message:
        yield f"{branch}: its message: {printable(now.message)}, planned: {printable(planned.message)}"
    if planned.files == now.files and planned.statement != now.statement:
        yield f"{branch}: its statement: sha256 {now.statement or 'none'}, planned: {planned.statement or 'none'}"


def _described(file: PlannedFile | None) -> str:
    return f"{file.size_bytes:,} bytes, sha256 {file.sha256}" if file else "no file"


def _remote_changes(
    planned: PlannedBranch, entry: BranchPlan, target: Target, *, check: bool
) -> tuple[list[str], bool]:
    """Return how the branch has moved, and whether an earlier publish of this plan has begun to change it."""
    branch = planned.branch
    if entry.parent == planned.parent:
        if check and entry.action != planned.action:
            return [f"{branch}: the action: {entry.action}, planned: {planned.action}"], False
        return [], False
    if planned.action == "create" and _is_empty(entry):
        return [], True  # a killed publish had made the branch, and no commit on it
    if check and planned.action != "unchanged" and _is_published(planned, entry, target):
        return [], True
    if entry.parent is None:
        return [f"{branch}: it does not exist any more, its planned head is {(planned.parent or '')[:12]}"], False
    author = f" by {printable(entry.foreign_author)}" if entry.foreign_author else ""
    head = f"{planned.parent[:12]}" if planned.parent else "no such branch"
    return [f"{branch}: its head: {entry.parent[:12]}{author}, planned: {head}"], False


def _is_empty(entry: BranchPlan) -> bool:
    """Return whether the branch exists without files, as a host makes it."""
    return entry.parent is not None and not entry.removed and not entry.changed and len(entry.added) == entry.num_files


def _is_published(planned: PlannedBranch, entry: BranchPlan, target: Target) -> bool:
    """Return whether the head is this program's commit of exactly the planned files on the planned head."""
    if entry.action != "unchanged" or entry.foreign_author:
        return False
    if planned.parent is None:
        return True
    records = target.history(planned.branch)
    before = {record.commit: earlier.commit for record, earlier in pairwise(records)}
    return before.get(entry.parent or "") == planned.parent
