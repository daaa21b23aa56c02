"""The publish plan: the files of each branch compared with those of the repository. No effect, no network."""

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from packager.errors import PublishError
from packager.publish.targets import BranchState, LocalFile, StoredFile
from packager.system.text import format_bytes
from packager.variant import MAIN

PublishAction = Literal["create", "update", "unchanged"]


@dataclass(frozen=True, kw_only=True)
class FileChange:
    """A file that is written, with its size in the new commit, or removed, with its size in the old commit."""

    name: str
    size_bytes: int


@dataclass(frozen=True, kw_only=True)
class BranchPlan:
    """The changes of one branch.

    Attributes:
        branch: the branch's name.
        action: "create" or "update" make a commit, "unchanged" makes none.
        parent: the present head, None if the branch does not exist.
        foreign_author: the author of that head, "" if this program made it; the head stays in the history.
        added: files that the branch does not have.
        changed: files that the branch has with another content.
        removed: files of the branch that are not in the manifest.
        num_files: files in the manifest.
        total_bytes: size of the manifest's files.
        present_bytes: size of the added and changed files whose content the repository already holds, on any branch.
        message: the commit's message, "" if none is made.
    """

    branch: str
    action: PublishAction
    parent: str | None
    foreign_author: str
    added: tuple[FileChange, ...]
    changed: tuple[FileChange, ...]
    removed: tuple[FileChange, ...]
    num_files: int
    total_bytes: int
    present_bytes: int
    message: str = ""

    @property
    def written_bytes(self) -> int:
        """The size of the files added and changed."""
        return sum(change.size_bytes for change in (*self.added, *self.changed))

    @property
    def uploaded_bytes(self) -> int:
        """The part of `written_bytes` that is uploaded."""
        return self.written_bytes - self.present_bytes


@dataclass(frozen=True, kw_only=True)
class PublishPlan:
    """The changes of a repository.

    Attributes:
        where: the repository's address, for messages.
        branches: in the order of publishing, `main` last.
        left_alone: branches of the repository that this publish does not change.
        final_steps: one line per change after the last branch.
        warnings: one line per thing that readers with a key will report after the publish.
    """

    where: str
    branches: tuple[BranchPlan, ...]
    left_alone: tuple[str, ...]
    final_steps: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()

    @property
    def effects(self) -> tuple[str, ...]:
        """Every change, for the confirmation prompt."""
        return (*self.changing, *self.final_steps)

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
        """The part of `written_bytes` that is uploaded, if no content is on two branches."""
        return sum(entry.uploaded_bytes for entry in self.branches)


def plan_publish(
    files: Mapping[str, Mapping[str, LocalFile]], remote: Mapping[str, BranchState], *, where: str
) -> PublishPlan:
    """Compare the files to publish with those of the repository.

    Args:
        files: by branch and name.
        remote: the target's branches.
        where: the target's address, for messages.

    Raises:
        PublishError: neither `files` nor the repository has `main`.
    """
    if MAIN not in files and MAIN not in remote:
        raise PublishError(
            f"{MAIN} is not among the branches and the repository has none",
            where=where,
            hint=f"publish {MAIN} with the others: readers who name no branch get {MAIN}",
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
    """Return the digests of the files that the branch's repository already holds, on any branch."""
    repository = remote[branch].repository if branch in remote else ""
    states = [state for state in remote.values() if state.repository == repository]
    found = {name for state in states for file in state.files.values() for name in (file.sha256, file.blob_id)}
    return found - {""}


def plan_line(plan: PublishPlan) -> str:
    """Return the plan in one line."""
    actions = Counter(entry.action for entry in plan.branches)
    counts = ", ".join(f"{count} {action}" for action, count in sorted(actions.items()))
    present_bytes = plan.written_bytes - plan.uploaded_bytes
    known = f", {format_bytes(present_bytes)} already there" if present_bytes else ""
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
    action: PublishAction = "create" if state is None else "update" if added or changed or removed else "unchanged"
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
