"""A test double of the Hugging Face Hub on 127.0.0.1: what huggingface_hub 2.4.0 asks while it publishes and downloads.

No package implements the Hub's write API, so this is ours, kept a thin skin over what is not: each model repository is
a bare git repository (`<root>/<namespace>/<name>.git`: git's commit ids, git's compare-and-swap, `git check-attr` for
what is LFS), LFS bytes lie in its `lfs/objects/ab/cd/<sha256>` where git-lfs looks for them, every stored object is
hashed again, and a commit that names an object which is not stored is refused. All state is on disk and survives a
restart. What it does not know (datasets, Spaces, pull requests, discussions) it answers with 404.

It does not speak Xet, and the client does not negotiate: set HF_HUB_DISABLE_XET=1 before huggingface_hub is imported.

    with LoopbackHub(tmp_path, tokens={"hf_w": Account("alice", orgs=("acme",))}) as hub:
        hub.fault("POST /api/models/.*/commit/", "status", status=429, retry_after=1)
        HfApi(endpoint=hub.endpoint, token="hf_w").create_repo("acme/tiny")

As a process, which prints its address once it listens, takes faults at POST /_loopback/faults and tells what it was
asked at GET /_loopback/record:

    python -m tests.loopback_hub --root DIR --port 0 --token hf_w --user alice --org acme
"""

import argparse
import base64
import binascii
import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BufferedIOBase
from pathlib import Path
from typing import Any, Literal, Self, TypeVar
from urllib.parse import parse_qs, unquote, urlencode, urlsplit
from uuid import uuid4

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

HOST = "127.0.0.1"
BLOCK_BYTES = 1 << 16
NOTHING = "0" * 40  # git's name for "this reference must not exist"
FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---", re.DOTALL)
POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize (\d+)\n")
REPO_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
MAX_POINTER_BYTES = 200
COMMITS_PER_PAGE = 50
LFS_ATTRIBUTES = "filter=lfs diff=lfs merge=lfs -text"
LFS_PATTERNS = """
    *.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz *.onnx
    *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar *.tflite *.tgz
    *.wasm *.xz *.zip *.zst *tfevents*
"""
GITATTRIBUTES = "".join(f"{pattern} {LFS_ATTRIBUTES}\n" for pattern in LFS_PATTERNS.split()).encode()

_T = TypeVar("_T")
FaultKind = Literal["status", "status-after", "cut", "cut-body", "cut-after", "cut-answer", "delay", "call"]


@dataclass(frozen=True)
class Account:
    """Who a token belongs to, and what it may do; it writes to the user's namespace and to `orgs`."""

    user: str
    role: Literal["write", "read"] = "write"
    orgs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Recorded:
    """A request as it arrived; status 0 where the connection was cut instead of answered."""

    method: str
    path: str
    received: int
    status: int
    headers: dict[str, str]


@dataclass(frozen=True)
class Upload:
    """The bytes of one PUT of an LFS object, or of one part of it, which may have been cut or refused."""

    oid: str
    part: int | None
    received: int
    accepted: bool


@dataclass
class Answer:
    """A response; `file` instead of `body` for bytes that stay on disk."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    file: Path | None = None
    first: int = 0
    length: int = 0

    @classmethod
    def of_json(cls, value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Self:
        body = json.dumps(value, default=str).encode()
        return cls(status, body, {"Content-Type": "application/json; charset=utf-8", **(headers or {})})

    def blocks(self) -> Iterator[bytes]:
        if self.file is None:
            yield self.body[self.first : self.first + self.length] if self.length else self.body
            return
        with self.file.open("rb") as stream:
            stream.seek(self.first)
            left = self.length
            while left and (block := stream.read(min(BLOCK_BYTES, left))):
                left -= len(block)
                yield block

    @property
    def size(self) -> int:
        return self.length if self.file or self.length else len(self.body)


class RefusedError(Exception):
    """What the Hub says instead of doing it."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        told = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.answer = Answer.of_json({"error": message}, status, told)


@dataclass
class Fault:
    """What goes wrong with the requests after the first `after` that match, `times` of them."""

    match: str
    kind: FaultKind
    times: int = 1
    after: int = 0
    status: int = 500
    message: str = "Internal Error - We're working hard to fix this as soon as possible!"
    code: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    retry_after: int | None = None
    reset: int | None = None  # seconds until the quota of the RateLimit header is full again
    at_bytes: int | None = None  # where cut-body and cut-answer cut; half-way if None
    seconds: float = 0.0
    call: "Callable[[Call], None] | None" = None
    seen: int = 0
    fired: int = 0

    def claims(self, request: str) -> bool:
        """Say whether this request is one that goes wrong; counts it."""
        if not re.search(self.match, request):
            return False
        self.seen += 1
        fires = self.seen > self.after and self.fired < self.times
        self.fired += fires
        return fires

    def answer(self) -> Answer:
        headers = dict(self.headers)
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.reset is not None:
            headers["RateLimit"] = f'"api";r=0;t={self.reset}'
            headers["RateLimit-Policy"] = '"fixed window";"api";q=1000;w=300'
        return RefusedError(self.status, self.message, self.code, headers).answer


@dataclass(frozen=True)
class Entry:
    """A file or folder of a commit; `sha256` and the bytes' own size for an LFS file."""

    path: str
    kind: Literal["blob", "tree"]
    oid: str
    size: int
    pointer_size: int = 0
    sha256: str = ""

    def described(self) -> dict[str, Any]:
        kind = "directory" if self.kind == "tree" else "file"
        lfs = {"oid": self.sha256, "size": self.size, "pointerSize": self.pointer_size} if self.sha256 else None
        return {"type": kind, "oid": self.oid, "size": self.size, **({"lfs": lfs} if lfs else {}), "path": self.path}


