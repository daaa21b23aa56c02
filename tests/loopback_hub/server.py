"""HTTP/1.1 on 127.0.0.1: takes requests, injects faults, and keeps a record."""

import re
import socket
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from uuid import uuid4

from tests.loopback_hub.faults import Fault
from tests.loopback_hub.messages import Answer, Body, Call

if TYPE_CHECKING:
    from tests.loopback_hub.hub import LoopbackHub

HOST = "127.0.0.1"


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


class Server(ThreadingHTTPServer):
    """Listens, and knows its connections."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, hub: "LoopbackHub", port: int) -> None:
        super().__init__((HOST, port), _Handler)
        self.hub = hub
        self.connections: set[socket.socket] = set()

    def cut_all(self) -> None:
        """Close the open connections, which are kept alive: no client waits for a stopped Hub."""
        for connection in list(self.connections):
            _cut(connection)


class _Handler(BaseHTTPRequestHandler):
    """HTTP/1.1 with connections kept alive; a request is recorded before it is answered."""

    server: Server
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
        """Log nothing: `requests` has all requests."""

    def _serve(self) -> None:
        address = urlsplit(self.path)
        call = Call(self.command, address.path, address.query, self.headers, Body(self.rfile, self.headers))
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
        if fault and fault.change:
            answer = fault.change(answer)
        self._record(call, answer.status)
        self._send(answer, fault)

    def _perform(self, call: Call, fault: Fault | None) -> Answer | None:
        """Perform a request, or the fault before it or in its place; return None for a cut connection."""
        answer = None
        if fault and fault.kind in {"cut", "cut-body"}:
            half = call.body.announced // 2 if fault.at_bytes is None else fault.at_bytes
            _exhaust(call.body.blocks(limit=half if fault.kind == "cut-body" else 0))
            return None
        if fault and fault.kind == "drip-headers":
            _exhaust(call.body.blocks())
            with suppress(OSError):  # the client goes away
                self.connection.sendall(b"HTTP/1.1 200 OK\r\n")
                while True:
                    self.connection.sendall(b"X-More: 1\r\n")
                    time.sleep(fault.seconds)
            self.close_connection = True
            return None
        if fault and fault.kind == "raw":
            _exhaust(call.body.blocks())
            self.wfile.write(fault.body)
            self.wfile.flush()
            return None
        if fault and fault.kind == "status":
            answer = fault.answer()
        elif fault and fault.kind == "answer":
            answer = Answer(fault.status, fault.body, dict(fault.headers))
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
        if fault and fault.kind == "drip":
            self._drip(answer, fault.seconds)
            return
        for block in answer.blocks():
            self.wfile.write(block[:left])
            left -= min(left, len(block))
        if fault and fault.kind == "cut-answer":
            self.wfile.flush()
            self._hang_up()

    def _drip(self, answer: Answer, seconds: float) -> None:
        self.wfile.flush()
        for byte in b"".join(answer.blocks()):
            time.sleep(seconds)
            self.wfile.write(bytes([byte]))
            self.wfile.flush()

    def _hang_up(self) -> None:
        self.close_connection = True
        _cut(self.connection)


def _exhaust(blocks: Iterable[bytes]) -> None:
    for _ in blocks:
        pass


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):  # the peer was faster
        connection.shutdown(socket.SHUT_RDWR)
