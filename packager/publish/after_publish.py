"""What a publish does after its last branch: planned, asked about and shown with the rest, and done once."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from packager.errors import PublishError
from packager.publish.plan import PublishPlan
from packager.publish.targets import Target
from packager.variant import branch_problem


class Closing(Protocol):
    """A step after the last branch."""

    def plan(self, plan: PublishPlan) -> Sequence[str]:
        """Return what there is to do, a line each; nothing is written, and nothing is left to do the second time.

        Raises:
            PublishError: it cannot be done.
        """

    def carry_out(self, heads: Mapping[str, str]) -> None:
        """Do what was planned; `heads` are the branches' commits now."""


class ReleaseTag:
    """Gives the release a name: main's commit; or each variant's, where each has a repository of its own.

    Args:
        target: where it is published.
        name: of the tag.
    """

    def __init__(self, target: Target, name: str) -> None:
        self._target, self._name = target, name
        self._lacking: tuple[str, ...] = ()

    def plan(self, plan: PublishPlan) -> Sequence[str]:
        """Return which branches' heads get the tag.

        Raises:
            PublishError: it is no name for a tag, or names another commit already.
        """
        problem = branch_problem(self._name).replace("a branch has", "a tag has")
        if any(self._name == entry.branch for entry in plan.branches) or self._name in plan.left_alone:
            problem = "a branch has that name"
        if problem:
            raise PublishError(f"{self._name!r} cannot be a tag", where=plan.where, why=problem)
        found = self._target.read_tag(self._name)
        kept = {entry.branch: entry.parent for entry in plan.branches if entry.action == "unchanged"}
        for branch, commit in found.items():
            if commit and commit != kept.get(branch):
                raise PublishError(
                    f"the tag {self._name} is there and names {commit[:12]} of {branch}",
                    where=plan.where,
                    why="what is published now is something else",
                    hint="give this release another name: a tag that people use is not moved",
                )
        self._lacking = tuple(branch for branch, commit in found.items() if not commit)
        return [f"tag {self._name} on {', '.join(self._lacking)}"] if self._lacking else []

    def carry_out(self, heads: Mapping[str, str]) -> None:
        """Make the tag."""
        if self._lacking:
            self._target.tag(self._name, {branch: heads[branch] for branch in self._lacking})
