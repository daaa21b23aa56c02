"""The rollback plan: the commit that each branch goes back to, and the changed files; nothing is written."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from packager.errors import PublishError
from packager.publish.plan import FileChange
from packager.publish.published.states import published_states
from packager.publish.release_history import States
from packager.publish.rollback.history import BranchHistory
from packager.publish.targets import (
    BranchState,
    CommitRecord,
    HeadMovedError,
    LocalFile,
    StoredFile,
    Target,
    same_files,
)
from packager.receipt import GIT_ATTRIBUTES, STATEMENTS
from packager.system.text import printable
from packager.variant import MAIN, branch_problem

RollbackAction = Literal["restore", "sign", "done", "left alone"]

_ABBREVIATED = re.compile(r"[0-9a-f]{7,40}\Z")
_HOSTS_FILES = frozenset({GIT_ATTRIBUTES})  # hosts begin a branch with a commit that holds nothing else


@dataclass(frozen=True, kw_only=True)
class RollbackRequest:
    """The branches to roll back, and how far.

    Attributes:
        branches: the branches; none means the whole release.
        to: a commit or a tag to go back to, of the one branch named, or of main for the whole release; "" goes one
            back.
        further_back: go back from the commit that the last rollback went back to.
    """

    branches: tuple[str, ...] = ()
    to: str = ""
    further_back: bool = False


@dataclass(frozen=True, kw_only=True)
class BranchRollback:
    """The changes of one branch.

    Attributes:
        branch: the branch's name.
        action: "restore" makes a commit, "sign" makes one that only replaces the release statement of main; "done" if
            the branch already holds the files.
        head: the present head.
        to: the commit whose files the branch gets or already holds; None if the branch is left alone.
        reason: why no commit is made, "" if one is made.
        is_newer: the branch had no files at the time that the release goes back to.
        added: files that come back, with their restored sizes.
        changed: files that get their earlier content, with their restored sizes.
        removed: files that are removed, with their present sizes.
        files: all files of the branch after the rollback, if a commit is made.
        replacing: new signed statements, which replace those of `to`.
    """

    branch: str
    action: RollbackAction
    head: CommitRecord
    to: CommitRecord | None = None
    reason: str = ""
    is_newer: bool = False
    added: tuple[FileChange, ...] = ()
    changed: tuple[FileChange, ...] = ()
    removed: tuple[FileChange, ...] = ()
    files: Mapping[str, StoredFile] = field(default_factory=dict)
    replacing: Mapping[str, LocalFile] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RollbackPlan:
    """The changes of a repository.

    Attributes:
        where: the repository's address.
        release: the commit of main that the whole release goes back to, None if branches were named.
        branches: in the order of the rollback, main last.
        signs: the number of the release that is signed, 0 if no release statement is made.
        warnings: one line per thing that readers with a key will report after the rollback.
    """

    where: str
    release: CommitRecord | None
    branches: tuple[BranchRollback, ...]
    signs: int = 0
    warnings: tuple[str, ...] = ()

    @property
    def effects(self) -> tuple[str, ...]:
        """Every change, for the confirmation prompt."""
        return self.changing

    @property
    def unlisted(self) -> tuple[str, ...]:
        """The branches that stay although the release that main goes back to did not have them."""
        restored = any(entry.branch == MAIN and entry.action == "restore" for entry in self.branches)
        entries = self.branches if self.release and restored else ()
        return tuple(entry.branch for entry in entries if entry.action == "left alone" and entry.is_newer)

    @property
    def changing(self) -> tuple[str, ...]:
        """The branches that get a commit."""
        return tuple(entry.branch for entry in self.branches if entry.action in ("restore", "sign"))


def plan_rollback(
    target: Target, request: RollbackRequest, sign: Callable[[RollbackPlan, States], RollbackPlan] | None = None
) -> RollbackPlan:
    """Find the commit that each branch goes back to, and the changed files; write nothing.

    Args:
        target: the repository.
        request: which branches, and how far back.
        sign: adds new signed statements to the plan; then files are compared without the statements, which a rollback
            that was killed has replaced.

    Raises:
        HeadMovedError: a branch moved while its history was read.
        PublishError: there is nothing to go back to, or the request does not fit the repository.
    """
    states = published_states(target, request.branches or (MAIN,))
    plan = _plan_states(target, request, states, ignoring=STATEMENTS if sign else frozenset())
    return sign(plan, states) if sign else plan


def _plan_states(target: Target, request: RollbackRequest, states: States, *, ignoring: frozenset[str]) -> RollbackPlan:
    if len(request.branches) > 1 and (request.to or request.further_back):
        raise PublishError(
            f"--{'to' if request.to else 'again'} is for one branch or for the whole release", where=target.where
        )
    if request.to and request.further_back:
        raise PublishError("--to and --again contradict each other", where=target.where)
    chosen = sorted(set(request.branches or states), key=lambda branch: (branch == MAIN, branch))
    histories = {branch: BranchHistory(branch, target.history(branch)) for branch in chosen}
    for branch, history in histories.items():
        if not history.records or history.head.commit != states[branch].commit:
            raise HeadMovedError(f"{branch} is moving", where=target.where, hint="run again")
    if request.branches:
        wanted = [_wanted_by_name(histories[branch], request, target) for branch in chosen]
        return _plan(target, states, histories, dict(zip(chosen, wanted, strict=True)), None, ignoring)
    release = _wanted_release(histories, states, request, target, ignoring)
    if not files_of(target, release):
        raise _nothing_before(MAIN, histories[MAIN].shown, target.where)
    at_that_time = {branch: history.at(release.time_s) for branch, history in histories.items()}
    if at_that_time[MAIN] is not release:
        raise PublishError(
            f"the times of the commits do not show which commits belonged to {release.commit[:12]} of {MAIN}",
            where=target.where,
            why=f"a later commit of {MAIN} has the same time or an earlier one: a clock was wrong",
            hint="put back each branch by name: --branch NAME, with --to COMMIT unless it is the one before the head",
        )
    return _plan(target, states, histories, at_that_time, release, ignoring)


def _wanted_by_name(history: BranchHistory, request: RollbackRequest, target: Target) -> CommitRecord:
    """Return the commit that a branch given by name goes back to, or has gone back to."""
    if request.to:
        return _found(history, request.to, target)
    if history.is_rollback() and not request.further_back:
        return history.shown
    wanted = history.before(history.shown if request.further_back else history.changed)
    if wanted is None:
        raise _nothing_before(history.branch, history.shown, target.where)
    return wanted


def _wanted_release(
    histories: Mapping[str, BranchHistory],
    states: States,
    request: RollbackRequest,
    target: Target,
    ignoring: frozenset[str],
) -> CommitRecord:
    """Return the commit of main that ends the release to go back to, or the goal of the last rollback."""
    main, where = histories[MAIN], target.where
    if request.to:
        return _found(main, request.to, target)
    if main.head.author:
        raise PublishError(
            f"{printable(main.head.author)} made the head of {MAIN}, not packager",
            where=where,
            why=f"{main.head.commit[:12]} {printable(main.head.title)}",
            hint=f"undo it with --branch {MAIN}, then run again; or name with --to the commit of {MAIN} to go back to",
        )
    latest = max((history for history in histories.values() if not history.head.author), key=_event)
    before: CommitRecord | None = main.shown  # main need not move if the publish ended before main
    if goals := main.find(latest.release_goal() or "none"):
        goal = main.resolved(goals[0])
        if not (request.further_back and _is_complete(goal, histories, states, target, ignoring)):
            return goal
        before = main.before(goal)
    elif latest.branch == MAIN:
        before = main.before(main.shown)
    if before is None:
        raise _nothing_before(MAIN, main.shown, where)
    return before


def _event(history: BranchHistory) -> tuple[int, bool, bool]:
    """Return a key that sorts branches by their last publish or rollback of the release.

    Within the same second a rollback is younger than a publish, and main, which is published last, is younger than the
    other branches. A rollback of one branch by name counts as the commit that it went back to.
    """
    is_release = bool(history.release_goal())
    return (history.head if is_release else history.shown).time_s, is_release, history.branch == MAIN


def _is_complete(
    goal: CommitRecord,
    histories: Mapping[str, BranchHistory],
    states: States,
    target: Target,
    ignoring: frozenset[str],
) -> bool:
    """Return whether every branch with a head of this program holds its files of the goal's time."""
    for branch, history in histories.items():
        wanted = history.at(goal.time_s)
        if history.head.author or wanted is None or wanted is history.head:
            continue
        files = files_of(target, wanted)
        if files and not _same(states[branch].files, files, ignoring):
            return False
    return True


