"""Addresses that name one branch: a repository or its folder with @BRANCH, a page of the Hub."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote, urlsplit

from packager.errors import UsageError
from packager.system.text import shown_address
from packager.variant import MAIN

_HUB = "hub:"
_HUB_URL = "https://huggingface.co"
# The part before the @ of the branch: git@host:path, and ssh://git@host/path, have one of their own.
_REMOTE = re.compile(
    r"(?P<repository>(?:hub:|[A-Za-z][A-Za-z0-9+.-]*://(?:[^/@]*@)?|[\w.-]+@[\w.-]+:)[^@]*)(?:@(?P<branch>.*))?\Z",
    re.DOTALL,
)
_PAGE = re.compile(r"/(?P<id>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*?)(?:\.git|/tree/(?P<branch>.+?))?/?\Z")


@dataclass(frozen=True, kw_only=True)
class BranchAddress:
    """A repository's address, as `resolve_target` takes it, and the name of one of its branches."""

    repository: str
    branch: str


def branch_address(text: str, environ: Mapping[str, str]) -> BranchAddress | None:
    """Return the repository and branch that a text names, None if it names neither a branch nor a repository elsewhere.

    Args:
        text: hub:namespace/name, a URL, or user@host:path, each with @BRANCH if it is not main; the address of a
            model's page on the Hub, as a browser shows it; or the folder of a git repository with @BRANCH.
        environ: HF_ENDPOINT is the address of another Hub.

    Raises:
        UsageError: the branch after @ is empty, the page names another branch, or the folder is no git repository.
    """
    if found := _REMOTE.match(text):
        repository, branch = found["repository"], found["branch"]
    elif folder := next((folder for folder in _before_each_at(text) if Path(folder).is_dir()), None):
        repository, branch = folder, text[len(folder) + 1 :]
        if not any((Path(folder) / name).exists() for name in (".git", "HEAD")):
            raise UsageError(f"{folder} is no git repository", hint="to audit it as a checkpoint, leave out the @")
    else:
        return None
    if branch == "":
        raise UsageError("the branch after @ is empty", where=shown_address(text), hint=f"leave out the @ for {MAIN}")
    if page := _page(repository, environ.get("HF_ENDPOINT") or _HUB_URL):
        repository = f"{_HUB}{page['id']}"
        shown = unquote(page["branch"]) if page["branch"] else None
        if branch and shown and branch != shown:
            raise UsageError(f"the page is that of {shown}, not of {branch}", where=shown_address(text))
        branch = branch or shown
    return BranchAddress(repository=repository, branch=branch or MAIN)


def _before_each_at(text: str) -> Iterator[str]:
    return (text[: at.start()] for at in re.finditer("@", text) if at.start())


def _page(url: str, hub: str) -> re.Match[str] | None:
    """Return the parts of a model's page if a URL is one of the Hub's."""
    if "://" not in url:
        return None
    base, parts = urlsplit(hub.rstrip("/")), urlsplit(url)
    if (parts.scheme, parts.netloc) != (base.scheme, base.netloc) or not parts.path.startswith(base.path):
        return None
    return _PAGE.fullmatch(parts.path.removeprefix(base.path))
