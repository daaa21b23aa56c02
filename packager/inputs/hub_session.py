"""The HTTP session of the Hub's client: which host gets the token, and how large and slow an answer may be.

Every answer is hostile until checked. The client follows the links of an answer to any host with the token, unpacks
compressed answers of any size, and waits for a slow answer without an end.

huggingface_hub is imported when first needed. One private name of it is used: `default_client_factory`. A factory that
does not call it would have to repeat its hooks (request ids, offline mode) and to choose between httpx and httpx2. Of
httpx, two: the client's `_transport` and `_mounts`. A client that is given a transport would ignore the user's proxies.
"""

import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast
from urllib.parse import urljoin, urlsplit

from packager.system.text import shown

if TYPE_CHECKING:
    from httpx2 import BaseTransport, Client, Request, Response, SyncByteStream
    from huggingface_hub.hf_api import RepoSibling

    ResponseHook = Callable[[Response], None]

# Values decoded from JSON take up to 24 times its size. 1,000 files, a page of a listing, are about 0.3 MB.
MAX_ANSWER_BYTES = 24 << 20
MAX_PAGES = 1000
# Seconds for the body of an answer, without the time before its first byte.
_ANSWER_S = 45.0
# Files may be of any size, but a file that comes more slowly than this does not come.
_SLOWEST_BYTES_PER_S, _SLOW_START_S = 1000, 45.0
# Limits of one read or write, not of a call: for a commit of many files the Hub sends nothing for minutes.
_TIMEOUTS_S = {"connect": 30.0, "read": 600.0, "write": 600.0, "pool": 600.0}
_READING_TIMEOUT_S = 60.0  # a request that changes nothing
_HEADERS_S = 5.0  # more than the limit of a read, which ends an answer that does not begin
_READING = frozenset({"GET", "HEAD"})
_OURS = "packager"
_CLIENTS = frozenset({"huggingface_hub", "hf_xet", "httpx", "httpx2", "httpcore", "httpcore2"})
# Of the HTTP library: an illegal header is quoted with its token, an invalid port may be the password of a proxy.
_QUOTING = frozenset({"LocalProtocolError", "UnsupportedProtocol", "InvalidURL"})
_HUB_DOMAINS = ("huggingface.co", "hf.co")


class AnswerError(Exception):
    """An answer that no Hub gives; the caller adds what was being done."""


class _Current:
    """The hooks of the present session, None before the first one."""

    hooks: "tuple[ResponseHook, ...] | None" = None


def open_session(*hooks: "ResponseHook") -> None:
    """Make the client use a session with these limits, and with more hooks for its responses."""
    from huggingface_hub import set_client_factory

    if _Current.hooks != hooks:
        _Current.hooks = hooks
        set_client_factory(lambda: _client(hooks))  # closes the present session
        logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its warnings show signed addresses of uploads


def is_of_client(error: Exception) -> bool:
    """Return whether the client or the network failed, not this program.

    The client raises bare OSError, ValueError, KeyError and TypeError, too (an unreadable file, a refused card, an
    answer of another form). Such an error is the client's if the innermost frame of the two programs, without those of
    other libraries, is the client's.
    """
    if isinstance(error, AnswerError) or _package(type(error).__module__) in _CLIENTS:
        return True
    frames = (_package(frame.f_globals.get("__name__", "")) for frame, _ in traceback.walk_tb(error.__traceback__))
    return [package for package in frames if package in {_OURS, *_CLIENTS}][-1] != _OURS


def client_message(error: Exception) -> str:
    """Return the first line of an error's message, "" if it quotes the request: a header, or a part of an address."""
    if type(error).__name__ in _QUOTING or not str(error):
        return ""
    return str(error).splitlines()[0]


def origin(url: str) -> tuple[str, str, int | None]:
    """Return a URL's scheme, host and port.

    Raises:
        AnswerError: the URL is malformed.
    """
    try:
        parts = urlsplit(url)
        return parts.scheme, parts.hostname or "", parts.port or {"http": 80, "https": 443}.get(parts.scheme)
    except ValueError:
        raise AnswerError(f"it names the malformed address {url[:200]!r}") from None


