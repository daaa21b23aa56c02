"""Read the branches of a repository that must not be empty."""

from collections.abc import Collection, Mapping

from packager.errors import PublishError
from packager.publish.targets import BranchState, Target
from packager.system.text import printable


def published_states(target: Target, named: Collection[str] = ()) -> Mapping[str, BranchState]:
    """Return every branch.

    Args:
        target: the repository.
        named: branches that must exist.

    Raises:
        PublishError: the repository has no branches, or lacks one of `named`.
    """
    states = target.read_branches()
    if not states:
        raise PublishError(
            "nothing is published here, or the token may not read it",
            where=target.where,
            hint="check the address; a private repository needs a token that may read it (HF_TOKEN, for git "
            "PACKAGER_GIT_TOKEN)",
        )
    if absent := [branch for branch in named if branch not in states]:
        raise PublishError(
            f"there is no branch {', '.join(absent)}",
            where=target.where,
            hint=f"the branches are {printable(', '.join(sorted(states)))}",
        )
    return states
