"""Calls to the Hub that wait when it is busy, and its refusals in our words.

The client retries some of its calls and not others, so every call goes through here: what may pass (429, 5xx, a cut
connection) is tried again after as long as the Hub asks for, aloud and with a limit; everything else is final.
"""

import itertools
import random
import time
from collections.abc import Callable, Mapping
from http import HTTPStatus
from typing import TypeVar, cast

from packager.errors import MachineError, PackagerError, PublishError
from packager.publish.targets import HeadMovedError
from packager.publish.targets.hub_client import asked_wait_s

Result = TypeVar("Result")

_TRANSIENT = frozenset({408, 425, 429})
_FINAL = frozenset({501, 505, 507, 511})  # of the server's errors, those that another try does not change
_SHORTEST_WAIT_S, _LONGEST_WAIT_S = 0.1, 60.0
# The Hub counts commits and requests by the hour, and by five minutes.
RETRY_LIMIT_S = 3600.0
_LOGIN_HINT = "set HF_TOKEN, or run `hf auth login`, with a token that may write to this repository"
_STATUSES: Mapping[int | None, tuple[str, str]] = {
    HTTPStatus.UNAUTHORIZED: ("the Hub does not know the token, or it has expired", _LOGIN_HINT),
    HTTPStatus.FORBIDDEN: ("the token may not do that", _LOGIN_HINT),
    HTTPStatus.REQUEST_ENTITY_TOO_LARGE: (
        "a file is larger than the Hub takes",
        "set checkpoint.max_shard_bytes in the recipe and build again",
    ),
    HTTPStatus.INSUFFICIENT_STORAGE: ("the Hub has no room for it", "free some of the account's storage"),
}


class RetryPolicy:
    """Runs calls until they succeed, fail for good, or have been waited for too long.

    Args:
        where: the repository, for people.
        log: gets one line per wait.
        limit_s: seconds that one call may be waited for in all.
    """

    def __init__(
        self,
        where: str,
        log: Callable[[str], None],
        *,
        limit_s: float = RETRY_LIMIT_S,
    ) -> None:
        self._where, self._log, self._limit_s = where, log, limit_s

    def call(self, what: str, function: Callable[[], Result]) -> Result:
        """Return what `function` returns.

        Args:
            what: what is being done, e.g. "listing branches"; it begins the lines people read.
            function: may be run several times.

        Raises:
            PublishError: the Hub refused, or did not answer within the limit.
            MachineError: this machine's disk is full, or it is set to be offline.
        """
        waited_s = 0.0  # waits alone: an upload of hours is no reason to give up at its first trouble
        for attempt in itertools.count():
            try:
                return function()
            except _failures() as error:
                cause = _cause(error)
                if not _may_pass(cause):
                    raise self._refusal(what, cause) from None
                reason, wait_s = _reason(cause), _wait_s(cause, attempt)
            if waited_s + wait_s > self._limit_s:
                raise PublishError(
                    f"{what}: the Hub did not do it within {self._limit_s:.0f} s",
                    where=self._where,
                    why=f"{reason}; the next try would be in {wait_s:.0f} s",
                    hint="run the same command again later: what has arrived is not sent again",
                )
            self._log(f"{what}: {reason}; trying again in {wait_s:.0f} s")
            time.sleep(wait_s)
            waited_s += wait_s
        raise AssertionError("the limit comes first")

    def _refusal(self, what: str, error: Exception) -> PackagerError:
        """Say what went wrong for good; only the Hub's own words are passed on, never a request and its headers."""
        from huggingface_hub import errors as hub

        if isinstance(error, hub.OfflineModeIsEnabled):
            return MachineError(f"{what}: this machine is set to be offline", hint="unset HF_HUB_OFFLINE and run again")
        if _is_of_this_side(error):
            problem = "the token or the address has a character that no request can have"
            return PublishError(f"{what}: {problem}", where=self._where, hint=_LOGIN_HINT)
        if _status(error) == HTTPStatus.PRECONDITION_FAILED:
            return HeadMovedError(f"{what}: the branch's head moved", where=self._where, why=_reason(error))
        kinds: tuple[tuple[type[Exception], str, str], ...] = (
            (hub.GatedRepoError, "the repository is gated and the token's account has no access", _LOGIN_HINT),
            (hub.LocalTokenNotFoundError, "there is no token", _LOGIN_HINT),
            (hub.OIDCError, "no token could be had for this CI job", "docs/how-to/publish.md says what it needs"),
            (hub.RevisionNotFoundError, "there is no such branch or commit", "run again: the plan is made anew"),
            (hub.EntryNotFoundError, "there is no such file", "run again: the plan is made anew"),
            (hub.RepositoryNotFoundError, "there is no such repository, or the token may not see it", _LOGIN_HINT),
        )
        found = [(problem, hint) for kind, problem, hint in kinds if isinstance(error, kind)]
        problem, hint = (*found, _STATUSES.get(_status(error), ("the Hub refused", "")))[0]
        return PublishError(f"{what}: {problem}", where=self._where, why=_reason(error), hint=hint)


def _failures() -> tuple[type[Exception], ...]:
    """Return what the client raises when a call fails: files that cannot be read and cards it refuses, too."""
    from huggingface_hub import errors as hub

    return (*_transport(), hub.OIDCError, OSError, RuntimeError, ValueError)


def _transport() -> tuple[type[Exception], ...]:
    """Return the errors of a network that fails; the HTTP library's root error is httpx2's, or another client's."""
    from huggingface_hub import errors as hub

    return (cast(type[Exception], hub.HfHubHTTPError.__bases__[0]), ConnectionError, TimeoutError)


def _is_of_this_side(error: Exception) -> bool:
    """Whether a request could not even be written, as with a line end in the token."""
    return type(error).__name__ in ("LocalProtocolError", "UnsupportedProtocol")


def _cause(error: Exception) -> Exception:
    """Return the error below one that only says which file it was about."""
    return error.__cause__ if isinstance(error, RuntimeError) and isinstance(error.__cause__, Exception) else error


def _may_pass(error: Exception) -> bool:
    """Whether the same call may succeed later."""
    from huggingface_hub import errors as hub

    status = _status(error)
    if status is not None or isinstance(error, hub.OfflineModeIsEnabled):
        return status is not None and (status in _TRANSIENT or (status >= 500 and status not in _FINAL))
    return isinstance(error, _transport()) and not _is_of_this_side(error)


def _status(error: Exception) -> int | None:
    response = getattr(error, "response", None)
    return cast(int, response.status_code) if response is not None else None


def _wait_s(error: Exception, attempt: int) -> float:
    """Return how long the answer asks to wait, else ever longer."""
    headers: Mapping[str, str] = getattr(getattr(error, "response", None), "headers", {})
    if (asked := asked_wait_s(headers, _status(error))) is not None:
        return max(asked, _SHORTEST_WAIT_S)
    return min(_LONGEST_WAIT_S, 2.0**attempt) * random.uniform(0.75, 1.25)  # noqa: S311 - so that crowds scatter


def _reason(error: Exception) -> str:
    """Return the status and the server's words, or the client's in one line."""
    status = _status(error)
    told = "" if status is not None or _is_of_this_side(error) else str(error)  # the header that is wrong is the token
    words = (getattr(error, "server_message", None) or told).strip()
    words = words.splitlines()[0] if words else ""
    if status is None:
        return f"{type(error).__name__}: {words}" if words else type(error).__name__
    phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else "without a word"
    return f"{status}: {words}" if words else f"{status} {phrase}"