def checked_siblings(siblings: object) -> "Sequence[RepoSibling]":
    """Return a repository's files as the client lists them.

    Raises:
        AnswerError: a name, size or digest has another type, or a name leads out of the repository.
    """
    if not isinstance(siblings, list):
        raise AnswerError("it has no list of files")
    for sibling in siblings:
        name, size, lfs = sibling.rfilename, sibling.size, sibling.lfs
        if not isinstance(name, str) or not name or name.startswith("/") or {"", ".", ".."} & set(name.split("/")):
            raise AnswerError(f"{shown(name)} is not the name of a file")
        if size is not None and not isinstance(size, int):
            raise AnswerError(f"{shown(size)} is not the size of {shown(name)}")
        if lfs is not None and not isinstance(lfs.sha256, str):
            raise AnswerError(f"{shown(lfs.sha256)} is not the digest of {shown(name)}")
    return siblings


def joined(base: str, reference: str) -> str:
    """Return the address that a link means.

    Raises:
        AnswerError: the link is malformed.
    """
    try:
        return urljoin(base, reference)
    except ValueError:
        raise AnswerError(f"it names the malformed address {reference[:200]!r}") from None


def _package(module: str) -> str:
    return module.partition(".")[0]


def _http_library() -> ModuleType:
    """Return the client's HTTP library: httpx2 from client 2.0 on, httpx before."""
    from huggingface_hub import errors

    return import_module(_package(errors.HfHubHTTPError.__bases__[0].__module__))


def _client(hooks: tuple["ResponseHook", ...]) -> "Client":
    from huggingface_hub.utils._http import default_client_factory

    client = default_client_factory()
    own = client.event_hooks
    client.event_hooks = {
        "request": [*own["request"], _limit_time, _refuse_packing, _TokenGuard()],
        "response": [*own["response"], _limit_answer, _PageGuard(), *hooks],
    }
    client._transport = _transport_type()(client._transport)
    client._mounts = {
        pattern: transport and _transport_type()(transport) for pattern, transport in client._mounts.items()
    }
    return client


def _limit_time(request: "Request") -> None:
    """Set a request's time limits where the client sets none, as in most of its calls."""
    given = request.extensions.get("timeout", {})
    limits = {**_TIMEOUTS_S, "read": _READING_TIMEOUT_S} if request.method in _READING else _TIMEOUTS_S
    timeout = {name: limit if given.get(name) is None else given[name] for name, limit in limits.items()}
    request.extensions = {**request.extensions, "timeout": timeout}


def _refuse_packing(request: "Request") -> None:
    """Ask for an answer that is not compressed: a small one can unpack to any size."""
    request.headers["Accept-Encoding"] = "identity"


class _TokenGuard:
    """Refuses to send a token that a Hub has been given to another host.

    httpx drops the token when an answer redirects a request. But the client sends it to whatever host the next page of
    a listing, or the confirmation of an upload, has in the answer. Tokens of other services, like the identity of a CI
    job, are not meant for the Hub and pass.
    """

    def __init__(self) -> None:
        self._tokens: set[str] = set()

    def __call__(self, request: "Request") -> None:
        from huggingface_hub import constants

        token = request.headers.get("Authorization", "")
        if not token:
            return
        home, there = origin(constants.ENDPOINT), origin(str(request.url))
        if there == home or (_is_hub(home) and _is_hub(there)):
            self._tokens.add(token)
        elif token in self._tokens:
            host = f"{there[0]}://{there[1]}:{there[2]}"
            raise AnswerError(f"it asks for a request with the token to another server, {host[:200]}")


def _is_hub(place: tuple[str, str, int | None]) -> bool:
    scheme, host, _ = place
    return scheme == "https" and any(host == domain or host.endswith(f".{domain}") for domain in _HUB_DOMAINS)


class _PageGuard(threading.local):
    """Ends a listing of the client's whose pages do not end: many successful requests in a row for one path."""

    def __init__(self) -> None:
        self._path, self._count = "", 0

    def __call__(self, response: "Response") -> None:
        from http import HTTPStatus  # here: making this enumeration takes 17 ms of the half second of `plan`

        request = response.request
        path = request.url.path if request.method == "GET" and response.status_code == HTTPStatus.OK else ""
        self._count = self._count + 1 if path == self._path else 1
        self._path = path
        if path.startswith("/api/") and self._count > MAX_PAGES:
            raise AnswerError(f"the list has more than {MAX_PAGES} pages")


