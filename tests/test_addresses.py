"""Addresses with a password (https://user:password@host): no error, log, table, JSON or file shows the password."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from packager.cli.main import app
from packager.errors import (
    LoaderUnavailableError,
    PackagerError,
    PublishError,
    SourceError,
    without_passwords,
    without_secrets,
)
from packager.inputs import hub_session
from packager.inputs.hub_endpoint import require_endpoint
from packager.inputs.hub_models import hub_errors
from packager.publish.targets import hub_calls
from packager.publish.targets.hub import HubTarget
from packager.publish.targets.hub_calls import RetryPolicy
from packager.publish.targets.resolve_target import resolve_target
from packager.receipt import LoaderRecord
from packager.system.terminal import Terminal
from packager.system.text import printable, printable_lines, shown_address
from tests.loopback_hub import Account, LoopbackHub
from tests.publish_fixtures import log_in

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # of the Hub's client
PASSWORD, TOKEN = "s3cret/wørd@x", "hf_addresses_0123456789"


@pytest.mark.parametrize(
    ("text", "safe"),
    [
        ("https://me:s3cret@hub.example/x", "https://hub.example/x"),
        ("see https://u:p@ss@host/simple.", "see https://host/simple."),
        ("'https://u:pa/s?s@host/x', and 'http://v:q@i'", "'https://host/x', and 'http://i'"),
        ("HTTPS://hf_token@host/x", "HTTPS://host/x"),
        ("git+https://u:p@host", "git+https://host"),
        ("ssh://git:word@host/x", "ssh://host/x"),
        ("https://s3/x?X-Amz-Signature=abc (id)", "https://s3/x?... (id)"),
        ("https://a/x,https://u:s3cret@h/y", "https://a/x,https://h/y"),
        ("https://h?x=https://u:s3cret@c", "https://h?..."),
        ("http://u:s3cret@a:80,http://v:s3cret@b", "http://a:80,http://b"),
        # no secret
        ("ssh://git@host/x", "ssh://git@host/x"),
        ("https://hub.example/@user/a@b", "https://hub.example/@user/a@b"),
        ("https://host:8080/a@b and c", "https://host:8080/a@b and c"),
        ("http://[::1]:80/x@y", "http://[::1]:80/x@y"),
        ("hub:somebody/Model@0123456", "hub:somebody/Model@0123456"),
    ],
)
def test_an_address_is_shown_without_what_opens_it(text: str, safe: str) -> None:
    assert without_secrets(text) == printable(text) == printable_lines(text) == safe
    assert str(PackagerError(text, where=text, why=text, hint=text)).count(safe) == 4


def test_a_query_stays_where_only_passwords_are_left_out() -> None:
    assert without_passwords("https://h?x=https://u:s3cret@c&y=1 and http://v:s3cret@i?z") == (
        "https://h?x=https://c&y=1 and http://i?z"
    )


def test_an_address_without_a_scheme_is_shown_without_its_password() -> None:
    assert shown_address("user:s3cret@host:path") == "host:path"
    assert shown_address("git@host:path") == "git@host:path"


LETTERS = st.characters(exclude_categories=["Cs", "Cc", "Z"], exclude_characters="'\"<>")
WORDS = st.text(LETTERS, min_size=3, max_size=30)


@given(before=WORDS, user=st.sampled_from(["", "u", "me.x"]), word=WORDS, cut=st.integers(0, 700))
def test_no_cut_and_no_neighbour_shows_a_password(before: str, user: str, word: str, cut: int) -> None:
    text = f"{'x' * cut} {before} https://{user}:#{word}#@host.example/path"
    for safe in (without_secrets(text), printable(text), printable_lines(text)):
        assert f"#{word}#" not in safe.replace(before, "")
        assert f"#{word}"[:-1] not in safe.replace(before, "")


def test_long_and_hostile_texts_take_no_time() -> None:
    started = time.process_time()
    for text in ("http://a:" * 3_000, "http://" + "a" * 30_000, "a://" * 5_000, "http://u:" + "p" * 30_000):
        without_secrets(f"{text} ?@")
        without_secrets(f"{text}?{text}@")
    assert time.process_time() - started < 5


def test_a_record_of_a_loader_gets_the_reason_without_the_password() -> None:
    error = LoaderUnavailableError("no index", where=f"https://me:{PASSWORD}@index/simple", why="404")
    record = LoaderRecord(loader="vllm", status="not run", required=False, reason=str(error))
    assert PASSWORD not in record.model_dump_json()


def test_results_and_logs_pass_the_same_gate(capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal()
    terminal.log(f"reading https://me:{PASSWORD}@hub/x")
    terminal.result(
        {
            "link": "https://hub/x?a=b",
            "where": f"https://me:{PASSWORD}@hub/x",
            "rows": [f'a "quoted" https://me:{PASSWORD}@hub'],
        }
    )
    terminal.error(PublishError("refused", where=f"https://me:{PASSWORD}@hub/x"))
    done = capsys.readouterr()
    assert PASSWORD not in done.out + done.err
    assert json.loads(done.out) == {
        "schema_version": 1,
        "link": "https://hub/x?a=b",
        "where": "https://hub/x",
        "rows": ['a "quoted" https://hub'],
    }


# the Hub's client


def refusal(status: int | None) -> Exception:
    """Return an error of the client, with the address of the request in its message."""
    url = f"https://me:{PASSWORD}@hub.example/api/models/a/b?signature=abcdef"
    http: Any = hub_session._http_library()
    request = http.Request("GET", "https://hub.example")
    error: Exception = http.ConnectError(f"cannot connect to {url}", request=request)
    if status is not None:
        response = http.Response(status, request=request)
        error = huggingface_hub.errors.HfHubHTTPError(f"{status} Client Error for url: {url}", response=response)
    return error


@pytest.mark.parametrize("status", [None, 404, 403, 500])
def test_an_error_while_reading_shows_no_password(status: int | None) -> None:
    with pytest.raises(SourceError) as caught, hub_errors("a model"):
        raise refusal(status)
    assert PASSWORD not in str(caught.value)
    assert "signature" not in str(caught.value)


@pytest.mark.parametrize("name", ["LocalProtocolError", "InvalidURL", "UnsupportedProtocol"])
def test_a_message_that_quotes_the_request_is_left_out(name: str) -> None:
    """h11 and httpx quote: Illegal header value b'Bearer hf_...', Invalid port: 's3cret'."""
    http: Any = hub_session._http_library()
    error = getattr(http, name)(f"it quotes b'Bearer {TOKEN}'")
    with pytest.raises(SourceError) as caught, hub_errors("a model"):
        raise error
    with pytest.raises(PublishError) as refused:
        RetryPolicy("hub", print).call("listing", lambda: (_ for _ in ()).throw(error))
    for each in (caught.value, refused.value):
        assert TOKEN not in str(each)


@pytest.mark.parametrize("status", [None, 404, 429])
def test_a_retry_and_its_end_show_no_password(status: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    clock = SimpleNamespace(sleep=lambda _: None, monotonic=time.monotonic)
    monkeypatch.setattr(hub_calls, "time", clock)
    error = refusal(status)

    def fail() -> None:
        raise error

    monkeypatch.setattr(hub_calls, "is_of_client", lambda _: True)
    with pytest.raises(PublishError) as caught:
        RetryPolicy(f"https://me:{PASSWORD}@hub.example/a/b", lines.append, limit_s=5).call("listing", fail)
    assert (lines != []) == (status != 404)
    assert PASSWORD not in f"{caught.value} {lines}"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "hub", tokens={TOKEN: Account("tester")}) as hub:
        log_in(hub, TOKEN, monkeypatch)
        yield hub


@pytest.mark.parametrize(
    "address",
    [
        "",
        "hub.example",
        "me:s3cret@hub.example",
        "https://me:s3/cret@hub.example",
        "https://me:s3#cret@hub.example",
        "https://me:s3cret@hub.example:port",
        "ftp://me:s3cret@hub.example",
        "https://me:s3cret@",
        "https://me:s3cret@hub.example/a b",
        "https://[me:s3cret@hub.example",
    ],
)
def test_an_endpoint_that_is_no_address_is_an_error_of_every_command(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", address)
    for command in (["status", "recipe.yaml"], ["verify-published", "hub:a/b"]):
        done = CliRunner().invoke(app, command)
        assert (done.exit_code, "HF_ENDPOINT is not the address of a Hub" in done.output) == (12, True), done.output
        assert "s3" not in done.output


@pytest.mark.parametrize("address", ["https://huggingface.co", "http://me:s3%2Fcret@[::1]:8080/hub/"])
def test_an_endpoint_with_all_its_parts_is_one(address: str) -> None:
    require_endpoint({"HF_ENDPOINT": address})
    require_endpoint({})


@pytest.mark.slow
def test_no_command_shows_the_password_of_the_endpoint(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = hub.endpoint.replace("://", "://me:s3cret@")
    monkeypatch.setenv("HF_ENDPOINT", endpoint)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", endpoint)
    monkeypatch.chdir(tmp_path)
    for command in (
        ["verify-published", "hub:a/b"],
        ["verify-published", "hub:a/b", "--format", "json"],
        ["rollback", "hub:a/b", "--dry-run"],
        ["init", "a/b"],
        ["doctor"],
        ["doctor", "--format", "json"],
    ):
        done = CliRunner().invoke(app, command)
        assert done.exception is None or isinstance(done.exception, SystemExit), command
        assert done.output, command
        assert "s3cret" not in done.output, command


@pytest.mark.parametrize(
    "address",
    [
        "https://me:s3cret@host/x",
        "HTTPS://me:s3cret@host/x",
        "me:s3cret@host:path",
        "me:s3cret@host/x/y",
        "ftp://me:s3cret@host/x",
        "hub:https://me:s3cret@host/x",
        "https://-x:s3cret@-host/x",
        "https://me:s3/cret@host/x",
    ],
)
def test_no_address_on_the_command_line_is_shown_with_its_password(address: str, tmp_path: Path) -> None:
    for command in ("verify-published", "rollback"):
        done = CliRunner().invoke(app, [command, address, "--dist", str(tmp_path)])
        assert done.exit_code == 10, done.output
        assert "s3cret" not in done.output
        assert "s3/cret" not in done.output
    with pytest.raises(PublishError):
        resolve_target(address, tmp_path, {}, print)


def test_plans_and_saved_plans_name_the_hub_without_its_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://me:s3cret@hub.example")
    assert HubTarget("a/b").where == "https://hub.example/a/b"
