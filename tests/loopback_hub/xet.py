"""Xet, the Hub's storage by chunks: what hf_xet 1.8 asks of it, of which the older half of each protocol is answered.

Clients cut a file into chunks, send them packed into xorbs, and then a shard that lists the chunks of each file.
Here a xorb is kept as it came and a shard's files as JSON; the hashes of a file's chunks are not checked, but when a
commit names a file by its sha256, hf_xet itself fetches it back from here, and that sha256 is checked.

The formats: https://huggingface.co/docs/xet (upload protocol, download protocol, shard, xorb).
"""

import json
import re
import struct
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from uuid import uuid4

from tests.loopback_hub.messages import BLOCK_BYTES, Answer, Call, RefusedError, ranged
from tests.loopback_hub.repository import Repository, write_whole

if TYPE_CHECKING:
    from tests.loopback_hub.hub import LoopbackHub

_TOKEN_LIFE_S = 3600
_ENTRY_BYTES = 48  # of a shard: everything in it is so long
_END_OF_FILES = b"\xff" * 32
_WITH_VERIFICATION, _WITH_SHA256 = 1 << 31, 1 << 30
_CHUNK_HEADER_BYTES = 8
_END_OF_CHUNKS = b"XETBLOB"


@dataclass(frozen=True)
class Term:
    """Some chunks of a xorb, in a row; `size` is of the bytes they unpack to."""

    xorb: str
    size: int
    first: int
    end: int


@dataclass(frozen=True)
class XetFile:
    """A file as a shard describes it."""

    hash: str
    sha256: str
    terms: tuple[Term, ...]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return sum(term.size for term in self.terms)


class XetStore:
    """Xorbs and files, in a folder."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @cached_property
    def _session(self) -> Any:
        from hf_xet import XetSession  # type: ignore[import-untyped]  # it has no types

        return XetSession()

    def xorb(self, name: str) -> Path:
        """Return the path of a xorb, stored or not."""
        return self._root / "xorbs" / name

    def add_xorb(self, name: str, content: bytes) -> bool:
        """Store a xorb; return whether it is new."""
        path = self.xorb(name)
        is_new = not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, content)
        return is_new

    def add_files(self, files: Iterable[XetFile]) -> None:
        """Store the terms of files, if all their xorbs are stored."""
        for file in files:
            for term in file.terms:
                if not self.xorb(term.xorb).is_file() or term.end > len(self.chunks(term.xorb)) - 1:
                    raise RefusedError(400, f"The file {file.hash} needs chunks {term} that were not uploaded")
            for kind, name in (("files", file.hash), ("sha256", file.sha256)):
                path = self._root / kind / name
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, json.dumps(asdict(file)).encode())

    def file(self, name: str, kind: Literal["files", "sha256"] = "files") -> XetFile | None:
        """Return the file of a Xet hash or a sha256."""
        path = self._root / kind / name
        if not path.is_file():
            return None
        values = json.loads(path.read_text(encoding="utf-8"))
        return XetFile(values["hash"], values["sha256"], tuple(Term(**term) for term in values["terms"]))

    def chunks(self, name: str) -> list[int]:
        """Return where in a xorb each chunk begins, and where the last one ends."""
        content, places = self.xorb(name).read_bytes(), [0]
        while places[-1] + _CHUNK_HEADER_BYTES <= len(content) and not content.startswith(_END_OF_CHUNKS, places[-1]):
            packed = int.from_bytes(content[places[-1] + 1 : places[-1] + 4], "little")
            places.append(places[-1] + _CHUNK_HEADER_BYTES + packed)
        return places

    def unpack(self, file: XetFile, endpoint: str, repository: Repository) -> None:
        """Reconstruct a file by hf_xet from `endpoint`, and store it as the repository's object."""
        from hf_xet import XetFileInfo

        whole = self._root / f".{uuid4().hex}"
        token = _token("read", repository.id)
        seed = {"token": token, "token_expiry_unix_secs": int(time.time()) + _TOKEN_LIFE_S}
        try:
            with self._session.new_file_download_group(endpoint=endpoint, **seed) as group:
                group.start_download_file(XetFileInfo(file.hash, file.size), str(whole))
            with whole.open("rb") as stream:
                repository.store(file.sha256, iter(lambda: stream.read(BLOCK_BYTES), b""))
        finally:
            whole.unlink(missing_ok=True)


