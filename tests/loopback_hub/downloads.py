"""Files by their path, whole or the part that is asked for."""

import re
from typing import TYPE_CHECKING

from tests.loopback_hub.messages import Answer, Call, RefusedError
from tests.loopback_hub.models import require_ungated

if TYPE_CHECKING:
    from tests.loopback_hub.hub import LoopbackHub


def resolve(hub: "LoopbackHub", call: Call) -> Answer:
    """Send a file."""
    repository = hub.readable(call)
    require_ungated(repository, call)
    commit = repository.resolve(call.args["rev"])
    headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
    entry = repository.files(commit).get(call.args["path"])
    if entry is None:
        raise RefusedError(404, "Entry not found", "EntryNotFound", headers)
    headers |= {"ETag": f'"{entry.sha256 or entry.oid}"', "Content-Type": "application/octet-stream"}
    if not entry.sha256:
        return _ranged(call, Answer(200, repository.blob(entry.oid), headers), entry.size)
    headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    return _ranged(call, Answer(200, b"", headers, repository.lfs_object(entry.sha256)), entry.size)


def _ranged(call: Call, answer: Answer, size: int) -> Answer:
    """Narrow an answer to the one range that was asked for, if any."""
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