def _limit_answer(response: "Response") -> None:
    """Limit the size and the time of an answer; of a file, only how slowly it may arrive."""
    packing = response.headers.get("Content-Encoding", "identity").strip().lower()
    if packing not in ("", "identity"):
        raise AnswerError(f"it is compressed ({packing[:40]}), which was not asked for")
    path = response.request.url.path
    is_content = path.startswith("/api/resolve-cache/") or not path.startswith(
        "/api/"
    )  # the Hub redirects to the first
    is_file = response.request.method == "GET" and response.is_success and is_content
    response.stream = _stream_type()(response.stream, _check_pace if is_file else _check_answer)


def _check_answer(received_bytes: int, waited_s: float) -> None:
    if received_bytes > MAX_ANSWER_BYTES:
        raise AnswerError(f"it is larger than {MAX_ANSWER_BYTES >> 20} MiB")
    if waited_s > _ANSWER_S:
        raise AnswerError(f"it did not end within {_ANSWER_S:.0f} s ({received_bytes} bytes came)")


def _check_pace(received_bytes: int, waited_s: float) -> None:
    if waited_s > _SLOW_START_S and received_bytes < waited_s * _SLOWEST_BYTES_PER_S:
        raise AnswerError(f"the file came too slowly: {received_bytes} bytes in {waited_s:.0f} s")


@cache
def _transport_type() -> Any:
    """Return the class of a transport that limits the whole time until an answer's headers end.

    The HTTP library limits each read: a server that sends a byte a minute would be read for weeks. The inner transport
    works in a thread, which is left behind when the time is over.
    """
    http = _http_library()

    class SentStream(http.SyncByteStream):  # type: ignore[misc, name-defined]
        """A request's body; an upload may take any time, so the limit begins at its end."""

        def __init__(self, inner: "SyncByteStream", ended: threading.Event) -> None:
            self._inner, self._ended = inner, ended

        def __iter__(self) -> Iterator[bytes]:
            try:
                yield from self._inner
            finally:
                self._ended.set()

        def close(self) -> None:
            self._inner.close()

    class TimedTransport(http.BaseTransport):  # type: ignore[misc, name-defined]
        def __init__(self, inner: "BaseTransport") -> None:
            self._inner = inner

        def handle_request(self, request: "Request") -> "Response":
            sent, answered = threading.Event(), threading.Event()
            body = cast("SyncByteStream", request.stream)
            request.stream = SentStream(body, sent)
            outcome: list[Response | BaseException] = []

            def work() -> None:
                try:
                    outcome.append(self._inner.handle_request(request))
                except BaseException as error:  # noqa: BLE001, raised again below
                    outcome.append(error)
                answered.set()
                sent.set()

            threading.Thread(target=work, name="hub-request", daemon=True).start()
            sent.wait()
            limit_s = request.extensions["timeout"]["read"] + _HEADERS_S
            if not answered.wait(limit_s):
                raise AnswerError(f"its headers did not end within {limit_s:.0f} s")
            if isinstance(outcome[0], BaseException):
                raise outcome[0]
            return outcome[0]

        def close(self) -> None:
            self._inner.close()

    return TimedTransport


@cache
def _stream_type() -> Any:
    """Return the class of a response's body with a limit; its base is the installed HTTP library's."""

    class LimitedStream(_http_library().SyncByteStream):  # type: ignore[misc]
        def __init__(self, inner: "SyncByteStream", check: Callable[[int, float], None]) -> None:
            self._inner, self._check = inner, check

        def __iter__(self) -> Iterator[bytes]:
            received_bytes, waited_s, blocks = 0, 0.0, iter(self._inner)
            while True:
                started = time.monotonic()
                block = next(blocks, None)
                waited_s += time.monotonic() - started
                if block is None:
                    return
                received_bytes += len(block)
                self._check(received_bytes, waited_s)
                yield block

        def close(self) -> None:
            self._inner.close()

    return LimitedStream
