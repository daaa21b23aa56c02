"""Malformed and hostile answers of a server with the Hub's protocol: one clear error, soon, in bounded memory."""

import gzip
import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from packager.errors import PackagerError, PublishError, SourceError
from packager.inputs import hub_session
from packager.inputs.hub_models import access_problem, hub_errors
from packager.publish.after_publish import FinalStep, ReleaseTag
from packager.publish.branches import publish_branches
from packager.publish.hub_collection import HubCollection
from packager.publish.targets import hub_client
from packager.publish.targets.hub import HubTarget, NewRepository
from tests.loopback_hub import Account, Answer, LoopbackHub
from tests.publish_fixtures import REPOSITORY, git, log_in
from tests.samples import sampled
from tests.test_hub_target import TOKEN, HubFixture

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")
COMMIT = "POST /api/models/.*/commit/"
# Every request that publishing makes, and the noun of its path here.
ENDPOINTS: Mapping[str, str] = {
    "whoami": "GET /api/whoami",
    "refs": "GET /api/models/[^/]+/[^/]+/refs",
    "tree": "GET /api/models/[^/]+/[^/]+/tree/",
    "commits": "GET /api/models/[^/]+/[^/]+/commits/",
    "create": "POST /api/repos/create",
    "settings": "PUT /api/models/.*/settings",
    "branch": "POST /api/models/.*/branch/",
    "preupload": "POST /api/models/.*/preupload/",
    "batch": "POST .*/objects/batch",
    "put": "PUT /_lfs",
    "verify": "POST .*/objects/verify",
    "card": "POST /api/validate-yaml",
    "commit": COMMIT,
    "tag": "POST /api/models/.*/tag/",
    "content": "GET /.*/resolve/",
    "collections": "GET /api/collections",
    "collection": "POST /api/collections",
}


class Stranger:
    """A server that the answers lead to; it remembers the requests that had a token."""

    def __init__(self) -> None:
        outer = self
        self.paths: list[str] = []
        self.tokens: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                self.rfile.read(length)
                outer.paths.append(f"{self.command} {self.path}")
                outer.tokens.extend(self.headers.get_all("Authorization", []))
                self.send_response(200)
                self.send_header("Content-Length", "2")
                self.end_headers()
                self.wfile.write(b"[]")

            do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815 - the names that http.server calls

            def log_message(self, *_: object) -> None:
                """Log nothing."""

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def stranger() -> Iterator[Stranger]:
    stranger = Stranger()
    yield stranger
    stranger.close()


@pytest.fixture
def fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubFixture]:
    with LoopbackHub(tmp_path / "hub", tokens={TOKEN: Account("somebody")}) as hub:
        log_in(hub, TOKEN, monkeypatch)
        monkeypatch.setattr("time.sleep", lambda _: None)
        yield HubFixture(tmp_path, hub)


def leaves(value: Any, new: Callable[[Any], Any]) -> Any:
    """Return JSON with every scalar replaced."""
    if isinstance(value, dict):
        return {key: leaves(entry, new) for key, entry in value.items()}
    return [leaves(entry, new) for entry in value] if isinstance(value, list) else new(value)