def _same(now: Mapping[str, StoredFile], then: Mapping[str, StoredFile], ignoring: frozenset[str]) -> bool:
    """Return whether a head holds the files of a commit, whatever is in those to ignore; it must have them, too."""
    if ignoring & then.keys() - now.keys():
        return False  # somebody has taken the signed statements off
    pair = [{name: file for name, file in files.items() if name not in ignoring} for files in (now, then)]
    return same_files(*pair)


def _found(history: BranchHistory, name: str, target: Target) -> CommitRecord:
    """Return the commit of a branch that an abbreviated id or a tag names."""
    matches = history.find(name) if _ABBREVIATED.match(name) else []
    tagged = ""
    if not matches and not branch_problem(name, noun="tag"):
        tagged = target.read_tag(name).get(history.branch, "")
        matches = history.find(tagged) if tagged else []
    if len(matches) != 1:
        latest = ", ".join(f"{record.commit[:12]} ({printable(record.title)})" for record in history.records[:5])
        why = f"the tag names {tagged[:12]}, which is not in its history" if tagged else ""
        raise PublishError(
            f"{name!r} is not one commit of {history.branch}",
            where=target.where,
            why=why or ("" if matches else "neither 7 to 40 hex digits of a commit's id nor a tag of this branch"),
            hint=f"the latest ones are {latest}",
        )
    return history.resolved(matches[0])


