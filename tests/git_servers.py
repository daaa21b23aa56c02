"""Real servers for the git target: git's own HTTP backend behind a token, and giftless for the objects of git-lfs.

The server in front checks the token, fails on request, runs `git http-backend`, and passes the requests of git-lfs on
to giftless, which runs in a process of its own.
"""

import base64
import http.client
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from tests.git_backend import ask_git

_CHUNK_BYTES = 1 << 20
_GIFTLESS = """
TRANSFER_ADAPTERS:
  basic:
    factory: giftless.transfer.basic_streaming:factory
    options:
      storage_class: giftless.storage.local_storage:LocalStorage
      storage_options: {path: %s}
AUTH_PROVIDERS: [giftless.auth.allow_anon:read_write]
PRE_AUTHORIZED_ACTION_PROVIDER:
  factory: giftless.auth.jwt:factory
  options: {algorithm: HS256, private_key: a key of thirty-two bytes or more for tests}
LEGACY_ENDPOINTS: false
"""


def require_git_lfs() -> None:
    """Fail where git-lfs is not installed: no test that needs it is skipped."""
    where = "apt-get install git-lfs, brew install git-lfs, or https://git-lfs.com"
    assert shutil.which("git-lfs"), f"git-lfs is not on the PATH: {where}"


@dataclass
class Service:
    """A running server.

    Attributes:
        url: without a path; a repository <root>/a/b.git is <url>/a/b.git.
        seen: every request: method and path, and whether the token came with it.
        failures: statuses that the next requests with the token get instead of an answer.
        read_only: whether a push gets 403.
    """

    url: str
    seen: list[tuple[str, str, bool]] = field(default_factory=list)
    failures: list[int] = field(default_factory=list)
    read_only: bool = False


@contextmanager
def serve_git(root: Path, token: str, *, lfs_port: int | None = None) -> Iterator[Service]:
    """Serve the repositories below `root` to clients with the token, with any user name or as a bearer."""
    service = Service(url="")

    class Front(_Front):
        pass

    Front.root, Front.token, Front.service, Front.lfs_port = root, token, service, lfs_port
    server = ThreadingHTTPServer(("127.0.0.1", 0), Front)
    server.daemon_threads = False
    service.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield service
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serve_lfs(folder: Path, python: str = sys.executable) -> Iterator[int]:
    """Run giftless over a folder and yield its port; every client may request upload addresses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder.mkdir(parents=True)
    (folder / "giftless.yaml").write_text(_GIFTLESS % (folder / "objects"))
    command = [python, "-m", "waitress", "--listen", f"127.0.0.1:{port}", "giftless.wsgi_entrypoint:app"]
    environment = {**os.environ, "GIFTLESS_CONFIG_FILE": str(folder / "giftless.yaml")}
    with (folder / "log").open("wb") as log, subprocess.Popen(command, env=environment, stdout=log, stderr=log) as run:
        try:
            _wait_for(port, run, folder / "log")
            yield port
        finally:
            run.terminate()


def _wait_for(port: int, run: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and run.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise AssertionError(f"giftless does not answer; nox -s tests-publish installs it:\n{log.read_text()[-2000:]}")


class _Front(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.0"
    root: Path
    token: str
    service: Service
    lfs_port: int | None

    def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - the library's name
        pass

    def do_GET(self) -> None:
        self._answer()

    do_POST = do_PUT = do_GET  # noqa: N815 - the library's names

    def _answer(self) -> None:
        known = self._is_known()
        self.service.seen.append((self.command, self.path, known))
        status = 0
        # giftless protects these addresses itself, with credentials that it gave to clients with our token.
        if not known and not self._is_storage():
            status = 401
        elif self.service.failures:
            status = self.service.failures.pop(0)
        elif self.service.read_only and "git-receive-pack" in self.path:
            status = 403
        if status:
            self._body()
            self.send_response(status)
            if status == 401:
                self.send_header("WWW-Authenticate", 'Basic realm="git"')
            self.send_header("Content-Length", "0")
            self.end_headers()
        elif "/info/lfs/" in self.path and self.lfs_port:
            self._hand_on()
        else:
            self._run_backend()

    def _is_known(self) -> bool:
        scheme, _, value = self.headers.get("Authorization", "").partition(" ")
        if scheme == "Basic":
            value = base64.b64decode(value).decode().partition(":")[2]
        return bool(value) and value == self.token

    def _is_storage(self) -> bool:
        return "/info/lfs/objects/storage/" in self.path

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _hand_on(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.lfs_port)
        left_out = {"Connection", "Transfer-Encoding", *(() if self._is_storage() else ("Authorization",))}
        headers = {name: value for name, value in self.headers.items() if name not in left_out}
        body = self._body()
        connection.request(self.command, self.path, body, {**headers, "Content-Length": str(len(body))})
        answer = connection.getresponse()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name not in ("Connection", "Transfer-Encoding"):
                self.send_header(name, value)
        self.end_headers()
        while chunk := answer.read(_CHUNK_BYTES):
            self.wfile.write(chunk)
        connection.close()

    def _run_backend(self) -> None:
        answer = ask_git(self.root, self.command, self.path, dict(self.headers), self._body(), user="somebody")
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)
