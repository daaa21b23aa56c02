"""Rollbacks of published branches in real git repositories, complete and killed."""

import io
import json
import os
import random
import subprocess
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console
from typer.testing import CliRunner

from packager.cli.main import app
from packager.cli.rollback_view import print_rollback_plan as print_plan
from packager.cli.rollback_view import print_rollback_report as print_report
from packager.cli.rollback_view import rollback_report_json as report_json
from packager.errors import PublishError
from packager.publish.branches import publish_branches
from packager.publish.rollback import RollbackReport, RollbackRequest, rollback
from packager.publish.rollback.history import BranchHistory
from packager.publish.rollback.plan import RollbackPlan
from packager.publish.targets import NO_FILES, CommitRecord, HeadMovedError, LocalFile, StoredFile
from packager.publish.targets.local import LocalTarget
from tests.golden_files import check_golden
from tests.publish_fixtures import REPOSITORY, git, heads, hub_folder, make_content, trees
from tests.samples import sampled

A, B, MAIN = "four-bits", "three-bits", "main"
NOON = 1_700_000_000
Files = Mapping[str, Mapping[str, bytes]]


class KilledError(Exception):
    """Raised by a test's target in place of a kill."""


class Killable(LocalTarget):
    """A local target that dies instead of restoring one more branch, once."""

    lives = 1000
    public = False

    @property
    def is_public(self) -> bool:
        return self.public

    def restore(
        self, branch: str, commit: str, *, parent: str, message: str, replacing: Mapping[str, LocalFile] = NO_FILES
    ) -> str:
        self.lives -= 1
        if self.lives < 0:
            self.lives = 1000
            raise KilledError
        return super().restore(branch, commit, parent=parent, message=message, replacing=replacing)


class RollbackFixture:
    """A repository, and a clock that goes on an hour with each thing that happens."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.scratch, self.root, self.repository = tmp_path, tmp_path / "hub", hub_folder(tmp_path / "hub")
        self.target = Killable(self.root, REPOSITORY)
        self.now, self.lines = NOON, list[str]()
        clock = SimpleNamespace(time=lambda: self.now, sleep=time.sleep, monotonic=time.monotonic)
        monkeypatch.setattr("packager.publish.targets.git_process.time", clock)
        self.releases: list[dict[str, str]] = []

    def publish(self, branches: Files) -> dict[str, str]:
        """Publish a release and return the trees of all branches then."""
        self.now += 3600
        folder = self.scratch / f"dist {self.now}"
        contents = [make_content(folder, branch, files) for branch, files in branches.items()]
        publish_branches(contents, self.target, self.lines.append)
        self.releases.append(trees(self.repository))
        return self.releases[-1]

    def release(self, *branches: str, number: int) -> dict[str, str]:
        """Publish a release in which the branches named have changed."""
        return self.publish({branch: {"README.md": f"card {number}\n".encode(), "w.bin": b"x" * number, "same": b"s"}
                             for branch in branches})  # fmt: skip

    def back(self, *branches: str, to: str = "", again: bool = False, dry_run: bool = False) -> RollbackReport:
        self.now += 3600
        self.lines.clear()
        request = RollbackRequest(branches=branches, to=to, further_back=again)
        return rollback(self.target, request, self.lines.append, dry_run=dry_run)

    def refused(self, *branches: str, to: str = "", again: bool = False) -> str:
        before = heads(self.repository)
        with pytest.raises(PublishError) as caught:
            self.back(*branches, to=to, again=again)
        assert heads(self.repository) == before
        return str(caught.value)

    def commits(self, branch: str) -> list[str]:
        """Return a branch's commits, the newest first."""
        return git("rev-list", branch, cwd=self.repository).split()

    def somebody_commits(self, branch: str, parent: str, message: str = "By hand") -> str:
        """Let a person put an edited card on a branch, past its worktree."""
        blob = self.scratch / "blob"
        blob.write_text(f"edited on {branch}")
        blob_id = git("hash-object", "-w", str(blob), cwd=self.repository).strip()
        listing = git("ls-tree", parent, cwd=self.repository).replace(
            git("rev-parse", f"{parent}:README.md", cwd=self.repository).strip(), blob_id
        )
        tree = git_input(self.repository, listing, "mktree").strip()
        commit = git("commit-tree", tree, "-p", parent, "-m", message, cwd=self.repository).strip()
        git("update-ref", f"refs/heads/{branch}", commit, cwd=self.repository)
        if branch == MAIN:
            git("reset", "--quiet", "--hard", cwd=self.repository)
        return commit