def _nothing_before(branch: str, record: CommitRecord, where: str) -> PublishError:
    return PublishError(
        f"{branch} has nothing to go back to",
        where=where,
        why=f"{record.commit[:12]} ({printable(record.title)}) is the first that holds files",
    )


def _plan(
    target: Target,
    states: States,
    histories: Mapping[str, BranchHistory],
    wanted: Mapping[str, CommitRecord | None],
    release: CommitRecord | None,
    ignoring: frozenset[str],
) -> RollbackPlan:
    entries = [
        _plan_branch(target, states[branch], history, wanted[branch], ignoring, by_name=release is None)
        for branch, history in histories.items()
    ]
    return RollbackPlan(where=target.where, release=release, branches=tuple(entries))


def _plan_branch(
    target: Target,
    state: BranchState,
    history: BranchHistory,
    wanted: CommitRecord | None,
    ignoring: frozenset[str],
    *,
    by_name: bool,
) -> BranchRollback:
    head = history.head
    files: Mapping[str, StoredFile] = {}
    if wanted is not None:
        files = state.files if wanted is head else files_of(target, wanted)
    if wanted is None or not files:
        if by_name:
            raise _nothing_before(history.branch, history.shown, target.where)
        reason = "it did not exist then: nothing to go back to"
        return BranchRollback(branch=history.branch, action="left alone", head=head, reason=reason, is_newer=True)
    if _same(state.files, files, ignoring):
        reason = f"it already holds the files of {wanted.commit[:12]}"
        more = "; --again goes further back" if history.is_rollback() else ""
        return BranchRollback(branch=history.branch, action="done", head=head, to=wanted, reason=reason + more)
    if head.author and not by_name and history.branch != MAIN:
        reason = f"{printable(head.author)} made its head: --branch {history.branch} puts it back"
        return BranchRollback(branch=history.branch, action="left alone", head=head, reason=reason)
    entry = BranchRollback(branch=history.branch, action="restore", head=head, to=wanted)
    return with_files(entry, state.files, files)


def with_files(entry: BranchRollback, now: Mapping[str, StoredFile], files: Mapping[str, StoredFile]) -> BranchRollback:
    """Return the entry of a branch that gets a commit, with its present files and those after the rollback."""
    changed = [name for name in sorted(files.keys() & now.keys()) if not files[name].holds(now[name])]
    return replace(
        entry,
        files=files,
        added=_changes(files, sorted(files.keys() - now.keys())),
        changed=_changes(files, changed),
        removed=_changes(now, sorted(now.keys() - files.keys())),
    )


def files_of(target: Target, record: CommitRecord) -> Mapping[str, StoredFile]:
    """Return a commit's files; none if the commit only has the file that hosts create."""
    files = target.read_back(record.commit)
    return files if files.keys() - _HOSTS_FILES else {}


def _changes(files: Mapping[str, StoredFile], names: Sequence[str]) -> tuple[FileChange, ...]:
    return tuple(FileChange(name=name, size_bytes=files[name].size_bytes) for name in names)
