"""The Hub's client, with time limits and logged waits, and the requests that it has no method for.

huggingface_hub is imported when first needed. One private name is used: `default_client_factory`. A factory that does
not call it would have to repeat its hooks (request ids, offline mode) and to choose between httpx and httpx2.
"""

import email.utils
import logging
import time
from collections.abc import Iterator, Mapping
from functools import cache
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from packager import __version__

if TYPE_CHECKING:
    from httpx2 import Client, Request, Response
    from huggingface_hub import HfApi

_CHUNK_BYTES = 1 << 20
# Limits of one read or write, not of a call: for a commit of many files the Hub sends nothing for minutes.
_TIMEOUTS_S = {"connect": 30.0, "read": 600.0, "write": 600.0, "pool": 600.0}
# The client waits as long as the Hub asks, without a log line; longer waits are left to `RetryPolicy`, which logs them.
_SILENT_WAIT_S = 10.0
_BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_LIBRARY = "gptq-packager"


def hub_api() -> "HfApi":
    """Return the client for the server that the environment names."""
    from huggingface_hub import HfApi

    _set_up()
    return HfApi(library_name=_LIBRARY, library_version=__version__)


def read_content(repository_id: str, commit: str, name: str, headers: Mapping[str, str]) -> Iterator[bytes]:
    """Yield a file's content as it arrives.

    Args:
        repository_id: namespace/name.
        commit: 40 hex digits.
        name: the file's.
        headers: more headers, e.g. Range.
    """
    from huggingface_hub import get_session
    from huggingface_hub.utils import hf_raise_for_status

    url = f"{hub_api().endpoint}/{repository_id}/resolve/{quote(commit, safe='')}/{quote(name)}"
    sent = {**_headers(), **headers, "Accept-Encoding": "identity"}  # a range of the stored bytes
    with get_session().stream("GET", url, headers=sent, follow_redirects=True) as response:
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        yield from response.iter_bytes(_CHUNK_BYTES)


def newest_commit(repository_id: str, revision: str) -> Mapping[str, Any]:
    """Return the Hub's record of a revision's newest commit; `list_repo_commits` would request all commits."""
    from huggingface_hub.utils import paginate

    url = f"{hub_api().endpoint}/api/models/{repository_id}/commits/{quote(revision, safe='')}"
    return next(iter(paginate(url, params={}, headers=_headers())))


def asked_wait_s(headers: Mapping[str, str], status: int | None) -> float | None:
    """Return the seconds that an answer asks to wait, None if it asks for no wait."""
    from huggingface_hub.utils import parse_ratelimit_headers

    asked = headers.get("retry-after", "").strip()
    if asked.isdigit():
        return float(asked)
    if asked and (date := _date(asked)) is not None:
        return max(0.0, date - time.time())
    limit = parse_ratelimit_headers(headers)
    if limit is not None and status == HTTPStatus.TOO_MANY_REQUESTS:
        return float(limit.reset_in_seconds)
    return None


@cache
def _set_up() -> None:
    from huggingface_hub import set_client_factory

    set_client_factory(_client)
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its warnings show signed addresses of uploads


def _headers() -> dict[str, str]:
    from huggingface_hub.utils import build_hf_headers

    return build_hf_headers(library_name=_LIBRARY, library_version=__version__)


def _client() -> "Client":
    from huggingface_hub.utils._http import default_client_factory

    client = default_client_factory()
    hooks = client.event_hooks
    client.event_hooks = {
        "request": [*hooks["request"], _limit_time],
        "response": [*hooks["response"], _refuse_long_wait],
    }
    return client


def _limit_time(request: "Request") -> None:
    """Set a request's time limits: most calls of the client set none."""
    request.extensions = {**request.extensions, "timeout": _TIMEOUTS_S}


def _refuse_long_wait(response: "Response") -> None:
    """Raise the client's error if it would wait for longer than `_SILENT_WAIT_S` without a log line."""
    from huggingface_hub.utils import hf_raise_for_status

    if response.status_code in _BUSY:
        wait_s = asked_wait_s(response.headers, response.status_code)
        if wait_s is not None and wait_s > _SILENT_WAIT_S:
            response.read()
            hf_raise_for_status(response)


def _date(text: str) -> float | None:
    """Return an HTTP date in seconds since 1970, None if the text is not a date."""
    try:
        return email.utils.parsedate_to_datetime(text).timestamp()
    except ValueError:
        return None
