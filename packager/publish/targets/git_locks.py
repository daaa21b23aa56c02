"""Locks of the repositories on this machine: those of publishers, and those that a killed publisher's git leaves."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from packager.errors import PublishError
from packager.system.files import LOCK_WAIT_S

_POLL_S = 0.05


@dataclass(frozen=True, kw_only=True)
class GitWaits:
    """Waiting times of the git targets, in seconds.

    Attributes:
        publisher_s: for another publisher to release the repository.
        staging_s: for another process to release the staging folder between two steps of a publish.
        orphan_s: for a killed publisher's git to release its locks. That git outlives the publisher by milliseconds: it
            holds a lock only to move a branch.
        retries_s: between tries of a transfer, one wait before each try after the first.
    """

    publisher_s: float = LOCK_WAIT_S
    staging_s: float = 10.0
    orphan_s: float = 2.0
    retries_s: tuple[float, ...] = (1.0, 3.0, 9.0, 27.0)


DEFAULT_WAITS = GitWaits()


def publisher_lock(folder: Path) -> FileLock:
    """Return the lock that keeps other publishers out of a folder; its file lies beside the folder."""
    return FileLock(str(folder.with_name(f".{folder.name}.lock")))


def acquire(lock: FileLock, timeout_s: float, *, where: str, why: str = "") -> None:
    """Acquire a publisher's lock.

    Raises:
        PublishError: another publisher holds it for longer than `timeout_s`.
    """
    try:
        lock.acquire(timeout=timeout_s)
    except Timeout as error:
        hint = "wait until it is done, then run again"
        raise PublishError("another publisher is at work", where=where, why=why, hint=hint) from error


def git_locks(git_folder: Path) -> Sequence[Path]:
    """Return git's own lock files in a repository."""
    return sorted((*git_folder.glob("*.lock"), *(git_folder / "refs").rglob("*.lock")))


def remove_stale_locks(find_locks: Callable[[], Sequence[Path]], wait_s: float) -> Sequence[Path]:
    """Remove lock files that no living process holds, and return them.

    Args:
        find_locks: returns the lock files of a killed publisher's git that exist now.
        wait_s: how long to wait for the end of that git, which removes its locks itself.
    """
    deadline = time.monotonic() + wait_s
    while (locks := find_locks()) and time.monotonic() < deadline:
        time.sleep(min(_POLL_S, wait_s))
    for path in locks:
        path.unlink(missing_ok=True)
    return locks


def remove_partial_objects(git_folder: Path) -> None:
    """Remove the object files that a killed git did not finish."""
    objects = git_folder / "objects"
    for path in (*objects.glob("*/tmp_obj_*"), *objects.glob("pack/tmp_*")):
        path.unlink(missing_ok=True)
