"""Commits: which files are large, and then all of a branch's changes at once."""

import base64
import binascii
import json
import re
import subprocess
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tests.loopback_hub.messages import Answer, Call, RefusedError
from tests.loopback_hub.repository import LFS_ATTRIBUTES, Repository

if TYPE_CHECKING:
    from tests.loopback_hub.hub import LoopbackHub


def preupload(hub: "LoopbackHub", call: Call) -> Answer:
    """Answer which files are large, and the branch's present files of these names."""
    repository = hub.writable(call)
    files = repository.files(repository.resolve(call.args["rev"]))
    attributes = repository.blob(files[".gitattributes"].oid) if ".gitattributes" in files else b""
    asked = call.json()["files"]
    tracked = repository.lfs_tracked(attributes, [file["path"] for file in asked])
    values = []
    for file in asked:
        is_lfs = file["path"] in tracked or file["size"] >= hub.lfs_threshold
        there = files.get(file["path"])
        oid = {"oid": there.sha256 or there.oid} if there else {}
        mode = "lfs" if is_lfs else "regular"
        values.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, **oid})
    return Answer.of_json({"files": values, "commitOid": repository.resolve(call.args["rev"])})


def create_commit(hub: "LoopbackHub", call: Call) -> Answer:
    """Make a commit of a whole branch's changes, upon the head that was named or 412."""
    repository, branch = hub.writable(call), call.args["rev"]
    header, operations = _read_commit(b"".join(call.body.blocks()))
    changed_since = RefusedError(412, "A commit has happened since. Please refresh and try again.")
    with repository.lock:
        head = repository.head(branch)
        if header.get("parentCommit", head) != head and hub.dialect.compares_parents:
            raise changed_since
        changes = _changes(hub, repository, head, operations)
        written = hub.written.setdefault(repository.id, {})
        if not hub.dialect.stores_equal_files:
            changes = [(path, content) for path, content in changes if content is None or written.get(path) != content]
            if not changes:
                return _committed(hub, repository, head)
        written.update(changes)
        hub.count_commit(repository.id)
        description = header.get("description") if hub.dialect.descriptions else ""
        message = "\n\n".join(filter(None, (header["summary"], description)))
        user = call.account.user if call.account else ""
        try:
            commit = repository.write(head, branch, changes, message=message, user=user)
        except subprocess.CalledProcessError as error:
            moved = "update-ref" in error.cmd  # by a push into the repository, which does not take our lock
            raise changed_since if moved else RefusedError(400, error.stderr.decode()) from error
    return _committed(hub, repository, commit)


def _committed(hub: "LoopbackHub", repository: Repository, commit: str) -> Answer:
    url = f"{hub.endpoint}/{repository.id}/commit/{commit}"
    return Answer.of_json({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})


def _read_commit(body: bytes) -> tuple[dict[str, Any], list[tuple[str, dict[str, Any]]]]:
    """Return the header and the operations of a commit's NDJSON."""
    try:
        lines = [(line["key"], line["value"]) for line in map(json.loads, body.splitlines())]
    except (ValueError, KeyError, TypeError) as error:
        raise RefusedError(400, f"Invalid NDJSON: {error!r}") from error
    if not lines or lines[0][0] != "header" or not lines[0][1].get("summary"):
        raise RefusedError(400, "The first line must be a header with a summary")
    return lines[0][1], lines[1:]


def _changes(
    hub: "LoopbackHub", repository: Repository, head: str, operations: Sequence[tuple[str, dict[str, Any]]]
) -> list[tuple[str, bytes | None]]:
    """Return what to write and delete, in order; an LFS file that no pattern covers gets a line of .gitattributes."""
    there = repository.files(head)
    paths = set(there)
    changes: list[tuple[str, bytes | None]] = []
    for key, value in operations:
        path = _checked_path(value["path"])
        gone = {path} & paths if key == "deletedFile" else {name for name in paths if name.startswith(f"{path}/")}
        if key.startswith("deleted") and not gone:
            raise RefusedError(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        content = None if key.startswith("deleted") else _content(hub, repository, key, value)
        paths = paths - gone if content is None else paths | {path}
        changes.append((path, content))
    texts = {".gitattributes": repository.blob(there[".gitattributes"].oid)} if ".gitattributes" in there else {}
    attributes = {**texts, **dict(changes)}.get(".gitattributes") or b""
    lfs = list(dict.fromkeys(value["path"] for key, value in operations if key == "lfsFile"))
    if uncovered := [path for path in lfs if path not in repository.lfs_tracked(attributes, lfs)]:
        lines = "".join(f"{path.replace(' ', '[[:space:]]')} {LFS_ATTRIBUTES}\n" for path in uncovered)
        changes.append((".gitattributes", attributes + lines.encode()))
    return changes


def _checked_path(path: str) -> str:
    parts = path.rstrip("/").split("/")
    if {"", ".", "..", ".git"} & set(parts) or re.search(r'["\n\0]', path):
        raise RefusedError(400, f"Invalid path: {path!r}")
    return "/".join(parts)


def _content(hub: "LoopbackHub", repository: Repository, key: str, value: dict[str, Any]) -> bytes:
    """Return the content that git stores for a file: its bytes, or a pointer to a stored object."""
    if key == "file":
        try:
            content = base64.b64decode(value["content"], validate=True)
        except binascii.Error as error:
            raise RefusedError(400, f"Invalid content of {value['path']}: {error}") from error
        if len(content) >= hub.lfs_threshold:
            raise RefusedError(413, f"{value['path']} is too large for git: upload it as a large file")
        return content
    if key != "lfsFile":
        raise RefusedError(400, f"Unknown operation: {key}")
    stored = repository.lfs_object(value["oid"])
    if not stored.is_file() and (file := hub.xet_store.file(value["oid"], "sha256")):
        hub.xet_store.unpack(file, f"{hub.endpoint}/_loopback", repository)
    if not stored.is_file() or value.get("size", stored.stat().st_size) != stored.stat().st_size:
        message = "Your push was rejected because an LFS pointer pointed to a file that does not exist."
        raise RefusedError(400, f"{message} Offending file: - {value['path']}")
    size = 0 if hub.dialect.copy_needs_size and "size" not in value else stored.stat().st_size
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\nsize {size}\n".encode()
