"""Which branches are published, for whoever cannot go on without one."""

from collections.abc import Collection, Mapping

from packager.errors import PublishError
from packager.publish.targets import BranchState, Target
from packager.system.text import printable


def published_states(target: Target, named: Collection[str] = ()) -> Mapping[str, BranchState]:
    """Return every branch that is there.

    Args:
        target: the repository.
        named: these must be.

    Raises:
        PublishError: nothing is there, or a branch named is not.
    """
    states = target.read_branches()
    if not states:
        raise PublishError(
            "nothing is published here, or it does not show itself",
            where=target.where,
            hint="check the address; a private repository shows itself to a token that may read it (HF_TOKEN, for git "
            "PACKAGER_GIT_TOKEN)",
        )
    if absent := [branch for branch in named if branch not in states]:
        raise PublishError(
            f"there is no branch {', '.join(absent)}",
            where=target.where,
            hint=f"there are {printable(', '.join(sorted(states)))}",
        )
    return states