def without_keys(value: Any) -> Any:
    """Return JSON without the keys of its innermost objects."""
    if isinstance(value, list):
        return [without_keys(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    return {key: without_keys(entry) for key, entry in value.items() if isinstance(entry, dict | list) and entry}


def changed(change: Callable[[Any], Any]) -> Callable[[Answer], Answer]:
    """Return a change of an answer's JSON; an answer of another kind becomes the changed empty object."""

    def apply(answer: Answer) -> Answer:
        try:
            value = json.loads(b"".join(answer.blocks()) or b"{}")
        except ValueError:
            value = {}
        return Answer.of_json(change(value), answer.status, answer.headers)

    return apply


def damages(hub: LoopbackHub, stranger: Stranger) -> Mapping[str, dict[str, Any]]:
    """Return every kind of damage, as the settings of a fault."""

    def answer(body: bytes, status: int = 200, **headers: str) -> dict[str, Any]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return {"kind": "answer", "body": body, "status": status, "headers": named}

    def change(function: Callable[[Any], Any]) -> dict[str, Any]:
        return {"kind": "change", "change": changed(function)}

    there = f"{stranger.address}/there"
    return {
        "a page of HTML": answer(b"<html>Please log in</html>", Content_Type="text/html"),
        "nothing": answer(b""),
        "null": answer(b"null"),
        "a number": answer(b"7"),
        "a text": answer(b'"text"'),
        "a list": answer(b"[[1]]"),
        "an object": answer(b"{}"),
        "a deep list": answer(b"[" * 100_000),
        "a number of many digits": answer(b"[" + b"9" * 10_000 + b"]"),
        "bytes that are no text": answer(b'\xff\xfe{"a"'),
        "a surrogate": answer(b'[{"name": "\\ud800", "path": "\\ud800"}]'),
        "compressed": answer(gzip.compress(bytes(64 << 20)), Content_Encoding="gzip"),
        "too large": answer(b" " * (hub_session.MAX_ANSWER_BYTES + (1 << 20))),
        "a redirect to itself": answer(b"", 307, Location="?again"),
        "a redirect to another server": answer(b"", 307, Location=there),
        "a redirect to no address": answer(b"", 307, Location="http://[::1/"),
        "a refusal with a list": answer(b"[]", 400),
        "a refusal with odd errors": answer(b'{"errors": [null, 7]}', 403),
        "a wait of many digits": answer(b"{}", 429, Retry_After="9" * 5000),
        "a quota of many digits": answer(b"{}", 429, RateLimit=f'"api";r=0;t={"9" * 5000}'),
        "another status": answer(b"{}", 299),
        "not HTTP": {"kind": "raw", "body": b"SSH-2.0-OpenSSH_9.2\r\n\r\n"},
        "values that are null": change(lambda value: leaves(value, lambda _: None)),
        "values that are numbers": change(lambda value: leaves(value, lambda _: 7)),
        "values that are lists": change(lambda value: leaves(value, lambda _: [])),
        "values that are negative": change(
            lambda value: leaves(value, lambda leaf: -1 if isinstance(leaf, int) else leaf)
        ),
        "addresses elsewhere": change(
            lambda value: leaves(value, lambda leaf: there if str(leaf).startswith("http") else leaf)
        ),
        "addresses that are none": change(
            lambda value: leaves(value, lambda leaf: "http://[::1/" if str(leaf).startswith("http") else leaf)
        ),
        "objects without keys": change(without_keys),
        "a list in a list": change(lambda value: [value]),
        "entries that are null": change(lambda value: [None for _ in value] if isinstance(value, list) else {}),
    }


SOME_ENDPOINTS = ("refs", "commit", "tree")


def exercise(fixture: HubFixture, repository_id: str) -> None:
    """Publish with everything around it, and read a file."""
    settings = NewRepository(gated="auto")
    target = HubTarget(repository_id, new=settings, log=fixture.lines.append, retry_limit_s=3)
    collection = HubCollection("All", [repository_id], private=False, log=fixture.lines.append, retry_limit_s=3)
    steps: list[FinalStep] = [ReleaseTag(target, "v1"), collection]
    report = publish_branches(fixture.contents, target, fixture.lines.append, final_steps=steps)
    assert target.read_bytes(report.head("main"), "config.json", size=2) == b"{}"


@pytest.mark.slow
@pytest.mark.parametrize("endpoint", SOME_ENDPOINTS)
def test_a_malformed_answer_is_one_clear_error(fixture: HubFixture, stranger: Stranger, endpoint: str) -> None:
    """Every kind of damage for one of the three requests that a publish depends on most."""
    answers_may_be_malformed(fixture, stranger, endpoint, SOME_ENDPOINTS.index(endpoint), len(SOME_ENDPOINTS))


@pytest.mark.long
@pytest.mark.parametrize("endpoint", ENDPOINTS)
def test_a_malformed_answer_is_one_clear_error_and_the_next_publish_is_right(
    fixture: HubFixture, stranger: Stranger, endpoint: str
) -> None:
    """Every kind of damage for each request of a publish: more than 500 answers."""
    answers_may_be_malformed(fixture, stranger, endpoint, 0, 1)


def answers_may_be_malformed(fixture: HubFixture, stranger: Stranger, endpoint: str, first: int, step: int) -> None:
    """Publish, and publish again without damage, for every `step`-th kind of damage from the `first` on."""
    refused = 0
    for number, (name, settings) in list(enumerate(damages(fixture.hub, stranger).items()))[first::step]:
        repository_id = f"somebody/R{number}"
        fault = fixture.hub.fault(ENDPOINTS[endpoint], times=9999, **settings)
        started = time.monotonic()
        try:
            exercise(fixture, repository_id)
        except PackagerError as error:
            refused += 1
            text = str(error)
            assert TOKEN not in text, name
            assert len(text) < 2000, name
        except AssertionError:
            assert endpoint == "content", name  # a file's bytes are compared by whoever reads it
        assert time.monotonic() - started < 60, name
        assert fault.fired, f"{endpoint} was not asked for"
        assert stranger.tokens == [], name
        fixture.hub.faults.clear()
        exercise(fixture, repository_id)
        path = fixture.hub.repository(repository_id).path
        for content in fixture.contents:
            names = git("ls-tree", "-r", "--name-only", content.branch, cwd=path).split()
            assert set(names) == {*content.files, ".gitattributes"}, name
    assert refused >= (5 if step == 1 else 2)
    assert TOKEN not in "".join(fixture.lines)


def refused(fixture: HubFixture, **settings: Any) -> str:
    with pytest.raises(PublishError) as caught:
        fixture.publish(**settings)
    assert TOKEN not in str(caught.value)
    return str(caught.value)


def test_the_address_of_the_next_page_is_on_the_same_server_and_new(fixture: HubFixture, stranger: Stranger) -> None:
    fixture.publish()
    links = {
        f"<{stranger.address}/api/next>; rel=next": "its next page is on another server",
        f"<{fixture.hub.storage}/api/next>; rel=next": "its next page is on another server",
        "<http://[::1/>; rel=next": "it names the malformed address",
        "<?>; rel=next": "its pages lead back to an earlier one|lists the file .* twice",
    }
    for link, words in links.items():
        for endpoint in ("tree", "commits"):
            fixture.hub.faults.clear()
            headers = {"Link": link}

            def linked(answer: Answer, headers: dict[str, str] = headers) -> Answer:
                return Answer(answer.status, answer.body, {**answer.headers, **headers})

            fixture.hub.fault(ENDPOINTS[endpoint], "change", times=9999, change=linked)
            started = time.monotonic()
            with pytest.raises(PublishError, match=words):
                fixture.publish() if endpoint == "tree" else fixture.target().history("main")
            assert time.monotonic() - started < 10
    assert stranger.paths == []


@pytest.mark.parametrize(
    ("name", "value", "words"),
    sampled(
        [
            ("_LISTING_S", 0.2, "its pages do not end"),
            ("MAX_ANSWER_BYTES", 20, "its pages do not end"),
            ("MAX_PAGES", 5, "the list has more than 5 pages"),
        ],
        ("MAX_PAGES", 5, "the list has more than 5 pages"),
    ),
)
def test_pages_that_do_not_end_are_ended(
    fixture: HubFixture, monkeypatch: pytest.MonkeyPatch, name: str, value: float, words: str
) -> None:
    fixture.publish()
    monkeypatch.setattr(f"packager.publish.targets.hub_answers.{name}", value)
    numbers = iter(range(10**6))

    def more(answer: Answer) -> Answer:
        return Answer(200, b"[]", {"Link": f"<?cursor={next(numbers)}>; rel=next"})

    fixture.hub.fault(ENDPOINTS["tree"], "change", times=10**6, change=more)
    text = refused(fixture)
    assert words in text
    assert "the answer is not one that the Hub gives" in text


def test_the_clients_own_listings_end_too(fixture: HubFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_session, "MAX_PAGES", 5)
    fixture.publish()
    numbers = iter(range(10**6))

    def more(answer: Answer) -> Answer:
        return Answer(200, b"[]", {"Link": f"<{fixture.hub.endpoint}/api/collections?n={next(numbers)}>; rel=next"})

    fixture.hub.fault("GET /api/collections", "change", times=10**6, change=more)
    collection = HubCollection("All", [REPOSITORY], private=False, log=print, retry_limit_s=1)
    (line,) = collection.plan(fixture.publish().plan)
    assert "the list has more than 5 pages" in line
    numbers = iter(range(10**6))
    tree = f"/api/models/{REPOSITORY}/tree/main"

    def more_files(answer: Answer) -> Answer:
        return Answer(200, b"[]", {"Link": f"<{fixture.hub.endpoint}{tree}?n={next(numbers)}>; rel=next"})

    fixture.hub.fault(f"GET {tree}", "change", times=10**6, change=more_files)
    with pytest.raises(SourceError, match="could not be downloaded"), hub_errors("a model"):
        list(huggingface_hub.HfApi().list_repo_tree(REPOSITORY))


@pytest.mark.parametrize("place", ["next", "verify"])
def test_the_token_goes_to_no_other_server(
    fixture: HubFixture, stranger: Stranger, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    """The client itself would send it there."""
    if place == "next":
        fixture.publish()
        link = {"Link": f"<{stranger.address}/api/next>; rel=next"}
        body = Answer.of_json([]).body
        fixture.hub.fault("GET /api/collections", "answer", status=200, body=body, headers=link)
        (line,) = HubCollection("All", [REPOSITORY], private=False, log=print, retry_limit_s=1).plan(
            fixture.publish().plan
        )
        assert "it asks for a request with the token to another server" in line
    else:

        def elsewhere(value: Any) -> Any:
            for entry in value["objects"]:
                entry.get("actions", {}).get("verify", {})["href"] = f"{stranger.address}/verify"
            return value

        fixture.hub.fault(ENDPOINTS["batch"], "change", times=99, change=changed(elsewhere))
        assert "it asks for a request with the token to another server" in refused(fixture)
    assert stranger.tokens == []


def test_an_upload_that_is_redirected_goes_without_the_token(fixture: HubFixture, stranger: Stranger) -> None:
    for endpoint in ("create", "preupload", "put", "commit"):
        fixture.hub.faults.clear()
        location = {"Location": f"{stranger.address}/upload"}
        fixture.hub.fault(ENDPOINTS[endpoint], "answer", times=99, status=307, headers=location)
        refused(fixture)
    assert any(path.startswith("POST /upload") for path in stranger.paths)
    assert stranger.tokens == []


def test_a_compressed_answer_is_not_unpacked(fixture: HubFixture) -> None:
    packed = gzip.compress(gzip.compress(bytes(64 << 20)))
    headers = {"Content-Encoding": "gzip, gzip"}
    fixture.hub.fault(ENDPOINTS["refs"], "answer", status=200, body=packed, headers=headers, times=99)
    assert "it is compressed (gzip, gzip), which was not asked for" in refused(fixture)
    assert {request.headers["Accept-Encoding"] for request in fixture.hub.requests} == {"identity"}


def test_an_answer_without_an_end_is_ended(fixture: HubFixture) -> None:
    fixture.hub.fault(ENDPOINTS["whoami"], "answer", status=200, body=b" " * (25 << 20), times=99)
    assert "it is larger than 24 MiB" in refused(fixture)


def test_an_answer_that_comes_byte_by_byte_is_ended(fixture: HubFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    fixture.publish()
    monkeypatch.setattr(hub_session, "_ANSWER_S", 0.3)
    monkeypatch.setattr(hub_session, "_SLOW_START_S", 0.3)
    monkeypatch.setattr("time.sleep", lambda seconds: threading.Event().wait(min(seconds, 0.02)))
    fault = fixture.hub.fault(ENDPOINTS["refs"], "drip", seconds=0.02, times=99)
    started = time.monotonic()
    assert "it did not end within 0 s" in refused(fixture)
    fault.times = 0
    target = fixture.target()
    head = target.history("main")[0].commit
    fixture.hub.fault(ENDPOINTS["content"], "drip", seconds=0.02, times=99)
    with pytest.raises(PublishError, match="the file came too slowly: "):
        target.read_bytes(head, "README.md")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize("endpoint", sampled(["refs", "tag", "content"], "refs"))
def test_headers_without_an_end_are_ended(fixture: HubFixture, monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    fixture.publish()
    head = fixture.target().history("main")[0].commit
    monkeypatch.setattr(hub_session, "_HEADERS_S", 0.2)
    monkeypatch.setattr(hub_session, "_READING_TIMEOUT_S", 0.1)
    monkeypatch.setattr(hub_session, "_TIMEOUTS_S", dict.fromkeys(hub_session._TIMEOUTS_S, 0.1))
    monkeypatch.setattr("time.sleep", lambda seconds: threading.Event().wait(min(seconds, 0.02)))
    fixture.hub.fault(ENDPOINTS[endpoint], "drip-headers", seconds=0.02, times=99)
    started = time.monotonic()
    target = fixture.target()
    calls: Mapping[str, Callable[[], object]] = {
        "refs": target.read_branches,
        "tag": lambda: target.tag("v1", {"main": head}, "notes"),
        "content": lambda: target.read_bytes(head, "README.md"),
    }
    with pytest.raises(PublishError, match="its headers did not end within"):
        calls[endpoint]()
    assert time.monotonic() - started < 10


def test_reading_waits_for_a_silent_server_for_a_minute_and_a_commit_longer(fixture: HubFixture) -> None:
    hub_client.hub_api()
    session = huggingface_hub.get_session()
    limits = {}
    for method in ("GET", "HEAD", "POST", "PUT", "DELETE"):
        request = session.build_request(method, fixture.hub.endpoint)
        hub_session._limit_time(request)
        limits[method] = request.extensions["timeout"]["read"]
    assert limits == {"GET": 60.0, "HEAD": 60.0, "POST": 600.0, "PUT": 600.0, "DELETE": 600.0}
    request = session.build_request("GET", fixture.hub.endpoint, timeout=5)
    hub_session._limit_time(request)
    assert request.extensions["timeout"]["read"] == 5


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"kind": "answer", "status": 307, "headers": {"Location": "?again"}}, "TooManyRedirects"),
        ({"kind": "raw", "body": b"220 mail.example.org ESMTP\r\n\r\n"}, "RemoteProtocolError"),
    ],
)
def test_an_answer_that_no_wait_changes_is_not_waited_for(
    fixture: HubFixture, fault: dict[str, Any], words: str
) -> None:
    fixture.hub.fault(ENDPOINTS["refs"], times=999, **fault)
    text = refused(fixture)
    assert words in text
    assert "check the address in HF_ENDPOINT" in text
    assert fixture.lines == [], "it was not tried again"


def test_a_refusal_with_a_list_keeps_its_status(fixture: HubFixture) -> None:
    fixture.hub.fault(ENDPOINTS["refs"], "answer", status=503, body=b"[]")
    fixture.publish()
    assert any("503" in line and "trying again" in line for line in fixture.lines)


def test_the_identity_of_a_ci_job_and_the_hubs_own_servers_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    hub_client.hub_api()
    session = huggingface_hub.get_session()

    def send(guard: Any, url: str, token: str) -> None:
        guard(session.build_request("GET", url, headers={"Authorization": f"Bearer {token}"}))

    guard = hub_session._TokenGuard()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://huggingface.co")
    send(guard, "https://huggingface.co/api/x", "hf_1")
    send(guard, "https://datasets-server.huggingface.co/parquet", "hf_1")
    send(guard, "https://token.actions.githubusercontent.com/?audience=x", "of the job")
    for url in (
        "http://huggingface.co/api",
        "https://huggingface.co.example.org/",
        "https://nothuggingface.co/",
        "https://huggingface.co:8443@example.org/",
    ):
        with pytest.raises(hub_session.AnswerError):
            send(guard, url, "hf_1")
    guard = hub_session._TokenGuard()
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://hub.example.org")
    send(guard, "https://hub.example.org/api/x", "hf_1")
    for url in ("https://huggingface.co/api", "http://hub.example.org/api", "https://hub.example.org:444/"):
        with pytest.raises(hub_session.AnswerError):
            send(guard, url, "hf_1")


VALUES: list[tuple[str, Callable[[Any], Any], str]] = [
    (
        "refs",
        lambda value: {**value, "branches": [{"name": "main", "targetCommit": None}]},
        "'targetCommit' is missing",
    ),
    (
        "refs",
        lambda value: {**value, "branches": [{"name": "main", "targetCommit": "main"}]},
        "not the id of a commit",
    ),
    ("refs", lambda value: {**value, "branches": 7}, "the branches are the value 7"),
    ("refs", lambda value: [value], "the references are a list"),
    ("commits", lambda _: [], "has no commits"),
    ("commits", lambda value: [{k: v for k, v in value[0].items() if k != "message"}], "'message' is missing"),
    ("commits", lambda value: [{**value[0], "authors": None}], "the authors are missing"),
    ("commits", lambda value: [{**value[0], "date": "yesterday"}], "is not the date of a commit"),
    ("commits", lambda value: [{**value[0], "id": None}], "is not the id of a commit"),
    ("tree", lambda value: [*value, *value], "twice"),
    ("tree", lambda value: [{**value[0], "size": True}], "true is not the size of a file"),
    ("tree", lambda value: [{**value[0], "size": -1}], "-1 is not the size of a file"),
    ("tree", lambda value: [{**value[0], "size": 1 << 70}], "is not the size of a file"),
    ("tree", lambda value: [{**value[0], "oid": "x"}], '"x" is not a digest'),
    ("tree", lambda value: [{**value[0], "lfs": []}], "the record of a large file is a list"),
    ("tree", lambda value: [{**value[0], "lfs": {"oid": "a" * 40, "size": 1}}], "is not a digest"),
    ("tree", lambda value: [{**value[0], "path": None}], "'path' is missing"),
    ("tree", lambda value: [{**value[0], "type": None}], "'type' is missing"),
    ("tree", lambda value: [value[0], None], "one of the files is missing or null"),
    ("tree", lambda value: [{**value[0], "path": str(n)} for n in range(100_001)], "it lists 100001 files"),
]


@pytest.mark.parametrize(("endpoint", "change", "words"), sampled(VALUES, *VALUES[::5]))
def test_every_value_of_a_list_is_checked(
    fixture: HubFixture, endpoint: str, change: Callable[[Any], Any], words: str
) -> None:
    fixture.publish()
    fixture.hub.fault(ENDPOINTS[endpoint], "change", times=99, change=changed(change))
    text = refused(fixture)
    assert words in text
    assert "the answer is not one that the Hub gives" in text


def read_info() -> None:
    """Read a model's record as a build does."""
    with hub_errors("a model"):
        info = huggingface_hub.HfApi().model_info(REPOSITORY, revision="main", files_metadata=True)
        hub_session.checked_siblings(info.siblings)


def test_what_reads_a_base_model_has_the_same_limits(fixture: HubFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    fixture.publish()
    hub_session._Current.hooks = None
    huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)
    packed = gzip.compress(bytes(64 << 20))
    check = f"GET /api/models/{REPOSITORY}/auth-check"
    fixture.hub.fault(check, "answer", status=200, body=packed, headers={"Content-Encoding": "gzip"})
    assert "it is compressed" in access_problem(REPOSITORY)
    for value in (
        b"null",
        b"[]",
        b'{"id": 7}',
        b'{"siblings": [null]}',
        b'{"siblings": [{"rfilename": 7}]}',
        b'{"id": "a/b", "siblings": [{"rfilename": "../x"}]}',
        b'{"id": "a/b", "siblings": [{"rfilename": "x", "size": "1"}]}',
        b"<html>",
    ):
        fixture.hub.faults.clear()
        fixture.hub.fault("GET /api/models/.*/revision/", "answer", status=200, body=value, times=9)
        with pytest.raises(SourceError, match="could not be downloaded"):
            read_info()


def test_a_bug_of_this_program_is_no_answer(fixture: HubFixture) -> None:
    for own in (KeyError("bug"), TypeError("bug"), AssertionError("bug"), AttributeError("bug")):
        with pytest.raises(type(own)) as caught, hub_errors("a model"):
            raise own
        assert caught.value is own
