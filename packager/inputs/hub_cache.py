"""The Hub's cache without a network (HF_HUB_OFFLINE): which files it knows of a commit, and which of them it lacks."""

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from packager.errors import SourceError
from packager.inputs.hub_session import AnswerError, checked_siblings
from packager.recipe.model_fit import is_commit
from packager.system.text import printable

if TYPE_CHECKING:
    from huggingface_hub.hf_api import RepoSibling

Kind = Literal["model", "dataset"]


def is_offline() -> bool:
    """Return whether HF_HUB_OFFLINE is set: then only the cache is read."""
    import huggingface_hub

    return huggingface_hub.is_offline_mode()


def cached_commit(kind: Kind, repo_id: str, revision: str) -> str:
    """Return the commit that a branch or tag meant when the cache last asked; a commit is returned as it is.

    Raises:
        SourceError: the cache does not know the revision.
    """
    if is_commit(revision):
        return revision
    reference = _snapshot(kind, repo_id, "").parent / "refs" / revision
    try:
        commit = reference.read_text()[:64].strip() if ".." not in revision else ""
    except (OSError, ValueError):
        commit = ""
    if not is_commit(commit):
        raise not_cached(kind, repo_id, revision, None)
    return commit


def cached_siblings(kind: Kind, repo_id: str, revision: str) -> "Sequence[RepoSibling]":
    """Return the files of a commit that the cache knows.

    The client's own record of the commit names all of them, but gives no digests: a lock has them. Clients before 2.0
    and other programs keep no record: then only those that are in the cache are known.

    Raises:
        SourceError: the cache knows no file of the commit, or its record is damaged.
    """
    from huggingface_hub.hf_api import RepoSibling

    names = _recorded(kind, repo_id, revision)
    if not names:
        folder = _snapshot(kind, repo_id, revision)
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    if not names:
        raise not_cached(kind, repo_id, revision, None)
    try:
        return checked_siblings([RepoSibling(name) for name in sorted(names)])
    except AnswerError as error:
        raise SourceError(
            f"the Hub cache's record of the {kind} {repo_id} is damaged",
            where=f"commit {revision[:12]}",
            why=str(error),
            hint="delete the folder trees of the repository in the cache",
        ) from error


def _recorded(kind: Kind, repo_id: str, revision: str) -> list[str]:
    import huggingface_hub

    tree = getattr(huggingface_hub, "get_cached_repo_tree", None)
    if tree is None:
        return []
    try:
        return [file.path for file in tree(repo_id, repo_type=kind, revision=revision)]
    except huggingface_hub.errors.CachedRepoTreeNotFoundError:
        return []


def cached_folder(kind: Kind, repo_id: str, revision: str, names: Iterable[str]) -> Path:
    """Return the folder of a commit in the cache if it holds the files `names`.

    Raises:
        SourceError: it lacks one; states the command that fetches it.
    """
    folder = _snapshot(kind, repo_id, revision)
    for name in names:
        if not (folder / name).is_file():
            raise not_cached(kind, repo_id, revision, name)
    return folder


def _snapshot(kind: Kind, repo_id: str, revision: str) -> Path:
    """Return the folder of a commit in the cache, which need not be there.

    The client's own `snapshot_download` gives it only if no file of the commit is lacking.
    """
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name

    return Path(HF_HUB_CACHE) / repo_folder_name(repo_id=repo_id, repo_type=kind) / "snapshots" / revision


def not_cached(kind: Kind, repo_id: str, revision: str, name: str | None) -> SourceError:
    """Return the error for a file that the cache lacks, None for all of them."""
    kind_of_revision = "commit" if is_commit(revision) else "revision"
    at = printable(revision[: 12 if is_commit(revision) else 60])
    words = ["hf", "download", repo_id, *([] if name is None else [name]), "--revision", revision]
    words += ["--repo-type", "dataset"] if kind == "dataset" else []
    return SourceError(
        f"the Hub's cache lacks {'the files' if name is None else 'a file'} of the {kind} {repo_id}",
        where=f"{kind_of_revision} {at}" if name is None else f"{printable(name)} at {at}",
        why="HF_HUB_OFFLINE is set, so nothing is downloaded",
        hint=f"where there is a network: {printable(shlex.join(words))}",
    )