def git_input(repository: Path, text: str, *arguments: str, date_s: int = NOON) -> str:
    """Run git with something to read, on a given day."""
    facts = {"NAME": "A Host", "EMAIL": "host@example.org", "DATE": f"@{date_s} +0000"}
    person = {f"GIT_{role}_{key}": value for role in ("AUTHOR", "COMMITTER") for key, value in facts.items()}
    environment = {**os.environ, **person}
    done = subprocess.run(
        ["git", *arguments], cwd=repository, input=text, capture_output=True, text=True, check=True, env=environment
    )
    return done.stdout


@pytest.fixture
def fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RollbackFixture:
    return RollbackFixture(tmp_path, monkeypatch)


def actions(report: RollbackReport) -> dict[str, str]:
    return {entry.branch: entry.action for entry in report.plan.branches}


def test_a_release_goes_back_to_the_one_before_in_new_commits(fixture: RollbackFixture) -> None:
    first = fixture.release(A, B, MAIN, number=1)
    fixture.release(A, B, MAIN, number=2)
    before = {branch: fixture.commits(branch) for branch in (A, B, MAIN)}
    report = fixture.back()
    assert trees(fixture.repository) == first
    assert [entry.branch for entry in report.plan.branches] == [A, B, MAIN], "variants first, main last"
    for outcome in report.outcomes:
        assert fixture.commits(outcome.plan.branch) == [outcome.commit, *before[outcome.plan.branch]]
    message = git("log", "-1", "--format=%B", MAIN, cwd=fixture.repository).strip()
    newest, oldest = before[MAIN]
    assert message.endswith(f"Rollback-of: {newest}\nRollback-to: {oldest}\nRollback-release: {oldest}")
    assert message.startswith(f"main: back to {oldest[:12]}, Publish main\n\n")
    assert git("status", "--porcelain", cwd=fixture.repository) == ""


def test_the_plan_says_what_changes(fixture: RollbackFixture) -> None:
    fixture.publish({MAIN: {"gone later": b"12345", "README.md": b"1"}})
    fixture.publish({MAIN: {"new": b"123", "README.md": b"22"}})
    (entry,) = fixture.back(dry_run=True).plan.branches
    changes = [[(change.name, change.size_bytes) for change in changes] for changes in
               (entry.added, entry.changed, entry.removed)]  # fmt: skip
    assert changes == [[("gone later", 5)], [("README.md", 1)], [("new", 3)]]


def test_done_twice_it_changes_nothing(fixture: RollbackFixture) -> None:
    fixture.release(A, MAIN, number=1)
    fixture.release(A, MAIN, number=2)
    fixture.back()
    before = heads(fixture.repository)
    assert actions(fixture.back()) == {A: "done", MAIN: "done"}
    assert heads(fixture.repository) == before


@pytest.mark.slow
def test_what_the_latest_release_left_alone_stays_and_what_it_made_is_named(fixture: RollbackFixture) -> None:
    fixture.release(A, MAIN, number=1)
    fixture.release(A, MAIN, number=2)
    second = fixture.publish({MAIN: {"README.md": b"3"}, B: {"README.md": b"3"}})
    report = fixture.back()
    assert actions(report) == {A: "done", B: "left alone", MAIN: "restore"}
    assert "it did not exist then" in "\n".join(fixture.lines)
    assert report.plan.unlisted == (B,)
    stream = io.StringIO()
    for dry_run in (True, False):
        print_report(replace(report, dry_run=dry_run), Console(file=stream, width=300))
    assert stream.getvalue().count(f"warning: {B} stays") == 2
    assert "card-branch-unlisted" in stream.getvalue()
    assert trees(fixture.repository) == {**fixture.releases[1], B: second[B]}


@pytest.mark.slow
def test_a_host_s_empty_first_commit_is_nothing_to_go_back_to(fixture: RollbackFixture) -> None:
    fixture.release(MAIN, number=1)
    tree = git_input(fixture.repository, "", "mktree").strip()
    empty = git_input(fixture.repository, "initial commit", "commit-tree", tree, date_s=NOON).strip()
    git("update-ref", f"refs/heads/{A}", empty, cwd=fixture.repository)
    fixture.release(A, MAIN, number=2)
    assert "nothing to go back to" in fixture.refused(A)
    assert "nothing to go back to" in fixture.refused(A, to=empty)
    assert actions(fixture.back()) == {A: "left alone", MAIN: "restore"}


