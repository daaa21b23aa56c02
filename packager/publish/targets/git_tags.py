"""Annotated tags of a git repository: a commit, a name, and the notes of the release."""

import time

from packager.errors import PublishError
from packager.publish.targets.git_process import AUTHOR_EMAIL, AUTHOR_NAME, NO_COMMIT, GitProcess


def read_tag(git: GitProcess, name: str) -> str:
    """Return the commit that a tag names, "" if the tag does not exist."""
    pattern = "--format=%(refname:lstrip=2) %(objectname) %(*objectname)"
    lines = git.run("for-each-ref", pattern, f"refs/tags/{name}").splitlines()
    return next((line.split()[-1] for line in lines if line.split()[0] == name), "")


def tag_object(git: GitProcess, name: str, commit: str, notes: str) -> str:
    """Store an annotated tag of a commit and return its id; no ref names it."""
    tagger = f"{AUTHOR_NAME} <{AUTHOR_EMAIL}> {int(time.time())} +0000"
    text = f"object {commit}\ntype commit\ntag {name}\ntagger {tagger}\n\n{notes}\n"
    return git.run("mktag", stdin=text.encode()).strip()


def make_tag(git: GitProcess, name: str, commit: str, notes: str) -> None:
    """Make an annotated tag, unless it exists.

    Raises:
        PublishError: the tag names another commit.
    """
    found = read_tag(git, name)
    if found and commit != found:
        raise PublishError(f"the tag {name} exists and names {found[:12]}", where=str(git.worktree))
    if not found:
        git.run("update-ref", f"refs/tags/{name}", tag_object(git, name, commit, notes), NO_COMMIT)
