"""The real client against the loopback Hub; git and hashlib check the stored files."""

import hashlib
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationCopy,
    CommitOperationDelete,
    HfApi,
    constants,
    get_session,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub_http import httpx
from tests.loopback_hub import Account, Call, LoopbackHub
from tests.publish_fixtures import git

# huggingface_hub's own way of sending a file to its HTTP client.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "acme/tiny"
WEIGHTS = bytes(range(256)) * 1200
TOKENS = {
    "hf_write": Account("alice", orgs=("acme",)),
    "hf_read": Account("alice", "read", orgs=("acme",)),
    "hf_other": Account("mallory"),
}


@pytest.fixture(autouse=True)
def _online_without_xet(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    yield
    huggingface_hub.close_session()


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "hub", tokens=TOKENS, page_size=3, part_bytes=100_000) as hub:
        yield hub


@pytest.fixture
def api(hub: LoopbackHub) -> HfApi:
    api = _client(hub.endpoint, "hf_write")
    api.create_repo(REPO)
    return api


def _client(endpoint: str, token: str | bool) -> HfApi:
    return HfApi(endpoint=endpoint, token=token)


def _first(api: HfApi) -> str:
    return api.list_repo_commits(REPO)[-1].commit_id


def _additions(weights: bytes = WEIGHTS) -> list[CommitOperationAdd]:
    files = {"config.json": b"{}\n", "folder/notes.txt": b"notes\n", "model.safetensors": weights}
    return [CommitOperationAdd(path, content) for path, content in files.items()]


def _publish(api: HfApi, branch: str = "w4") -> str:
    """Publish as packager does: a branch from the first commit, bytes first, then one commit on that head."""
    api.create_branch(REPO, branch=branch, revision=_first(api))
    head = api.model_info(REPO, revision=branch).sha
    operations = _additions()
    api.preupload_lfs_files(REPO, operations, revision=branch)
    return str(api.create_commit(REPO, operations, commit_message="Add w4", revision=branch, parent_commit=head).oid)


def _paths(api: HfApi, revision: str = "w4") -> list[str]:
    return [entry.path for entry in api.list_repo_tree(REPO, revision=revision, recursive=True)]


def _status(error: "pytest.ExceptionInfo[HfHubHTTPError]") -> int:
    return int(error.value.response.status_code)


def test_a_new_repository_holds_gitattributes_only(hub: LoopbackHub, api: HfApi) -> None:
    assert _paths(api, "main") == [".gitattributes"]
    assert api.whoami()["name"] == "alice"
    assert api.create_repo(REPO, exist_ok=True) == f"{hub.endpoint}/{REPO}"
    with pytest.raises(HfHubHTTPError) as error:
        api.create_repo(REPO)
    assert _status(error) == 409


def test_the_client_the_disk_and_git_agree_on_a_published_branch(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    commit = _publish(api)
    files = {file.path: file for file in api.get_paths_info(REPO, ["model.safetensors", "none"], revision="w4")}
    lfs = getattr(files["model.safetensors"], "lfs", None)
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    assert list(files) == ["model.safetensors"]
    assert lfs
    assert (lfs.sha256, lfs.size) == (sha256, len(WEIGHTS))
    assert {ref.name: ref.target_commit for ref in api.list_repo_refs(REPO).branches}["w4"] == commit
    assert [(item.title, item.authors) for item in api.list_repo_commits(REPO, revision="w4")] == [
        ("Add w4", ["alice"]),
        ("initial commit", ["alice"]),
    ]
    downloaded = Path(api.snapshot_download(REPO, revision="w4", cache_dir=tmp_path / "cache"))
    assert downloaded.name == commit
    assert (downloaded / "model.safetensors").read_bytes() == WEIGHTS
    assert (downloaded / "folder/notes.txt").read_bytes() == b"notes\n"
    repository = hub.repository(REPO)
    assert repository.lfs_object(sha256).read_bytes() == WEIGHTS
    # Without git-lfs' filters: whether it is installed changes nothing here.
    clone = ["git", "-c", "filter.lfs.smudge=", "-c", "filter.lfs.process=", "-c", "filter.lfs.required=false", "clone"]
    subprocess.run([*clone, "-q", "--branch", "w4", f"file://{repository.path}", tmp_path / "clone"], check=True)
    pointer = (tmp_path / "clone/model.safetensors").read_text(encoding="utf-8")
    assert pointer == f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(WEIGHTS)}\n"
    subprocess.run(["git", f"--git-dir={repository.path}", "fsck", "--strict"], check=True, capture_output=True)