def test_a_publish_that_did_not_reach_main_is_undone_and_no_more(fixture: RollbackFixture) -> None:
    fixture.release(A, B, MAIN, number=1)
    complete = fixture.release(A, B, MAIN, number=2)
    fixture.release(A, B, number=3)
    assert actions(fixture.back()) == {A: "restore", B: "restore", MAIN: "done"}
    assert trees(fixture.repository) == complete
    assert set(actions(fixture.back()).values()) == {"done"}
    fixture.back(again=True)
    assert trees(fixture.repository) == fixture.releases[0]


@pytest.mark.crash
@pytest.mark.parametrize("lives", [0, 1, 2])
def test_killed_and_run_again_it_finishes_the_same_rollback(fixture: RollbackFixture, lives: int) -> None:
    fixture.release(A, B, MAIN, number=1)
    fixture.release(A, B, MAIN, number=2)
    fixture.release(A, B, MAIN, number=3)
    fixture.target.lives = lives
    with pytest.raises(KilledError):
        fixture.back()
    fixture.back()
    assert trees(fixture.repository) == fixture.releases[1]
    assert [len(fixture.commits(branch)) for branch in (A, B, MAIN)] == [4, 4, 4], "one rollback each"


@pytest.mark.crash
@pytest.mark.parametrize("lives", [0, 1])
def test_undoing_an_unfinished_publish_can_be_killed_too(fixture: RollbackFixture, lives: int) -> None:
    fixture.release(A, B, MAIN, number=1)
    fixture.release(A, B, MAIN, number=2)
    fixture.release(A, B, number=3)
    fixture.target.lives = lives
    with pytest.raises(KilledError):
        fixture.back()
    fixture.back()
    fixture.back()
    assert trees(fixture.repository) == fixture.releases[1]


@pytest.mark.crash
def test_again_goes_one_further_and_killed_it_finishes_first(fixture: RollbackFixture) -> None:
    for number in (1, 2, 3, 4):
        fixture.release(A, B, MAIN, number=number)
    fixture.back()
    fixture.target.lives = 1
    with pytest.raises(KilledError):
        fixture.back(again=True)
    fixture.back(again=True)
    assert trees(fixture.repository) == fixture.releases[1], "the second run ended the first"
    fixture.back(again=True)
    assert trees(fixture.repository) == fixture.releases[0]
    assert "nothing to go back to" in fixture.refused(again=True)


@pytest.mark.slow
def test_a_release_after_a_rollback_goes_back_to_what_was_rolled_back_to(fixture: RollbackFixture) -> None:
    for number in (1, 2):
        fixture.release(A, MAIN, number=number)
    fixture.back()
    fixture.release(A, MAIN, number=3)
    fixture.back()
    assert trees(fixture.repository) == fixture.releases[0]
    assert "nothing to go back to" in fixture.refused(again=True), "release 2 was taken back, it is not before 3"


@pytest.mark.parametrize("seed", sampled(range(6), 4))
def test_whatever_was_published_the_state_before_comes_back(fixture: RollbackFixture, seed: int) -> None:
    dice = random.Random(seed)
    for number in range(1, 4):
        others = [branch for branch in (A, B) if dice.random() < 0.6]
        fixture.release(*others, MAIN, number=number)
    fixture.target.lives = dice.randrange(3)
    try:
        fixture.back()
    except KilledError:
        fixture.back()
    expected = {**fixture.releases[-1], **fixture.releases[-2]}
    assert trees(fixture.repository) == expected


def test_a_branch_by_name_goes_to_the_commit_before_its_head(fixture: RollbackFixture) -> None:
    for number in (1, 2, 3):
        fixture.release(A, B, MAIN, number=number)
    fixture.back(A)
    assert trees(fixture.repository) == {**fixture.releases[2], A: fixture.releases[1][A]}
    assert actions(fixture.back(A)) == {A: "done"}
    assert "--again goes further back" in fixture.lines[0]
    fixture.back(A, again=True)
    assert trees(fixture.repository)[A] == fixture.releases[0][A]
    assert "nothing to go back to" in fixture.refused(A, again=True)
    fixture.back(A, B)
    assert trees(fixture.repository) == {**fixture.releases[2], A: fixture.releases[0][A], B: fixture.releases[1][B]}


