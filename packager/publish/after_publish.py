"""The steps after the last branch of a publish: planned, confirmed and shown with the branches, and applied once.

A step that fails when it is applied is an error at the end: the branches are published, and stay so.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Final, Protocol

from packager.errors import PackagerError, PublishError
from packager.publish.plan import PublishPlan
from packager.publish.targets import Target
from packager.system.text import printable
from packager.variant import MAIN, branch_problem

_MOST_NOTES: Final = 16_000  # characters


class FinalStep(Protocol):
    """A step after the last branch."""

    def plan(self, plan: PublishPlan) -> Sequence[str]:
        """Return one line per change that `apply` would make; write nothing. A step that was applied has no changes.

        Raises:
            PublishError: the step cannot be applied.
        """

    def apply(self, heads: Mapping[str, str]) -> None:
        """Make the planned changes; `heads` are the present head commits by branch."""


def apply_final_steps(steps: Sequence[FinalStep], heads: Mapping[str, str], where: str) -> None:
    """Apply every step; a step that fails does not stop the others.

    Raises:
        PublishError: steps failed; every branch is published.
    """
    failed: list[PackagerError] = []
    for step in steps:
        try:
            step.apply(heads)
        except PackagerError as error:
            failed.append(error)
    if failed:
        raise PublishError(
            "every branch is published, but a final step failed",
            where=where,
            why="; ".join(error.brief for error in failed),
            hint="publish again: it changes no branch and makes the steps that are missing",
        )


class ReleaseTag:
    """Tags the release: the commit of main, or one commit per variant if each variant has its own repository.

    Args:
        target: where the release is published.
        name: the tag's name.
    """

    def __init__(self, target: Target, name: str) -> None:
        self._target, self._name = target, name
        self._lacking: tuple[str, ...] = ()

    def plan(self, plan: PublishPlan) -> Sequence[str]:
        """Return which branches' heads get the tag.

        Raises:
            PublishError: the name is not valid for a tag, or the tag exists and names another commit.
        """
        problem = branch_problem(self._name, noun="tag")
        if any(self._name == entry.branch for entry in plan.branches) or self._name in plan.left_alone:
            problem = "a branch has that name"
        if problem:
            raise PublishError(f"{self._name!r} cannot be a tag", where=plan.where, why=problem)
        found = self._target.read_tag(self._name)
        unchanged = {entry.branch: entry.parent for entry in plan.branches if entry.action == "unchanged"}
        for branch, commit in found.items():
            if commit and commit != unchanged.get(branch):
                raise PublishError(
                    f"the tag {self._name} exists and names {commit[:12]} of {branch}",
                    where=plan.where,
                    why="this publish has other content",
                    hint="give this release another name: a tag that people use is not moved",
                )
        self._lacking = tuple(branch for branch, commit in found.items() if not commit)
        return [f"tag {self._name} on {', '.join(self._lacking)}"] if self._lacking else []

    def apply(self, heads: Mapping[str, str]) -> None:
        """Make the tag."""
        if self._lacking:
            notes = release_notes(self._name, self._target, heads)
            self._target.tag(self._name, {branch: heads[branch] for branch in self._lacking}, notes)


def release_notes(tag: str, target: Target, heads: Mapping[str, str]) -> str:
    """Return the message of a tag: what the last commit of each branch changed, `main` first.

    Where that is longer than hosts take, only the first line of each commit is there, and the notes say so.

    Args:
        tag: its name.
        target: where the branches are published.
        heads: the branches of the release, with their head commits.
    """
    found = []
    for branch in sorted(heads, key=lambda name: (name != MAIN, name)):
        record = next((each for each in target.history(branch) if each.commit == heads[branch]), None)
        if record is None:  # somebody has moved the branch: the release is still what was published
            found.append((f"{branch} at {heads[branch][:12]}", ""))
            continue
        day = time.strftime("%Y-%m-%d", time.gmtime(record.time_s))
        title, _, body = record.message.partition("\n")
        head = f"{branch} at {record.commit[:12]} of {day}: {printable(title.removeprefix(f'{branch}: '))}"
        found.append((head, "\n".join(printable(line) for line in body.strip().splitlines())))
    whole = "\n\n".join("\n\n".join(filter(None, entry)) for entry in found)
    if len(whole) > _MOST_NOTES:
        titles = "\n".join(head for head, _ in found)
        whole = f"{titles}\n\nThe messages of the commits say more of each branch."
    return f"Release {tag}\n\n{whole}"
