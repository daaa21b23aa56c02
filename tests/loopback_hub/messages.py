"""Requests as they arrive and answers as they leave."""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from email.message import Message
from io import BufferedIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from tests.loopback_hub.accounts import Account

BLOCK_BYTES = 1 << 16


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
        """Make an answer of JSON."""
        body = json.dumps(value, default=str).encode()
        return cls(status, body, {"Content-Type": "application/json; charset=utf-8", **(headers or {})})

    def blocks(self) -> Iterator[bytes]:
        """Yield the body."""
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
        """Bytes of the body."""
        return self.length if self.file or self.length else len(self.body)


class RefusedError(Exception):
    """A refusal of the Hub."""

    def __init__(self, status: int, message: str, code: str = "", headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        values = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **(headers or {})}
        self.answer = Answer.of_json({"error": message}, status, values)


class Body:
    """A request's body as it arrives, with Content-Length or in chunks."""

    def __init__(self, stream: BufferedIOBase, headers: Message) -> None:
        self._stream = stream
        self._chunked = "chunked" in headers.get("Transfer-Encoding", "")
        self._left = int(headers.get("Content-Length") or 0)
        self.announced = self._left
        self.received = 0

    def blocks(self, limit: float = float("inf")) -> Iterator[bytes]:
        """Yield the body, or its bytes before `limit`; raise ConnectionError if the peer closes the connection."""
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
    query_text: str
    headers: Message
    body: Body
    account: "Account | None" = None
    args: dict[str, str] = field(default_factory=dict)

    @property
    def query(self) -> dict[str, list[str]]:
        """The parameters of the query."""
        return parse_qs(self.query_text)

    def json(self) -> Any:
        """Return the body's JSON; 400 if it is none."""
        try:
            return json.loads(b"".join(self.body.blocks()) or b"{}")
        except ValueError as error:
            raise RefusedError(400, f"Invalid JSON: {error}") from error

    def is_set(self, name: str) -> bool:
        """Whether the query has this flag."""
        return self.query.get(name, [""])[0].lower() in {"1", "true"}


def ranged(call: Call, answer: Answer, size: int) -> Answer:
    """Restrict an answer to the requested range, if any."""
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