def test_a_first_commit_has_nothing_before_it(fixture: RollbackFixture) -> None:
    fixture.release(A, MAIN, number=1)
    assert f"{A} has nothing to go back to" in fixture.refused(A)
    assert "main has nothing to go back to" in fixture.refused()


def test_any_commit_can_be_named(fixture: RollbackFixture) -> None:
    for number in (1, 2, 3):
        fixture.release(A, B, MAIN, number=number)
    commits = {branch: fixture.commits(branch) for branch in (A, MAIN)}
    fixture.back(to=commits[MAIN][2][:10])
    assert trees(fixture.repository) == fixture.releases[0]
    fixture.back(to=commits[MAIN][0])
    assert trees(fixture.repository) == fixture.releases[2], "forward, too"
    fixture.back(A, to=commits[A][1])
    assert trees(fixture.repository) == {**fixture.releases[2], A: fixture.releases[1][A]}
    assert "is not one commit of main" in fixture.refused(to=commits[A][0])
    assert "7 to 40 hex digits" in fixture.refused(to="HEAD~1")
    assert "is for one branch" in fixture.refused(A, B, to=commits[A][1])
    assert "is for one branch" in fixture.refused(A, B, again=True)
    assert "contradict" in fixture.refused(A, again=True, to=commits[A][1])
    assert f"the branches are {A}, {MAIN}, {B}" in fixture.refused("tree-bits")


def test_what_somebody_else_made_is_left_alone_unless_named(fixture: RollbackFixture) -> None:
    fixture.release(A, B, MAIN, number=1)
    fixture.release(A, B, MAIN, number=2)
    edited = fixture.somebody_commits(A, heads(fixture.repository)[A], "Rollback-to: nonsense")
    report = fixture.back()
    assert actions(report) == {A: "left alone", B: "restore", MAIN: "restore"}
    assert f"A Person <person@example.org> made its head: --branch {A} puts it back" in fixture.lines[0]
    assert heads(fixture.repository)[A] == edited
    fixture.back(A)
    assert trees(fixture.repository)[A] == fixture.releases[1][A]


@pytest.mark.slow
def test_an_edited_card_is_undone_by_name_before_the_release(fixture: RollbackFixture) -> None:
    fixture.release(A, MAIN, number=1)
    fixture.release(A, MAIN, number=2)
    fixture.somebody_commits(MAIN, heads(fixture.repository)[MAIN])
    text = fixture.refused()
    assert "A Person <person@example.org> made the head of main, not packager" in text
    assert "--branch main" in text
    fixture.back(MAIN)
    assert trees(fixture.repository) == fixture.releases[1]
    fixture.back()
    assert trees(fixture.repository) == fixture.releases[0]


@pytest.mark.slow
def test_variants_follow_a_main_that_was_put_back_by_name(fixture: RollbackFixture) -> None:
    for number in (1, 2, 3):
        fixture.release(A, MAIN, number=number)
    fixture.back(MAIN)
    fixture.back()
    assert trees(fixture.repository) == fixture.releases[1]


def test_a_head_that_moves_meanwhile_is_somebody_s_work(fixture: RollbackFixture) -> None:
    fixture.release(A, MAIN, number=1)
    fixture.release(A, MAIN, number=2)

    def meanwhile(_: RollbackPlan) -> None:
        fixture.somebody_commits(A, heads(fixture.repository)[A])

    with pytest.raises(HeadMovedError) as caught:
        rollback(fixture.target, RollbackRequest(), fixture.lines.append, confirm=meanwhile)
    assert f"{A} moved while it was being put back" in str(caught.value)
    assert "done are not put back twice" in caught.value.hint
    assert trees(fixture.repository)[MAIN] == fixture.releases[1][MAIN]


def test_a_dry_run_and_a_no_write_nothing(fixture: RollbackFixture) -> None:
    fixture.release(MAIN, number=1)
    fixture.release(MAIN, number=2)
    before = heads(fixture.repository)
    shown: list[RollbackPlan] = []

    def no(_: RollbackPlan) -> None:
        assert shown, "the plan comes first"
        raise KilledError

    assert actions(fixture.back(dry_run=True)) == {MAIN: "restore"}
    with pytest.raises(KilledError):
        rollback(fixture.target, RollbackRequest(), fixture.lines.append, show_plan=shown.append, confirm=no)
    assert heads(fixture.repository) == before


