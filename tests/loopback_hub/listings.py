"""The files of a commit and the commits of a branch, page by page."""

import base64
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import parse_qs, urlencode

from tests.loopback_hub.messages import Answer, Call, RefusedError

if TYPE_CHECKING:
    from tests.loopback_hub.hub import LoopbackHub

_T = TypeVar("_T")
COMMITS_PER_PAGE = 50


def list_tree(hub: "LoopbackHub", call: Call) -> Answer:
    """List a folder, or all files below it."""
    repository = hub.readable(call)
    commit = repository.resolve(call.args["rev"])
    folder = call.args.get("path", "").strip("/")
    entries = repository.entries(commit)
    if folder and folder not in {entry.path for entry in entries if entry.kind == "tree"}:
        raise RefusedError(404, f"{folder} does not exist on {call.args['rev']}", "EntryNotFound")
    below = [entry for entry in entries if entry.path.startswith(f"{folder}/" if folder else "")]
    depth = folder.count("/") + 1 if folder else 0
    listed = [entry for entry in below if call.is_set("recursive") or entry.path.count("/") == depth]
    page, link = _page(hub, call, listed, hub.page_size)
    return Answer.of_json([entry.described() for entry in page], 200, link)


def list_paths(hub: "LoopbackHub", call: Call) -> Answer:
    """Describe the named files and folders, without those that do not exist."""
    if not hub.dialect.paths_info:
        raise RefusedError(404, "404 page not found")
    repository = hub.readable(call)
    commit = repository.resolve(call.args["rev"])
    form = parse_qs(b"".join(call.body.blocks()).decode())
    wanted = {path.strip("/") for path in form.get("paths", [])}
    return Answer.of_json([entry.described() for entry in repository.entries(commit) if entry.path in wanted])


def list_commits(hub: "LoopbackHub", call: Call) -> Answer:
    """List the history of a revision, newest first."""
    repository = hub.readable(call)
    log = repository.log(repository.resolve(call.args["rev"]))
    page, link = _page(hub, call, log, min(hub.page_size, COMMITS_PER_PAGE))
    keys = ("id", "authors", "date", "title", "message")
    values = [dict(zip(keys, (oid, [{"user": who}], *rest), strict=True)) for oid, who, *rest in page]
    return Answer.of_json(values, 200, link)


def first_of_page(cursor: str, items: Sequence[object]) -> int:
    """Return the number of the first item of a page.

    The Hub's own clients follow its links. text-generation-webui makes cursors itself: the base64 of `X:50`, where X is
    the base64 of `{"file_name": "the last name of the page before"}`.
    """
    if cursor.isdecimal():
        return int(cursor)
    inner, _, _size = base64.b64decode(cursor).decode().partition(":")
    name = json.loads(base64.b64decode(inner))["file_name"]
    return next((number for number, item in enumerate(items, 1) if getattr(item, "path", "") == name), len(items))


def _page(hub: "LoopbackHub", call: Call, items: Sequence[_T], size: int) -> tuple[Sequence[_T], dict[str, str]]:
    """Return a page and the Link header that leads to the next."""
    end = first_of_page(call.query.get("cursor", ["0"])[0], items) + size
    more = urlencode({**call.query, "cursor": [str(end)]}, doseq=True)
    link = {"Link": f'<{hub.endpoint}{call.path}?{more}>; rel="next"'} if end < len(items) else {}
    return items[end - size : end], link
