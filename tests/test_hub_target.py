"""Publishing to a loopback Hub: stored files, uploaded bytes, and faults."""

import email.utils
import errno
import json
import logging
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Any

import huggingface_hub.constants
import pytest

from packager.errors import MachineError, PackagerError, PublishError
from packager.inputs import hub_session
from packager.publish.after_publish import ReleaseTag
from packager.publish.branches import BranchContent, PublishReport, publish_branches
from packager.publish.sign_release import ReleaseSigner, SigningKeys
from packager.publish.statements import ReleaseStatement, read_envelope, read_release_statement
from packager.publish.targets import HeadMovedError, hub_calls, hub_client, read_local_file
from packager.publish.targets.hub import HubTarget, NewRepository
from packager.publish.targets.repository_per_variant import RepositoryPerVariant
from packager.receipt import ATTESTATION, RELEASE_ATTESTATION
from packager.system.files import sha256_file
from packager.variant import branch_problem
from tests.loopback_hub import Account, FaultKind, LoopbackHub
from tests.publish_fixtures import REPOSITORY, VARIANT, describe, fixed_signer, git, log_in, make_content, trees
from tests.samples import sampled

# The client's own upload of raw bytes.
pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")
TOKEN, READER, RIVAL = "hf_writes_0123456789", "hf_reads_0123456789", "hf_rival_0123456789"
COMMIT = "POST /api/models/.*/commit/"
PUT = "PUT /"
WEIGHTS = {"main": b"main's weights" * 1000, VARIANT: b"the variant's weights" * 1000}


class HubFixture:
    """An empty Hub, two branches to publish, and the log lines."""

    def __init__(self, tmp_path: Path, hub: LoopbackHub) -> None:
        self.dist, self.hub = tmp_path / "dist", hub
        self.contents = [
            make_content(
                self.dist,
                branch,
                {"README.md": b"---\nlicense: mit\n---\n# Card\n", "config.json": b"{}", "model.safetensors": weights},
            )
            for branch, weights in WEIGHTS.items()
        ]
        self.lines: list[str] = []

    @property
    def path(self) -> Path:
        return self.hub.repository(REPOSITORY).path

    def target(self, **settings: Any) -> HubTarget:
        return HubTarget(REPOSITORY, log=self.lines.append, **settings)

    def publish(self, contents: Sequence[BranchContent] | None = None, **settings: Any) -> PublishReport:
        self.lines.clear()
        return publish_branches(contents or self.contents, self.target(**settings), self.lines.append)

    def refused(self, kind: type[PackagerError] = PublishError, **settings: Any) -> str:
        with pytest.raises(kind) as caught:
            self.publish(**settings)
        assert TOKEN not in str(caught.value)
        assert isinstance(caught.value.__cause__, HeadMovedError | type(None))
        return str(caught.value)

    def change(self, branch: str, **files: bytes) -> list[BranchContent]:
        """Return the contents after some files of a branch have changed."""
        for name, data in files.items():
            (self.dist / branch / name.replace("_", ".")).write_bytes(data)
        return [describe(self.dist / content.branch, content.branch) for content in self.contents]

    def assert_published(self) -> None:
        """Assert that a clone has exactly the files, large ones by git-lfs, and .gitattributes."""
        for content in self.contents:
            names = git("ls-tree", "-r", "--name-only", content.branch, cwd=self.path).split()
            assert set(names) == {*content.files, ".gitattributes"}
            for name in content.files:
                data = (content.folder / name).read_bytes()
                stored = git("show", f"{content.branch}:{name}", cwd=self.path)
                if name.endswith(".safetensors"):
                    record = content.files[name]
                    assert f"oid sha256:{record.sha256}\nsize {record.size_bytes}\n" in stored
                    assert self.hub.repository(REPOSITORY).lfs_object(record.sha256).read_bytes() == data
                else:
                    assert stored.encode() == data

    def uploaded_bytes(self) -> int:
        return sum(upload.received for upload in self.hub.uploaded)

    def commits(self, branch: str) -> list[str]:
        return git("log", "--format=%s", branch, cwd=self.path).splitlines()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    tokens = {
        TOKEN: Account("somebody"),
        READER: Account("somebody", role="read"),
        RIVAL: Account("rival", orgs=("somebody",)),
    }
    with LoopbackHub(tmp_path / "hub", tokens=tokens) as hub:
        log_in(hub, TOKEN, monkeypatch)
        # The client waits between its own tries, too.
        monkeypatch.setattr("time.sleep", lambda _: None)
        yield hub


