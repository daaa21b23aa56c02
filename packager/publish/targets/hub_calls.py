"""Calls to the Hub: retries with waits, and the translation of the client's errors.

huggingface_hub retries some of its calls and not others, so every call goes through `RetryPolicy`. It retries failures
that may pass (429, 5xx, a cut connection) after the wait that the Hub asks for, logs each wait, and has a limit. Every
other failure of the client or the network is final, and so is an answer that no Hub gives. An error of this program
passes unchanged, with its traceback.
"""

import itertools
import json
import random
import socket
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from types import ModuleType
from typing import TypeVar, cast

from packager.errors import MachineError, PackagerError, PublishError
from packager.inputs.hub_session import AnswerError, client_message, is_of_client
from packager.publish.targets import HeadMovedError
from packager.publish.targets.hub_client import asked_wait_s
from packager.system.text import printable

_Result = TypeVar("_Result")

_TRANSIENT = frozenset({408, 425, 429})
_FINAL = frozenset({501, 505, 507, 511})  # errors of the server that a retry does not change
_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 0.1, 60.0
# The Hub's rate limits count commits and requests per hour and per five minutes.
RETRY_LIMIT_S = 3600.0
# A name that cannot be resolved is a wrong address or a machine without a network more often than a short failure.
_UNRESOLVED_LIMIT_S = 30.0
# Errors of the HTTP library that a retry does not change: redirects without an end, bytes that are not HTTP, ...
_BROKEN = frozenset({"TooManyRedirects", "DecodingError", "UnsupportedProtocol", "LocalProtocolError"})
_NOT_HTTP, _CUT = "RemoteProtocolError", ("disconnected", "closed connection")
_MAX_MESSAGE = 300
_ANSWER_HINT = "check the address in HF_ENDPOINT, and whether a proxy answers in the server's place"
_LOGIN_HINT = "set HF_TOKEN, or run `hf auth login`, with a token that may write to this repository"
_STATUSES: Mapping[int | None, tuple[str, str]] = {
    HTTPStatus.UNAUTHORIZED: ("the Hub does not know the token, or it has expired", _LOGIN_HINT),
    HTTPStatus.FORBIDDEN: ("the token may not do that", _LOGIN_HINT),
    HTTPStatus.NOT_FOUND: ("the server does not have it, or does not know the request", _ANSWER_HINT),
    HTTPStatus.NOT_IMPLEMENTED: ("the server cannot do that", ""),
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: (
        "a file is larger than the Hub takes",
        "set checkpoint.max_shard_bytes in the recipe and build again",
    ),
    HTTPStatus.INSUFFICIENT_STORAGE: ("the Hub has no room for it", "free some of the account's storage"),
}


class RetryPolicy:
    """Runs calls until they succeed, fail finally, or exceed a total waiting time.

    Args:
        where: the repository's address, for messages.
        log: gets one line per wait.
        limit_s: total seconds of waiting per call.
    """

    def __init__(
        self,
        where: str,
        log: Callable[[str], None],
        *,
        limit_s: float = RETRY_LIMIT_S,
    ) -> None:
        self._where, self._log, self._limit_s = where, log, limit_s

    def call(self, what: str, function: Callable[[], _Result]) -> _Result:
        """Return what `function` returns.

        Args:
            what: the activity, e.g. "listing branches"; log lines and errors begin with it.
            function: may be run several times.

        Raises:
            PublishError: the Hub refused, or did not answer within the limit.
            MachineError: this machine is set to be offline.
        """
        waited_s = 0.0  # waits alone: the hours of a long upload do not count
        for attempt in itertools.count():
            result, error = _attempt(function)
            if error is None:
                return cast(_Result, result)
            if isinstance(error, PackagerError) or not _is_of_network(error):
                raise error
            cause = _cause(error)
            if not _may_pass(cause):
                raise self._refusal(what, cause) from None
            reason, wait_s = _reason(cause), _wait_s(cause, attempt)
            if _is_unresolved(cause) and waited_s + wait_s > _UNRESOLVED_LIMIT_S:
                raise PublishError(
                    f"{what}: the name of the server cannot be resolved",
                    where=self._where,
                    why=reason,
                    hint="check the network and HF_ENDPOINT; a local repository is named by its folder, such as "
                    "dist/hub/models/NAMESPACE/NAME",
                )
            if waited_s + wait_s > self._limit_s:
                raise PublishError(
                    f"{what}: the Hub did not answer within {self._limit_s:.0f} s of waiting",
                    where=self._where,
                    why=f"{reason}; the next try would be in {wait_s:.0f} s",
                    hint="run the same command again later: uploaded files are not uploaded twice",
                )
            self._log(f"{what}: {reason}; trying again in {wait_s:.0f} s")
            time.sleep(wait_s)
            waited_s += wait_s
        raise AssertionError("the limit comes first")

    def _refusal(self, what: str, error: Exception) -> PackagerError:
        """Return the error for a final failure; it has the Hub's message, never a request and its headers."""
        from huggingface_hub import errors as hub

        if isinstance(error, hub.OfflineModeIsEnabled):
            return MachineError(f"{what}: this machine is set to be offline", hint="unset HF_HUB_OFFLINE and run again")
        if _is_unsendable(error):
            problem = "the token or the address has a character that no request can have"
            return PublishError(f"{what}: {problem}", where=self._where, hint=_LOGIN_HINT)
        if _status(error) is None and (_is_broken(error) or _is_of_form(error)):
            problem = f"{what}: the answer is not one that the Hub gives"
            return PublishError(problem, where=self._where, why=_reason(error), hint=_ANSWER_HINT)
        if _status(error) == HTTPStatus.PRECONDITION_FAILED:
            return HeadMovedError(f"{what}: the branch's head moved", where=self._where, why=_reason(error))
        kinds: tuple[tuple[type[Exception], str, str], ...] = (
            (hub.GatedRepoError, "the repository is gated and the token's account has no access", _LOGIN_HINT),
            (hub.LocalTokenNotFoundError, "there is no token", _LOGIN_HINT),
            (hub.OIDCError, "the Hub gave this CI job no token", "docs/how-to/publish.md lists the requirements"),
            (hub.RevisionNotFoundError, "there is no such branch or commit", "run again: the plan is made again"),
            (hub.EntryNotFoundError, "there is no such file", "run again: the plan is made again"),
            (hub.RepositoryNotFoundError, "there is no such repository, or the token may not see it", _LOGIN_HINT),
        )
        found = [(problem, hint) for kind, problem, hint in kinds if isinstance(error, kind)]
        problem, hint = (*found, _STATUSES.get(_status(error), ("the Hub refused", "")))[0]
        return PublishError(f"{what}: {problem}", where=self._where, why=_reason(error), hint=hint)


