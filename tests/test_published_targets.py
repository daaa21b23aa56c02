"""verify-published and rollback on the loopback Hub and on a git remote."""

import io
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from packager.cli.main import app
from packager.cli.published_view import print_published as print_report
from packager.cli.published_view import published_json as report_json
from packager.errors import AuditError, PublishError
from packager.publish import published
from packager.publish.published import PublishedReport
from packager.publish.rollback import RollbackPlan, RollbackReport, RollbackRequest, rollback
from packager.publish.targets import HeadMovedError, Target
from packager.publish.targets.git import GitTarget
from packager.publish.targets.hub import HubTarget
from packager.receipt import Provenance
from tests import test_published
from tests.audit_cases import WEIGHTS
from tests.checkpoints import edit_json
from tests.loopback_hub import Account, LoopbackHub
from tests.loopback_hub.messages import Answer
from tests.publish_fixtures import git, heads, log_in, trees
from tests.samples import sampled
from tests.test_published import MAIN, PROVENANCE, README, REPOSITORY, VARIANT, reseal

# The client's own upload of raw bytes.
pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")
TOKEN = "hf_writes_0123456789"  # noqa: S105 - the loopback Hub's
NOON = 1_700_000_000


class KilledError(Exception):
    """Raised by a test in place of a kill."""


class PublishedFixture(test_published.PublishedFixture):
    """Two branches, a bare repository that they are published to, and a clock that goes on a minute at each look."""

    def __init__(self, tmp_path: Path, bare: Path, resolve_target: Callable[[], Target]) -> None:
        super().__init__(tmp_path)
        self.bare, self.resolve_target = bare, resolve_target
        self.now = NOON

    def remote(self) -> Target:
        """Return the target as a new process has it."""
        return self.resolve_target()

    def tick(self) -> float:
        self.now += 60
        return self.now

    def publish(self, *branches: str) -> None:
        self.publish_to(self.remote(), *branches)

    def release(self, number: int) -> dict[str, str]:
        """Publish both branches with something changed in each, and return their trees."""
        for branch, folder in self.folders.items():
            (folder / "USE_POLICY.md").write_text(f"# Acceptable Use Policy {number}\n")
            reseal(folder, branch)
        self.publish()
        return trees(self.bare)

    def verify(self, *branches: str, full: bool = False) -> PublishedReport:
        return published.verify_published(self.remote(), self.lines.append, branches=branches, full=full)

    def back(self, *branches: str) -> RollbackReport:
        return rollback(self.remote(), RollbackRequest(branches=branches), self.lines.append)

    def tamper(self, branch: str, name: str, data: bytes) -> None:
        """Put a file on a branch without packager, as another person would."""
        blob = self._plumb("hash-object", "-w", "--stdin", stdin=data)
        index: dict[str, Any] = {"GIT_INDEX_FILE": str(self.bare / "tamper-index")}
        self._plumb("read-tree", branch, **index)
        self._plumb("update-index", "--add", "--cacheinfo", f"100644,{blob},{name}", **index)
        tree = self._plumb("write-tree", **index)
        commit = self._plumb("commit-tree", tree, "-p", branch, "-m", "By hand")
        self._plumb("update-ref", f"refs/heads/{branch}", commit)

    def _plumb(self, *arguments: str, stdin: bytes = b"", **environ: str) -> str:
        facts = {"NAME": "A Person", "EMAIL": "person@example.org", "DATE": f"@{int(self.tick())} +0000"}
        person = {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in facts.items()}
        done = subprocess.run(
            ["git", *arguments],
            cwd=self.bare,
            env={**os.environ, **person, **environ},
            input=stdin,
            capture_output=True,
            check=True,
        )
        return done.stdout.decode().strip()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    with LoopbackHub(tmp_path / "hub-root", tokens={TOKEN: Account("tester")}) as hub:
        log_in(hub, TOKEN, monkeypatch)
        yield hub


def clock(fixture: PublishedFixture) -> SimpleNamespace:
    return SimpleNamespace(time=fixture.tick, sleep=lambda _: None, monotonic=time.monotonic)