@pytest.fixture
def fixture(tmp_path: Path, hub: LoopbackHub) -> HubFixture:
    return HubFixture(tmp_path, hub)


def test_a_new_repository_gets_a_branch_per_variant_main_last(fixture: HubFixture) -> None:
    report = fixture.publish()
    assert [outcome.plan.branch for outcome in report.outcomes] == [VARIANT, "main"]
    fixture.assert_published()
    written = [request.path for request in fixture.hub.requests if "/commit/" in request.path]
    assert [path.rpartition("/")[2] for path in written] == [VARIANT, "main"]
    # A variant's history begins with the repository's first commit, which holds no weights.
    assert len(fixture.commits(VARIANT)) == 2
    message = git("log", "-1", "--format=%B", VARIANT, cwd=fixture.path)
    assert message.startswith(f"Publish {VARIANT}\n")
    assert "Published-by: gptq-packager" in message


def test_a_second_publish_makes_no_request_that_writes(fixture: HubFixture) -> None:
    fixture.publish()
    before, uploaded = trees(fixture.path), fixture.uploaded_bytes()
    fixture.hub.requests.clear()
    report = fixture.publish()
    assert {outcome.plan.action for outcome in report.outcomes} == {"unchanged"}
    assert {request.method for request in fixture.hub.requests} == {"GET"}
    assert (trees(fixture.path), fixture.uploaded_bytes()) == (before, uploaded)


def test_only_changes_are_uploaded_and_stale_files_are_removed_in_one_commit(fixture: HubFixture) -> None:
    fixture.publish()
    fixture.hub.uploaded.clear()
    (fixture.dist / VARIANT / "model.safetensors").rename(fixture.dist / VARIANT / "better.safetensors")
    fixture.contents = fixture.change(VARIANT, config_json=b'{"new": true}')
    (outcome, _) = fixture.publish().outcomes
    assert outcome.plan.present_bytes == len(WEIGHTS[VARIANT])
    assert [change.name for change in outcome.plan.removed] == ["model.safetensors"]
    assert fixture.uploaded_bytes() == 0
    assert len(fixture.commits(VARIANT)) == 3
    fixture.assert_published()


def test_the_files_of_main_are_not_copied_to_a_new_branch(fixture: HubFixture) -> None:
    main, variant = fixture.contents
    fixture.publish([main])
    seen: list[set[str]] = []

    def look(_: object) -> None:
        seen.append(set(git("ls-tree", "-r", "--name-only", VARIANT, cwd=fixture.path).split()))

    fixture.hub.fault(COMMIT, "call", call=look)
    fixture.publish([main, variant])
    assert seen == [{".gitattributes"}]
    fixture.assert_published()


def test_visibility_and_gating_are_those_of_the_recipe(fixture: HubFixture) -> None:
    # A run that ends between making the repository and gating it.
    fault = fixture.hub.fault("PUT /api/models/.*/settings", "status", status=403)
    fixture.refused(new=NewRepository(visibility="private", gated="manual"))
    assert fault.fired == 1
    assert fixture.uploaded_bytes() == 0
    fixture.publish(new=NewRepository(visibility="private", gated="manual"))
    settings = fixture.hub.repository(REPOSITORY).settings
    assert (settings["private"], settings["gated"]) == (True, "manual")


@pytest.mark.crash
@pytest.mark.parametrize("kind", ["cut-after", "status-after"])
def test_a_commit_whose_answer_is_lost_is_found(fixture: HubFixture, kind: FaultKind) -> None:
    fixture.hub.fault(COMMIT, kind, times=2)
    fixture.publish()
    fixture.assert_published()
    assert len(fixture.commits(VARIANT)) == 2
    assert [line for line in fixture.lines if "but the commit was made" in line]


# `reset` is a time of the server's clock: some of the seconds are over when the client reads it.
ASKED = [({"retry_after": 7}, [7]), ({"reset": 31}, [29, 30, 31])]


