"""Git for a copy of a repository on another machine: who we are there, and what to make of its answers.

A token travels in a variable that only our GIT_ASKPASS script reads, and only for the host of the address: a redirect
elsewhere gets none.
"""

import base64
import re
import shutil
import time
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from filelock import FileLock

from packager.errors import PackagerError, PublishError
from packager.publish.targets.git_process import Answer, GitProcess
from packager.recipe.field_groups import has_credentials
from packager.system.files import TEMPORARY_PREFIX, fsync_folder, write_atomic
from packager.variant import MAIN

_REMOTE_SETTINGS = {
    # GIT_SSH_COMMAND, if the user set it, goes before this; their ~/.ssh/config and agent hold either way.
    "core.sshCommand": "ssh -o BatchMode=yes -o ConnectTimeout=30 -o ServerAliveInterval=30",
    "core.filesRefLockTimeout": "2000",
    "fetch.recurseSubmodules": "false",
    "push.recurseSubmodules": "no",
    # A server may be silent for minutes while its hooks run, not for ever.
    "http.lowSpeedLimit": "1",
    "http.lowSpeedTime": "300",
}
_ASKPASS = b"""#!/bin/sh
[ -n "$PACKAGER_GIT_PASSWORD" ] || exit 1
case $1 in *"//$PACKAGER_GIT_HOST"[\\'\\"]* | *"@$PACKAGER_GIT_HOST"[\\'\\"]*) ;; *) exit 1 ;; esac
case $1 in Username*) printf '%s\\n' "$PACKAGER_GIT_USER" ;; *) printf '%s\\n' "$PACKAGER_GIT_PASSWORD" ;; esac
"""
# A killed publisher's git outlives it by milliseconds.
_ORPHAN_WAIT_S = 2.0
WAITS_S = (1.0, 3.0, 9.0, 27.0)  # between five tries
_TRANSIENT = (
    r"could not resolve|name resolution|no such host|connection (reset|refused|timed out|closed|aborted)|timed? ?out"
    r"|failed to connect|network is unreachable|no route to host|early eof|empty reply|unexpected (disconnect|eof)"
    r"|broken pipe|too slow|(returned error:|http|status) (429|5\d\d)|server error|rate limit|ssl_(read|error)"
    r"|remote end hung up unexpectedly"
)
_REFUSALS = (
    (
        r"returned error: 40[13]|authentication failed|authentication required|authorization error"
        r"|could not read (username|password)|permission denied|permission to .* denied|unable to read askpass",
        "the repository refuses access",
        "https needs a token that may write there, ssh a key that the host knows and the agent holds",
    ),
    (
        r"not found|does not appear to be a git repository|no such repository|does not exist",
        "there is no such repository, or it does not show itself",
        "git hosts make no repository by push: create it there first, empty, and check address and token",
    ),
    (
        r"\[(remote )?rejected\]|declined|denycurrentbranch|protected branch|remote unpack failed",
        "the repository refused the push",
        "",
    ),
)