class Body:
    """A request's body as it arrives, with Content-Length or in chunks."""

    def __init__(self, stream: BufferedIOBase, headers: Message) -> None:
        self._stream = stream
        self._chunked = "chunked" in headers.get("Transfer-Encoding", "")
        self._left = int(headers.get("Content-Length") or 0)
        self.announced = self._left
        self.received = 0

    def blocks(self, limit: float = float("inf")) -> Iterator[bytes]:
        """Yield the body, or what of it lies before byte `limit`; a peer that goes away is a ConnectionError."""
        while self.received < limit and self._some_is_left():
            block = self._stream.read(int(min(BLOCK_BYTES, self._left, limit - self.received)))
            if not block:
                raise ConnectionError("the client went away while it was sending")
            self._left -= len(block)
            self.received += len(block)
            yield block
            if self._chunked and not self._left:
                self._stream.readline()

    def _some_is_left(self) -> bool:
        if self._chunked and not self._left:
            line = self._stream.readline()
            if not line:
                raise ConnectionError("the client went away while it was sending")
            self._left = int(line.split(b";")[0], 16)
            if not self._left:
                self._chunked = False
                self._stream.readline()
        return self._left > 0


@dataclass
class Call:
    """One request on its way to a route; `args` are the parts of its path."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: Message
    body: Body
    account: Account | None = None
    args: dict[str, str] = field(default_factory=dict)

    def json(self) -> Any:
        try:
            return json.loads(b"".join(self.body.blocks()) or b"{}")
        except ValueError as error:
            raise RefusedError(400, f"Invalid JSON: {error}") from error

    def says(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in {"1", "true"}


class Repository:
    """A bare git repository with an LFS store, and the few settings the Hub keeps beside it (hub.json)."""

    def __init__(self, repo_id: str, path: Path) -> None:
        self.id = repo_id
        self.path = path
        self.lock = threading.Lock()
        self._entries: dict[str, list[Entry]] = {}

    @classmethod
    def create(cls, repo_id: str, path: Path, *, user: str, private: bool) -> None:
        """Make a repository whose first commit holds .gitattributes only; it appears whole or not at all."""
        path.parent.mkdir(parents=True, exist_ok=True)
        hidden = cls(repo_id, path.parent / f".{uuid4().hex}")
        command = ["git", "init", "--quiet", "--bare", "--initial-branch=main", "--template=", str(hidden.path)]
        subprocess.run(command, check=True)
        hidden.settings = {"private": private, "gated": False, "createdAt": _date(time.time())}
        with hidden.lock:
            hidden.write(None, "main", [(".gitattributes", GITATTRIBUTES)], message="initial commit", user=user)
        try:
            hidden.path.rename(path)
        except OSError as error:  # somebody else's is there, and not empty
            shutil.rmtree(hidden.path)
            raise FileExistsError(path) from error

    @property
    def settings(self) -> dict[str, Any]:
        return dict(json.loads((self.path / "hub.json").read_text(encoding="utf-8")))

    @settings.setter
    def settings(self, settings: Mapping[str, Any]) -> None:
        _write_whole(self.path / "hub.json", json.dumps(settings).encode())

    def git(self, *arguments: str, stdin: bytes = b"") -> bytes:
        command = ["git", f"--git-dir={self.path}", *arguments]
        alone = {**os.environ, "GIT_CONFIG_NOSYSTEM": "1", "GIT_CONFIG_GLOBAL": os.devnull}
        return subprocess.run(command, input=stdin, env=alone, check=True, capture_output=True).stdout

    def resolve(self, revision: str) -> str:
        """Return the commit of a branch, a tag, a reference or a (shortened) commit id."""
        names = [f"refs/heads/{revision}", f"refs/tags/{revision}"]
        if revision.startswith("refs/") or re.fullmatch("[0-9a-f]{7,40}", revision):
            names = [revision] if len(revision) == len(NOTHING) else [*names, revision]
        for name in names:
            try:
                found = self.git("rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
            except subprocess.CalledProcessError:
                continue
            return found.decode().strip()
        raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def head(self, branch: str) -> str:
        """Return the commit that a branch points to."""
        commit = self.references().get(f"refs/heads/{branch}")
        if commit is None:
            raise RefusedError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        return commit

    def references(self) -> dict[str, str]:
        """Return what each branch and tag points to, by full name."""
        command = ("for-each-ref", "--format=%(refname) %(objectname) %(*objectname)", "refs/heads", "refs/tags")
        lines = [line.split() for line in self.git(*command).decode().splitlines()]
        return {name: oids[-1] for name, *oids in lines}

    def point(self, reference: str, commit: str, old: str) -> None:
        """Move a reference from `old`; git itself refuses when it points elsewhere by now."""
        self.git("update-ref", reference, commit, old)

    def entries(self, commit: str) -> list[Entry]:
        """List every file and folder of a commit, in git's order."""
        if commit not in self._entries:
            lines = self.git("ls-tree", "-r", "-t", "-l", "-z", commit).decode().split("\0")[:-1]
            fields = [(*line.split("\t", 1)[0].split(), line.split("\t", 1)[1]) for line in lines]
            small = [oid for _, _, oid, size, _ in fields if size != "-" and int(size) <= MAX_POINTER_BYTES]
            pointers = self._pointers(small)
            self._entries[commit] = [_entry(path, kind, oid, size, pointers) for _, kind, oid, size, path in fields]
        return self._entries[commit]

    def files(self, commit: str) -> dict[str, Entry]:
        return {entry.path: entry for entry in self.entries(commit) if entry.kind == "blob"}

    def blob(self, oid: str) -> bytes:
        return self.git("cat-file", "blob", oid)

    def _pointers(self, oids: Sequence[str]) -> dict[str, tuple[str, int]]:
        """Return the sha256 and the size that those of the blobs name which are LFS pointers."""
        output = self.git("cat-file", "--batch", stdin="".join(f"{oid}\n" for oid in oids).encode())
        pointers = {}
        for oid in oids:
            header, _, rest = output.partition(b"\n")
            size = int(header.split()[-1])
            if match := POINTER.fullmatch(rest[:size]):
                pointers[oid] = (match[1].decode(), int(match[2]))
            output = rest[size + 1 :]
        return pointers

    def lfs_tracked(self, attributes: bytes, paths: Sequence[str]) -> set[str]:
        """Return the paths that a root .gitattributes gives to LFS; one in a folder is not looked at."""
        with tempfile.NamedTemporaryFile(dir=self.path) as file:
            file.write(attributes)
            file.flush()
            command = ("-c", f"core.attributesFile={file.name}", "check-attr", "-z", "--stdin", "filter")
            words = self.git(*command, stdin="".join(f"{path}\0" for path in paths).encode()).decode().split("\0")
        return {path for path, value in zip(words[::3], words[2::3], strict=False) if value == "lfs"}

    def write(
        self, head: str | None, branch: str, changes: Iterable[tuple[str, bytes | None]], *, message: str, user: str
    ) -> str:
        """Commit changes (None deletes) upon `head` and move the branch from there to it; the lock is held."""
        aside = f"refs/loopback/{uuid4().hex}"  # fast-import wants a reference, and would not compare and swap
        who = f"{user} <{user}@users.noreply.loopback> {int(time.time())} +0000"
        text = message.encode()
        stream = [f"commit {aside}\nmark :1\nauthor {who}\ncommitter {who}\ndata {len(text)}\n".encode(), text, b"\n"]
        stream += [f"from {head}\n".encode()] if head else []
        for path, content in changes:
            if content is None:
                stream.append(f"D {path}\n".encode())
            else:
                stream += [f"M 100644 inline {path}\ndata {len(content)}\n".encode(), content, b"\n"]
        stream.append(b"get-mark :1\ndone\n")
        commit = self.git("fast-import", "--quiet", "--done", stdin=b"".join(stream)).decode().strip()
        moves = f"update refs/heads/{branch} {commit} {head or NOTHING}\ndelete {aside}\n"
        self.git("update-ref", "--stdin", stdin=moves.encode())
        return commit

    def log(self, commit: str, *more: str) -> list[tuple[str, str, str, str, str]]:
        """Return id, author, date, title and message of the commits, newest first."""
        lines = self.git("log", "-z", "--format=%H%x01%an%x01%ct%x01%s%x01%b", commit, *more).decode()
        commits = (line.split("\x01") for line in lines.split("\0") if line)
        return [(oid, author, _date(int(when)), title, text.strip()) for oid, author, when, title, text in commits]

    def lfs_object(self, sha256: str) -> Path:
        return self.path / "lfs" / "objects" / sha256[:2] / sha256[2:4] / sha256

    def store(self, sha256: str, blocks: Iterable[bytes]) -> None:
        """Keep an LFS object if the bytes are what their name says."""
        target = self.lfs_object(sha256)
        target.parent.mkdir(parents=True, exist_ok=True)
        digest = hashlib.sha256()
        unfinished = target.with_name(f".{uuid4().hex}")
        try:
            with unfinished.open("wb") as file:
                for block in blocks:
                    digest.update(block)
                    file.write(block)
            if digest.hexdigest() != sha256:
                raise RefusedError(400, f"The bytes of {sha256} hash to {digest.hexdigest()}")
            unfinished.replace(target)
        finally:
            unfinished.unlink(missing_ok=True)

    def part(self, sha256: str, number: int) -> Path:
        return self.path / "lfs" / "incomplete" / sha256 / str(number)


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
    ) -> None:
        self.root = root
        self.tokens = dict(tokens)
        self.page_size = page_size
        self.lfs_threshold = lfs_threshold
        self.multipart_threshold = multipart_threshold
        self.part_bytes = part_bytes
        self.commit_cap = commit_cap
        self.requests: list[Recorded] = []
        self.uploaded: list[Upload] = []
        self.faults: list[Fault] = []
        self.lock = threading.Lock()
        self._commit_times: dict[str, list[float]] = {}
        self._repositories: dict[str, Repository] = {}
        self._server = _Server(self, port)
        self.endpoint = f"http://{HOST}:{self._server.server_address[1]}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._server.cut_all()

    def fault(self, match: str, kind: FaultKind, times: int = 1, after: int = 0, **options: Any) -> Fault:
        """Arm a fault for requests whose "METHOD /path" holds the regular expression `match`.

        Kinds: "status" answers `status` (with `message`, `code`, `headers`, `retry_after`, `reset`) and does nothing;
        "status-after" does it and then says it failed; "cut" drops the connection unread, "cut-body" after `at_bytes`
        of the request's body, "cut-after" once it is done (the answer is lost), "cut-answer" after `at_bytes` of the
        answer's body; "delay" waits `seconds`; "call" calls `call` with the request first. One fault per request: the
        first that was armed and is not used up.
        """
        fault = Fault(match, kind, times, after, **options)
        with self.lock:
            self.faults.append(fault)
        return fault

    def claim(self, request: str) -> Fault | None:
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
        """Commit regular files past the API, as somebody else would; None deletes."""
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
            for its_method, pattern, respond in _ROUTES:
                if its_method == method and (match := pattern.fullmatch(call.path)):
                    call.args = {name: unquote(value) for name, value in match.groupdict(default="").items()}
                    return respond(self, call)
            raise RefusedError(404, f"The loopback hub has no {call.method} {call.path}")
        except RefusedError as refused:
            return refused.answer

    def _account(self, call: Call) -> Account | None:
        scheme, _, token = call.headers.get("Authorization", "").partition(" ")
        if not token:
            return None
        if scheme != "Bearer" or token not in self.tokens:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        return self.tokens[token]

    def readable(self, call: Call) -> Repository:
        """Return the repository of a request that may see it."""
        repository = self.repository(call.args["id"])
        if repository.settings["private"] and not _is_member(call.account, repository.id):
            raise RefusedError(404, "Repository not found", "RepoNotFound")
        return repository

    def writable(self, call: Call) -> Repository:
        """Return the repository of a request that may change it."""
        repository = self.readable(call)
        _require_write(call.account, repository.id)
        return repository