def test_what_is_stored_is_read_again_and_compared(fixture: RollbackFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    fixture.release(MAIN, number=1)
    fixture.release(MAIN, number=2)
    known = set(fixture.commits(MAIN))
    read = Killable.read_back

    def forgetful(self: Killable, commit: str) -> Mapping[str, StoredFile]:
        files = dict(read(self, commit))
        if commit not in known:
            files["w.bin"] = replace(files["w.bin"], sha256="0" * 64)
        return files

    monkeypatch.setattr(Killable, "read_back", forgetful)
    with pytest.raises(PublishError) as caught:
        fixture.back()
    assert "does not hold the files of" in str(caught.value)
    assert caught.value.why.startswith("w.bin; putting back the files of ")


def test_nothing_published_is_an_error_and_makes_no_repository(fixture: RollbackFixture) -> None:
    with pytest.raises(PublishError, match="nothing is published here"):
        fixture.back()
    assert not fixture.repository.exists()


@pytest.mark.parametrize("later_s", sampled([0, -7200], -7200))
def test_releases_that_their_times_do_not_tell_apart_are_not_mixed(fixture: RollbackFixture, later_s: int) -> None:
    fixture.release(A, MAIN, number=1)
    fixture.now += later_s - 3600  # a publisher whose clock is wrong
    fixture.release(A, MAIN, number=2)
    fixture.now += 7200
    text = fixture.refused()
    assert "the times of the commits do not show" in text
    assert "--branch NAME" in text
    fixture.back(A, MAIN)
    assert trees(fixture.repository) == fixture.releases[0]


@pytest.mark.slow
def test_a_head_that_only_says_that_it_is_back_is_put_back(fixture: RollbackFixture) -> None:
    fixture.release(A, MAIN, number=1)
    fixture.release(A, MAIN, number=2)
    first = fixture.commits(A)[1]
    fixture.now += 3600
    fixture.target.restore(A, heads(fixture.repository)[A], parent=heads(fixture.repository)[A],
                         message=f"{A}: back\n\nRollback-to: {first}")  # fmt: skip
    assert trees(fixture.repository)[A] == fixture.releases[1][A]
    assert actions(fixture.back(A)) == {A: "restore"}
    assert trees(fixture.repository)[A] == fixture.releases[0][A]


def test_a_release_does_not_go_back_to_a_commit_without_files(fixture: RollbackFixture) -> None:
    fixture.release(MAIN, number=1)
    empty = git_input(fixture.repository, "", "mktree").strip()
    commit = git_input(fixture.repository, "initial commit", "commit-tree", empty, date_s=NOON).strip()
    again = git("commit-tree", f"{MAIN}^{{tree}}", "-p", commit, "-m", "x", cwd=fixture.repository).strip()
    git("update-ref", f"refs/heads/{MAIN}", again, cwd=fixture.repository)
    assert "main has nothing to go back to" in fixture.refused(to=commit)


def test_what_others_wrote_is_shown_without_what_a_terminal_obeys(fixture: RollbackFixture) -> None:
    odd = "\x1b[2J\x9b2J\u202e Rollback-to: nonsense"
    fixture.release(A, MAIN, number=1)
    edited = fixture.somebody_commits(A, heads(fixture.repository)[A], odd)
    fixture.somebody_commits(MAIN, heads(fixture.repository)[MAIN], odd)
    texts = [fixture.refused(), fixture.refused(A, to="abcdefabcdef")]
    fixture.release(A, number=2)
    stream = io.StringIO()
    print_plan(fixture.back(A).plan, Console(file=stream, width=200))
    assert trees(fixture.repository)[A] == git("rev-parse", f"{edited}^{{tree}}", cwd=fixture.repository).strip()
    texts += [stream.getvalue(), *fixture.lines, git("log", "-1", "--format=%B", A, cwd=fixture.repository)]
    for text in texts:
        assert all(line.isprintable() for line in text.splitlines()), text
    assert all("\\x1b[2J\\x9b2J\\u202e" in text for text in (texts[0], texts[1], stream.getvalue()))


def record(letter: str, *, to: str = "", author: str = "", time_s: int = 0) -> CommitRecord:
    message = f"title\n\nRollback-to: {to * 40}" if to else "title"
    return CommitRecord(commit=letter * 40, author=author, title="title", message=message, time_s=time_s)


def test_a_trailer_counts_only_if_it_is_ours_and_leads_back() -> None:
    c, b, a = record("c", to="a"), record("b"), record("a")
    assert BranchHistory(MAIN, [c, b, a]).shown is a
    for odd in (record("c", to="d"), record("c", to="c"), record("c", to="a", author="Mallory <m@example.org>")):
        assert BranchHistory(MAIN, [odd, b, a]).shown is odd
    looping = [record("c", to="b"), record("b", to="c"), a]
    assert BranchHistory(MAIN, looping).shown is looping[1], "a rollback never leads to a younger commit"
    assert BranchHistory(MAIN, [record("d"), c, b, a]).before(record("d")) is a


def test_the_words(fixture: RollbackFixture, update_golden: bool) -> None:
    fixture.release(A, B, MAIN, number=1)
    fixture.publish({A: {"README.md": b"2", "more.json": b"{}"}, MAIN: {"README.md": b"2"}})
    stream = io.StringIO()
    console = Console(file=stream, width=200)
    report = fixture.back(dry_run=True)
    print_plan(replace(report.plan, where="/srv/hub/models/somebody/Model-GPTQ"), console)
    report = fixture.back()
    print_report(replace(report, plan=replace(report.plan, where="somebody/Model-GPTQ")), console)
    stream.write("\n".join(line.rpartition(",")[0] or line for line in fixture.lines) + "\n")
    text = "".join(f"{line.rstrip()}\n" for line in stream.getvalue().splitlines())
    check_golden("cli/rollback.txt", text, update_golden)


def packager(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], prog_name="packager")
    return result.exit_code, result.stdout, result.stderr


