"""The Hub's read API over a folder of git repositories, for the Hub's own clients: olah, with its refusals corrected.

olah 0.5.4 serves <root>/models/<namespace>/<name>, an ordinary git repository, without reaching for the Hub. But
whatever a repository does not have, it refuses with 401 RepoNotFound, while the Hub answers 404: EntryNotFound for a
file or folder, RevisionNotFound for a branch. transformers asks for files that a model need not have and takes the 401
for "there is no such model". And olah ignores `cursor`, so that who asks for pages until one is empty, as
text-generation-webui does, never ends: it lists all files on the first. So a small server in front passes everything on
and corrects these two answers; every byte of a published file is olah's.
"""

import http.client
import re
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

HOST = "127.0.0.1"
START_TIMEOUT_S = 60.0
_REVISION = re.compile(
    r"(?:/api/models)?/(?P<id>[^/]+/[^/]+)/(?:revision|tree|paths-info|resolve)/(?P<revision>[^/?]+)"
)
# Each connection is used once, and bodies are passed on as they come.
_NOT_PASSED_ON = frozenset({"connection", "keep-alive", "transfer-encoding", "date", "server"})


@contextmanager
def serve(root: Path, scratch: Path, olah: str) -> Iterator[str]:
    """Serve the repositories below `root`/models and give the endpoint's address.

    Args:
        root: what the local target publishes to, e.g. dist/hub.
        scratch: where olah keeps its configuration and its log.
        olah: the olah-cli program.
    """
    port = _free_port()
    config = scratch / "olah.toml"
    config.write_text(
        f'[basic]\nhost = "{HOST}"\nport = {port}\nrepos-path = "{scratch}/cache"\nmirrors-path = ["{root}"]\n'
        "[accessibility]\noffline = true\n",
        encoding="utf-8",
    )
    command = [olah, "--config", str(config), "--log-path", str(scratch / "logs")]
    with (scratch / "olah.txt").open("wb") as log:
        process = subprocess.Popen(command, cwd=scratch, stdout=log, stderr=log)
    try:
        _wait_until_it_listens(process, port, scratch / "olah.txt")
        with _Server(root, port) as server:
            threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
            yield f"http://{HOST}:{server.server_address[1]}"
            server.shutdown()
    finally:
        process.terminate()
        process.wait()


class _Server(ThreadingHTTPServer):
    """In front of the olah that listens on `olah_port`."""

    def __init__(self, root: Path, olah_port: int) -> None:
        super().__init__((HOST, 0), _Handler)
        self.root = root
        self.olah_port = olah_port


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    protocol_version = "HTTP/1.0"

    def do_GET(self) -> None:
        self._pass_on()

    def do_HEAD(self) -> None:
        self._pass_on()

    def log_message(self, *_: object) -> None:
        """Print nothing: olah writes a log."""

    def _pass_on(self) -> None:
        if "/tree/" in self.path and "cursor=" in self.path.partition("?")[2]:
            self._answer(HTTPStatus.OK, {"Content-Type": "application/json"}, b"[]")
            return
        connection = http.client.HTTPConnection(HOST, self.server.olah_port, timeout=60)
        try:
            connection.request(self.command, self.path, headers=dict(self.headers.items()))
            response = connection.getresponse()
            if response.status == HTTPStatus.UNAUTHORIZED and (error := self._what_is_missing()):
                self._answer(HTTPStatus.NOT_FOUND, {"X-Error-Code": error, "X-Error-Message": error}, b"")
            else:
                self._answer(response.status, dict(response.getheaders()), response.read())
        finally:
            connection.close()

    def _what_is_missing(self) -> str:
        """Return the Hub's error code for a request that olah refused, "" when it is right: no such repository."""
        match = _REVISION.match(self.path)
        repository = self.server.root / "models" / match["id"] if match else None
        if match is None or repository is None or not repository.is_dir():
            return ""
        commit = f"{unquote(match['revision'])}^{{commit}}"
        command = ["git", "rev-parse", "--verify", "--quiet", "--end-of-options", commit]
        known = subprocess.run(command, cwd=repository, stdout=subprocess.DEVNULL, check=False).returncode == 0
        return "EntryNotFound" if known else "RevisionNotFound"

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in _NOT_PASSED_ON and (self.command == "HEAD" or name.lower() != "content-length"):
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _wait_until_it_listens(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as probe:
            if probe.connect_ex((HOST, port)) == 0:
                return
        time.sleep(0.1)
    raise RuntimeError(f"olah does not answer:\n{log.read_text(encoding='utf-8', errors='replace')[-2000:]}")
