"""The Hub: its state and its access rules."""

import base64
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import unquote

from tests.loopback_hub.accounts import Account, is_member, require_write
from tests.loopback_hub.dialect import Dialect
from tests.loopback_hub.faults import Fault, FaultKind
from tests.loopback_hub.messages import Answer, Call, RefusedError
from tests.loopback_hub.repository import REPO_ID, Repository
from tests.loopback_hub.routes import ROUTES
from tests.loopback_hub.server import HOST, Recorded, Server, Upload
from tests.loopback_hub.xet import XetStore


class LoopbackHub:
    """The Hub; a context manager that listens while it is open.

    Args:
        root: where the repositories are, from this run or an earlier one.
        tokens: the access tokens, and whose they are.
        port: 0 for any free one; see `endpoint`.
        page_size: entries in a page of a tree, and at most 50 commits in a page of a history.
        lfs_threshold: files of so many bytes are LFS whatever their name.
        multipart_threshold: objects of more bytes are uploaded in parts of `part_bytes`.
        commit_cap: commits per repository and hour, then 429.
        xet: whether large files may be stored by chunks; a server that is not the Hub has no such storage.
        dialect: how its answers differ from the Hub's.
    """

    def __init__(
        self,
        root: Path,
        *,
        tokens: Mapping[str, Account],
        port: int = 0,
        page_size: int = 1000,
        lfs_threshold: int = 10_000_000,
        multipart_threshold: int = 1 << 30,
        part_bytes: int = 1 << 24,
        commit_cap: int = 128,
        xet: bool = False,
        dialect: Dialect = Dialect(),  # noqa: B008 - frozen
    ) -> None:
        self.root = root
        self.tokens = dict(tokens)
        self.page_size = page_size
        self.lfs_threshold = lfs_threshold
        self.multipart_threshold = multipart_threshold
        self.part_bytes = part_bytes
        self.commit_cap = commit_cap
        self.xet = xet
        self.dialect = dialect
        self.xet_store = XetStore(root / ".xet")
        self.requests: list[Recorded] = []
        self.uploaded: list[Upload] = []
        self.faults: list[Fault] = []
        self.ci_secret = ""  # of the job that `trusting` trusts
        self.trusting = ""
        self.identities: set[str] = set()
        self.lock = threading.Lock()
        self.written: dict[str, dict[str, bytes | None]] = {}  # the last content of each path, on any branch
        self._commit_times: dict[str, list[float]] = {}
        self._repositories: dict[str, Repository] = {}
        self._server = Server(self, port)
        self.endpoint = f"http://{HOST}:{self._server.server_address[1]}"
        # The same server by another name: to a client a host that must not get its token.
        self.storage = f"http://localhost:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._server.cut_all()

    def fault(self, match: str, kind: FaultKind, times: int = 1, after: int = 0, **options: Any) -> Fault:
        """Arm a fault for requests whose "METHOD /path" holds the regular expression `match`.

        Kinds: "status" answers `status` (with `message`, `code`, `headers`, `retry_after`, `reset`) and does nothing;
        "status-after" does it and answers as failed; "cut" drops the connection unread, "cut-body" after `at_bytes`
        of the request's body, "cut-after" once it is done (the answer is lost), "cut-answer" after `at_bytes` of the
        answer's body; "delay" waits `seconds`; "call" calls `call` with the request first; "answer" answers `status`,
        `headers` and `body`; "change" does it and changes the answer by `change`; "drip" sends the answer's body byte
        by byte, each after `seconds`, and "drip-headers" headers without an end; "raw" sends `body` instead of HTTP.
        One fault per request: the first that was armed and is not used up.
        """
        fault = Fault(match, kind, times, after, **options)
        with self.lock:
            self.faults.append(fault)
        return fault

    def claim(self, request: str) -> Fault | None:
        """Return the fault of a request, if any; requests to the Hub's own addresses have none."""
        if "/_loopback/" in request:
            return None
        with self.lock:
            return next((fault for fault in self.faults if fault.claims(request)), None)

    def repository(self, repo_id: str) -> Repository:
        """Return a repository; its `path` is what `git clone` takes."""
        path = self.root / f"{repo_id}.git"
        if not REPO_ID.fullmatch(repo_id) or not path.is_dir():
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        return self._repositories.setdefault(repo_id, Repository(repo_id, path))

    def commit(
        self, repo_id: str, changes: Mapping[str, bytes | None], *, branch: str = "main", user: str = "somebody-else"
    ) -> str:
        """Commit regular files without the API, as another person would; None deletes."""
        repository = self.repository(repo_id)
        with repository.lock:
            head = repository.head(branch)
            return repository.write(head, branch, changes.items(), message="Somebody else's change", user=user)

    def count_commit(self, repo_id: str) -> None:
        """Refuse a commit past the cap as the Hub does: the RateLimit header is of another quota, and not used up."""
        with self.lock:
            recent = [when for when in self._commit_times.get(repo_id, []) if when > time.time() - 3600]
            if len(recent) >= self.commit_cap:
                message = f"You have exceeded the rate limit for repository commits ({self.commit_cap} per hour). "
                message += "You can retry this action in about 1 hour."
                raise RefusedError(429, message, headers={"RateLimit": '"api";r=949;t=271'})
            self._commit_times[repo_id] = [*recent, time.time()]

    def answer(self, call: Call) -> Answer:
        """Do what a request asks."""
        try:
            call.account = self._account(call)
            method = "GET" if call.method == "HEAD" else call.method
            for its_method, pattern, respond in ROUTES:
                if its_method == method and (match := pattern.fullmatch(call.path)):
                    call.args = {name: unquote(value) for name, value in match.groupdict(default="").items()}
                    return respond(self, call)
            raise RefusedError(404, f"The loopback hub has no {call.method} {call.path}")
        except RefusedError as refused:
            if not self.dialect.error_codes:
                refused.answer.headers.pop("X-Error-Code", None)
            return refused.answer

    def _account(self, call: Call) -> Account | None:
        if call.path.startswith(("/_xet/", "/_loopback/")):
            return None  # the storage has tokens of its own
        scheme, _, token = call.headers.get("Authorization", "").partition(" ")
        if scheme == "Basic":  # git's, with any user name
            token = base64.b64decode(token).decode().partition(":")[2]
        if not token or call.path == "/_loopback/id-token":
            return None
        if call.path.startswith("/_lfs/"):
            raise RefusedError(400, "Only one way to authenticate is allowed, and the address is signed")
        if scheme not in {"Bearer", "Basic"} or token not in self.tokens:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return self.tokens[token]

    def readable(self, call: Call) -> Repository:
        """Return the repository of a request that may see it; without a token its existence is not revealed."""
        try:
            repository = self.repository(call.args["id"])
            if repository.settings["private"] and not is_member(call.account, repository.id):
                raise RefusedError(404, "Repository not found", "RepoNotFound")
        except RefusedError as refused:
            raise (refused if call.account else _who_are_you()) from None
        return repository

    def writable(self, call: Call) -> Repository:
        """Return the repository of a request that may change it."""
        repository = self.readable(call)
        if call.account is None:
            raise _who_are_you()
        require_write(call.account, repository.id)
        return repository


def _who_are_you() -> RefusedError:
    """Return the Hub's 401 with a code: over http the client recognises it by the code only."""
    return RefusedError(401, "Invalid username or password.", "RepoNotFound")