def _namespace(name: str) -> str:
    return name.partition("/")[0]


def _is_member(account: Account | None, repo_id: str) -> bool:
    return account is not None and _namespace(repo_id) in {account.user, *account.orgs}


def _require_write(account: Account | None, repo_id: str) -> Account:
    if account is None:
        raise RefusedError(401, "Invalid username or password.")
    if account.role != "write":
        raise RefusedError(403, "Forbidden: you must use a write token to write to a repository.")
    if not _is_member(account, repo_id):
        raise RefusedError(403, f"You don't have the rights to write to the namespace {_namespace(repo_id)}")
    return account


def _whoami(hub: LoopbackHub, call: Call) -> Answer:
    if call.account is None:
        raise RefusedError(401, "Invalid username or password.")
    account = call.account
    orgs = [{"type": "org", "name": org, "fullname": org, "roleInOrg": account.role} for org in account.orgs]
    auth = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": account.role}}
    user = {"type": "user", "id": account.user, "name": account.user, "fullname": account.user}
    return Answer.of_json({**user, "orgs": orgs, "auth": auth})


def _create_repo(hub: LoopbackHub, call: Call) -> Answer:
    wish = call.json()
    if wish.get("type", "model") != "model":
        raise RefusedError(400, "The loopback hub has models only")
    repo_id = f"{wish.get('organization') or (call.account and call.account.user)}/{wish['name']}"
    account = _require_write(call.account, repo_id)
    if not REPO_ID.fullmatch(repo_id):
        raise RefusedError(400, f"Invalid repository name: {repo_id}")
    told = {"url": f"{hub.endpoint}/{repo_id}", "name": repo_id}
    private = wish.get("visibility") == "private" or bool(wish.get("private"))
    try:
        Repository.create(repo_id, hub.root / f"{repo_id}.git", user=account.user, private=private)
    except FileExistsError:
        return Answer.of_json({"error": "You already created this model repo", **told}, 409)
    return Answer.of_json(told)


