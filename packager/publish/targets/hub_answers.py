"""The Hub's lists of references, files and commits, read page by page; every value is checked.

The client's own methods are not used for these lists: they follow a page's `next` link without an end, and return
values of any type. Other servers with the Hub's protocol, and broken proxies, answer in ways that the Hub does not.
"""

import re
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from packager import __version__
from packager.inputs.hub_session import MAX_ANSWER_BYTES, MAX_PAGES, AnswerError, joined, origin
from packager.publish.targets import CommitRecord, StoredFile
from packager.system.text import shown

if TYPE_CHECKING:
    from httpx2 import Response

LIBRARY = "gptq-packager"
# The last line of this program's commit messages: the Hub names the token's account, not the program.
TRAILER = "Published-by: gptq-packager"
_LISTING_S = 50.0
_MAX_ENTRIES = 100_000
_MAX_SIZE_BYTES = 1 << 62
_COMMIT = re.compile(r"[0-9a-f]{40}")
_OBJECT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, kw_only=True)
class References:
    """The commits of a repository's branches and tags, by name."""

    branches: Mapping[str, str]
    tags: Mapping[str, str]


def hub_headers() -> dict[str, str]:
    """Return the client's headers with the token."""
    from huggingface_hub.utils import build_hf_headers

    return build_hf_headers(library_name=LIBRARY, library_version=__version__)


def api_url(repository_id: str, *parts: str) -> str:
    """Return an address of the Hub's API for a model repository."""
    from huggingface_hub import constants

    quoted = "/".join(quote(part, safe="") for part in parts)
    return f"{constants.ENDPOINT}/api/models/{repository_id}/{quoted}"


def read_references(repository_id: str) -> References:
    """Return a repository's branches and tags.

    Raises:
        AnswerError: the answer is not one of a Hub.
    """
    answer = next(_pages(api_url(repository_id, "refs"), {}))
    if not isinstance(answer, Mapping):
        raise AnswerError(f"the references are {_kind(answer)}")
    # Servers written in Go write an empty list as null.
    lists = {key: answer.get(key) or [] for key in ("branches", "tags")}
    found = {
        key: {_text(entry, "name"): commit_id(_text(entry, "targetCommit")) for entry in _entries(values, key)}
        for key, values in lists.items()
    }
    return References(branches=found["branches"], tags=found["tags"])


def read_tree(repository_id: str, commit: str) -> Mapping[str, StoredFile]:
    """Return a commit's files by path: sha256 and size of large files, blob ids of small ones.

    Raises:
        AnswerError: the answer is not one of a Hub.
    """
    files: dict[str, StoredFile] = {}
    for page in _pages(api_url(repository_id, "tree", commit), {"recursive": "true"}):
        for entry in _entries(page, "files"):
            if _text(entry, "type") != "file":
                continue
            path = _text(entry, "path")
            if path in files:
                raise AnswerError(f"it lists the file {path[:100]!r} twice")
            files[path] = _stored_file(entry)
    return files


def read_commits(repository_id: str, revision: str, *, newest: int = 0) -> Sequence[CommitRecord]:
    """Return the commits that lead to a revision, newest first, or only so many of the newest.

    Raises:
        AnswerError: the answer is not one of a Hub, or has no commits.
    """
    records: list[CommitRecord] = []
    for page in _pages(api_url(repository_id, "commits", revision), {}):
        records.extend(_commit_record(entry) for entry in _entries(page, "commits"))
        if newest and len(records) >= newest:
            break
    if not records:
        raise AnswerError(f"{revision[:40]} has no commits")
    return records[:newest] if newest else records


def commit_id(value: object) -> str:
    """Return a commit's id.

    Raises:
        AnswerError: the value is not 40 hex digits.
    """
    if isinstance(value, str) and _COMMIT.fullmatch(value):
        return value
    if isinstance(value, str) and _SHA256.fullmatch(value):
        raise AnswerError("its commit ids have 64 digits, and the Hub's client can name only those of 40")
    raise AnswerError(f"{shown(value)} is not the id of a commit")