def test_bytes_are_uploaded_once(hub: LoopbackHub, api: HfApi) -> None:
    _publish(api)
    api.create_branch(REPO, branch="w8", revision=_first(api))
    before = len(hub.requests)
    api.create_commit(REPO, _additions(), commit_message="The same", revision="w8")
    assert [(upload.received, upload.accepted) for upload in hub.uploaded] == [(len(WEIGHTS), True)]
    assert not [request for request in hub.requests[before:] if request.method == "PUT"]
    assert all("authorization" not in map(str.lower, request.headers) for request in hub.requests)
    head = api.model_info(REPO, revision="w8").sha
    unchanged = api.create_commit(REPO, _additions(), commit_message="Nothing new", revision="w8")
    assert unchanged.oid == head


def test_pages_are_followed(api: HfApi) -> None:
    for number in range(4):
        files = [CommitOperationAdd(f"{number}.txt", b"x"), CommitOperationAdd(f"folder/{number}.txt", b"x")]
        api.create_commit(REPO, files, commit_message=f"Number {number}")
    assert len(_paths(api, "main")) == 1 + 4 + 1 + 4
    titles = [commit.title for commit in api.list_repo_commits(REPO)]
    assert titles == ["Number 3", "Number 2", "Number 1", "Number 0", "initial commit"]
    below = api.list_repo_tree(REPO, "folder")
    assert [entry.path for entry in below] == [f"folder/{number}.txt" for number in range(4)]


def test_a_branch_without_a_starting_point_copies_main(api: HfApi) -> None:
    api.create_commit(REPO, _additions(), commit_message="On main")
    api.create_branch(REPO, branch="copied")
    assert _paths(api, "copied") == _paths(api, "main")
    api.create_tag(REPO, tag="v1", tag_message="The first", revision="copied")
    refs = api.list_repo_refs(REPO)
    assert {ref.name for ref in refs.branches} == {"main", "copied"}
    assert [(ref.name, ref.target_commit) for ref in refs.tags] == [("v1", refs.branches[0].target_commit)]
    with pytest.raises(HfHubHTTPError) as error:
        api.create_branch(REPO, branch="main")
    assert _status(error) == 409
    with pytest.raises(RevisionNotFoundError):
        api.create_branch(REPO, branch="lost", revision="nowhere")


def test_copies_and_deletions(hub: LoopbackHub, api: HfApi) -> None:
    _publish(api)
    operations: list[CommitOperationCopy | CommitOperationDelete] = [
        CommitOperationCopy("model.safetensors", "copy.safetensors"),
        CommitOperationCopy("config.json", "copy.json"),
        CommitOperationDelete("folder/"),
        CommitOperationDelete("model.safetensors"),
    ]
    api.create_commit(REPO, operations, commit_message="Rename", revision="w4")
    assert _paths(api) == [".gitattributes", "config.json", "copy.json", "copy.safetensors"]
    assert len(hub.uploaded) == 1
    with pytest.raises(EntryNotFoundError, match="A file with this name doesn't exist"):
        api.create_commit(REPO, [CommitOperationDelete("none.txt")], commit_message="Delete", revision="w4")


def test_a_large_file_is_lfs_and_gets_its_line_of_gitattributes(hub: LoopbackHub, api: HfApi) -> None:
    hub.lfs_threshold = 100
    api.create_commit(REPO, [CommitOperationAdd("tokenizer.json", b"{}" * 60)], commit_message="Add tokenizer")
    assert [upload.received for upload in hub.uploaded] == [120]
    repository = hub.repository(REPO)
    attributes = repository.git("show", "main:.gitattributes").decode()
    assert attributes.endswith("\ntokenizer.json filter=lfs diff=lfs merge=lfs -text\n")


