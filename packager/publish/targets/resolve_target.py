"""Find the target that a recipe or an address on the command line names."""

import re
from collections.abc import Callable, Mapping
from hashlib import sha256
from pathlib import Path

from packager.errors import PublishError
from packager.publish.targets import Target
from packager.publish.targets.git import GitTarget
from packager.publish.targets.hub import HubTarget, NewRepository
from packager.publish.targets.local import LocalTarget
from packager.publish.targets.other_target import open_other_target
from packager.publish.targets.repository_per_variant import RepositoryPerVariant
from packager.recipe import Recipe
from packager.system.text import shown_address

# The variable with the token for git remotes; the Hub's client finds its own token.
GIT_TOKEN = "PACKAGER_GIT_TOKEN"  # noqa: S105 - the variable's name
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_HUB = "hub:"
_GIT_URL = re.compile(r"[a-z+]+://|[\w.-]+@[\w.-]+:")


def target_of(recipe: Recipe, dist: Path, environ: Mapping[str, str], log: Callable[[str], None]) -> Target:
    """Return the target that a recipe names; read and write nothing.

    Args:
        recipe: its section `repository` is used, and its variants if each has its own repository.
        dist: the output folder; the local target and the staging folders of git remotes are below it.
        environ: the environment, which may hold the token for a git remote.
        log: gets a line per wait.

    Raises:
        PublishError: the target of another package cannot be opened.
    """
    repository = recipe.repository
    if repository.url is not None:
        return _git(repository.url, dist, environ, log)
    if repository.plugin is not None:
        return open_other_target(repository.plugin, repository.id, environ, log)

    def open_one(repository_id: str) -> Target:
        if repository.target == "local":
            return LocalTarget(dist / "hub", repository_id)
        new = NewRepository(visibility=repository.visibility, gated=repository.gated)
        return HubTarget(repository_id, new=new, log=log)

    if repository.layout == "branches":
        return open_one(repository.id)
    branches = [variant.branch for variant in recipe.expanded_variants()]
    return RepositoryPerVariant({branch: open_one(repository.place(branch).repository) for branch in branches})


def resolve_target(address: str, dist: Path, environ: Mapping[str, str], log: Callable[[str], None]) -> Target:
    """Return the target that an address names; write nothing.

    Args:
        address: namespace/name of a repository below `dist`, else on the Hub; hub:namespace/name, on the Hub; a git
            remote's URL; or a folder that the local target made.
        dist: the output folder; the local target and the staging folders of git remotes are below it.
        environ: the environment, which may hold the token for a git remote.
        log: gets a line per wait.

    Raises:
        PublishError: the address cannot name a repository.
    """
    folder = Path(address).absolute()
    if _GIT_URL.match(address):
        return _git(address, dist, environ, log)
    if is_local_repository(folder):
        return LocalTarget(folder.parents[2], f"{folder.parts[-2]}/{folder.parts[-1]}")
    if address and folder.is_dir():
        return _git(str(folder), dist, environ, log)
    name = address.removeprefix(_HUB)
    if _HUB_ID.fullmatch(name):
        local = dist / "hub" / "models" / name
        if name == address and (local / ".git").is_dir():
            log(f"reading {local}; the repository of this name on the Hub is {_HUB}{name}")
            return LocalTarget(dist / "hub", name)
        return HubTarget(name, log=log)
    raise PublishError(
        "this is not the address of a repository",
        where=shown_address(address),
        hint="give namespace/name, hub:namespace/name, the URL of a git remote, or a folder",
    )


def is_local_repository(folder: Path) -> bool:
    """Return whether the local target made a folder; the branch that lies in it is one of several."""
    path = folder.absolute()
    return len(path.parts) > 3 and path.parts[-3] == "models" and (path / ".git").is_dir()


def _git(url: str, dist: Path, environ: Mapping[str, str], log: Callable[[str], None]) -> GitTarget:
    staging = dist / "remotes" / sha256(url.encode()).hexdigest()[:16]
    return GitTarget(url, staging, token=environ.get(GIT_TOKEN, ""), log=log)
