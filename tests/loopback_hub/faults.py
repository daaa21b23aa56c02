"""Injected faults."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from tests.loopback_hub.messages import Answer, Call, RefusedError

FaultKind = Literal[
    "status",
    "status-after",
    "cut",
    "cut-body",
    "cut-after",
    "cut-answer",
    "delay",
    "call",
    "answer",
    "change",
    "drip",
    "drip-headers",
    "raw",
]


@dataclass
class Fault:
    """A fault of `times` matching requests, after the first `after` of them."""

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
    call: Callable[[Call], None] | None = None
    body: bytes = b""
    change: Callable[[Answer], Answer] | None = None
    seen: int = 0
    fired: int = 0

    def claims(self, request: str) -> bool:
        """Count a request, and return whether the fault applies to it."""
        if not re.search(self.match, request):
            return False
        self.seen += 1
        fires = self.seen > self.after and self.fired < self.times
        self.fired += fires
        return fires

    def answer(self) -> Answer:
        """Return the answer of a failing server."""
        headers = dict(self.headers)
        if self.retry_after is not None:
            headers["Retry-After"] = str(self.retry_after)
        if self.reset is not None:
            headers["RateLimit"] = f'"api";r=0;t={self.reset}'
            headers["RateLimit-Policy"] = '"fixed window";"api";q=1000;w=300'
        return RefusedError(self.status, self.message, self.code, headers).answer