class RemoteGit(GitProcess):
    """Git for a repository that is a cache of another one, its remote `origin`, which no configuration file names.

    Args:
        worktree: the folder that holds `.git`.
        address: what git calls the remote.
        host: the only one that the token is for, with its port.
        token: a password for it, or user:password; "" if none is needed.
        log: gets a line for each wait.
    """

    def __init__(self, worktree: Path, address: str, *, host: str, token: str, log: Callable[[str], None]) -> None:
        user, _, password = token.strip().rpartition(":")
        user = user or "x-access-token"  # GitHub's name for it; GitLab, Gitea and the Hub take any
        basic = base64.b64encode(f"{user}:{password}".encode()).decode()
        self._askpass = worktree.absolute() / "packager-askpass"
        super().__init__(
            worktree,
            settings={**_REMOTE_SETTINGS, "remote.origin.url": address},
            environment={
                "GIT_ASKPASS": str(self._askpass),
                "GIT_ALLOW_PROTOCOL": "file:http:https:ssh",
                "GIT_LFS_SKIP_SMUDGE": "0",
                "GIT_TRACE_REDACT": "1",
                "PACKAGER_GIT_HOST": host,
                "PACKAGER_GIT_USER": user,
                "PACKAGER_GIT_PASSWORD": password,
            },
            secrets={text for text in (token, password, quote(password, safe=""), basic) if password and text},
        )
        self._address, self._say = address, log

    def beside(self, worktree: Path) -> "RemoteGit":
        """Return git for another repository with the same remote."""
        other = copy(self)
        other.worktree, other.git_folder, other._files = worktree, worktree / ".git", {}
        return other

    def write_askpass(self) -> None:
        """Put the script in place that answers when git asks who we are; it holds no secret."""
        write_atomic(self._askpass, _ASKPASS)
        self._askpass.chmod(0o700)

    def transfer(self, *arguments: str, stdin: bytes = b"", discard: bool = False) -> Answer:
        """Run a command that needs the remote; while the network fails it is tried again, with growing waits."""
        for wait_s in WAITS_S:
            answer = self.attempt(*arguments, stdin=stdin, discard=discard)
            if not answer.status or not is_transient(answer.words):
                return answer
            last = answer.words.rpartition("\n")[2]
            self._say(f"{self._address}: git {arguments[0]}: {last}; trying again in {wait_s:g} s")
            time.sleep(wait_s)
        return self.attempt(*arguments, stdin=stdin, discard=discard)

    def reach(self, *arguments: str, stdin: bytes = b"", discard: bool = False) -> str:
        """Return the output of a command that needs the remote, or raise what `refusal` says."""
        answer = self.transfer(*arguments, stdin=stdin, discard=discard)
        if answer.status:
            raise self.refusal(arguments[0], answer.words)
        return answer.output

    def refusal(self, command: str, words: str) -> PackagerError:
        """Translate what git says when the remote, or the way to it, refuses."""
        ours = _of_this_side(words)
        if "No space left on device" in ours and "remote unpack failed" not in ours:
            return self._refusal((command,), words)
        if is_transient(words):
            what, hint = "the repository cannot be reached", "run again: what has been uploaded is not uploaded twice"
        else:
            what, hint = next(
                ((what, hint) for pattern, what, hint in _REFUSALS if re.search(pattern, words, re.IGNORECASE)),
                (f"git {command} failed", ""),
            )
        return PublishError(what, where=self._address, why=words or "git said nothing", hint=hint)


def is_transient(words: str) -> bool:
    """Return whether git's words tell of a network or server that may be well again in a moment."""
    ours = _of_this_side(words)
    return bool(re.search(_TRANSIENT, ours, re.IGNORECASE)) and not re.search(_REFUSALS[0][0], ours, re.IGNORECASE)


def _of_this_side(words: str) -> str:
    """Return the lines that are git's own here: what a server's hooks print may say anything."""
    return "\n".join(line for line in words.splitlines() if not line.startswith("remote:"))


def folder_of(url: str, token: str) -> Path | None:
    """Return the folder that a URL names, None if it is on another machine, or raise if we do not publish there."""
    parts = urlsplit(url) if "://" in url else None
    if parts is None:
        return None if ":" in url.split("/", 1)[0] else Path(url).absolute()
    if parts.scheme not in ("https", "http", "ssh", "file"):
        raise PublishError(f"nothing is published by {parts.scheme}", hint="https, ssh, file or a path")
    if has_credentials(url):
        where = f"{parts.scheme}://***@{parts.hostname or ''}{parts.path}"
        hint = "leave them out, and give the token by itself"
        raise PublishError("an address with credentials in it would be kept and shown", where=where, hint=hint)
    if token and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise PublishError("a token would travel unencrypted", where=url, hint="use https")
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def create_bare(folder: Path) -> None:
    """Make an empty bare repository aside and rename it into place, unless somebody else has."""
    aside = folder.with_name(f"{TEMPORARY_PREFIX}{folder.name}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{aside}.lock")
    with lock:
        shutil.rmtree(aside, ignore_errors=True)
        if not folder.exists() or not any(folder.iterdir()):
            aside.mkdir()
            git = GitProcess(aside)
            git.run("init", "--quiet", "--template=", f"--initial-branch={MAIN}")
            git.run("config", "core.bare", "true")
            git.run("config", "--unset-all", "core.logAllRefUpdates")
            git.git_folder.rename(folder)
            fsync_folder(folder.parent)
            aside.rmdir()
        Path(lock.lock_file).unlink(missing_ok=True)


def unlock(locks: Sequence[Path]) -> list[str]:
    """Remove git's locks that nobody can hold any more, and say so."""
    deadline = time.monotonic() + _ORPHAN_WAIT_S
    while any(path.exists() for path in locks) and time.monotonic() < deadline:
        time.sleep(0.05)
    stale = [path for path in locks if path.exists()]
    for path in stale:
        path.unlink(missing_ok=True)
    return [f"removed a killed run's stale lock {path}" for path in stale]