def _attempt(function: Callable[[], _Result]) -> tuple[_Result | None, Exception | None]:
    """Return the result or the error of a call; the client raises KeyError and AssertionError, too."""
    try:
        return function(), None
    except Exception as error:  # noqa: BLE001 - `RetryPolicy` raises what is not the client's
        return None, error


def _client_errors() -> ModuleType:
    """Return the client's module of errors, imported when first needed."""
    from huggingface_hub import errors

    return errors


def _transport_errors() -> tuple[type[Exception], ...]:
    """Return the errors of a failing network; the root error of the HTTP library is httpx's or httpx2's."""
    return (cast(type[Exception], _client_errors().HfHubHTTPError.__bases__[0]), ConnectionError, TimeoutError)


def _is_of_network(error: Exception) -> bool:
    return isinstance(error, _transport_errors()) or is_of_client(error)


def _is_unresolved(error: BaseException | None) -> bool:
    """Return whether an error was caused by a name without an address."""
    while error is not None:
        if isinstance(error, socket.gaierror):
            return True
        error = error.__cause__ or error.__context__
    return False


def _is_unsendable(error: Exception) -> bool:
    """Return whether the request could not be written, e.g. because of a line end in the token."""
    return type(error).__name__ in ("LocalProtocolError", "UnsupportedProtocol")


def _is_of_form(error: Exception) -> bool:
    """Return whether an answer has another form than the client or this program reads."""
    return isinstance(
        error, AnswerError | LookupError | TypeError | AttributeError | ArithmeticError | RecursionError
    ) or (isinstance(error, json.JSONDecodeError | UnicodeError) or type(error).__name__ == "InvalidURL")


def _cause(error: Exception) -> Exception:
    """Return the cause of an error that only adds the name of a file, or of one about an unreadable refusal."""
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception):
        return error.__cause__
    context = error.__context__  # the client expects an object in the body of a refusal
    if isinstance(context, Exception) and _status(context) and not (_status(error) or isinstance(error, AnswerError)):
        return context
    return error


def _may_pass(error: Exception) -> bool:
    """Return whether the same call may succeed later."""
    from huggingface_hub import errors as hub

    status = _status(error)
    if status is not None or isinstance(error, hub.OfflineModeIsEnabled):
        return status is not None and (status in _TRANSIENT or (status >= 500 and status not in _FINAL))
    return isinstance(error, _transport_errors()) and not _is_broken(error)


def _is_broken(error: Exception) -> bool:
    """Return whether an answer was malformed, or the request cannot be sent: not a failure that passes."""
    kind = type(error).__name__
    return kind in _BROKEN or (kind == _NOT_HTTP and not any(word in str(error) for word in _CUT))


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    return cast(int, response.status_code) if response is not None else None


def _wait_s(error: Exception, attempt: int) -> float:
    """Return the seconds that the answer asks to wait, else 2^attempt."""
    headers: Mapping[str, str] = getattr(getattr(error, "response", None), "headers", {})
    if (asked := asked_wait_s(headers, _status(error))) is not None:
        return max(asked, _SHORTEST_WAIT_S)
    return min(_LONGEST_WAIT_S, 2.0**attempt) * random.uniform(0.75, 1.25)  # noqa: S311 - spreads the retries of many clients


def _reason(error: Exception) -> str:
    """Return the status and the server's message, or the client's message, in one line."""
    status = _status(error)
    own = client_message(error) if status is None else ""
    message = (getattr(error, "server_message", None) or own).strip()
    message = printable(message.splitlines()[0])[:_MAX_MESSAGE] if message else ""
    if isinstance(error, AnswerError):
        return message
    if status is None:
        return f"{type(error).__name__}: {message}" if message else type(error).__name__
    phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else "without a message"
    return f"{status}: {message}" if message else f"{status} {phrase}"