def _change_settings(hub: LoopbackHub, call: Call) -> Answer:
    repository = hub.writable(call)
    wish = call.json()
    changes = {name: wish[name] for name in ("private", "gated") if name in wish}
    if "visibility" in wish:
        changes["private"] = wish["visibility"] == "private"
    with repository.lock:
        repository.settings = {**repository.settings, **changes}
    return Answer.of_json(changes)


def _validate_yaml(hub: LoopbackHub, call: Call) -> Answer:
    content = call.json()["content"]
    try:
        metadata = _front_matter(content)
    except YAMLError as error:
        return Answer.of_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
    warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
    return Answer.of_json({"errors": [], "warnings": warnings})


def _create_branch(hub: LoopbackHub, call: Call) -> Answer:
    repository = hub.writable(call)
    starting_point = repository.resolve(call.json().get("startingPoint") or "main")
    return _create_reference(repository, f"refs/heads/{call.args['name']}", starting_point)


def _create_reference(repository: Repository, reference: str, commit: str) -> Answer:
    try:
        repository.git("check-ref-format", reference)
    except subprocess.CalledProcessError:
        raise RefusedError(400, f"Invalid reference name: {reference}") from None
    with repository.lock:
        if reference in repository.references():
            raise RefusedError(409, "Reference already exists")
        repository.point(reference, commit, NOTHING)
    return Answer.of_json({"ref": reference, "targetCommit": commit})


def _delete_branch(hub: LoopbackHub, call: Call) -> Answer:
    repository, name = hub.writable(call), call.args["name"]
    if name == "main":
        raise RefusedError(403, "Cannot delete the main branch")
    with repository.lock:
        repository.git("update-ref", "-d", f"refs/heads/{name}", repository.head(name))
    return Answer.of_json({})


def _create_tag(hub: LoopbackHub, call: Call) -> Answer:
    repository, wish = hub.writable(call), call.json()
    commit = repository.resolve(call.args["rev"])
    answer = _create_reference(repository, f"refs/tags/{wish['tag']}", commit)
    if message := wish.get("message"):
        user = call.account.user if call.account else ""
        identity = ("-c", f"user.name={user}", "-c", f"user.email={user}@users.noreply.loopback")
        repository.git(*identity, "tag", "--force", "--annotate", f"--message={message}", wish["tag"], commit)
    return answer


def _list_refs(hub: LoopbackHub, call: Call) -> Answer:
    found: dict[str, list[dict[str, str]]] = {"heads": [], "tags": []}
    for reference, commit in hub.readable(call).references().items():
        _, group, name = reference.split("/", 2)
        found[group].append({"name": name, "ref": reference, "targetCommit": commit})
    listed: dict[str, object] = {"branches": found["heads"], "tags": found["tags"], "converts": []}
    return Answer.of_json({**listed, **({"pullRequests": []} if call.says("include_prs") else {})})


def _model_info(hub: LoopbackHub, call: Call) -> Answer:
    repository = hub.readable(call)
    commit = repository.resolve(call.args.get("rev") or "main")
    files = repository.files(commit)
    _, _, modified, *_ = repository.log(commit, "-1")[0]
    card = _front_matter(repository.blob(files["README.md"].oid).decode()) if "README.md" in files else {}
    info = {
        "_id": hashlib.sha256(repository.id.encode()).hexdigest()[:24],
        "id": repository.id,
        "modelId": repository.id,
        "author": _namespace(repository.id),
        "sha": commit,
        "lastModified": modified,
        **repository.settings,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": card.get("tags", []),
        "cardData": card,
        "siblings": [_sibling(entry, whole=call.says("blobs")) for entry in files.values()],
    }
    wanted = {"_id", "id", "modelId", *call.query.get("expand", [])} if "expand" in call.query else set(info)
    return Answer.of_json({name: value for name, value in info.items() if name in wanted})


def _sibling(entry: Entry, *, whole: bool) -> dict[str, Any]:
    if not whole:
        return {"rfilename": entry.path}
    lfs = {"sha256": entry.sha256, "size": entry.size, "pointerSize": entry.pointer_size} if entry.sha256 else None
    return {"rfilename": entry.path, "size": entry.size, "blobId": entry.oid, **({"lfs": lfs} if lfs else {})}