@pytest.fixture
def on_hub(tmp_path: Path, hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> PublishedFixture:
    bare = hub.root / f"{REPOSITORY}.git"
    fixture = PublishedFixture(tmp_path, bare, lambda: HubTarget(REPOSITORY, retry_limit_s=5))
    monkeypatch.setattr("tests.loopback_hub.repository.time", clock(fixture))
    monkeypatch.setattr("packager.publish.targets.hub_calls.time.sleep", lambda _: None)
    return fixture


@pytest.fixture
def on_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PublishedFixture:
    bare = tmp_path / "remotes" / f"{REPOSITORY}.git"
    fixture = PublishedFixture(tmp_path, bare, lambda: GitTarget(f"file://{bare}", tmp_path / "staging"))
    monkeypatch.setattr("packager.publish.targets.git_process.time", clock(fixture))
    return fixture


# test_git_target and test_rollback run a git remote in the fast loop.
@pytest.fixture(params=["on_hub", pytest.param("on_git", marks=pytest.mark.slow)])
def fixture(request: pytest.FixtureRequest) -> PublishedFixture:
    found: PublishedFixture = request.getfixturevalue(request.param)
    return found


# verify-published


@pytest.mark.parametrize("full", sampled([False, True], True), ids=["", "full"])
def test_what_was_just_published_is_proven(fixture: PublishedFixture, full: bool) -> None:
    fixture.publish()
    report = fixture.verify(full=full)
    assert report.findings == ()
    assert report.card_rows == 2
    for proof in report.branches:
        assert proof.commit == heads(fixture.bare)[proof.branch]
        assert proof.num_stated + proof.num_read == proof.num_files - 1, "all but provenance.json itself"
        assert (proof.audited, proof.num_tensors) == (full, 63)


def test_a_file_that_was_edited_in_the_repository_is_named_with_its_branch(fixture: PublishedFixture) -> None:
    fixture.publish()
    fixture.tamper(VARIANT, "tokenizer.json", (fixture.folders[VARIANT] / "tokenizer.json").read_bytes() + b" ")
    fixture.tamper(MAIN, "more.txt", b"x")
    found = fixture.found()
    assert found.keys() == {"remote-file-changed", "remote-file-unlisted", "head-foreign"}
    assert found["remote-file-changed"][0].startswith(f"{VARIANT}: tokenizer.json: ")
    assert found["remote-file-unlisted"][0].startswith(f"{MAIN}: more.txt: ")
    assert len(found["head-foreign"]) == 2


@pytest.mark.slow
def test_swapped_branches_are_named(fixture: PublishedFixture) -> None:
    fixture.publish()
    before = heads(fixture.bare)
    for branch, other in ((MAIN, VARIANT), (VARIANT, MAIN)):
        git("update-ref", f"refs/heads/{branch}", before[other], cwd=fixture.bare)
    assert len(fixture.found()["branch-differs"]) >= 2


@pytest.mark.slow
def test_another_branch_s_files_under_an_edited_record_are_a_copy(fixture: PublishedFixture) -> None:
    fixture.publish()
    shutil.copytree(fixture.main, fixture.folders[VARIANT], dirs_exist_ok=True)
    fixture.folders[VARIANT].joinpath("model.safetensors.index.json").unlink()
    for shard in fixture.folders[VARIANT].glob("model-*.safetensors"):
        shard.unlink()
    edit_json(fixture.folders[VARIANT], PROVENANCE, lambda record: record.update(branch=VARIANT))
    reseal(fixture.folders[VARIANT], VARIANT)
    fixture.publish(VARIANT)
    found = fixture.found()
    assert "branch-copied" in found
    assert f"{VARIANT} and {MAIN} have the same weights" in found["branch-copied"][0]


def count_served(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Count the bytes of the answers that the Hub sends, of contents and of the rest."""
    served = {"content": 0, "other": 0}
    blocks = Answer.blocks

    def counted(self: Answer) -> Iterator[bytes]:
        kind = "other" if "application/json" in self.headers.get("Content-Type", "") else "content"
        for block in blocks(self):
            served[kind] += len(block)
            yield block

    monkeypatch.setattr(Answer, "blocks", counted)
    return served


def test_of_weights_only_headers_travel(on_hub: PublishedFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    on_hub.publish()
    served = count_served(monkeypatch)
    assert on_hub.verify().findings == ()
    documents = headers = weights = 0
    for branch, folder in on_hub.folders.items():
        files = Provenance.model_validate_json((folder / PROVENANCE).read_bytes()).files
        stored = on_hub.remote().read_back(heads(on_hub.bare)[branch])
        documents += sum(file.size_bytes for file in stored.values() if not file.sha256)
        for name in (name for name in files if name.endswith(".safetensors")):
            data = (folder / name).read_bytes()
            headers += 8 + 8 + int.from_bytes(data[:8], "little")
            weights += len(data)
    card = (on_hub.main / README).stat().st_size
    assert served["content"] <= documents + headers + card
    assert headers < weights / 5
    before = served["content"]
    on_hub.verify(full=True)
    assert served["content"] - before > weights


@pytest.mark.slow
def test_a_server_without_ranges_costs_nothing_but_time(on_hub: PublishedFixture, hub: LoopbackHub) -> None:
    on_hub.publish()

    def whole(call: Any) -> None:
        del call.headers["Range"]

    fault = hub.fault("GET .*(/resolve/|/_lfs/)", "call", times=10_000, call=whole)
    assert on_hub.verify().findings == ()
    assert fault.fired


def test_empty_files_are_read_where_no_range_of_nothing_exists(fixture: PublishedFixture) -> None:
    fixture.publish()
    fixture.tamper(VARIANT, PROVENANCE, b"")
    fixture.tamper(MAIN, README, b"")
    found = fixture.found()
    assert "branch-unreadable" not in found
    assert f"{VARIANT}: {PROVENANCE}: " in found["provenance-invalid"][0]
    assert f"{MAIN}: {README}: " in found["remote-file-changed"][0]
    assert "card-table" in found


def test_a_card_that_cannot_be_read_is_a_finding_and_hides_no_other(on_hub: PublishedFixture, hub: LoopbackHub) -> None:
    on_hub.publish()
    on_hub.tamper(VARIANT, "more.txt", b"x")
    seen: list[str] = []

    def note(call: Any) -> None:
        seen.append(call.path)

    hub.fault(f"GET .*/{README}$", "call", times=10_000, call=note)
    on_hub.verify()
    hub.faults.clear()
    hub.fault(f"GET .*/{README}$", "status", after=len(seen) - 1, status=403, message="go away")
    found = on_hub.found()
    assert f"{MAIN}: {README}: " in found["branch-unreadable"][0]
    assert "go away" in found["branch-unreadable"][0]
    assert "remote-file-unlisted" in found


@pytest.mark.slow
def test_a_stored_object_that_is_not_what_its_name_says_needs_the_full_download(
    on_hub: PublishedFixture, hub: LoopbackHub
) -> None:
    on_hub.publish()
    record = Provenance.model_validate_json((on_hub.main / PROVENANCE).read_bytes()).files[WEIGHTS]
    test_published.flip(hub.repository(REPOSITORY).lfs_object(record.sha256))
    assert on_hub.found() == {}, "the Hub's word"
    (message,) = on_hub.found(full=True)["remote-file-changed"]
    assert message.startswith(f"{MAIN}: {WEIGHTS}: its content has the sha256")


def packager(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="packager")
    return result.exit_code, result.stdout, result.stderr


PRIVATE, GATED, ANOTHER_S = {"private": True}, {"gated": "manual"}, "hf_of_somebody_else_123"


COMMANDS = [["verify-published", REPOSITORY], ["rollback", REPOSITORY, "--yes"]]


@pytest.mark.parametrize("command", sampled(COMMANDS, COMMANDS[1]))
@pytest.mark.parametrize(
    "settings", sampled([{"private": True}, {"gated": "manual"}], {"gated": "manual"}), ids=["private", "gated"]
)
@pytest.mark.parametrize(
    "token", sampled(["", "hf_of_somebody_else_123"], "hf_of_somebody_else_123"), ids=["no token", "another's"]
)
def test_who_has_no_access_is_told_so_without_a_secret(
    on_hub: PublishedFixture,
    hub: LoopbackHub,
    monkeypatch: pytest.MonkeyPatch,
    command: list[str],
    settings: dict[str, object],
    token: str,
) -> None:
    on_hub.release(1)
    on_hub.release(2)
    repository = hub.repository(REPOSITORY)
    repository.settings = {**repository.settings, **settings}
    hub.tokens["hf_of_somebody_else_123"] = Account("mallory")
    monkeypatch.setenv("HF_TOKEN", token)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(on_hub.root / "no token"))
    before = heads(on_hub.bare)
    code, out, err = packager(*command)
    assert (code, out) == (PublishError.exit_code, "")
    assert heads(on_hub.bare) == before
    assert "HF_TOKEN" in err
    assert "Traceback" not in err
    assert not {TOKEN, "hf_of_somebody_else_123"} & set(err.split())
    assert "hf_of" not in err


@pytest.mark.slow
def test_the_command_on_a_git_remote(on_git: PublishedFixture, tmp_path: Path) -> None:
    on_git.publish()
    where = f"file://{on_git.bare}"
    code, out, _ = packager("verify-published", where, "--dist", tmp_path / "copies")
    assert code == 0
    assert "passed  0 errors, 0 warnings" in out
    on_git.tamper(MAIN, "config.json", b"{}")
    code, out, _ = packager("verify-published", where, "--dist", tmp_path / "copies", "--format", "json")
    result = json.loads(out)
    assert code == AuditError.exit_code
    rules = {finding["rule"] for finding in result["branches"][0]["findings"]}
    assert {"remote-file-changed", "head-foreign"} <= rules
    assert result["branches"][1]["passed"]


@pytest.mark.slow
def test_a_git_remote_may_have_any_address_but_one_repository(on_git: PublishedFixture, tmp_path: Path) -> None:
    on_git.publish()
    elsewhere = tmp_path / "elsewhere.git"
    on_git.bare.rename(elsewhere)
    on_git.resolve_target = lambda: GitTarget(f"file://{elsewhere}", tmp_path / "another-staging")
    report = on_git.verify()
    assert report.passed
    assert [finding.rule for finding in report.findings] == ["address-differs"] * 2
    edit_json(on_git.folders[VARIANT], PROVENANCE, lambda record: record.update(repository="other/tiny-GPTQ"))
    on_git.publish(VARIANT)
    report = on_git.verify()
    assert not report.passed
    (error,) = [finding for finding in report.findings if finding.severity == "error"]
    assert (error.branch, error.rule) == (VARIANT, "repository-differs")


@pytest.mark.slow
def test_pointers_of_git_lfs_to_nothing_of_any_size_are_findings(on_git: PublishedFixture) -> None:
    on_git.publish()
    on_git.tamper(MAIN, ".gitattributes", b"*.safetensors filter=lfs -text\nREADME.md filter=lfs -text\n")
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %s\n" % (b"0" * 64, b"9" * 800)
    for name in (WEIGHTS, README):
        on_git.tamper(MAIN, name, pointer)
    report = on_git.verify()
    print_report(report, Console(file=io.StringIO(), width=120))
    json.dumps(report_json(report))
    assert {"not-a-regular-file", "card-table"} <= {finding.rule for finding in report.findings}
    assert report.branches[1].passed


# rollback


def test_a_release_goes_back_and_verifies(fixture: PublishedFixture) -> None:
    first, second = fixture.release(1), fixture.release(2)
    assert first != second
    report = fixture.back()
    assert {entry.action for entry in report.plan.branches} == {"restore"}
    assert trees(fixture.bare) == first
    assert fixture.verify(full=True).findings == ()
    before = heads(fixture.bare)
    assert {entry.action for entry in fixture.back().plan.branches} == {"done"}
    assert heads(fixture.bare) == before


@pytest.mark.slow
def test_one_branch_goes_back(fixture: PublishedFixture) -> None:
    first, second = fixture.release(1), fixture.release(2)
    fixture.back(VARIANT)
    assert trees(fixture.bare) == {**second, VARIANT: first[VARIANT]}
    assert fixture.found() == {}, "both releases' files are what their records say"


@pytest.mark.crash
@pytest.mark.parametrize("lives", [0, 1])
def test_killed_in_the_middle_and_run_again(
    fixture: PublishedFixture, monkeypatch: pytest.MonkeyPatch, lives: int
) -> None:
    first, _ = fixture.release(1), fixture.release(2)
    kind, left = type(fixture.remote()), [lives]
    restore = kind.restore

    def dying(self: Target, branch: str, commit: str, **rest: Any) -> str:
        if not left[0]:
            raise KilledError
        left[0] -= 1
        return restore(self, branch, commit, **rest)

    monkeypatch.setattr(kind, "restore", dying)
    with pytest.raises(KilledError):
        fixture.back()
    monkeypatch.setattr(kind, "restore", restore)
    fixture.back()
    assert trees(fixture.bare) == first
    commits = {branch: int(git("rev-list", "--count", branch, cwd=fixture.bare)) for branch in first}
    made = 1 if kind is HubTarget else 0  # the Hub begins each branch with a commit of its own
    assert commits == dict.fromkeys(first, made + 3), "one rollback each"
    assert fixture.verify().findings == ()


@pytest.mark.crash
def test_an_answer_that_is_lost_is_no_second_commit(on_hub: PublishedFixture, hub: LoopbackHub) -> None:
    first, _ = on_hub.release(1), on_hub.release(2)
    fault = hub.fault("POST /api/models/.*/commit/", "cut-after", times=2)
    on_hub.back()
    assert fault.fired == 2
    assert trees(on_hub.bare) == first
    assert git("rev-list", "--count", MAIN, cwd=on_hub.bare).strip() == "4"


@pytest.mark.slow
def test_a_head_that_moves_in_between_is_somebody_s_work(fixture: PublishedFixture) -> None:
    first, second = fixture.release(1), fixture.release(2)

    def meanwhile(_: RollbackPlan) -> None:
        fixture.tamper(MAIN, "more.txt", b"x")

    with pytest.raises(HeadMovedError) as caught:
        rollback(fixture.remote(), RollbackRequest(), fixture.lines.append, confirm=meanwhile)
    assert "main moved while it was being put back" in str(caught.value)
    now = trees(fixture.bare)
    assert now[VARIANT] == first[VARIANT], "what came before it is done"
    assert now[MAIN] not in (first[MAIN], second[MAIN]), "nobody's work is overwritten"
