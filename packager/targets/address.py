"""From what a person types to the repository it means."""

from collections.abc import Callable
from pathlib import Path

from packager.errors import PublishError
from packager.targets import Target
from packager.targets.local import LocalTarget


def open_target(address: str, say: Callable[[str], None]) -> Target:  # noqa: ARG001 - for targets that wait
    """Return the target that an address names; nothing is read or written yet.

    Args:
        address: a folder below some `models/<namespace>/<name>`, as the local target makes it.
        say: gets a line when something has to be waited for.

    Raises:
        PublishError: the address names nothing that can be a repository.
    """
    folder = Path(address).absolute()
    if folder.is_dir() and len(folder.parts) > 4 and folder.parts[-3] == "models":
        return LocalTarget(folder.parents[2], f"{folder.parts[-2]}/{folder.parts[-1]}")
    raise PublishError("this is no address of a repository", where=address)