def json_of(response: "Response") -> Any:
    """Return an answer's JSON.

    Raises:
        AnswerError: the answer is not JSON, or is nested too deeply.
    """
    try:
        return response.json()
    except (ValueError, RecursionError) as error:
        kind = response.headers.get("Content-Type", "")[:60]
        problem = "nested too deeply" if isinstance(error, RecursionError) else "not JSON"
        raise AnswerError(f"it is {problem}: {kind or 'no type'}, begins {response.text[:60]!r}") from None


def _pages(url: str, params: Mapping[str, str]) -> Iterator[Any]:
    """Yield the pages of a list; every page is on the server of the first.

    Raises:
        AnswerError: a page is not JSON, or the pages do not end.
    """
    from huggingface_hub import get_session
    from huggingface_hub.utils import hf_raise_for_status

    seen: set[str] = set()
    size_bytes, started = 0, time.monotonic()
    response = get_session().get(url, params=dict(params), headers=hub_headers())
    while True:
        hf_raise_for_status(response)
        yield json_of(response)
        size_bytes += len(response.content)
        following = response.links.get("next", {}).get("url", "")
        if not following:
            return
        following = joined(url, following)
        if origin(following) != origin(url):
            raise AnswerError(f"its next page is on another server, {following[:200]}")
        seen.add(str(response.request.url))
        if following in seen:
            raise AnswerError("its pages lead back to an earlier one")
        if size_bytes > MAX_ANSWER_BYTES or time.monotonic() - started > _LISTING_S:
            raise AnswerError(f"its pages do not end: {len(seen)} so far, {size_bytes} bytes")
        if len(seen) >= MAX_PAGES:
            raise AnswerError(f"the list has more than {MAX_PAGES} pages")
        response = get_session().get(following, headers=hub_headers())


def _entries(page: object, noun: str) -> Collection[Mapping[str, Any]]:
    if not isinstance(page, list):
        raise AnswerError(f"the {noun} are {_kind(page)}")
    if len(page) > _MAX_ENTRIES:
        raise AnswerError(f"it lists {len(page)} {noun} on one page")
    for entry in page:
        if not isinstance(entry, Mapping):
            raise AnswerError(f"one of the {noun} is {_kind(entry)}")
    return page


def _stored_file(entry: Mapping[str, Any]) -> StoredFile:
    lfs = entry.get("lfs")
    if lfs is None:
        return StoredFile(size_bytes=_size(entry), blob_id=_digest(entry, "oid", _OBJECT))
    if not isinstance(lfs, Mapping):
        raise AnswerError(f"the record of a large file is {_kind(lfs)}")
    return StoredFile(size_bytes=_size(lfs), sha256=_digest(lfs, "oid", _SHA256))


def _commit_record(entry: Mapping[str, Any]) -> CommitRecord:
    from huggingface_hub.utils import parse_datetime

    title, body, date = _text(entry, "title"), _text(entry, "message"), _text(entry, "date")
    authors = [_text(author, "user") for author in _entries(entry.get("authors"), "authors")]
    try:
        time_s = int(parse_datetime(date).timestamp())
    except (ValueError, OverflowError):
        raise AnswerError(f"{date[:60]!r} is not the date of a commit") from None
    return CommitRecord(
        commit=commit_id(entry.get("id")),
        author="" if TRAILER in body else ", ".join(authors) or "an unknown author",
        title=title,
        message=f"{title}\n\n{body}".strip(),
        time_s=time_s,
    )


def _text(entry: Mapping[str, Any], key: str) -> str:
    value = entry.get(key)
    if not isinstance(value, str):
        raise AnswerError(f"{key!r} is {_kind(value)}, not a text")
    return value


def _size(entry: Mapping[str, Any]) -> int:
    value = entry.get("size")
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < _MAX_SIZE_BYTES:
        raise AnswerError(f"{shown(value)} is not the size of a file")
    return value


def _digest(entry: Mapping[str, Any], key: str, form: re.Pattern[str]) -> str:
    value = _text(entry, key)
    if not form.fullmatch(value):
        raise AnswerError(f"{shown(value)} is not a digest")
    return value


def _kind(value: object) -> str:
    """Name a JSON value's kind."""
    if value is None:
        return "missing or null"
    kinds: Mapping[type, str] = {dict: "an object", list: "a list", str: "a text"}
    return kinds.get(type(value)) or f"the value {shown(value)}"