def _check_access(hub: LoopbackHub, call: Call) -> Answer:
    _require_ungated(hub.readable(call), call)
    return Answer.of_json({})


def _list_tree(hub: LoopbackHub, call: Call) -> Answer:
    repository = hub.readable(call)
    commit = repository.resolve(call.args["rev"])
    folder = call.args.get("path", "").strip("/")
    entries = repository.entries(commit)
    if folder and folder not in {entry.path for entry in entries if entry.kind == "tree"}:
        raise RefusedError(404, f"{folder} does not exist on {call.args['rev']}", "EntryNotFound")
    below = [entry for entry in entries if entry.path.startswith(f"{folder}/" if folder else "")]
    depth = folder.count("/") + 1 if folder else 0
    listed = [entry for entry in below if call.says("recursive") or entry.path.count("/") == depth]
    page, link = _page(hub, call, listed, hub.page_size)
    return Answer.of_json(
        [_described(repository, commit, entry, expand=call.says("expand")) for entry in page], 200, link
    )


def _list_paths(hub: LoopbackHub, call: Call) -> Answer:
    repository = hub.readable(call)
    commit = repository.resolve(call.args["rev"])
    form = parse_qs(b"".join(call.body.blocks()).decode())
    wanted = {path.strip("/") for path in form.get("paths", [])}
    expand = form.get("expand", [""])[0].lower() == "true"
    found = [entry for entry in repository.entries(commit) if entry.path in wanted]
    return Answer.of_json([_described(repository, commit, entry, expand=expand) for entry in found])


def _described(repository: Repository, commit: str, entry: Entry, *, expand: bool) -> dict[str, Any]:
    if not expand:
        return entry.described()
    oid, _, date, title, _ = repository.log(commit, "-1", "--", entry.path)[0]
    return {**entry.described(), "lastCommit": {"id": oid, "title": title, "date": date}}


def _list_commits(hub: LoopbackHub, call: Call) -> Answer:
    repository = hub.readable(call)
    log = repository.log(repository.resolve(call.args["rev"]))
    page, link = _page(hub, call, log, min(hub.page_size, COMMITS_PER_PAGE))
    keys = ("id", "authors", "date", "title", "message")
    told = [dict(zip(keys, (oid, [{"user": who}], *rest), strict=True)) for oid, who, *rest in page]
    return Answer.of_json(told, 200, link)


def _page(hub: LoopbackHub, call: Call, items: Sequence[_T], size: int) -> tuple[Sequence[_T], dict[str, str]]:
    """Return a page and the Link header that leads to the next."""
    end = int(call.query.get("cursor", ["0"])[0]) + size
    more = urlencode({**call.query, "cursor": [str(end)]}, doseq=True)
    link = {"Link": f'<{hub.endpoint}{call.path}?{more}>; rel="next"'} if end < len(items) else {}
    return items[end - size : end], link


def _preupload(hub: LoopbackHub, call: Call) -> Answer:
    repository = hub.writable(call)
    files = repository.files(repository.resolve(call.args["rev"]))
    attributes = repository.blob(files[".gitattributes"].oid) if ".gitattributes" in files else b""
    asked = call.json()["files"]
    tracked = repository.lfs_tracked(attributes, [file["path"] for file in asked])
    told = []
    for file in asked:
        is_lfs = file["path"] in tracked or file["size"] >= hub.lfs_threshold
        there = files.get(file["path"])
        oid = {"oid": there.sha256 or there.oid} if there else {}
        mode = "lfs" if is_lfs else "regular"
        told.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
    return Answer.of_json({"files": told, "commitOid": repository.resolve(call.args["rev"])})


def _lfs_batch(hub: LoopbackHub, call: Call) -> Answer:
    repository, wish = hub.writable(call), call.json()
    if wish.get("operation") != "upload":
        raise RefusedError(422, "The loopback hub gives no LFS downloads; see resolve")
    in_parts = "multipart" in wish.get("transfers", [])
    told = [_lfs_actions(hub, repository, item["oid"], item["size"], in_parts=in_parts) for item in wish["objects"]]
    multipart = any("chunk_size" in item.get("actions", {}).get("upload", {}).get("header", {}) for item in told)
    return Answer.of_json({"transfer": "multipart" if multipart else "basic", "objects": told})


