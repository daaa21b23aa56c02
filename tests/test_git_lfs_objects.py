"""Parts of git-lfs objects by HTTP, from a server that keeps to the batch API or does not."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from packager.errors import PublishError
from packager.inputs.hub_session import AnswerError
from packager.publish.targets import StoredFile
from packager.publish.targets.git import GitTarget
from packager.publish.targets.git_lfs import attributes, pointer
from packager.publish.targets.git_lfs_objects import LfsObjects
from packager.publish.targets.git_remote import RemoteGit
from tests.git_servers import Service, serve_git
from tests.publish_fixtures import SHORT_WAITS, git

TOKEN = "a-token-of-somebody"  # noqa: S105
DATA = bytes(range(256)) * 400
SHA256 = "9" * 64
NAME = "model.safetensors"
STORAGE = "/info/lfs/objects/storage/one"


@dataclass
class Store:
    """What a server of objects does, and what it was asked.

    Attributes:
        ranges: whether it sends the part that was asked for.
        answer: its answer to the batch request; None for the right one.
        header: Content-Range; None for the right one.
        statuses: of the next requests for content, instead of an answer.
        sent: bytes of content.
        asked: paths and ranges.
    """

    ranges: bool = True
    answer: Any = None
    header: str | None = None
    data: bytes = DATA
    statuses: list[int] = field(default_factory=list)
    sent: int = 0
    asked: list[tuple[str, str]] = field(default_factory=list)


@contextmanager
def serve_objects(store: Store) -> Iterator[int]:
    """Serve one object; yields the port."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002 - the library's name
            pass

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            store.asked.append((self.path, ""))
            assert (asked["operation"], asked["objects"]) == ("download", [{"oid": SHA256, "size": len(DATA)}])
            download = {"href": f"http://{self.headers['Host']}/model.git{STORAGE}", "header": {"X-Signed": "yes"}}
            found = {"transfer": "basic", "objects": [{**asked["objects"][0], "actions": {"download": download}}]}
            self._send(200, json.dumps(found if store.answer is None else store.answer).encode())

        def do_GET(self) -> None:
            store.asked.append((self.path, self.headers["Range"]))
            assert self.headers["X-Signed"] == "yes"
            assert "Authorization" not in self.headers
            if store.statuses and (status := store.statuses.pop(0)) != 200:
                return self._send(status, b"")
            first, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            part = store.data[first : last + 1] if store.ranges else store.data
            store.sent += len(part)
            headers = {"Content-Range": store.header or f"bytes {first}-{last}/{len(DATA)}"} if store.ranges else {}
            return self._send(206 if store.ranges else 200, part, headers)

        def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@dataclass
class Remote:
    """A remote with one file in git-lfs, the target that reads it, and what was logged."""

    target: GitTarget
    commit: str
    store: Store
    service: Service
    log: list[str]
    whole: list[str]

    def read(self, start: int, size: int | None) -> bytes:
        return self.target.read_bytes(self.commit, NAME, start=start, size=size)


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Remote]:
    folder, whole, log = tmp_path / "served" / "model.git", [], list[str]()
    work = tmp_path / "work"
    work.mkdir()
    git("init", "--quiet", "--initial-branch=main", cwd=work)
    (work / NAME).write_bytes(pointer(SHA256, len(DATA)))
    (work / ".gitattributes").write_bytes(attributes([NAME]))
    git("add", ".", cwd=work)
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "files", cwd=work)
    git("clone", "--quiet", "--bare", str(work), str(folder), cwd=tmp_path)
    (tmp_path / "object").write_bytes(DATA)

    def downloaded(_: LfsObjects, stored: StoredFile) -> Path:
        whole.append(stored.sha256)
        return tmp_path / "object"

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(LfsObjects, "whole", downloaded)  # git-lfs, which not every machine has
    store = Store()
    with serve_objects(store) as port, serve_git(tmp_path / "served", TOKEN, lfs_port=port) as service:
        target = GitTarget(
            f"{service.url}/model.git", tmp_path / "staging", token=TOKEN, log=log.append, waits=SHORT_WAITS
        )
        commit = target.read_branches()["main"].commit
        yield Remote(target=target, commit=commit, store=store, service=service, log=log, whole=whole)