def test_the_command_asks_where_others_would_see_it(fixture: RollbackFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    fixture.release(A, MAIN, number=1)
    fixture.release(A, MAIN, number=2)
    monkeypatch.setattr("packager.publish.targets.resolve_target.resolve_target", lambda *_: fixture.target)
    fixture.target.public = True
    code, out, err = packager("rollback", fixture.repository)
    assert (code, out) == (PublishError.exit_code, "")
    assert "To put back in" in err
    assert "--yes" in err
    code, out, _ = packager("rollback", fixture.repository, "--dry-run", "--format", "json")
    assert (code, json.loads(out)["dry_run"]) == (0, True)
    assert trees(fixture.repository) == fixture.releases[1]
    code, out, _ = packager("rollback", fixture.repository, "--yes", "--format", "json")
    result = json.loads(out)
    assert code == 0
    assert [entry["action"] for entry in result["branches"]] == ["restore", "restore"]
    assert {entry["branch"]: entry["commit"] for entry in result["branches"]} == heads(fixture.repository)
    assert trees(fixture.repository) == fixture.releases[0]
    code, out, _ = packager("rollback", fixture.repository)
    assert code == 0, "nothing changes, so nobody need be asked"
    assert "nothing to do" in out


def test_json_has_what_the_table_has(fixture: RollbackFixture) -> None:
    fixture.release(MAIN, number=1)
    fixture.release(MAIN, number=2)
    result = report_json(fixture.back())
    result = json.loads(json.dumps(result))
    (entry,) = result["branches"]
    assert entry["changed"] == [{"name": "README.md", "size_bytes": 7}, {"name": "w.bin", "size_bytes": 1}]
    assert set(result) == {"where", "release", "branches", "unlisted", "signs", "warnings", "dry_run", "notes"}


def test_a_tag_names_the_release_to_go_back_to(fixture: RollbackFixture) -> None:
    fixture.release(A, MAIN, number=1)
    fixture.target.tag("v1.0", {MAIN: fixture.commits(MAIN)[0]}, "notes")
    fixture.release(A, MAIN, number=2)
    fixture.release(A, MAIN, number=3)
    assert actions(fixture.back(to="v1.0")) == {A: "restore", MAIN: "restore"}
    assert trees(fixture.repository) == fixture.releases[0]
    assert "'v1.1' is not one commit of main" in fixture.refused(to="v1.1")
    assert "nor a tag of this branch" in fixture.refused(A, to="v1.0")
    for name in ("../x", "-x", "v1.0^{}", "HEAD", "a b", "main..v1.0"):
        assert "is not one commit of main" in fixture.refused(to=name)
    assert not fixture.back(dry_run=True).plan.unlisted
