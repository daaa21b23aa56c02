"""Large files: stored objects, and the addresses for uploads and downloads."""

import hashlib
import re
import shutil
from typing import TYPE_CHECKING, Any

from tests.loopback_hub.messages import Answer, Call, RefusedError, ranged
from tests.loopback_hub.models import require_ungated
from tests.loopback_hub.repository import Repository, write_whole

if TYPE_CHECKING:
    from tests.loopback_hub.hub import LoopbackHub

_LFS_JSON = {"Content-Type": "application/vnd.git-lfs+json"}


def lfs_batch(hub: "LoopbackHub", call: Call) -> Answer:
    """Answer for each object whether it is stored, and its address for an upload or a download."""
    wish = call.json()
    if wish.get("operation") != "upload":
        repository = hub.readable(call)
        require_ungated(repository, call)
        found = [_lfs_download(hub, repository, item["oid"], item["size"]) for item in wish["objects"]]
        return Answer.of_json({"transfer": "basic", "objects": found}, headers=_LFS_JSON)
    repository = hub.writable(call)
    in_parts = "multipart" in wish.get("transfers", [])
    values = [_lfs_actions(hub, repository, item["oid"], item["size"], in_parts=in_parts) for item in wish["objects"]]
    multipart = any("chunk_size" in item.get("actions", {}).get("upload", {}).get("header", {}) for item in values)
    return Answer.of_json({"transfer": "multipart" if multipart else "basic", "objects": values}, headers=_LFS_JSON)


def storage_address(hub: "LoopbackHub", repository: Repository, oid: str) -> str:
    """Return the addresses of an object; the Hub would sign them."""
    return f"{hub.storage}/_lfs/{repository.id}/{oid}"


def _lfs_download(hub: "LoopbackHub", repository: Repository, oid: str, size: int) -> dict[str, Any]:
    if not repository.lfs_object(oid).is_file():
        return {"oid": oid, "size": size, "error": {"code": 404, "message": "Object does not exist"}}
    actions = {"download": {"href": storage_address(hub, repository, oid)}}
    return {"oid": oid, "size": size, "authenticated": True, "actions": actions}


def _lfs_actions(hub: "LoopbackHub", repository: Repository, oid: str, size: int, *, in_parts: bool) -> dict[str, Any]:
    if not re.fullmatch("[0-9a-f]{64}", oid):
        return {"oid": oid, "size": size, "error": {"code": 422, "message": "Invalid object id"}}
    if repository.lfs_object(oid).is_file():
        return {"oid": oid, "size": size}
    storage = storage_address(hub, repository, oid)
    upload: dict[str, Any] = {"href": storage}
    if in_parts and size > hub.multipart_threshold:
        parts = range(1, -(-size // hub.part_bytes) + 1)
        header = {"chunk_size": str(hub.part_bytes), **{str(part): f"{storage}/{part}" for part in parts}}
        upload = {"href": storage, "header": header}
    verify = {"href": f"{hub.endpoint}/{repository.id}.git/info/lfs/objects/verify"}
    return {"oid": oid, "size": size, "authenticated": True, "actions": {"upload": upload, "verify": verify}}


def get_object(hub: "LoopbackHub", call: Call) -> Answer:
    """Send an object."""
    path = hub.repository(call.args["id"]).lfs_object(call.args["oid"])
    if not path.is_file():
        raise RefusedError(404, "No such object")
    headers = {"ETag": f'"{path.name}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
    return ranged(call, Answer(200, b"", headers, path), path.stat().st_size)


def put_object(hub: "LoopbackHub", call: Call) -> Answer:
    """Store an object."""
    hub.repository(call.args["id"]).store(call.args["oid"], call.body.blocks())
    return Answer()


def put_part(hub: "LoopbackHub", call: Call) -> Answer:
    """Keep a part of an object until all are there."""
    target = hub.repository(call.args["id"]).part(call.args["oid"], int(call.args["part"]))
    target.parent.mkdir(parents=True, exist_ok=True)
    content = b"".join(call.body.blocks())
    write_whole(target, content)
    return Answer(headers={"ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'})


def complete_object(hub: "LoopbackHub", call: Call) -> Answer:
    """Store an object whose parts have been sent."""
    repository, oid = hub.repository(call.args["id"]), call.args["oid"]
    blocks = []
    for listed in sorted(call.json()["parts"], key=lambda part: int(part["partNumber"])):
        path = repository.part(oid, int(listed["partNumber"]))
        content = path.read_bytes() if path.is_file() else b""
        if listed["etag"] != f'"{hashlib.sha256(content).hexdigest()[:32]}"':
            raise RefusedError(400, f"Part {listed['partNumber']} of {oid} is not the one that was uploaded")
        blocks.append(content)
    repository.store(oid, blocks)
    shutil.rmtree(repository.part(oid, 1).parent)
    return Answer.of_json({"success": True})


def lfs_verify(hub: "LoopbackHub", call: Call) -> Answer:
    """Answer whether an object is stored."""
    repository, wish = hub.writable(call), call.json()
    path = repository.lfs_object(wish["oid"])
    if not path.is_file() or path.stat().st_size != wish["size"]:
        raise RefusedError(404, f"No object {wish['oid']} of {wish['size']} bytes")
    return Answer.of_json({})
