"""`git http-backend`, git's own server, for one HTTP request."""

import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit


@dataclass(frozen=True, kw_only=True)
class GitAnswer:
    """The answer of `git http-backend`."""

    status: int
    headers: dict[str, str]
    body: bytes


def ask_git(root: Path, method: str, address: str, headers: Mapping[str, str], body: bytes, *, user: str) -> GitAnswer:
    """Let git answer a request.

    Args:
        root: a repository <root>/a/b.git is at /a/b.git.
        method: GET or POST.
        address: the path with its query.
        headers: the request's; Git-Protocol, Content-Type and Content-Encoding count.
        body: the request's.
        user: who pushes; "" for a user who may only read.
    """
    parts = urlsplit(address)
    environ = {
        "PATH": os.environ["PATH"],
        "GIT_CONFIG_GLOBAL": os.devnull,
        "GIT_CONFIG_NOSYSTEM": "1",
        "GIT_HTTP_EXPORT_ALL": "1",
        "GIT_PROJECT_ROOT": str(root),
        "GIT_PROTOCOL": headers.get("Git-Protocol", ""),
        "HTTP_CONTENT_ENCODING": headers.get("Content-Encoding", ""),
        "CONTENT_LENGTH": str(len(body)),
        "CONTENT_TYPE": headers.get("Content-Type", ""),
        "PATH_INFO": parts.path,
        "QUERY_STRING": parts.query,
        "REQUEST_METHOD": method,
        **({"REMOTE_USER": user} if user else {}),
    }
    done = subprocess.run(["git", "http-backend"], input=body, env=environ, capture_output=True, check=False)
    head, _, content = done.stdout.partition(b"\r\n\r\n")
    answered = dict(line.split(": ", 1) for line in head.decode().split("\r\n") if line)
    status = int(answered.pop("Status", "200").split()[0])
    return GitAnswer(status=status, headers=answered, body=content)
