"""What publishing would do: what each branch is to hold, compared with what is there. No effect, no network."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from packager.errors import PublishError
from packager.publish.targets import BranchState, LocalFile, StoredFile
from packager.system.text import format_bytes
from packager.variant import MAIN

Action = Literal["create", "update", "unchanged"]


@dataclass(frozen=True, kw_only=True)
class FileChange:
    """A file that is written or removed, and its size in the new commit, or in the old one if it is removed."""

    name: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class BranchPlan:
    """What publishing does to one branch.

    Attributes:
        branch: its name.
        action: whether a commit is made, and on what.
        parent: the head as it is now, None if the branch is not there.
        foreign_author: who made that head, "" when it was this program; it stays in the history.
        added: files that the branch does not have.
        changed: files that it has with another content.
        removed: files that it has and the manifest has not.
        num_files: files in the manifest.
        total_bytes: their size.
        present_bytes: the size of those added and changed whose content the repository holds already, on some branch.
    """

    branch: str
    action: Action
    parent: str | None
    foreign_author: str
    added: tuple[FileChange, ...]
    changed: tuple[FileChange, ...]
    removed: tuple[FileChange, ...]
    num_files: int
    total_bytes: int
    present_bytes: int

    @property
    def written_bytes(self) -> int:
        """The size of the files added and changed."""
        return sum(change.size_bytes for change in (*self.added, *self.changed))

    @property
    def uploaded_bytes(self) -> int:
        """What of that must travel."""
        return self.written_bytes - self.present_bytes


@dataclass(frozen=True, kw_only=True)
class PublishPlan:
    """What publishing does to a repository.

    Attributes:
        where: the repository, as people know it.
        branches: in the order they are published, `main` last.
        left_alone: branches that are there and not in this publish.
        closing: what comes after the last branch, a line each.
    """

    where: str
    branches: tuple[BranchPlan, ...]
    left_alone: tuple[str, ...]
    closing: tuple[str, ...] = ()

    @property
    def effects(self) -> tuple[str, ...]:
        """Everything that would be done, for the question whether it shall be."""
        return (*self.changing, *self.closing)

    @property
    def changing(self) -> tuple[str, ...]:
        """The branches that get a commit."""
        return tuple(entry.branch for entry in self.branches if entry.action != "unchanged")

    @property
    def written_bytes(self) -> int:
        """The size of the files added and changed on all branches."""
        return sum(entry.written_bytes for entry in self.branches)

    @property
    def uploaded_bytes(self) -> int:
        """What of that must travel, if nothing is on two branches."""
        return sum(entry.uploaded_bytes for entry in self.branches)


def plan_publish(
    files: Mapping[str, Mapping[str, LocalFile]], remote: Mapping[str, BranchState], *, where: str
) -> PublishPlan:
    """Compare what the branches are to hold with what is there.

    Args:
        files: by branch and name.
        remote: the target's branches.
        where: the target, for people.

    Raises:
        PublishError: there would be no `main`.
    """
    if MAIN not in files and MAIN not in remote:
        raise PublishError(
            f"{MAIN} is not among the branches and the repository has none",
            where=where,
            hint=f"publish {MAIN} together with the others: it is what a reader gets who names no branch",
        )
    ordered = sorted(files, key=lambda branch: branch == MAIN)
    return PublishPlan(
        where=where,
        branches=tuple(
            _plan_branch(branch, files[branch], remote.get(branch), _held(remote, branch)) for branch in ordered
        ),
        left_alone=tuple(sorted(remote.keys() - files.keys())),
    )


def _held(remote: Mapping[str, BranchState], branch: str) -> Collection[str]:
    """Return the digests of what the branch's repository has already, on any branch."""
    repository = remote[branch].repository if branch in remote else ""
    states = [state for state in remote.values() if state.repository == repository]
    found = {name for state in states for file in state.files.values() for name in (file.sha256, file.blob_id)}
    return found - {""}


def plan_line(plan: PublishPlan) -> str:
    """Return the plan in one line."""
    actions = Counter(entry.action for entry in plan.branches)
    counts = ", ".join(f"{count} {action}" for action, count in sorted(actions.items()))
    there = plan.written_bytes - plan.uploaded_bytes
    known = f", {format_bytes(there)} already there" if there else ""
    return f"{plan.where}: {counts}; {format_bytes(plan.uploaded_bytes)} to upload{known}"


def _plan_branch(
    branch: str, files: Mapping[str, LocalFile], state: BranchState | None, held: Collection[str]
) -> BranchPlan:
    stored: Mapping[str, StoredFile] = state.files if state else {}
    added = tuple(_change(name, files[name]) for name in sorted(files.keys() - stored.keys()))
    removed = tuple(_change(name, stored[name]) for name in sorted(stored.keys() - files.keys()))
    common = sorted(files.keys() & stored.keys())
    changed = tuple(_change(name, files[name]) for name in common if not stored[name].holds(files[name]))
    new = [files[change.name] for change in (*added, *changed)]
    action: Action = "create" if state is None else "update" if added or changed or removed else "unchanged"
    return BranchPlan(
        branch=branch,
        action=action,
        parent=state.commit if state else None,
        foreign_author=state.foreign_author if state else "",
        added=added,
        changed=changed,
        removed=removed,
        num_files=len(files),
        total_bytes=sum(file.size_bytes for file in files.values()),
        present_bytes=sum(file.size_bytes for file in new if file.sha256 in held or file.blob_id in held),
    )


def _change(name: str, file: LocalFile | StoredFile) -> FileChange:
    return FileChange(name=name, size_bytes=file.size_bytes)
