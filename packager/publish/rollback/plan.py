"""Which commit each branch goes back to, and what that changes; nothing is written."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from packager.errors import PublishError
from packager.publish.plan import FileChange
from packager.publish.published.states import published_states
from packager.publish.rollback.history import Line
from packager.publish.targets import BranchState, CommitRecord, HeadMovedError, StoredFile, Target, same_files
from packager.receipt import GIT_ATTRIBUTES
from packager.system.text import printable
from packager.variant import MAIN

Action = Literal["restore", "done", "left alone"]
States = Mapping[str, BranchState]

_ABBREVIATED = re.compile(r"[0-9a-f]{7,40}\Z")
_HOSTS_FILES = frozenset({GIT_ATTRIBUTES})  # hosts begin a branch with a commit that holds nothing else


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is asked for.

    Attributes:
        branches: these; none means the whole release.
        to: a commit to go back to, of the one branch named, or of main for the whole release; "" goes one back.
        again: go further back from where the last rollback led.
    """

    branches: tuple[str, ...] = ()
    to: str = ""
    again: bool = False


@dataclass(frozen=True, kw_only=True)
class BranchRollback:
    """What a rollback does to one branch.

    Attributes:
        branch: its name.
        action: whether a commit is made; "done" if the branch holds the files already.
        head: its head as it is now.
        to: the commit whose files it gets, or holds already; None if it is left alone.
        reason: why no commit is made, "" if one is.
        added: files that come back, with their sizes then.
        changed: files that get their earlier content, with their sizes then.
        removed: files that go, with their sizes now.
        files: all that it is to hold, if a commit is made.
    """

    branch: str
    action: Action
    head: CommitRecord
    to: CommitRecord | None = None
    reason: str = ""
    added: tuple[FileChange, ...] = ()
    changed: tuple[FileChange, ...] = ()
    removed: tuple[FileChange, ...] = ()
    files: Mapping[str, StoredFile] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RollbackPlan:
    """What a rollback does to a repository.

    Attributes:
        where: the repository.
        release: the commit of main that the whole release goes back to, None if branches were named.
        branches: in the order they are restored, main last.
    """

    where: str
    release: CommitRecord | None
    branches: tuple[BranchRollback, ...]

    @property
    def effects(self) -> tuple[str, ...]:
        """Everything that would be done, for the question whether it shall be."""
        return self.changing

    @property
    def changing(self) -> tuple[str, ...]:
        """The branches that get a commit."""
        return tuple(entry.branch for entry in self.branches if entry.action == "restore")


def plan_rollback(target: Target, request: Request) -> RollbackPlan:
    """Find out which commit each branch goes back to, and what that changes; nothing is written.

    Raises:
        PublishError: there is nothing to go back to, or the request does not fit the repository.
    """
    states = published_states(target, request.branches or (MAIN,))
    if len(request.branches) > 1 and (request.to or request.again):
        raise PublishError(
            f"--{'to' if request.to else 'again'} is for one branch or for the whole release", where=target.where
        )
    if request.to and request.again:
        raise PublishError("--to and --again contradict each other", where=target.where)
    chosen = sorted(set(request.branches or states), key=lambda branch: (branch == MAIN, branch))
    lines = {branch: Line(branch, target.history(branch)) for branch in chosen}
    for branch, line in lines.items():
        if not line.records or line.head.commit != states[branch].commit:
            raise HeadMovedError(f"{branch} is being moved by somebody else", where=target.where, hint="run again")
    if request.branches:
        wanted = [_wanted_by_name(lines[branch], request, target.where) for branch in chosen]
        return _plan(target, states, lines, dict(zip(chosen, wanted, strict=True)), None)
    release = _wanted_release(lines, states, request, target)
    if not files_of(target, release):
        raise _nothing_before(MAIN, lines[MAIN].shown, target.where)
    at_that_time = {branch: line.at(release.time_s) for branch, line in lines.items()}
    if at_that_time[MAIN] is not release:
        raise PublishError(
            f"the times of the commits do not tell what belonged to {release.commit[:12]} of {MAIN}",
            where=target.where,
            why=f"a later commit of {MAIN} has the same time or an earlier one: a clock was wrong",
            hint="put back each branch by name: --branch NAME, with --to COMMIT where it is not the one before",
        )
    return _plan(target, states, lines, at_that_time, release)


def _wanted_by_name(line: Line, request: Request, where: str) -> CommitRecord:
    """Return the commit that a branch given by name goes back to, or is back at."""
    if request.to:
        return _found(line, request.to, where)
    if line.is_rollback() and not request.again:
        return line.shown
    wanted = line.before(line.shown if request.again else line.head)
    if wanted is None:
        raise _nothing_before(line.branch, line.shown, where)
    return wanted


