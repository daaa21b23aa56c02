"""Git with a remote: authentication, retries, and the translation of its errors.

The token is in a variable that only the GIT_ASKPASS script of this module reads, and the script returns it only for the
host of the remote's address: a redirect to another host gets no token.
"""

import base64
import os
import re
import shutil
import time
from collections.abc import Callable, Sequence
from copy import copy
from pathlib import Path
from urllib.parse import quote, unquote, urlsplit

from filelock import FileLock

from packager.errors import PackagerError, PublishError
from packager.publish.targets.git_process import CommandResult, GitProcess
from packager.system.files import FULL_DISK, TEMPORARY_PREFIX, fsync_folder, write_atomic
from packager.system.text import has_credentials, printable, shown_address
from packager.variant import MAIN

_REMOTE_SETTINGS = {
    # GIT_SSH_COMMAND of the user's environment overrides this; their ~/.ssh/config and agent apply in both cases.
    "core.sshCommand": "ssh -o BatchMode=yes -o ConnectTimeout=30 -o ServerAliveInterval=30",
    "core.filesRefLockTimeout": "2000",
    "fetch.recurseSubmodules": "false",
    "push.recurseSubmodules": "no",
    # A server may send nothing for minutes while its hooks run.
    "http.lowSpeedLimit": "1",
    "http.lowSpeedTime": "300",
}
_ASKPASS = b"""#!/bin/sh
[ -n "$PACKAGER_GIT_PASSWORD" ] || exit 1
case $1 in *"//$PACKAGER_GIT_HOST"[\\'\\"]* | *"@$PACKAGER_GIT_HOST"[\\'\\"]*) ;; *) exit 1 ;; esac
case $1 in Username*) printf '%s\\n' "$PACKAGER_GIT_USER" ;; *) printf '%s\\n' "$PACKAGER_GIT_PASSWORD" ;; esac
"""
# user@host:path. A user or host that begins with "-" would be an option of ssh; "::" is a program of git's.
_SSH_ADDRESS = re.compile(r"([\w.][\w.-]*@)?([\w.][\w.-]*|\[[0-9A-Fa-f:.]+\]):(?!:)")
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
        "the repository does not exist, or the token may not see it",
        "git hosts create no repository on push: create an empty one there first, and check address and token",
    ),
    (
        r"\[(remote )?rejected\]|declined|denycurrentbranch|protected branch|remote unpack failed",
        "the repository refused the push",
        "",
    ),
)


class RemoteGit(GitProcess):
    """Git for a repository that caches its remote `origin`; the environment configures the remote, no file does.

    Args:
        worktree: the folder that holds `.git`.
        address: the remote's URL or path.
        view: a view of the remote, which git opens if the remote is a folder of this machine; else None.
        host: the only host that gets the token, with its port.
        token: a password, or user:password; "" for none.
        log: gets a line per wait.
        retries_s: seconds between tries of a transfer.

    Attributes:
        authorization: the header that gives the token to its host; "" without a token.
        retries_s: see above.
    """

    def __init__(
        self,
        worktree: Path,
        address: str,
        *,
        view: Path | None = None,
        host: str,
        token: str,
        log: Callable[[str], None],
        retries_s: Sequence[float],
    ) -> None:
        user, _, password = token.strip().rpartition(":")
        user = user or "x-access-token"  # GitHub's user name for tokens; GitLab, Gitea and the Hub accept any
        basic = base64.b64encode(f"{user}:{password}".encode()).decode()
        self.authorization = f"Basic {basic}" if password else ""
        self._askpass = worktree.absolute() / "packager-askpass"
        super().__init__(
            worktree,
            settings={**_REMOTE_SETTINGS, "remote.origin.url": str(view or address)},
            environment={
                "GIT_ASKPASS": str(self._askpass),
                "GIT_ALLOW_PROTOCOL": "file" if view else _protocols(address),
                "GIT_LFS_SKIP_SMUDGE": "0",
                "GIT_TRACE_REDACT": "1",
                "PACKAGER_GIT_HOST": host,
                "PACKAGER_GIT_USER": user,
                "PACKAGER_GIT_PASSWORD": password,
            },
            secrets={text for text in (token, password, quote(password, safe=""), basic) if password and text},
        )
        self._address, self._view, self._log, self.retries_s = address, view, log, tuple(retries_s)

    def beside(self, worktree: Path) -> "RemoteGit":
        """Return git for another repository on this machine with the same remote."""
        other = copy(self)
        other.worktree, other._files = worktree, {}
        other.git_folder = other.git_dir = worktree / ".git"
        return other

    def _scrubbed(self, stderr: str | bytes) -> str:
        text = super()._scrubbed(stderr)
        return text.replace(str(self._view), self._address) if self._view else text

    def write_askpass(self) -> None:
        """Write the script that answers git's questions for user and password; it holds no secret."""
        write_atomic(self._askpass, _ASKPASS)
        self._askpass.chmod(0o700)

    def transfer(self, *arguments: str, stdin: bytes = b"", discard: bool = False) -> CommandResult:
        """Run a command that needs the remote; retry it after network failures, with growing waits."""
        for wait_s in self.retries_s:
            result = self.attempt(*arguments, stdin=stdin, discard=discard)
            if not result.status or not is_transient(result.stderr):
                return result
            last = result.stderr.rpartition("\n")[2]
            self._log(f"{self._address}: git {arguments[0]}: {last}; trying again in {wait_s:g} s")
            time.sleep(wait_s)
        return self.attempt(*arguments, stdin=stdin, discard=discard)

    def reach(self, *arguments: str, stdin: bytes = b"", discard: bool = False) -> str:
        """Return the output of a command that needs the remote.

        Raises:
            MachineError: the disk of this machine is full.
            PublishError: the remote cannot be reached, or refused.
        """
        result = self.transfer(*arguments, stdin=stdin, discard=discard)
        if result.status:
            raise self.refusal(arguments[0], result.stderr)
        return result.output

    def refusal(self, command: str, stderr: str) -> PackagerError:
        """Return the error for a transfer that failed with `stderr`."""
        ours = _local_lines(stderr)
        if any(text in ours for text in FULL_DISK) and "remote unpack failed" not in ours:
            return self._refusal((command,), stderr)
        if is_transient(stderr):
            what, hint = "the repository cannot be reached", "run again: uploaded files are not uploaded twice"
        else:
            what, hint = next(
                ((what, hint) for pattern, what, hint in _REFUSALS if re.search(pattern, stderr, re.IGNORECASE)),
                (f"git {command} failed", ""),
            )
        return PublishError(what, where=self._address, why=stderr or "git printed no error message", hint=hint)