def parse_shard(content: bytes) -> Iterator[XetFile]:
    """Yield the files that a shard describes."""
    place = _ENTRY_BYTES
    while content[place : place + 32] != _END_OF_FILES:
        name = _hex(content[place : place + 32])
        flags, count = struct.unpack_from("<II", content, place + 32)
        place += _ENTRY_BYTES
        terms = []
        for _ in range(count):
            size, first, end = struct.unpack_from("<III", content, place + 36)
            terms.append(Term(_hex(content[place : place + 32]), size, first, end))
            place += _ENTRY_BYTES
        if flags & _WITH_VERIFICATION:
            place += _ENTRY_BYTES * count
        if not flags & _WITH_SHA256:
            raise RefusedError(400, f"The shard does not say which sha256 the file {name} has")
        yield XetFile(name, _hex(content[place : place + 32]), tuple(terms))
        place += _ENTRY_BYTES


def _hex(hashed: bytes) -> str:
    """Write a hash as Xet does: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", hashed))


def xet_token(hub: "LoopbackHub", call: Call) -> Answer:
    """Answer with the address of the storage and a token."""
    scope = call.args["scope"]
    if not hub.xet:
        raise RefusedError(404, "This Hub has no Xet")
    repository = hub.writable(call) if scope == "write" else hub.readable(call)
    token, until, address = _token(scope, repository.id), int(time.time()) + _TOKEN_LIFE_S, f"{hub.storage}/_xet"
    headers = {"X-Xet-Access-Token": token, "X-Xet-Token-Expiration": str(until), "X-Xet-Cas-Url": address}
    return Answer.of_json({"accessToken": token, "exp": until, "casUrl": address}, headers=headers)


def _token(scope: str, repo_id: str) -> str:
    return f"xet-{scope}-{repo_id}"


def _require_token(call: Call, *scopes: str) -> None:
    token = call.headers.get("Authorization", "")
    if not re.fullmatch(rf"Bearer xet-({'|'.join(scopes)})-.+/.+", token):
        raise RefusedError(401, "No token for this")


def put_xorb(hub: "LoopbackHub", call: Call) -> Answer:
    """Store a xorb."""
    _require_token(call, "write")
    is_new = hub.xet_store.add_xorb(call.args["hash"], b"".join(call.body.blocks()))
    return Answer.of_json({"was_inserted": is_new})


def put_shard(hub: "LoopbackHub", call: Call) -> Answer:
    """Store the files of a shard."""
    _require_token(call, "write")
    hub.xet_store.add_files(list(parse_shard(b"".join(call.body.blocks()))))
    return Answer.of_json({"result": 1})


def reconstruct(hub: "LoopbackHub", call: Call) -> Answer:
    """Answer with the parts of xorbs that make up a file or a range of it."""
    _require_token(call, "read", "write")
    file = hub.xet_store.file(call.args["hash"])
    if file is None:
        raise RefusedError(404, "No such file")
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", call.headers.get("Range", ""))
    first, last = (int(asked[1]), int(asked[2])) if asked else (0, file.size - 1)
    if first >= file.size:
        raise RefusedError(416, "Range Not Satisfiable")
    terms: list[Term] = []
    skipped = place = 0
    for term in file.terms:
        if place + term.size > first and place <= last:
            skipped = skipped if terms else first - place
            terms.append(term)
        place += term.size
    values = [
        {"hash": term.xorb, "unpacked_length": term.size, "range": {"start": term.first, "end": term.end}}
        for term in terms
    ]
    prefix = hub.endpoint + call.path.partition("/v1/")[0]
    fetch: dict[str, list[dict[str, Any]]] = {}
    for term in terms:
        places = hub.xet_store.chunks(term.xorb)
        where = {"start": places[term.first], "end": places[term.end] - 1}
        part = {"range": {"start": term.first, "end": term.end}, "url": f"{prefix}/xorbs/{term.xorb}"}
        fetch.setdefault(term.xorb, []).append({**part, "url_range": where})
    return Answer.of_json({"offset_into_first_range": skipped, "terms": values, "fetch_info": fetch})


def get_xorb(hub: "LoopbackHub", call: Call) -> Answer:
    """Send a xorb, or a part of it; the Hub would sign the address."""
    path = hub.xet_store.xorb(call.args["hash"])
    if not path.is_file():
        raise RefusedError(404, "No such xorb")
    return ranged(call, Answer(200, b"", {}, path), path.stat().st_size)
