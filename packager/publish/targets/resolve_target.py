"""From what a recipe or a person says to the repository that is meant."""

import re
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path

from packager.errors import PublishError
from packager.publish.targets import Target
from packager.publish.targets.git import GitTarget
from packager.publish.targets.hub import HubTarget, NewRepository
from packager.publish.targets.local import LocalTarget
from packager.publish.targets.repository_per_variant import SeparateTarget
from packager.recipe import Recipe

# The token of target git; the Hub's client finds its own.
GIT_TOKEN = "PACKAGER_GIT_TOKEN"  # noqa: S105 - the variable's name
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_GIT_URL = re.compile(r"[a-z+]+://|[\w.-]+@[\w.-]+:")


def target_of(recipe: Recipe, dist: Path, environ: Mapping[str, str], log: Callable[[str], None]) -> Target:
    """Return the target that a recipe names; nothing is read or written yet.

    Args:
        recipe: its section `repository`, and its variants where each has a repository of its own.
        dist: the output folder: the local target and copies of git remotes are below it.
        environ: where the token for a git remote is.
        log: gets a line when something has to be waited for.
    """
    repository = recipe.repository
    if repository.url is not None:
        return _git(repository.url, dist, environ, log)

    def open_one(repository_id: str) -> Target:
        if repository.target == "local":
            return LocalTarget(dist / "hub", repository_id)
        new = NewRepository(visibility=repository.visibility, gated=repository.gated)
        return HubTarget(repository_id, new=new, log=log)

    if repository.layout == "branches":
        return open_one(repository.id)
    branches = [variant.branch for variant in recipe.expanded_variants()]
    return SeparateTarget({branch: open_one(repository.place(branch).repository) for branch in branches})


def open_target(address: str, dist: Path, environ: Mapping[str, str], log: Callable[[str], None]) -> Target:
    """Return the target that an address names; nothing is read or written yet.

    Args:
        address: namespace/name on the Hub, a git remote's URL, or a folder that the local target made.
        dist: where copies of git remotes are kept.
        environ: where the token for a git remote is.
        log: gets a line when something has to be waited for.

    Raises:
        PublishError: the address names nothing that can be a repository.
    """
    folder = Path(address).absolute()
    if _GIT_URL.match(address):
        return _git(address, dist, environ, log)
    if folder.is_dir() and len(folder.parts) > 3 and folder.parts[-3] == "models" and (folder / ".git").is_dir():
        return LocalTarget(folder.parents[2], f"{folder.parts[-2]}/{folder.parts[-1]}")
    if folder.is_dir():
        return _git(str(folder), dist, environ, log)
    if _HUB_ID.fullmatch(address):
        return HubTarget(address, log=log)
    raise PublishError(
        "this is no address of a repository",
        where=address,
        hint="give namespace/name for the Hub, the URL of a git remote, or a folder",
    )


def _git(url: str, dist: Path, environ: Mapping[str, str], log: Callable[[str], None]) -> GitTarget:
    staging = dist / "remotes" / sha256(url.encode()).hexdigest()[:16]
    return GitTarget(url, staging, token=environ.get(GIT_TOKEN, ""), log=log)