@pytest.mark.parametrize(("options", "allowed"), sampled(ASKED, ASKED[1]))
def test_the_wait_for_a_busy_hub_is_the_one_that_it_requests(
    fixture: HubFixture, monkeypatch: pytest.MonkeyPatch, options: dict[str, int], allowed: list[int]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr("packager.publish.targets.hub_calls.time.sleep", waits.append)
    fixture.hub.fault(COMMIT, "status", status=429, message="You have exceeded our hourly quota", **options)
    fixture.publish()
    fixture.assert_published()
    start = f"committing {VARIANT}: 429: You have exceeded our hourly quota; trying again in "
    line = next(line for line in fixture.lines if line.startswith(start))
    assert line in [f"{start}{seconds} s" for seconds in allowed]
    assert int(line.split()[-2]) in waits


@pytest.mark.crash
def test_a_hub_that_stays_busy_is_an_error_with_a_hint(fixture: HubFixture) -> None:
    fixture.hub.fault(COMMIT, "status", status=429, retry_after=4000, times=99)
    text = fixture.refused()
    assert f"committing {VARIANT}: the Hub did not answer within 3600 s of waiting" in text
    assert "uploaded files are not uploaded twice" in text
    fixture.hub.faults.clear()
    uploaded = fixture.uploaded_bytes()
    fixture.publish()
    fixture.assert_published()
    assert fixture.uploaded_bytes() == uploaded + len(WEIGHTS["main"])


REFUSALS = [
    ("GET /api/whoami", 401, "reading the token's account: the Hub does not know the token, or it has expired"),
    ("POST /api/repos/create", 403, "making the repository: the token may not do that"),
    (COMMIT, 403, f"committing {VARIANT}: the token may not do that"),
    (PUT, 413, f"uploading the files of {VARIANT}: a file is larger than the Hub takes"),
    (PUT, 507, f"uploading the files of {VARIANT}: the Hub has no room for it"),
]


@pytest.mark.parametrize(("request_line", "status", "text"), sampled(REFUSALS, REFUSALS[0], REFUSALS[2]))
def test_a_refusal_of_the_hub_is_an_error_without_a_retry(
    fixture: HubFixture, request_line: str, status: int, text: str
) -> None:
    fixture.hub.fault(request_line, "status", status=status, message="No.", times=99)
    assert text in fixture.refused()
    fixture.hub.faults.clear()
    fixture.publish()
    fixture.assert_published()


def test_a_token_for_reading_or_none_is_refused_before_anything_is_made(
    fixture: HubFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", READER)
    assert "the token is for reading only" in fixture.refused()
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.utils._auth._get_token_from_file", lambda: None)
    assert "hf auth login" in fixture.refused()
    assert all(request.method == "GET" for request in fixture.hub.requests)


def test_an_offline_machine_is_an_error_with_a_hint(fixture: HubFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True, raising=False)
    huggingface_hub.close_session()
    assert "unset HF_HUB_OFFLINE" in fixture.refused(MachineError)
    huggingface_hub.close_session()


def test_a_head_that_another_person_moves_stops_the_run_with_the_changes(fixture: HubFixture) -> None:
    fixture.publish()
    better = fixture.change(VARIANT, config_json=b'{"better": 1}')

    def rival(_: object) -> None:
        api = huggingface_hub.HfApi(token=RIVAL)
        api.upload_file(path_or_fileobj=b"rival", path_in_repo="NEWS.md", repo_id=REPOSITORY, revision=VARIANT)

    fixture.hub.fault(COMMIT, "call", call=rival)
    with pytest.raises(HeadMovedError) as caught:
        fixture.publish(better)
    text = str(caught.value)
    assert f"{VARIANT} moved while it was being published" in text
    assert "by rival, NEWS.md was added" in text
    plan = fixture.publish(better).plan.branches[0]
    assert (plan.foreign_author, [change.name for change in plan.removed]) == ("rival", ["NEWS.md"])


def test_a_branch_made_between_plan_and_commit_is_not_overwritten(fixture: HubFixture) -> None:
    fixture.publish(fixture.contents[:1])

    def rival(_: object) -> None:
        huggingface_hub.HfApi(token=RIVAL).create_branch(REPOSITORY, branch=VARIANT)

    fixture.hub.fault(f"GET /api/models/{REPOSITORY}/refs", "call", after=1, call=rival)
    assert f"{VARIANT} moved" in fixture.refused(HeadMovedError)


def test_a_file_that_changes_while_it_is_sent_moves_no_branch(fixture: HubFixture) -> None:
    weights = fixture.dist / VARIANT / "model.safetensors"
    fixture.hub.fault("POST .*/objects/batch", "call", call=lambda _: weights.write_bytes(b"x" * len(WEIGHTS[VARIANT])))
    assert f"uploading the files of {VARIANT}" in fixture.refused()
    assert fixture.commits(VARIANT) == ["initial commit"]


def test_published_files_can_be_read_in_parts(fixture: HubFixture, tmp_path: Path) -> None:
    report = fixture.publish()
    target, commit = fixture.target(), report.outcomes[0].commit or ""
    data = WEIGHTS[VARIANT]
    assert target.read_bytes(commit, "model.safetensors") == data
    fixture.hub.requests.clear()
    assert target.read_bytes(commit, "model.safetensors", start=5, size=9) == data[5:14]
    assert "bytes=5-13" in json.dumps(fixture.hub.requests[-1].headers)
    assert target.read_bytes(commit, "config.json", start=1) == b"}"
    target.export(commit, "model.safetensors", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    with pytest.raises(PublishError, match="there is no such file"):
        target.read_bytes(commit, "nothing.bin")


def test_an_earlier_commit_is_restored_without_an_upload(fixture: HubFixture) -> None:
    first = fixture.publish().outcomes[0].commit or ""
    fixture.publish(fixture.change(VARIANT, model_safetensors=b"worse" * 1000, config_json=b'{"worse": 1}'))
    target = fixture.target()
    head, before, *_ = target.history(VARIANT)
    assert (before.commit, before.author, head.title) == (first, "", f"Publish {VARIANT}")
    fixture.hub.uploaded.clear()
    made = target.restore(VARIANT, first, parent=head.commit, message="Back\n\nRollback-of: it")
    assert target.read_back(made) == target.read_back(first)
    assert target.history(VARIANT)[0].title == "Back"
    assert not fixture.hub.uploaded
    fixture.hub.commit(REPOSITORY, {"NEWS.md": b"news"}, branch=VARIANT)
    with pytest.raises(HeadMovedError):
        target.restore(VARIANT, head.commit, parent=made, message="Forth")


@pytest.mark.slow
def test_a_small_file_of_a_restored_commit_is_replaced(fixture: HubFixture, tmp_path: Path) -> None:
    first = fixture.publish().outcomes[0].commit or ""
    fixture.publish(fixture.change(VARIANT, model_safetensors=b"worse" * 1000, config_json=b'{"worse": 1}'))
    target, statements = fixture.target(), {}
    for name, data in (("config.json", b'{"replaced": 1}'), ("release.dsse.json", b"new")):
        (tmp_path / name).write_bytes(data)
        statements[name] = read_local_file(tmp_path / name)
    head = target.history(VARIANT)[0].commit
    fixture.hub.uploaded.clear()
    made = target.restore(VARIANT, first, parent=head, message="Back", replacing=statements)
    assert not fixture.hub.uploaded
    assert target.read_bytes(made, "config.json") == b'{"replaced": 1}'
    restored = target.read_back(first)
    assert target.read_back(made) == {
        **restored,
        **{name: replace(restored["config.json"], size_bytes=file.size_bytes, blob_id=file.blob_id)
           for name, file in statements.items()},
    }  # fmt: skip


def test_a_tag_names_one_commit_for_good(fixture: HubFixture) -> None:
    first, last = (outcome.commit or "" for outcome in fixture.publish().outcomes)
    target = fixture.target()
    assert target.read_tag("v1") == {"main": ""}
    target.tag("v1", {"main": first}, "notes")
    target.tag("v1", {"main": first}, "notes")
    assert target.read_tag("v1") == {"main": first}
    assert git("rev-parse", "v1^{commit}", cwd=fixture.path).strip() == first
    with pytest.raises(PublishError, match="the tag v1 exists"):
        fixture.target().tag("v1", {"main": last}, "notes")


def test_a_used_or_invalid_tag_stops_a_publish_before_it_begins(fixture: HubFixture) -> None:
    first = fixture.publish().outcomes[-1].commit
    fixture.target().tag("v1", {"main": first or ""}, "notes")
    before = trees(fixture.path)
    contents = fixture.change("main", README_md=b"---\nlicense: mit\n---\n# Another\n")
    for name, problem in (
        ("v1", "the tag v1 exists"),
        ("main", "a branch has that name"),
        ("my release", "a tag has"),
    ):
        for dry_run in (True, False):
            with pytest.raises(PublishError, match=problem):
                publish_branches(
                    contents, fixture.target(), print, final_steps=[ReleaseTag(fixture.target(), name)], dry_run=dry_run
                )
    assert trees(fixture.path) == before
    report = publish_branches(contents, fixture.target(), print, final_steps=[ReleaseTag(fixture.target(), "v2")])
    assert report.plan.final_steps == ("tag v2 on main",)
    assert git("rev-parse", "v2^{commit}", cwd=fixture.path).strip() == report.head("main")
    again = publish_branches(contents, fixture.target(), print, final_steps=[ReleaseTag(fixture.target(), "v2")])
    assert again.plan.effects == ()


def test_the_rule_for_names_has_the_noun_of_its_subject() -> None:
    rule = "has 1 to 100 letters, digits, '.', '_' or '-' and no '/'"
    assert branch_problem("my release", noun="tag") == f"a tag {rule}"
    assert branch_problem("my release") == f"a branch {rule}"


def test_repositories_of_their_own_are_tagged_as_they_were_published(fixture: HubFixture) -> None:
    target = RepositoryPerVariant({"main": HubTarget("somebody/M"), VARIANT: HubTarget("somebody/M-v")})

    class Rival(ReleaseTag):
        def apply(self, heads: Mapping[str, str]) -> None:
            fixture.hub.commit("somebody/M-v", {"NEWS.md": b"news"})
            super().apply(heads)

    report = publish_branches(fixture.contents, target, print, final_steps=[Rival(target, "v1")])
    for name, branch in (("M", "main"), ("M-v", VARIANT)):
        path = fixture.hub.repository(f"somebody/{name}").path
        assert git("rev-parse", "v1^{commit}", cwd=path).strip() == report.head(branch)


@pytest.mark.slow
def test_a_higher_threshold_of_large_files_on_the_hub_works(fixture: HubFixture) -> None:
    fixture.hub.lfs_threshold = 10 << 20
    (fixture.dist / "main" / "tokenizer.json").write_bytes(b"x" * 10_200_000)
    fixture.contents = [describe(fixture.dist / content.branch, content.branch) for content in fixture.contents]
    fixture.publish()
    assert fixture.publish().plan.changing == ()


def test_a_long_call_is_still_retried(fixture: HubFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**9, 10**6))
    monkeypatch.setattr("time.monotonic", lambda: float(next(clock)))
    tries: list[int] = []

    def upload() -> str:
        tries.append(1)
        if len(tries) == 1:
            raise ConnectionError("cut after hours")
        return "done"

    assert hub_calls.RetryPolicy("here", fixture.lines.append).call("uploading", upload) == "done"
    assert "trying again" in fixture.lines[0]


def test_a_server_whose_name_has_no_address_is_given_up_soon(
    fixture: HubFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unresolved(*_: object, **__: object) -> object:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    waits: list[float] = []
    monkeypatch.setattr("packager.publish.targets.hub_calls.time.sleep", waits.append)
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    policy = hub_calls.RetryPolicy("here", fixture.lines.append)
    api = hub_client.hub_api()
    with pytest.raises(PublishError, match="listing: the name of the server cannot be resolved") as caught:
        policy.call("listing", lambda: api.list_repo_refs("a/b"))
    assert "dist/hub/models/NAMESPACE/NAME" in caught.value.hint
    assert 5 < sum(waits) <= 30


def test_an_error_of_this_program_is_not_taken_for_the_hubs(fixture: HubFixture, tmp_path: Path) -> None:
    policy = hub_calls.RetryPolicy("here", fixture.lines.append)
    for own in (ValueError("a bug"), RuntimeError("a bug"), OSError(errno.ENOSPC, "No space left on device")):

        def fail(error: Exception = own) -> None:
            raise error

        with pytest.raises(type(own)) as caught:
            policy.call("uploading", fail)
        assert caught.value is own
        assert caught.traceback[-1].name == "fail", "the traceback leads to the bug"
    with pytest.raises(FileNotFoundError):
        policy.call("reading", lambda: sha256_file(tmp_path / "none"))
    assert fixture.lines == []


def test_a_bare_error_of_the_client_is_the_hubs_refusal(fixture: HubFixture) -> None:
    policy = hub_calls.RetryPolicy("here", fixture.lines.append)
    api = hub_client.hub_api()
    with pytest.raises(PublishError, match="committing: the Hub refused") as caught:
        policy.call("committing", lambda: api.create_commit(REPOSITORY, [], commit_message=""))
    assert "ValueError" in caught.value.why


def test_every_wait_is_logged(
    fixture: HubFixture, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The client would wait by itself, as long as the server states, and print the signed address of an upload."""
    waits: list[float] = []
    monkeypatch.setattr("time.sleep", waits.append)
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr(logging.getLogger("huggingface_hub"), "propagate", True)
    fixture.hub.fault("POST /api/models/.*/preupload/", "status", status=429, retry_after=50_000, times=99)
    text = fixture.refused(retry_limit_s=60)
    assert "the next try would be in 50000 s" in text
    assert waits == []
    fixture.hub.faults.clear()
    fixture.hub.fault("PUT /", "status", status=503)
    fixture.publish()
    assert [record.getMessage() for record in caplog.records if record.name.startswith("huggingface_hub")] == []


@pytest.mark.crash
def test_a_silent_server_is_an_error_after_a_time_limit(fixture: HubFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(hub_session._TIMEOUTS_S, "read", 0.3)
    monkeypatch.setattr("time.sleep", lambda seconds: Event().wait(min(seconds, 1.0)))
    fixture.hub.fault(COMMIT, "delay", seconds=1.0)
    fixture.publish()
    assert [line for line in fixture.lines if "ReadTimeout" in line]
    fixture.assert_published()


@pytest.mark.slow
def test_a_new_branch_of_a_squashed_repository_is_emptied_before_the_upload(fixture: HubFixture) -> None:
    fixture.publish(fixture.contents[:1])
    tree = git("rev-parse", "main^{tree}", cwd=fixture.path).strip()
    squashed = git("commit-tree", tree, "-m", "Super-squash branch 'main'", cwd=fixture.path).strip()
    git("update-ref", "refs/heads/main", squashed, cwd=fixture.path)
    seen: list[set[str]] = []

    def look(_: object) -> None:
        seen.append(set(git("ls-tree", "-r", "--name-only", VARIANT, cwd=fixture.path).split()))

    fixture.hub.fault(PUT, "call", call=look)
    fixture.publish()
    assert seen == [{".gitattributes"}]
    fixture.assert_published()


def test_a_branch_made_by_another_at_the_same_moment_is_not_overwritten(fixture: HubFixture) -> None:
    fixture.publish(fixture.contents[:1])

    def rival(_: object) -> None:
        api = huggingface_hub.HfApi(token=RIVAL)
        api.create_branch(REPOSITORY, branch=VARIANT)
        api.upload_file(path_or_fileobj=b"news", path_in_repo="NEWS.md", repo_id=REPOSITORY, revision=VARIANT)

    fixture.hub.fault(f"POST /api/models/{REPOSITORY}/branch/", "call", call=rival)
    with pytest.raises(HeadMovedError, match=r"NEWS\.md was added"):
        fixture.publish()
    assert "NEWS.md" in git("ls-tree", "--name-only", VARIANT, cwd=fixture.path).split()


def test_a_file_that_changed_after_the_confirmation_is_not_sent(fixture: HubFixture) -> None:
    def meanwhile(_: object) -> None:
        (fixture.dist / "main" / "model.safetensors").write_bytes(b"other weights")

    with pytest.raises(PublishError, match="the file changed while it was being published"):
        publish_branches(fixture.contents[:1], fixture.target(), fixture.lines.append, confirm=meanwhile)
    assert fixture.uploaded_bytes() == 0


def test_a_token_that_no_header_can_have_is_not_shown(fixture: HubFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_se\x0bcret")
    text = fixture.refused()
    assert "a character that no request can have" in text
    assert "cret" not in text + "".join(fixture.lines)


TEMPORARY: list[tuple[dict[str, Any], str]] = [
    ({"status": 520, "message": ""}, "520"),
    ({"status": 529, "message": "overloaded"}, "529: overloaded"),
    ({"status": 503, "headers": {"Retry-After": ""}}, " s"),
]


@pytest.mark.parametrize(("options", "words"), sampled(TEMPORARY, TEMPORARY[1]))
def test_a_temporary_failure_is_retried_after_the_wait_that_the_server_states(
    fixture: HubFixture, options: dict[str, Any], words: str
) -> None:
    if "headers" in options:
        options["headers"]["Retry-After"] = email.utils.formatdate(time.time() + 600, usegmt=True)
    fixture.hub.fault(COMMIT, "status", **options)
    fixture.publish()
    (line,) = [line for line in fixture.lines if "trying again" in line]
    assert words in line
    wait_s = int(line.split(" in ")[-1].split()[0])
    assert (wait_s > 400) == ("headers" in options)


def test_the_author_of_a_head_takes_one_request(fixture: HubFixture) -> None:
    fixture.publish()
    fixture.hub.page_size = 5
    for number in range(12):
        fixture.hub.commit(REPOSITORY, {"n.md": str(number).encode()})
    fixture.hub.requests.clear()
    states = fixture.target().read_branches()
    assert states["main"].foreign_author
    assert len([request for request in fixture.hub.requests if "/commits/" in request.path]) == len(states)


@pytest.mark.pinned
def test_each_weight_byte_is_hashed_once(fixture: HubFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is given our digest, and sends what it reads."""
    monkeypatch.setattr("huggingface_hub.lfs.sha_fileobj", lambda *_: pytest.fail("hashed again"))
    fixture.publish()
    fixture.assert_published()


def test_two_simultaneous_publishers_leave_one_result_per_branch(fixture: HubFixture, tmp_path: Path) -> None:
    """Two publishers have different content; each branch ends with one of them, the other gets an error."""
    fixture.publish()
    other = HubFixture(tmp_path / "other", fixture.hub)
    results: list[str] = []

    def run(each: HubFixture, word: bytes) -> None:
        for branch in WEIGHTS:
            each.contents = each.change(branch, model_safetensors=word * 3000, config_json=b'{"by": "%s"}' % word)
        try:
            publish_branches(each.contents, each.target(), each.lines.append)
            results.append("won")
        except HeadMovedError as error:
            results.append(str(error))

    threads = [Thread(target=run, args=arguments) for arguments in ((fixture, b"one"), (other, b"two"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert "won" in results
    assert [text for text in results if text != "won" and "moved" not in text] == []
    for branch in WEIGHTS:
        config = json.loads(git("show", f"{branch}:config.json", cwd=fixture.path))
        maker = fixture if config["by"] == "one" else other
        record = next(content for content in maker.contents if content.branch == branch).files["model.safetensors"]
        assert record.sha256 in git("show", f"{branch}:model.safetensors", cwd=fixture.path)


def test_an_unsigned_commit_of_another_account_is_named_and_the_next_release_has_the_next_number(
    fixture: HubFixture, tmp_path: Path
) -> None:
    """`tests/test_signatures.py` has the cases; this one is on the Hub, whose authors are accounts."""

    def publish() -> tuple[PublishReport, ReleaseStatement]:
        report = publish_branches(
            fixture.contents, fixture.target(), fixture.lines.append, signer=fixed_signer(tmp_path / "statements")
        )
        data = fixture.target().read_bytes(report.head("main"), RELEASE_ATTESTATION)
        return report, read_release_statement(read_envelope(data)[0])

    assert publish()[1].release == 1
    head = fixture.hub.commit(REPOSITORY, dict.fromkeys((RELEASE_ATTESTATION, ATTESTATION)), user="rival")
    with pytest.raises(PublishError, match="no key to sign with"):
        publish_branches(
            fixture.contents, fixture.target(), print, signer=ReleaseSigner(REPOSITORY, SigningKeys(), tmp_path)
        )
    report, release = publish()
    assert release.release == 2
    (line,) = report.plan.warnings
    assert f"{head[:12]} " in line
    assert "by rival" in line
    assert publish()[0].plan.changing == ()