def is_transient(stderr: str) -> bool:
    """Return whether git's error output reports a network or server failure that may pass."""
    ours = _local_lines(stderr)
    return bool(re.search(_TRANSIENT, ours, re.IGNORECASE)) and not re.search(_REFUSALS[0][0], ours, re.IGNORECASE)


def _local_lines(stderr: str) -> str:
    """Return the lines of the local git, without the output of the server's hooks, which may be any text."""
    return "\n".join(line for line in stderr.splitlines() if not line.startswith("remote:"))


def _protocols(address: str) -> str:
    """Return the protocols that git may use for an address: those of a redirect, too."""
    scheme = address.partition("://")[0] if "://" in address else "ssh"
    return {"http": "http:https", "https": "https", "ssh": "ssh"}.get(scheme, "none")


def folder_of(url: str, token: str) -> Path | None:
    """Return the folder that a URL names, None if the URL names another machine.

    Raises:
        PublishError: the scheme is not supported, the URL holds credentials, or the token would be sent unencrypted.
    """
    parts = urlsplit(url) if "://" in url else None
    hint = "use https, ssh, file or a path"
    if parts is None:
        if ":" not in url.split("/", 1)[0]:
            return Path(url).absolute()
        if not _SSH_ADDRESS.match(url):
            raise PublishError("this is not the address of a git remote", where=shown_address(url), hint=hint)
        return None
    if parts.scheme not in ("https", "http", "ssh", "file"):
        raise PublishError(f"{printable(parts.scheme)} addresses are not supported", hint=hint)
    if parts.netloc.startswith("-") or (parts.hostname or "").startswith("-"):
        raise PublishError("the address begins with an option, not with a host", where=shown_address(url), hint=hint)
    if has_credentials(url):
        where = f"{parts.scheme}://***@{parts.hostname or ''}{parts.path}"
        hint = "remove them, and give the token separately"
        raise PublishError("the address contains credentials, which would be stored and shown", where=where, hint=hint)
    if token and parts.scheme == "http" and parts.hostname not in ("localhost", "127.0.0.1", "::1"):
        raise PublishError("the token would be sent unencrypted", where=url, hint="use https")
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def is_absent(folder: Path) -> bool:
    """Return whether a remote that is a folder has no repository yet: nothing is there, or an empty folder."""
    return not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir()))


def create_bare(folder: Path) -> None:
    """Make an empty bare repository under a temporary name and rename it, unless another process has made it."""
    temporary = folder.with_name(f"{TEMPORARY_PREFIX}{folder.name}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(f"{temporary}.lock")
    with lock:
        shutil.rmtree(temporary, ignore_errors=True)
        if not folder.exists() or not any(folder.iterdir()):
            temporary.mkdir()
            git = GitProcess(temporary)
            git.run("init", "--quiet", "--template=", f"--initial-branch={MAIN}")
            git.run("config", "core.bare", "true")
            git.run("config", "--unset-all", "core.logAllRefUpdates")
            git.git_folder.rename(folder)
            fsync_folder(folder.parent)
            temporary.rmdir()
        Path(lock.lock_file).unlink(missing_ok=True)