def _lfs_actions(hub: LoopbackHub, repository: Repository, oid: str, size: int, *, in_parts: bool) -> dict[str, Any]:
    if not re.fullmatch("[0-9a-f]{64}", oid):
        return {"oid": oid, "size": size, "error": {"code": 422, "message": "Invalid object id"}}
    if repository.lfs_object(oid).is_file():
        return {"oid": oid, "size": size}
    storage = f"{hub.endpoint}/_lfs/{repository.id}/{oid}"
    upload: dict[str, Any] = {"href": storage}
    if in_parts and size > hub.multipart_threshold:
        parts = range(1, -(-size // hub.part_bytes) + 1)
        header = {"chunk_size": str(hub.part_bytes), **{str(part): f"{storage}/{part}" for part in parts}}
        upload = {"href": storage, "header": header}
    verify = {"href": f"{hub.endpoint}/{repository.id}.git/info/lfs/objects/verify"}
    return {"oid": oid, "size": size, "authenticated": True, "actions": {"upload": upload, "verify": verify}}


def _put_object(hub: LoopbackHub, call: Call) -> Answer:
    hub.repository(call.args["id"]).store(call.args["oid"], call.body.blocks())
    return Answer()


def _put_part(hub: LoopbackHub, call: Call) -> Answer:
    target = hub.repository(call.args["id"]).part(call.args["oid"], int(call.args["part"]))
    target.parent.mkdir(parents=True, exist_ok=True)
    content = b"".join(call.body.blocks())
    _write_whole(target, content)
    return Answer(headers={"ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'})


def _complete_object(hub: LoopbackHub, call: Call) -> Answer:
    repository, oid = hub.repository(call.args["id"]), call.args["oid"]
    blocks = []
    for listed in sorted(call.json()["parts"], key=lambda part: int(part["partNumber"])):
        path = repository.part(oid, int(listed["partNumber"]))
        content = path.read_bytes() if path.is_file() else b""
        if listed["etag"] != f'"{hashlib.sha256(content).hexdigest()[:32]}"':
            raise RefusedError(400, f"Part {listed['partNumber']} of {oid} is not the one that was uploaded")
        blocks.append(content)
    repository.store(oid, blocks)
    shutil.rmtree(repository.part(oid, 1).parent)
    return Answer.of_json({"success": True})


def _lfs_verify(hub: LoopbackHub, call: Call) -> Answer:
    repository, wish = hub.writable(call), call.json()
    path = repository.lfs_object(wish["oid"])
    if not path.is_file() or path.stat().st_size != wish["size"]:
        raise RefusedError(404, f"No object {wish['oid']} of {wish['size']} bytes")
    return Answer.of_json({})


def _create_commit(hub: LoopbackHub, call: Call) -> Answer:
    repository, branch = hub.writable(call), call.args["rev"]
    header, operations = _read_commit(b"".join(call.body.blocks()))
    changed_since = RefusedError(412, "A commit has happened since. Please refresh and try again.")
    with repository.lock:
        head = repository.head(branch)
        if header.get("parentCommit", head) != head:
            raise changed_since
        changes = _changes(repository, head, operations)
        hub.count_commit(repository.id)
        message = "\n\n".join(filter(None, (header["summary"], header.get("description"))))
        user = call.account.user if call.account else ""
        try:
            commit = repository.write(head, branch, changes, message=message, user=user)
        except subprocess.CalledProcessError as error:
            moved = "update-ref" in error.cmd  # by a push into the repository, which knows no lock of ours
            raise changed_since if moved else RefusedError(400, error.stderr.decode()) from error
    url = f"{hub.endpoint}/{repository.id}/commit/{commit}"
    return Answer.of_json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})


def _read_commit(body: bytes) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    """Return the header and the operations of a commit's NDJSON."""
    try:
        lines = [(line["key"], line["value"]) for line in map(json.loads, body.splitlines())]
    except (ValueError, KeyError, TypeError) as error:
        raise RefusedError(400, f"Invalid NDJSON: {error!r}") from error
    if not lines or lines[0][0] != "header" or not lines[0][1].get("summary"):
        raise RefusedError(400, "The first line must be a header with a summary")
    return lines[0][1], lines[1:]


def _changes(
    repository: Repository, head: str, operations: Sequence[tuple[str, dict[str, Any]]]
) -> list[tuple[str, bytes | None]]:
    """Return what to write and delete, in order; an LFS file that no pattern covers gets a line of .gitattributes."""
    there = repository.files(head)
    paths = set(there)
    changes: list[tuple[str, bytes | None]] = []
    for key, value in operations:
        path = _checked_path(value["path"])
        gone = {path} & paths if key == "deletedFile" else {name for name in paths if name.startswith(f"{path}/")}
        if key.startswith("deleted") and not gone:
            raise RefusedError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        content = None if key.startswith("deleted") else _content(repository, key, value)
        paths = paths - gone if content is None else paths | {path}
        changes.append((path, content))
    texts = {".gitattributes": repository.blob(there[".gitattributes"].oid)} if ".gitattributes" in there else {}
    attributes = {**texts, **dict(changes)}.get(".gitattributes") or b""
    lfs = list(dict.fromkeys(value["path"] for key, value in operations if key == "lfsFile"))
    if uncovered := [path for path in lfs if path not in repository.lfs_tracked(attributes, lfs)]:
        lines = "".join(f"{path.replace(' ', '[[:space:]]')} {LFS_ATTRIBUTES}\n" for path in uncovered)
        changes.append((".gitattributes", attributes + lines.encode()))
    return changes


def _checked_path(path: str) -> str:
    parts = path.rstrip("/").split("/")
    if {"", ".", "..", ".git"} & set(parts) or re.search(r'["\n\0]', path):
        raise RefusedError(400, f"Invalid path: {path!r}")
    return "/".join(parts)


def _content(repository: Repository, key: str, value: dict[str, Any]) -> bytes:
    """Return what git is to hold of a file: its bytes, or a pointer to an object that is stored."""
    if key == "file":
        try:
            return base64.b64decode(value["content"], validate=True)
        except binascii.Error as error:
            raise RefusedError(400, f"Invalid content of {value['path']}: {error}") from error
    if key != "lfsFile":
        raise RefusedError(400, f"Unknown operation: {key}")
    stored = repository.lfs_object(value["oid"])
    if not stored.is_file() or value.get("size", stored.stat().st_size) != stored.stat().st_size:
        message = "Your push was rejected because an LFS pointer pointed to a file that does not exist."
        raise RefusedError(400, f"{message} Offending file: - {value['path']}")
    size = stored.stat().st_size
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\nsize {size}\n".encode()


def _resolve(hub: LoopbackHub, call: Call) -> Answer:
    repository = hub.readable(call)
    _require_ungated(repository, call)
    commit = repository.resolve(call.args["rev"])
    headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
    entry = repository.files(commit).get(call.args["path"])
    if entry is None:
        raise RefusedError(404, "Entry not found", "EntryNotFound", headers)
    headers |= {"ETag": f'"{entry.sha256 or entry.oid}"', "Content-Type": "application/octet-stream"}
    if not entry.sha256:
        return _ranged(call, Answer(200, repository.blob(entry.oid), headers), entry.size)
    headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    return _ranged(call, Answer(200, b"", headers, repository.lfs_object(entry.sha256)), entry.size)


def _require_ungated(repository: Repository, call: Call) -> None:
    if repository.settings["gated"] and not _is_member(call.account, repository.id):
        message = f"Access to model {repository.id} is restricted and you are not in the authorized list."
        raise RefusedError(403 if call.account else 401, message, "GatedRepo")


def _ranged(call: Call, answer: Answer, size: int) -> Answer:
    """Narrow an answer to the one range that was asked for, if any."""
    answer.length = size
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", call.headers.get("Range", ""))
    if match is None or match[0] == "bytes=-":
        return answer
    first = int(match[1]) if match[1] else max(0, size - int(match[2]))
    last = min(int(match[2]), size - 1) if match[1] and match[2] else size - 1
    if first > last:
        raise RefusedError(416, "Range Not Satisfiable", headers={"Content-Range": f"bytes */{size}"})
    answer.status, answer.first, answer.length = 206, first, last - first + 1
    answer.headers["Content-Range"] = f"bytes {first}-{last}/{size}"
    return answer


def _list_collections(hub: LoopbackHub, call: Call) -> Answer:
    owner = call.query.get("owner", [""])[0]
    found = [dict(found) for found in _collections(hub).values() if owner in {"", found["owner"]["name"]}]
    for collection in found:
        del collection["position"]  # of a list, the client counts itself
    return Answer.of_json(found)


def _get_collection(hub: LoopbackHub, call: Call) -> Answer:
    return Answer.of_json(_collection(_collections(hub), call))


def _create_collection(hub: LoopbackHub, call: Call) -> Answer:
    wish = call.json()
    _require_write(call.account, f"{wish['namespace']}/")
    title = re.sub(r"[^a-z0-9]+", "-", wish["title"].lower()).strip("-")
    slug = f"{wish['namespace']}/{title}-{hashlib.sha256(wish['title'].encode()).hexdigest()[:24]}"
    with hub.lock:
        collections = _collections(hub)
        if slug in collections:
            return Answer.of_json({"error": "This collection already exists", "slug": slug}, 409)
        of_its_own = {"slug": slug, "title": wish["title"], "owner": {"name": wish["namespace"]}, "items": []}
        defaults = {"position": len(collections), "theme": "green", "upvotes": 0, "lastUpdated": _date(time.time())}
        optional = {"private": bool(wish.get("private")), "description": wish.get("description")}
        collections[slug] = {**of_its_own, **defaults, **optional}
        _write_whole(hub.root / "collections.json", json.dumps(collections).encode())
    return Answer.of_json(collections[slug])


def _add_collection_item(hub: LoopbackHub, call: Call) -> Answer:
    wish = call.json()
    _require_write(call.account, call.args["slug"])
    with hub.lock:
        collections = _collections(hub)
        items = _collection(collections, call)["items"]
        if wish["item"]["id"] in {item["id"] for item in items}:
            raise RefusedError(409, "Item already in collection")
        hub.repository(wish["item"]["id"])
        note = {"note": {"text": wish["note"]}} if "note" in wish else {}
        items.append({"_id": uuid4().hex[:24], **wish["item"], "position": len(items), **note})
        _write_whole(hub.root / "collections.json", json.dumps(collections).encode())
    return Answer.of_json(collections[call.args["slug"]])


def _collections(hub: LoopbackHub) -> dict[str, Any]:
    path = hub.root / "collections.json"
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _collection(collections: Mapping[str, Any], call: Call) -> dict[str, Any]:
    if call.args["slug"] not in collections:
        raise RefusedError(404, "Collection not found")
    return dict(collections[call.args["slug"]])


def _arm_fault(hub: LoopbackHub, call: Call) -> Answer:
    hub.fault(**call.json())
    return Answer.of_json({})


def _tell_record(hub: LoopbackHub, call: Call) -> Answer:
    told = {"requests": [asdict(it) for it in hub.requests], "uploaded": [asdict(it) for it in hub.uploaded]}
    return Answer.of_json(told)


def _route(
    method: str, template: str, respond: Callable[[LoopbackHub, Call], Answer]
) -> tuple[str, re.Pattern[str], Callable[[LoopbackHub, Call], Answer]]:
    several = {"id": "[^/]+/[^/]+", "slug": "[^/]+/[^/]+", "path": ".+", "oid": "[0-9a-f]{64}", "part": "[0-9]+"}
    pattern = re.sub(r"{(\w+)}", lambda name: f"(?P<{name[1]}>{several.get(name[1], '[^/]+')})", template)
    return method, re.compile(pattern), respond


_ROUTES = (
    _route("GET", "/api/whoami-v2", _whoami),
    _route("POST", "/api/repos/create", _create_repo),
    _route("POST", "/api/validate-yaml", _validate_yaml),
    _route("GET", "/api/models/{id}", _model_info),
    _route("GET", "/api/models/{id}/revision/{rev}", _model_info),
    _route("GET", "/api/models/{id}/auth-check", _check_access),
    _route("PUT", "/api/models/{id}/settings", _change_settings),
    _route("POST", "/api/models/{id}/branch/{name}", _create_branch),
    _route("DELETE", "/api/models/{id}/branch/{name}", _delete_branch),
    _route("POST", "/api/models/{id}/tag/{rev}", _create_tag),
    _route("GET", "/api/models/{id}/refs", _list_refs),
    _route("GET", "/api/models/{id}/tree/{rev}", _list_tree),
    _route("GET", "/api/models/{id}/tree/{rev}/{path}", _list_tree),
    _route("POST", "/api/models/{id}/paths-info/{rev}", _list_paths),
    _route("GET", "/api/models/{id}/commits/{rev}", _list_commits),
    _route("POST", "/api/models/{id}/preupload/{rev}", _preupload),
    _route("POST", "/{id}[.]git/info/lfs/objects/batch", _lfs_batch),
    _route("POST", "/{id}[.]git/info/lfs/objects/verify", _lfs_verify),
    # Where the Hub would name a storage with signed addresses: the client sends no token there.
    _route("PUT", "/_lfs/{id}/{oid}", _put_object),
    _route("PUT", "/_lfs/{id}/{oid}/{part}", _put_part),
    _route("POST", "/_lfs/{id}/{oid}", _complete_object),
    _route("POST", "/api/models/{id}/commit/{rev}", _create_commit),
    _route("GET", "/{id}/resolve/{rev}/{path}", _resolve),
    _route("GET", "/api/collections", _list_collections),
    _route("POST", "/api/collections", _create_collection),
    _route("GET", "/api/collections/{slug}", _get_collection),
    _route("POST", "/api/collections/{slug}/items", _add_collection_item),
    _route("POST", "/_loopback/faults", _arm_fault),
    _route("GET", "/_loopback/record", _tell_record),
)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: LoopbackHub, port: int) -> None:
        super().__init__((HOST, port), _Handler)
        self.hub = hub
        self.connections: set[socket.socket] = set()

    def cut_all(self) -> None:
        """Let nobody wait for a Hub that is gone: connections are kept alive."""
        for connection in list(self.connections):
            _cut(connection)


class _Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 with connections kept alive; a request is recorded before it is answered."""

    server: _Server
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet, or the peer's delayed acknowledgement costs 40 ms each
    disable_nagle_algorithm = True

    def setup(self) -> None:
        super().setup()
        self.server.connections.add(self.connection)

    def finish(self) -> None:
        self.server.connections.discard(self.connection)
        super().finish()

    def handle(self) -> None:
        try:
            super().handle()
        except ConnectionError:
            self.close_connection = True

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815 # the names that http.server calls

    def log_message(self, *_: object) -> None:
        """Say nothing: `requests` has it all."""

    def _serve(self) -> None:
        address = urlsplit(self.path)
        query = parse_qs(address.query)
        call = Call(self.command, address.path, query, self.headers, Body(self.rfile, self.headers))
        fault = self.server.hub.claim(f"{self.command} {address.path}")
        kind = fault.kind if fault else None
        try:
            answer = self._perform(call, fault)
        except ConnectionError:  # the client went away, or was killed
            self._record(call, 0)
            raise
        if answer is None or kind == "cut-after":
            self._record(call, 0)
            self._hang_up()
            return
        if fault and kind == "status-after":
            answer = fault.answer()
        self._record(call, answer.status)
        self._send(answer, fault)

    def _perform(self, call: Call, fault: Fault | None) -> Answer | None:
        """Let happen what is asked, or what a fault puts before it or in its place; None is a cut connection."""
        answer = None
        if fault and fault.kind in {"cut", "cut-body"}:
            half = call.body.announced // 2 if fault.at_bytes is None else fault.at_bytes
            _exhaust(call.body.blocks(limit=half if fault.kind == "cut-body" else 0))
            return None
        if fault and fault.kind == "status":
            answer = fault.answer()
        elif fault and fault.kind == "delay":
            time.sleep(fault.seconds)
        elif fault and fault.call:
            fault.call(call)
        answer = answer or self.server.hub.answer(call)
        _exhaust(call.body.blocks())  # what a refused request still sends
        return answer

    def _record(self, call: Call, status: int) -> None:
        if call.path.startswith("/_loopback/"):
            return
        headers = {name: value for name, value in call.headers.items() if name.lower() != "authorization"}
        hub = self.server.hub
        hub.requests.append(Recorded(call.method, self.path, call.body.received, status, headers))
        if call.method == "PUT" and (match := re.fullmatch(r"/_lfs/[^/]+/[^/]+/(\w+)(?:/(\d+))?", call.path)):
            part = int(match[2]) if match[2] else None
            hub.uploaded.append(Upload(match[1], part, call.body.received, status == 200))

    def _send(self, answer: Answer, fault: Fault | None) -> None:
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(answer.size), "X-Request-Id": uuid4().hex}.items():
            self.send_header(name, re.sub(r"[\r\n]+", " ", value))
        self.end_headers()
        if self.command == "HEAD":
            return
        left = answer.size
        if fault and fault.kind == "cut-answer":
            left = answer.size // 2 if fault.at_bytes is None else fault.at_bytes
        for block in answer.blocks():
            self.wfile.write(block[:left])
            left -= min(left, len(block))
        if fault and fault.kind == "cut-answer":
            self.wfile.flush()
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        _cut(self.connection)


def _exhaust(blocks: Iterable[bytes]) -> None:
    for _ in blocks:
        pass


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):  # the peer was faster
        connection.shutdown(socket.SHUT_RDWR)


def _entry(path: str, kind: str, oid: str, size: str, pointers: Mapping[str, tuple[str, int]]) -> Entry:
    if kind == "tree":
        return Entry(path, "tree", oid, 0)
    if oid in pointers:
        sha256, stored = pointers[oid]
        return Entry(path, "blob", oid, stored, int(size), sha256)
    return Entry(path, "blob", oid, int(size))


def _front_matter(content: str) -> dict[str, Any]:
    match = FRONT_MATTER.match(content)
    loaded = YAML(typ="safe", pure=True).load(match[1]) if match else None
    return loaded if isinstance(loaded, dict) else {}


def _date(when: float) -> str:
    return datetime.fromtimestamp(when, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")


def _write_whole(path: Path, content: bytes) -> None:
    unfinished = path.with_name(f".{uuid4().hex}")
    unfinished.write_bytes(content)
    unfinished.replace(path)


def main() -> None:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(description="A loopback Hugging Face Hub for tests.")
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--token", required=True, help="a token that may write")
    parser.add_argument("--read-token", help="one that may not")
    parser.add_argument("--user", default="loopback-user")
    parser.add_argument("--org", action="append", default=[])
    for option in ("page-size", "lfs-threshold", "multipart-threshold", "part-bytes", "commit-cap"):
        parser.add_argument(f"--{option}", type=int, default=argparse.SUPPRESS)
    options = vars(parser.parse_args())
    user, orgs = options.pop("user"), tuple(options.pop("org"))
    tokens = {options.pop("token"): Account(user, "write", orgs)}
    if read_token := options.pop("read_token"):
        tokens[read_token] = Account(user, "read", orgs)
    with LoopbackHub(options.pop("root"), tokens=tokens, **options) as hub:
        print(hub.endpoint, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