def test_a_file_is_uploaded_in_parts(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    hub.multipart_threshold = 150_000
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    operation = CommitOperationAdd("model.safetensors", tmp_path / "model.safetensors")
    api.create_commit(REPO, [operation], commit_message="In parts")
    assert sorted((upload.part, upload.received) for upload in hub.uploaded) == [
        (1, 100_000),
        (2, 100_000),
        (3, 100_000),
        (4, len(WEIGHTS) - 300_000),
    ]
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    assert hub.repository(REPO).lfs_object(sha256).read_bytes() == WEIGHTS


def test_a_stale_parent_is_412(hub: LoopbackHub, api: HfApi) -> None:
    stale = _first(api)
    hub.commit(REPO, {"theirs.txt": b"theirs"})
    with pytest.raises(HfHubHTTPError, match="A commit has happened since") as error:
        api.create_commit(REPO, _additions(), commit_message="Mine", parent_commit=stale)
    assert _status(error) == 412
    assert _paths(api, "main") == [".gitattributes", "theirs.txt"]


def test_a_commit_of_another_person_between_plan_and_commit_is_412(hub: LoopbackHub, api: HfApi) -> None:
    def theirs(call: Call) -> None:
        hub.commit(REPO, {"theirs.txt": b"theirs"}, user="bob")

    fault = hub.fault("POST /api/models/.*/commit/", "call", call=theirs)
    with pytest.raises(HfHubHTTPError) as error:
        api.create_commit(REPO, _additions(), commit_message="Mine", parent_commit=_first(api))
    assert _status(error) == 412
    assert fault.fired == 1
    assert api.list_repo_commits(REPO)[0].authors == ["bob"]


def test_a_push_past_the_hub_is_412_too(hub: LoopbackHub, api: HfApi, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = hub.repository(REPO)
    git, theirs = repository.git, hub.commit(REPO, {"theirs.txt": b"theirs"})
    first = _first(api)
    git("update-ref", "refs/heads/main", first)

    def pushed(*arguments: str, stdin: bytes = b"") -> bytes:
        output = git(*arguments, stdin=stdin)
        if arguments[0] == "fast-import":
            git("update-ref", "refs/heads/main", theirs, first)
        return output

    monkeypatch.setattr(repository, "git", pushed)
    with pytest.raises(HfHubHTTPError) as error:
        api.create_commit(REPO, [CommitOperationAdd("mine.txt", b"mine")], commit_message="Mine", parent_commit=first)
    assert _status(error) == 412
    assert repository.head("main") == theirs


def test_of_many_commits_on_one_head_one_succeeds(hub: LoopbackHub, api: HfApi) -> None:
    first = _first(api)

    def commit(number: int) -> int:
        header = {"key": "header", "value": {"summary": f"Number {number}", "parentCommit": first}}
        file = {"key": "file", "value": {"path": f"{number}.txt", "content": "eA==", "encoding": "base64"}}
        content = "\n".join(map(json.dumps, (header, file)))
        headers = {"Authorization": "Bearer hf_write"}
        url = f"{hub.endpoint}/api/models/{REPO}/commit/main"
        return int(get_session().post(url, content=content, headers=headers).status_code)

    with ThreadPoolExecutor(4) as pool:
        statuses = sorted(pool.map(commit, range(8)))
    assert statuses == [200] + 7 * [412]
    assert len(api.list_repo_commits(REPO)) == 2


def test_a_commit_that_names_an_object_which_is_not_stored_is_refused(hub: LoopbackHub, api: HfApi) -> None:
    header = {"key": "header", "value": {"summary": "Forged"}}
    forged = {"key": "lfsFile", "value": {"path": "x.bin", "algo": "sha256", "oid": "0" * 64, "size": 3}}
    answer = get_session().post(
        f"{hub.endpoint}/api/models/{REPO}/commit/main",
        content="\n".join(map(json.dumps, (header, forged))),
        headers={"Authorization": "Bearer hf_write"},
    )
    assert (answer.status_code, "does not exist" in answer.text) == (400, True)
    answer = get_session().put(f"{hub.endpoint}/_lfs/{REPO}/{'0' * 64}", content=b"abc")
    assert (answer.status_code, "hash to ba7816bf" in answer.text) == (400, True)
    assert list((hub.repository(REPO).path / "lfs").rglob("*.*")) == []


@pytest.mark.crash
def test_a_commit_with_a_lost_answer_exists(hub: LoopbackHub, api: HfApi) -> None:
    first = _first(api)
    hub.fault("POST /api/models/.*/commit/", "cut-after")
    with pytest.raises(httpx.HTTPError):
        api.create_commit(REPO, _additions(), commit_message="Lost", parent_commit=first)
    assert "model.safetensors" in _paths(api, "main")
    with pytest.raises(HfHubHTTPError) as error:
        api.create_commit(REPO, [CommitOperationAdd("b.txt", b"")], commit_message="Again", parent_commit=first)
    assert _status(error) == 412


@pytest.mark.parametrize(("kind", "landed"), [("status", False), ("status-after", True)])
def test_a_status_before_or_after_the_effect(hub: LoopbackHub, api: HfApi, kind: Any, landed: bool) -> None:
    hub.fault("POST /api/models/.*/branch/", kind, status=503)
    with pytest.raises(HfHubHTTPError) as error:
        api.create_branch(REPO, branch="w4")
    assert _status(error) == 503
    assert ("w4" in {ref.name for ref in api.list_repo_refs(REPO).branches}) is landed


@pytest.mark.crash
def test_a_rate_limit_is_in_the_headers_and_the_client_waits(hub: LoopbackHub, api: HfApi) -> None:
    fault = hub.fault("POST .*/commit/", "status", status=429, message="Slow down", retry_after=7, reset=30)
    with pytest.raises(HfHubHTTPError, match="Retry after 30 seconds") as error:
        api.create_commit(REPO, [CommitOperationAdd("a.txt", b"a")], commit_message="Add")
    assert error.value.response.headers["Retry-After"] == "7"
    assert fault.fired == 1
    hub.fault("POST .*/preupload/", "status", status=429, retry_after=0)
    started = time.monotonic()
    api.create_commit(REPO, [CommitOperationAdd("a.txt", b"a")], commit_message="Add")
    assert time.monotonic() - started > 0.9
    assert [request.status for request in hub.requests if "/preupload/" in request.path][-2:] == [429, 200]


def test_commits_are_capped_per_hour(hub: LoopbackHub, api: HfApi) -> None:
    hub.commit_cap = 1
    api.create_commit(REPO, [CommitOperationAdd("a.txt", b"a")], commit_message="One")
    with pytest.raises(HfHubHTTPError, match="rate limit for repository commits") as error:
        api.create_commit(REPO, [CommitOperationAdd("b.txt", b"b")], commit_message="Two")
    assert _status(error) == 429


@pytest.mark.crash
def test_an_upload_that_is_cut_is_begun_again(hub: LoopbackHub, api: HfApi) -> None:
    hub.fault("PUT /_lfs/", "cut-body", at_bytes=1000)
    api.create_commit(REPO, _additions(), commit_message="Add")
    assert [(upload.received, upload.accepted) for upload in hub.uploaded] == [(1000, False), (len(WEIGHTS), True)]


@pytest.mark.crash
def test_a_client_that_is_killed_while_it_uploads_leaves_nothing(hub: LoopbackHub, api: HfApi) -> None:
    oid = hashlib.sha256(WEIGHTS).hexdigest()
    with socket.create_connection(("127.0.0.1", int(hub.endpoint.rsplit(":", 1)[1]))) as connection:
        connection.sendall(f"PUT /_lfs/{REPO}/{oid} HTTP/1.1\r\nContent-Length: 1000\r\n\r\n".encode() + WEIGHTS[:400])
    deadline = time.monotonic() + 5
    while not hub.uploaded and time.monotonic() < deadline:
        time.sleep(0.01)
    assert [(upload.oid, upload.accepted) for upload in hub.uploaded] == [(oid, False)]
    assert [path for path in (hub.repository(REPO).path / "lfs").rglob("*") if path.is_file()] == []
    assert api.model_info(REPO).id == REPO


@pytest.mark.crash
def test_a_download_that_is_cut_is_begun_again(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    _publish(api)
    hub.fault("GET /_lfs/", "cut-answer", at_bytes=1000)
    path = api.hf_hub_download(REPO, "model.safetensors", revision="w4", cache_dir=tmp_path / "cache")
    assert Path(path).read_bytes() == WEIGHTS
    gets = [request for request in hub.requests if request.method == "GET" and "/_lfs/" in request.path]
    assert [request.status for request in gets] == [200, 200]


def test_times_after_and_delay(hub: LoopbackHub, api: HfApi) -> None:
    hub.fault("GET .*/refs", "status", times=2, after=1, status=500)
    hub.fault("GET .*/whoami-v2", "delay", seconds=0.2)
    hub.fault("GET /api/models/acme/tiny$", "cut")
    statuses = [get_session().get(f"{hub.endpoint}/api/models/{REPO}/refs").status_code for _ in range(4)]
    assert statuses == [200, 500, 500, 200]
    started = time.monotonic()
    api.whoami()
    assert time.monotonic() - started >= 0.2
    with pytest.raises(httpx.HTTPError):
        api.model_info(REPO)
    assert api.model_info(REPO).id == REPO


def test_ranged_requests_get_parts_of_files(hub: LoopbackHub, api: HfApi) -> None:
    _publish(api)

    def ask(path: str, span: str) -> httpx.Response:
        url = f"{hub.endpoint}/{REPO}/resolve/w4/{path}"
        return get_session().get(url, headers={"Range": f"bytes={span}"}, follow_redirects=True)

    assert (ask("model.safetensors", "8-15").status_code, ask("model.safetensors", "8-15").content) == (
        206,
        bytes(range(8, 16)),
    )
    assert ask("model.safetensors", "-2").content == WEIGHTS[-2:]
    assert ask("config.json", "1-").content == b"}\n"
    assert ask("config.json", "1-").headers["Content-Range"] == "bytes 1-2/3"
    beyond = ask("model.safetensors", f"{len(WEIGHTS)}-")
    assert (beyond.status_code, beyond.headers["Content-Range"]) == (416, f"bytes */{len(WEIGHTS)}")


def test_who_may_do_what(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    for token, status in (("hf_unknown", 401), (False, 401), ("hf_read", 403), ("hf_other", 403)):
        with pytest.raises(HfHubHTTPError) as error:
            _client(hub.endpoint, token).create_branch(REPO, branch="w4")
        assert _status(error) == status
    _client(hub.endpoint, False).model_info(REPO)
    api.update_repo_settings(REPO, gated="auto")
    with pytest.raises(GatedRepoError):
        _client(hub.endpoint, "hf_other").hf_hub_download(REPO, ".gitattributes", cache_dir=tmp_path)
    api.update_repo_settings(REPO, private=True, gated=False)
    for token in (False, "hf_other"):
        with pytest.raises(RepositoryNotFoundError):
            _client(hub.endpoint, token).model_info(REPO)
    assert _client(hub.endpoint, "hf_read").model_info(REPO).private is True
    with pytest.raises(RepositoryNotFoundError):
        api.model_info("acme/none")
    with pytest.raises(RevisionNotFoundError):
        api.model_info(REPO, revision="none")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(REPO, "none.txt", cache_dir=tmp_path)


def test_a_card_is_validated_and_read(api: HfApi) -> None:
    card = b"---\nlicense: mit\ntags: [gptq]\n---\n# Tiny\n"
    api.create_commit(REPO, [CommitOperationAdd("README.md", card)], commit_message="Add card")
    info = api.model_info(REPO, files_metadata=True)
    assert (info.tags, info.card_data and info.card_data.license) == (["gptq"], "mit")
    with pytest.raises(ValueError, match="Invalid metadata in README"):
        api.create_commit(REPO, [CommitOperationAdd("README.md", b"---\na: [\n---\n")], commit_message="Break card")


CLONE = ("-c", "filter.lfs.smudge=", "-c", "filter.lfs.process=", "-c", "filter.lfs.required=false", "clone", "-q")


def test_git_clones_readable_repositories_and_cannot_push(hub: LoopbackHub, api: HfApi, tmp_path: Path) -> None:
    commit = _publish(api)
    url = f"{hub.endpoint}/{REPO}"
    for number, address in enumerate((url, f"{url}.git")):
        git(*CLONE, "--single-branch", "--branch", "w4", address, str(tmp_path / str(number)))
        assert git("rev-parse", "HEAD", cwd=tmp_path / str(number)).strip() == commit
    assert git("show", "HEAD:config.json", cwd=tmp_path / "0") == "{}\n"
    with pytest.raises(AssertionError, match="403"):
        git("push", "-q", "origin", "w4:mine", cwd=tmp_path / "0")
    api.update_repo_settings(REPO, private=True)
    with pytest.raises(AssertionError, match="Authentication failed"):
        git("-c", "core.askPass=true", "-c", "credential.helper=", *CLONE, url, str(tmp_path / "refused"))
    with pytest.raises(AssertionError, match="not found"):
        git(*CLONE, url.replace("://", "://any:hf_other@"), str(tmp_path / "refused"))
    git(*CLONE, url.replace("://", "://any:hf_read@"), str(tmp_path / "private"))


def test_git_lfs_gets_the_address_of_an_object(hub: LoopbackHub, api: HfApi) -> None:
    _publish(api)
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    objects = [{"oid": sha256, "size": len(WEIGHTS)}, {"oid": "0" * 64, "size": 1}]
    wish = {"operation": "download", "transfers": ["basic"], "objects": objects}
    batch = f"{hub.endpoint}/{REPO}.git/info/lfs/objects/batch"
    found, lost = get_session().post(batch, json=wish).json()["objects"]
    assert lost["error"]["code"] == 404
    href = found["actions"]["download"]["href"]
    assert get_session().get(href).content == WEIGHTS
    assert get_session().get(href, headers={"Authorization": "Bearer hf_read"}).status_code == 400
    assert get_session().post(batch, json={**wish, "operation": "upload"}).status_code == 401
    api.update_repo_settings(REPO, gated="auto")
    assert get_session().post(batch, json=wish).headers["X-Error-Code"] == "GatedRepo"


# The client keeps its Xet session and what it remembers of a server for as long as its process lives.
XET_CLIENT = """
import sys
from pathlib import Path
from huggingface_hub import CommitOperationAdd, HfApi
api, repository, branch, weights = HfApi(), sys.argv[1], sys.argv[2], Path("model.safetensors")
operations = [CommitOperationAdd(weights.name, weights), CommitOperationAdd("config.json", b"{}")]
api.create_repo(repository, exist_ok=True)
api.create_branch(repository, branch=branch)
api.preupload_lfs_files(repository, operations, revision=branch)
api.create_commit(repository, operations, commit_message="Add", revision=branch)
found = Path(api.snapshot_download(repository, revision=branch), weights.name)
assert found.read_bytes() == weights.read_bytes()
"""


def _with_xet(hub: LoopbackHub, folder: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    own = {"HF_ENDPOINT": hub.endpoint, "HF_TOKEN": "hf_write", "HF_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "0"}
    environ = {**os.environ, **own, "HF_HUB_DISABLE_XET": "0"}
    command = [sys.executable, "-c", XET_CLIENT, *arguments]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True, check=False)


def _xet_bytes(hub: LoopbackHub) -> int:
    xorbs = [request for request in hub.requests if "/v1/xorbs/" in request.path and request.method == "POST"]
    return sum(request.received for request in xorbs if request.status == 200)


@pytest.mark.pinned
@pytest.mark.slow
def test_xet_stores_chunks_and_git_has_the_file(tmp_path: Path) -> None:
    weights = random.Random(1).randbytes(400_000) + b"xet" * 300_000 + random.Random(2).randbytes(400_000)
    changed = weights[:-1] + b"!"
    with LoopbackHub(tmp_path / "hub", tokens=TOKENS, xet=True) as hub:
        for branch, content in (("w4", weights), ("w8", changed)):
            (tmp_path / "model.safetensors").write_bytes(content)
            sent = _xet_bytes(hub)
            done = _with_xet(hub, tmp_path, REPO, branch)
            assert done.returncode == 0, done.stderr
            sha256 = hashlib.sha256(content).hexdigest()
            assert hub.repository(REPO).lfs_object(sha256).read_bytes() == content
            pointer = hub.repository(REPO).git("show", f"{branch}:model.safetensors").decode()
            assert f"oid sha256:{sha256}\n" in pointer
        assert 0 < _xet_bytes(hub) - sent < 200_000  # the chunk that changed
        assert not hub.uploaded
        assert [request for request in hub.requests if "/_xet/xorbs/" in request.path and request.status == 206]
        assert not [request for request in hub.requests if request.path.startswith("/_loopback")]


@pytest.mark.pinned
@pytest.mark.slow
def test_a_commit_of_a_file_that_xet_damaged_is_refused(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(random.Random(1).randbytes(100_000))

    def spoil(_: Call) -> None:
        (xorb,) = (tmp_path / "hub" / ".xet" / "xorbs").iterdir()
        content = xorb.read_bytes()
        xorb.write_bytes(content[:1000] + bytes(8) + content[1008:])

    with LoopbackHub(tmp_path / "hub", tokens=TOKENS, xet=True) as hub:
        hub.fault("POST /api/models/.*/commit/", "call", call=spoil)
        done = _with_xet(hub, tmp_path, REPO, "w4")
        assert done.returncode == 1
        assert "hash to" in done.stderr.splitlines()[-1]
        hub.fault("POST /_xet/v1/shards", "status", status=403)
        done = _with_xet(hub, tmp_path, REPO, "w8")
        assert done.returncode == 1
        assert hub.repository(REPO).head("w8") == hub.repository(REPO).head("main")


@pytest.mark.pinned
def test_a_server_without_xet_is_an_error_of_the_client(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    with LoopbackHub(tmp_path / "hub", tokens=TOKENS) as hub:
        done = _with_xet(hub, tmp_path, REPO, "w4")
        assert done.returncode == 1
        assert "xet-write-token" in done.stderr.splitlines()[-1]


def test_collections_are_created_listed_and_filled(hub: LoopbackHub, api: HfApi) -> None:
    slug = api.create_collection("Quantized models", namespace="acme").slug
    assert api.create_collection("Quantized models", namespace="acme", exists_ok=True).slug == slug
    api.add_collection_item(slug, REPO, "model", note="4 bit")
    api.add_collection_item(slug, REPO, "model", exists_ok=True)
    items = api.get_collection(slug).items
    assert [(item.item_id, item.note) for item in items] == [(REPO, "4 bit")]


@pytest.mark.slow
def test_the_process_takes_faults_and_its_state_survives_a_restart(tmp_path: Path) -> None:
    heads = []
    for attempt in range(2):
        command = [sys.executable, "-m", "tests.loopback_hub", "--root", str(tmp_path), "--token", "hf_write"]
        server = subprocess.Popen([*command, "--org", "acme"], stdout=subprocess.PIPE, text=True)
        try:
            assert server.stdout
            endpoint = server.stdout.readline().strip()
            api = _client(endpoint, "hf_write")
            api.create_repo(REPO, exist_ok=True)
            if attempt == 0:
                _publish(api)
                fault = {"match": "GET .*/refs", "kind": "status", "status": 507}
                get_session().post(f"{endpoint}/_loopback/faults", json=fault)
                assert get_session().get(f"{endpoint}/api/models/{REPO}/refs").status_code == 507
                recorded = get_session().get(f"{endpoint}/_loopback/record").json()
                assert [upload["received"] for upload in recorded["uploaded"]] == [len(WEIGHTS)]
                assert recorded["requests"][-1]["status"] == 507
            heads.append({ref.name: ref.target_commit for ref in api.list_repo_refs(REPO).branches})
        finally:
            server.kill()
            server.communicate()
    assert heads[0] == heads[1]
    assert set(heads[0]) == {"main", "w4"}
