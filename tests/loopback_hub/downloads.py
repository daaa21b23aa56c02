"""Files by path, whole or in part."""

from typing import TYPE_CHECKING

from tests.loopback_hub.lfs import storage_address
from tests.loopback_hub.messages import Answer, Call, RefusedError, ranged
from tests.loopback_hub.models import require_ungated

if TYPE_CHECKING:
    from tests.loopback_hub.hub import LoopbackHub


def resolve(hub: "LoopbackHub", call: Call) -> Answer:
    """Send a small file, or the address of a large one: the storage needs no token."""
    repository = hub.readable(call)
    require_ungated(repository, call)
    commit = repository.resolve(call.args["rev"])
    headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
    entry = repository.files(commit).get(call.args["path"])
    if entry is None:
        raise RefusedError(404, "Entry not found", "EntryNotFound", headers)
    if not entry.sha256:
        headers |= {"ETag": f'"{entry.oid}"', "Content-Type": "application/octet-stream"}
        return ranged(call, Answer(200, repository.blob(entry.oid), headers), entry.size)
    headers |= {"X-Linked-Etag": f'"{entry.sha256}"', "X-Linked-Size": str(entry.size)}
    if hub.xet and (file := hub.xet_store.file(entry.sha256, "sha256")):
        refresh = f"{hub.endpoint}/api/models/{repository.id}/xet-read-token/{commit}"
        headers |= {"X-Xet-Hash": file.hash, "Link": f'<{refresh}>; rel="xet-auth"'}
    return Answer(302, b"", {**headers, "Location": storage_address(hub, repository, entry.sha256)})
