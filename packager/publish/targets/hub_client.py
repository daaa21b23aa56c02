"""The Hub's client, with logged waits, and the requests that it has no method for; huggingface_hub is imported late."""

import base64
import email.utils
import json
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from packager import __version__
from packager.inputs.hub_session import AnswerError, open_session
from packager.publish.targets import StoredFile
from packager.publish.targets.hub_answers import LIBRARY, api_url, commit_id, hub_headers, json_of

if TYPE_CHECKING:
    from httpx2 import Response
    from huggingface_hub import HfApi

_CHUNK_BYTES = 1 << 20
# The client waits as long as the Hub asks, without a log line; longer waits are left to `RetryPolicy`, which logs them.
_SILENT_WAIT_S = 10.0
_BUSY = (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE)


def hub_api() -> "HfApi":
    """Return the client for the server that the environment names."""
    from huggingface_hub import HfApi

    open_session(_refuse_long_wait)
    return HfApi(library_name=LIBRARY, library_version=__version__)


def read_content(
    repository_id: str, commit: str, name: str, *, start: int = 0, size: int | None = None
) -> Iterator[bytes]:
    """Yield a file's content as it arrives.

    Args:
        repository_id: namespace/name.
        commit: 40 hex digits.
        name: the file's.
        start: ask for the part from this byte on.
        size: ask for so many bytes, at least one; a server without ranges sends more.

    Raises:
        AnswerError: the answer does not begin with byte `start`.
    """
    from huggingface_hub import get_session
    from huggingface_hub.utils import hf_raise_for_status

    url = f"{hub_api().endpoint}/{repository_id}/resolve/{quote(commit, safe='')}/{quote(name)}"
    end = "" if size is None else str(start + size - 1)
    sent = {**hub_headers(), **({"Range": f"bytes={start}-{end}"} if start or size is not None else {})}
    with get_session().stream("GET", url, headers=sent, follow_redirects=True) as response:
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
        if start and not begins_with(response, start):
            raise AnswerError("the server does not send the part of the file that was asked for")
        yield from response.iter_bytes(_CHUNK_BYTES)


def begins_with(response: "Response", start: int) -> bool:
    """Return whether an answer is the part of a file that begins with a byte, by its headers."""
    stated = re.match(r"bytes (\d{1,20})-", response.headers.get("Content-Range", ""))
    return response.status_code == HTTPStatus.PARTIAL_CONTENT and stated is not None and int(stated[1]) == start


def stored_operation(name: str, file: StoredFile, content: bytes) -> Mapping[str, Any]:
    """Return the operation that gives a file to a commit without an upload of large content.

    Args:
        name: the file's path.
        file: its size and digest; the repository has a large file's content.
        content: a small file's content.
    """
    if file.sha256:  # CommitOperationCopy would ask /paths-info, which not every server has, and send no size
        value = {"path": name, "algo": "sha256", "oid": file.sha256, "size": file.size_bytes}
        return {"key": "lfsFile", "value": value}
    encoded = base64.b64encode(content).decode()
    return {"key": "file", "value": {"path": name, "content": encoded, "encoding": "base64"}}


def deletion(name: str) -> Mapping[str, Any]:
    """Return the operation that removes a file."""
    return {"key": "deletedFile", "value": {"path": name}}


def post_commit(
    repository_id: str,
    branch: str,
    operations: Iterable[Mapping[str, Any]],
    *,
    title: str,
    description: str,
    parent: str,
) -> str:
    """Make a commit from `stored_operation` and `deletion`, and return its id."""
    from huggingface_hub import get_session
    from huggingface_hub.utils import hf_raise_for_status

    header = {"summary": title, "description": description, "parentCommit": parent}
    lines = [{"key": "header", "value": header}, *operations]
    response = get_session().post(
        api_url(repository_id, "commit", branch),
        content=b"".join(json.dumps(line).encode() + b"\n" for line in lines),
        headers={**hub_headers(), "Content-Type": "application/x-ndjson"},
    )
    hf_raise_for_status(response, endpoint_name="commit")
    answer = json_of(response)
    return commit_id(answer.get("commitOid") if isinstance(answer, Mapping) else None)


def asked_wait_s(headers: Mapping[str, str], status: int | None) -> float | None:
    """Return the seconds that an answer asks to wait, None if it asks for no wait."""
    from huggingface_hub.utils import parse_ratelimit_headers

    asked = headers.get("retry-after", "").strip()
    if asked.isascii() and asked.isdigit():
        return float(asked)
    if asked and (date := _date(asked)) is not None:
        return max(0.0, date - time.time())
    try:
        limit = parse_ratelimit_headers(headers)
        return float(limit.reset_in_seconds) if limit and status == HTTPStatus.TOO_MANY_REQUESTS else None
    except (ValueError, OverflowError):  # a number of a thousand digits
        return None


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
    except (ValueError, OverflowError):
        return None