def test_only_the_parts_that_are_asked_for_travel(remote: Remote) -> None:
    """The address is asked for once, with the token; the storage gets what the address says, and no token."""
    for start, size in ((0, 8), (0, 1000), (90_000, 3000), (len(DATA) - 5, 5), (len(DATA) - 5, 50)):
        assert remote.read(start, size) == DATA[start : start + size]
    assert remote.store.sent == 8 + 1000 + 3000 + 5 + 5
    batch, *parts = remote.store.asked
    assert batch == ("/model.git/info/lfs/objects/batch", "")
    assert parts[2] == (f"/model.git{STORAGE}", "bytes=90000-92999")
    assert len(parts) == 5
    known = {path: known for _, path, known in remote.service.seen if "/info/lfs/" in path}
    assert known == {batch[0]: True, parts[0][0]: False}
    assert (remote.whole, remote.log) == ([], [])


def test_a_whole_object_is_downloaded_by_git_lfs(remote: Remote) -> None:
    assert remote.read(0, None) == remote.read(0, len(DATA)) == remote.read(0, len(DATA) + 1) == DATA
    assert remote.read(len(DATA), 5) == remote.read(7, 0) == b""
    assert remote.store.asked == []


def test_an_address_that_expired_is_asked_for_again(remote: Remote) -> None:
    remote.store.statuses = [200, 403, 200]
    assert [remote.read(5, 10), remote.read(50, 10)] == [DATA[5:15], DATA[50:60]]
    assert [path.rpartition("/")[2] for path, _ in remote.store.asked] == ["batch", "one", "one", "batch", "one"]
    assert remote.log == []


def test_a_busy_server_is_asked_again(remote: Remote) -> None:
    remote.store.statuses = [503, 429, 200]
    assert remote.read(5, 10) == DATA[5:15]
    assert remote.read(50, 10) == DATA[50:60]
    assert remote.whole == []
    assert [line.partition("model.git: ")[2].partition("; trying")[0] for line in remote.log] == [
        "the server answers 503", "the server answers 429",
    ]  # fmt: skip


ANSWERS: dict[str, tuple[dict[str, Any], str]] = {
    "no ranges": ({"ranges": False}, "does not send the part"),
    "another part": ({"header": "bytes 0-9/100"}, "does not send the part"),
    "less": ({"data": DATA[:55]}, "sends less"),
    "forbidden": ({"statuses": [403]}, "answers 403"),
    "no object": ({"answer": {"objects": [{"error": {"code": 404, "message": "x"}}]}}, "names no address"),
    "nothing": ({"answer": []}, "names no address"),
    "no text": ({"answer": {"objects": [{"actions": {"download": {"href": 5}}}]}}, "is no text"),
    "a file": ({"answer": {"objects": [{"actions": {"download": {"href": "file:///etc/passwd"}}}]}}, "no https"),
    "headers": (
        {"answer": {"objects": [{"actions": {"download": {"href": "http://x", "header": {"a": 1}}}}]}},
        "is no text",
    ),
    "nobody": (
        {"answer": {"objects": [{"actions": {"download": {"href": "http://127.0.0.1:9/one?signed=secret"}}}]}},
        "ConnectError",
    ),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_without_parts_the_whole_object_is_read_and_said_once(remote: Remote, name: str) -> None:
    changes, says = ANSWERS[name]
    for key, value in changes.items():
        setattr(remote.store, key, value)
    assert remote.read(50, 10) == DATA[50:60]
    asked = len(remote.store.asked)
    assert remote.read(70, 10) == DATA[70:80]
    assert (remote.whole, len(remote.store.asked)) == ([SHA256] * 2, asked)
    *again, line = remote.log
    assert all("trying again" in each for each in again)
    assert bool(again) is (name == "nobody")
    assert says in line
    assert line.startswith(f"{remote.service.url}/model.git: no part of a git-lfs object can be read")
    assert "secret" not in line


def test_a_server_without_ranges_still_sends_a_beginning(remote: Remote) -> None:
    remote.store.ranges = False
    assert remote.read(0, 10) == DATA[:10]
    assert (remote.whole, remote.log) == ([], [])


def test_an_encrypted_remote_leads_to_no_unencrypted_storage(tmp_path: Path) -> None:
    address = "https://git.example.org/model.git"
    remote = RemoteGit(tmp_path, address, host="git.example.org", token="", log=print, retries_s=())
    objects = LfsObjects(remote, None, address, print)
    with pytest.raises(AnswerError, match="no https address"):
        objects._checked({"objects": [{"actions": {"download": {"href": "http://elsewhere/one"}}}]})
    assert remote.authorization == ""


def test_an_object_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    remote = RemoteGit(tmp_path / "staging", str(tmp_path), host="", token="", log=print, retries_s=())
    objects = LfsObjects(remote, tmp_path / "repository", str(tmp_path), print)
    with pytest.raises(PublishError, match="git-lfs has no object"):
        objects.read(StoredFile(size_bytes=5, sha256=SHA256), 0, 2)