def _wanted_release(lines: Mapping[str, Line], states: States, request: Request, target: Target) -> CommitRecord:
    """Return the commit of main that marks the release to go back to, or that the last rollback was to go back to."""
    main, where = lines[MAIN], target.where
    if request.to:
        return _found(main, request.to, where)
    if main.head.author:
        raise PublishError(
            f"the head of {MAIN} was made by {printable(main.head.author)}, not by packager",
            where=where,
            why=f"{main.head.commit[:12]} {printable(main.head.title)}",
            hint=f"undo it with --branch {MAIN}, then run again; or name with --to the commit of {MAIN} to go back to",
        )
    latest = max((line for line in lines.values() if not line.head.author), key=_event)
    before: CommitRecord | None = main.shown  # a publish that did not get as far as main: main need not move
    if goals := main.find(latest.release_goal() or "none"):
        goal = main.resolved(goals[0])
        if not (request.again and _is_complete(goal, lines, states, target)):
            return goal
        before = main.before(goal)
    elif latest.branch == MAIN:
        before = main.before(main.shown)
    if before is None:
        raise _nothing_before(MAIN, main.shown, where)
    return before


def _event(line: Line) -> tuple[int, bool, bool]:
    """Return what orders the branches by the last thing that a publish or a rollback of the release did to them.

    In the same second a rollback is younger than a publish, and main, which is published last, than the rest. A branch
    that was put back by name counts as if what it undid had not been.
    """
    is_release = bool(line.release_goal())
    return (line.head if is_release else line.shown).time_s, is_release, line.branch == MAIN


def _is_complete(goal: CommitRecord, lines: Mapping[str, Line], states: States, target: Target) -> bool:
    """Return whether every branch of ours holds what it held at the goal's time."""
    for branch, line in lines.items():
        wanted = line.at(goal.time_s)
        if line.head.author or wanted is None or wanted is line.head:
            continue
        files = files_of(target, wanted)
        if files and not same_files(states[branch].files, files):
            return False
    return True


def _found(line: Line, commit: str, where: str) -> CommitRecord:
    matches = line.find(commit) if _ABBREVIATED.match(commit) else []
    if len(matches) != 1:
        latest = ", ".join(f"{record.commit[:12]} ({printable(record.title)})" for record in line.records[:5])
        raise PublishError(
            f"{commit!r} is not one commit of {line.branch}",
            where=where,
            why="" if matches else "a commit is named by 7 to 40 hex digits of its id",
            hint=f"the latest ones are {latest}",
        )
    return line.resolved(matches[0])


def _nothing_before(branch: str, record: CommitRecord, where: str) -> PublishError:
    return PublishError(
        f"{branch} has nothing to go back to",
        where=where,
        why=f"{record.commit[:12]} ({printable(record.title)}) is the first that holds files",
    )


def _plan(
    target: Target,
    states: States,
    lines: Mapping[str, Line],
    wanted: Mapping[str, CommitRecord | None],
    release: CommitRecord | None,
) -> RollbackPlan:
    entries = [
        _plan_branch(target, states[branch], line, wanted[branch], by_name=release is None)
        for branch, line in lines.items()
    ]
    return RollbackPlan(where=target.where, release=release, branches=tuple(entries))


def _plan_branch(
    target: Target, state: BranchState, line: Line, wanted: CommitRecord | None, *, by_name: bool
) -> BranchRollback:
    head = line.head
    files: Mapping[str, StoredFile] = {}
    if wanted is not None:
        files = state.files if wanted is head else files_of(target, wanted)
    if wanted is None or not files:
        if by_name:
            raise _nothing_before(line.branch, line.shown, target.where)
        reason = "it was not there then: nothing to go back to"
        return BranchRollback(branch=line.branch, action="left alone", head=head, reason=reason)
    if same_files(state.files, files):
        reason = f"it holds what {wanted.commit[:12]} does"
        more = "; --again goes further back" if line.is_rollback() else ""
        return BranchRollback(branch=line.branch, action="done", head=head, to=wanted, reason=reason + more)
    if head.author and not by_name and line.branch != MAIN:
        reason = f"its head was made by {printable(head.author)}: --branch {line.branch} puts it back"
        return BranchRollback(branch=line.branch, action="left alone", head=head, reason=reason)
    now = state.files
    return BranchRollback(
        branch=line.branch,
        action="restore",
        head=head,
        to=wanted,
        files=files,
        added=_changes(files, sorted(files.keys() - now.keys())),
        changed=_changes(
            files, [name for name in sorted(files.keys() & now.keys()) if not files[name].holds(now[name])]
        ),
        removed=_changes(now, sorted(now.keys() - files.keys())),
    )


def files_of(target: Target, record: CommitRecord) -> Mapping[str, StoredFile]:
    """Return what a commit holds; nothing if that is nothing but what hosts put there."""
    files = target.read_back(record.commit)
    return files if files.keys() - _HOSTS_FILES else {}


def _changes(files: Mapping[str, StoredFile], names: Sequence[str]) -> tuple[FileChange, ...]:
    return tuple(FileChange(name=name, size_bytes=files[name].size_bytes) for name in names)
