"""The Hub's client, set up so that nothing waits unseen or for ever, and what it has no call for.

huggingface_hub is imported when first needed.
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
# Of one read or write, not of a call: a commit of many files takes the Hub minutes, in which it sends nothing.
_TIMEOUTS_S = {"connect": 30.0, "read": 600.0, "write": 600.0, "pool": 600.0}
# The client waits by itself, in silence, for as long as it is asked to; what is longer is waited for aloud.
_SILENT_WAIT_S = 10.0
_BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)
_LIBRARY = "gptq-packager"


def hub_api() -> "HfApi":
    """Return the client, for the server that the environment names."""
    from huggingface_hub import HfApi

    _set_up()
    return HfApi(library_name=_LIBRARY, library_version=__version__)


def read_content(repository_id: str, commit: str, name: str, headers: Mapping[str, str]) -> Iterator[bytes]:
    """Yield a file's content as it arrives.

    Args:
        repository_id: namespace/name.
        commit: 40 hex digits.
        name: the file's.
        headers: beside the client's own, such as Range.
    """
    from huggingface_hub import get_session
    from huggingface_hub.utils._http import hf_raise_for_status

    url = f"{hub_api().endpoint}/{repository_id}/resolve/{quote(commit, safe='')}/{quote(name)}"
    sent = {**_headers(), **headers, "Accept-Encoding": "identity"}  # a range of what is stored, not of what is sent
    with get_session().stream("GET", url, headers=sent, follow_redirects=True) as response:
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        yield from response.iter_bytes(_CHUNK_BYTES)


def newest_commit(repository_id: str, revision: str) -> Mapping[str, Any]:
    """Return what the Hub tells of a revision's newest commit; `list_repo_commits` would ask for all of them."""
    from huggingface_hub.utils._pagination import paginate

    url = f"{hub_api().endpoint}/api/models/{repository_id}/commits/{quote(revision, safe='')}"
    return next(iter(paginate(url, params={}, headers=_headers())))


def asked_wait_s(headers: Mapping[str, str], status: int | None) -> float | None:
    """Return how many seconds an answer asks to wait, None if it does not say."""
    from huggingface_hub.utils._http import parse_ratelimit_headers

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
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its warnings name signed addresses of uploads


def _headers() -> dict[str, str]:
    from huggingface_hub.utils._headers import build_hf_headers

    return build_hf_headers(library_name=_LIBRARY, library_version=__version__)


def _client() -> "Client":
    from huggingface_hub.utils._http import default_client_factory

    client = default_client_factory()
    hooks = client.event_hooks
    client.event_hooks = {
        "request": [*hooks["request"], _limit_time],
        "response": [*hooks["response"], _refuse_to_wait_in_silence],
    }
    return client


def _limit_time(request: "Request") -> None:
    """Give a request its time limits: most of the client's calls ask for none."""
    request.extensions = {**request.extensions, "timeout": _TIMEOUTS_S}


def _refuse_to_wait_in_silence(response: "Response") -> None:
    from huggingface_hub.utils._http import hf_raise_for_status

    if response.status_code in _BUSY:
        wait_s = asked_wait_s(response.headers, response.status_code)
        if wait_s is not None and wait_s > _SILENT_WAIT_S:
            response.read()
            hf_raise_for_status(response)


def _date(text: str) -> float | None:
    """Return a date of HTTP in seconds since 1970, None if it is none."""
    try:
        return email.utils.parsedate_to_datetime(text).timestamp()
    except ValueError:
        return None
