"""Publishing to a local repository, read back with git itself."""

import json
import os
import subprocess
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from filelock import FileLock
from rich.console import Console

from packager.cli.publish_view import print_publish_plan as print_plan
from packager.cli.publish_view import print_publish_report as print_report
from packager.cli.publish_view import publish_plan_json as plan_json
from packager.cli.publish_view import publish_report_json as report_json
from packager.errors import MachineError, PackagerError, PublishError, StateError
from packager.publish.branches import BranchContent, PublishReport, check_folders, publish_branches
from packager.publish.plan import plan_publish
from packager.publish.targets import (
    NO_FILES,
    BranchState,
    CommitRecord,
    LocalFile,
    StoredFile,
    file_name_problem,
    read_local_file,
)
from packager.publish.targets.git_process import AUTHOR_EMAIL, AUTHOR_NAME
from packager.publish.targets.git_view import PUSHES
from packager.publish.targets.local import LocalTarget
from packager.receipt import FileRecord
from tests.publish_fixtures import (
    REPOSITORY,
    SHORT_WAITS,
    VARIANT,
    describe,
    files_in,
    git,
    heads,
    hub_folder,
    leftovers,
    make_content,
    shim,
    trees,
)
from tests.samples import sampled

ODD_NAMES = {
    "README.md": b"line\r\nends\nstay\r",
    "-rf": b"a leading dash",
    "a name with  spaces": b"",
    '"quoted"': b"quotes",
    "modèle/日本語/🦙.json": b"{}",
    ".gitattributes": b"*.md text eol=crlf\n*.bin filter=lfs diff=lfs merge=lfs -text\n",
    ".gitignore": b"*\n",
    "w.bin": bytes(range(256)) * 40,
}


class LocalFixture:
    """A target below a scratch folder, and two branches to publish."""

    def __init__(self, tmp_path: Path) -> None:
        self.dist = tmp_path / "dist"
        self.root = tmp_path / "hub"
        self.repository = hub_folder(self.root)
        self.target = LocalTarget(self.root, REPOSITORY, waits=SHORT_WAITS)
        self.contents = [
            make_content(self.dist, "main", {"README.md": b"card\n", "w.bin": b"weights"}),
            make_content(self.dist, VARIANT, {"README.md": b"card\n", "w.bin": b"other", "sub/x.json": b"{}"}),
        ]
        self.lines: list[str] = []

    def publish(self, contents: Sequence[BranchContent] | None = None, *, dry_run: bool = False) -> PublishReport:
        self.lines.clear()
        return publish_branches(contents or self.contents, self.target, self.lines.append, dry_run=dry_run)

    def refused(self, kind: type[PackagerError], contents: Sequence[BranchContent] | None = None) -> str:
        """Publish, and return the error's text; the repository's branches have not moved."""
        before = heads(self.repository) if (self.repository / ".git").is_dir() else {}
        with pytest.raises(kind) as caught:
            self.publish(contents)
        assert (heads(self.repository) if (self.repository / ".git").is_dir() else {}) == before
        return str(caught.value)


@pytest.fixture
def fixture(tmp_path: Path) -> LocalFixture:
    return LocalFixture(tmp_path)


def assert_published(contents: Sequence[BranchContent], repository: Path, scratch: Path) -> None:
    """Clone every branch alone and compare it with its folder, file by file."""
    for content in contents:
        clone = scratch / f"clone of {content.branch}"
        git("clone", "--quiet", "--branch", content.branch, "--single-branch", str(repository), str(clone))
        attributes = clone / ".git" / "info" / "attributes"
        attributes.parent.mkdir(exist_ok=True)
        attributes.write_text("* -text -filter\n")
        git("rm", "--quiet", "--cached", "-r", ".", cwd=clone)
        git("reset", "--quiet", "--hard", cwd=clone)
        assert files_in(clone) == {name: (content.folder / name).read_bytes() for name in content.files}


def test_every_branch_holds_exactly_its_files(fixture: LocalFixture, tmp_path: Path) -> None:
    report = fixture.publish()
    assert [outcome.plan.action for outcome in report.outcomes] == ["create", "create"]
    assert {outcome.plan.branch: outcome.commit for outcome in report.outcomes} == heads(fixture.repository)
    assert_published(fixture.contents, fixture.repository, tmp_path)
    histories = git("rev-list", "--all", "--parents", cwd=fixture.repository).splitlines()
    assert sorted(histories) == sorted(heads(fixture.repository).values()), "each branch is one commit without a parent"


def test_main_comes_last_and_is_checked_out(fixture: LocalFixture) -> None:
    report = fixture.publish()
    assert [outcome.plan.branch for outcome in report.outcomes] == [VARIANT, "main"]
    assert files_in(fixture.repository) == {"README.md": b"card\n", "w.bin": b"weights"}
    assert git("status", "--porcelain", "--branch", cwd=fixture.repository) == "## main\n"


def test_a_second_publish_changes_nothing(fixture: LocalFixture) -> None:
    fixture.publish()
    before = heads(fixture.repository), {path: path.stat().st_mtime_ns for path in fixture.repository.rglob("*")}
    report = fixture.publish()
    assert [outcome.plan.action for outcome in report.outcomes] == ["unchanged", "unchanged"]
    assert {outcome.plan.branch: outcome.commit for outcome in report.outcomes} == before[0]
    assert heads(fixture.repository) == before[0]
    folders = {fixture.repository / ".git"}
    after = {path: path.stat().st_mtime_ns for path in fixture.repository.rglob("*")}
    assert {path for path in after if after[path] != before[1].get(path)} <= folders
    assert fixture.lines[1:] == [f"{VARIANT}: unchanged", "main: unchanged"]


def test_an_update_is_one_commit_on_the_branch_it_concerns(fixture: LocalFixture, tmp_path: Path) -> None:
    fixture.publish()
    before = heads(fixture.repository)
    (fixture.dist / VARIANT / "sub" / "x.json").unlink()
    (fixture.dist / VARIANT / "w.bin").write_bytes(b"better")
    (fixture.dist / VARIANT / "new").write_bytes(b"n" * 10)
    contents = [fixture.contents[0], describe(fixture.dist / VARIANT, VARIANT)]
    report = fixture.publish(contents)
    plan = report.outcomes[0].plan
    assert (plan.action, report.outcomes[1].plan.action) == ("update", "unchanged")
    assert [(change.name, change.size_bytes) for change in plan.added] == [("new", 10)]
    assert [(change.name, change.size_bytes) for change in plan.changed] == [("w.bin", 6)]
    assert [(change.name, change.size_bytes) for change in plan.removed] == [("sub/x.json", 2)]
    assert plan.written_bytes == 16
    after = heads(fixture.repository)
    assert after["main"] == before["main"]
    assert git("rev-parse", f"{VARIANT}^", cwd=fixture.repository).strip() == before[VARIANT]
    assert_published(contents, fixture.repository, tmp_path)


def test_main_can_be_updated_alone(fixture: LocalFixture) -> None:
    fixture.publish()
    (fixture.dist / "main" / "README.md").write_bytes(b"a better card\n")
    report = fixture.publish([describe(fixture.dist / "main", "main")])
    assert report.plan.left_alone == (VARIANT,)
    assert (fixture.repository / "README.md").read_bytes() == b"a better card\n"
    assert git("status", "--porcelain", cwd=fixture.repository) == ""


def test_a_dry_run_writes_nothing(fixture: LocalFixture) -> None:
    report = fixture.publish(dry_run=True)
    assert report.dry_run
    assert [outcome.plan.action for outcome in report.outcomes] == ["create", "create"]
    assert fixture.lines == [f"{fixture.repository}: 2 create; 24 B to upload"]
    assert not fixture.root.exists()
    fixture.publish()
    before = heads(fixture.repository)
    (fixture.dist / "main" / "README.md").write_bytes(b"edited\n")
    report = fixture.publish([describe(fixture.dist / "main", "main"), fixture.contents[1]], dry_run=True)
    assert [outcome.plan.action for outcome in report.outcomes] == ["unchanged", "update"]
    assert heads(fixture.repository) == before


def test_odd_names_and_bytes_arrive_unchanged(fixture: LocalFixture, tmp_path: Path) -> None:
    contents = [make_content(fixture.dist, "odd", ODD_NAMES), make_content(fixture.dist / "again", "main", ODD_NAMES)]
    fixture.publish(contents)
    assert_published(contents, fixture.repository, tmp_path)
    assert files_in(fixture.repository) == ODD_NAMES
    assert git("status", "--porcelain", cwd=fixture.repository) == ""
    assert [outcome.plan.action for outcome in fixture.publish(contents).outcomes] == ["unchanged", "unchanged"]


@pytest.mark.parametrize(
    "name", ["a\nb", "back\\slash", "a\tb", ".git/config", "sub/.GIT/x", "git~1", "\udcff", "x/.tmp-y"]
)
def test_names_that_git_would_lose_are_refused(name: str) -> None:
    assert file_name_problem(name)


@pytest.mark.parametrize("name", ["../x", "/x", "a//b", "a/./b", "", "a/"])
def test_names_outside_the_folder_are_refused(name: str) -> None:
    assert "relative" in file_name_problem(name)


def test_every_name_problem_is_reported_before_anything_is_read(fixture: LocalFixture) -> None:
    record = FileRecord(size_bytes=1, sha256="0" * 64)
    bad = BranchContent(branch="a/b", folder=fixture.dist, files={"x\ny": record, "../z": record}, message="")
    text = fixture.refused(
        PublishError, [bad, fixture.contents[0], fixture.contents[0], replace(bad, branch="x", files={})]
    )
    for part in ("'a/b': a branch has", "'x\\ny'", "'../z'", "'main': given twice", "'x': has no files"):
        assert part in text


def test_an_edited_folder_is_not_published(fixture: LocalFixture) -> None:
    (fixture.dist / "main" / "w.bin").write_bytes(b"WEIGHTS")
    (fixture.dist / VARIANT / "README.md").write_bytes(b"longer card\n")
    (fixture.dist / VARIANT / "w.bin").unlink()
    (fixture.dist / VARIANT / "extra").write_bytes(b"")
    text = fixture.refused(StateError)
    assert f"{fixture.dist / 'main' / 'w.bin'}: changed: sha256" in text
    assert f"{fixture.dist / VARIANT / 'README.md'}: changed: 12 bytes instead of 5" in text
    assert f"{fixture.dist / VARIANT / 'w.bin'}: missing" in text
    assert f"{fixture.dist / VARIANT / 'extra'}: not in the manifest" in text
    assert "hint: build the branch again" in text
    assert not fixture.root.exists()


def test_a_file_that_changes_while_it_is_published_moves_no_branch(fixture: LocalFixture) -> None:
    fixture.publish()
    files = dict(check_folders(fixture.contents)["main"])
    (fixture.dist / "main" / "w.bin").write_bytes(b"changed")
    before = heads(fixture.repository)
    stale = replace(files["w.bin"], blob_id="1" * 40)
    with pytest.raises(PublishError, match="changed while it was being published"):
        fixture.target.commit("main", {**files, "w.bin": stale}, parent=before["main"], message="")
    assert heads(fixture.repository) == before


def test_main_is_required(fixture: LocalFixture) -> None:
    assert "main is not among the branches" in fixture.refused(PublishError, fixture.contents[1:])
    assert not fixture.root.exists()
    fixture.publish()
    assert fixture.publish(fixture.contents[1:]).outcomes[0].plan.action == "unchanged"


@pytest.fixture
def hostile_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user whose settings would change, sign or refuse every commit, publishing from inside one of their hooks."""
    home = tmp_path / "home"
    hooks = home / "template" / "hooks"
    hooks.mkdir(parents=True)
    ran = home / "a hook ran"
    for name in (
        "pre-commit",
        "commit-msg",
        "post-commit",
        "reference-transaction",
        "post-checkout",
        "post-index-change",
    ):
        (hooks / name).write_text(f"#!/bin/sh\ntouch '{ran}'\nexit 1\n")
        (hooks / name).chmod(0o755)
    settings = f"""
        [user] name = Real Name
        [user] email = real@host.example
        [user] signingKey = DEADBEEF
        [commit] gpgSign = true
        [gpg] program = false
        [core] autocrlf = true
        [core] hooksPath = {hooks}
        [core] attributesFile = {home / "attributes"}
        [core] logAllRefUpdates = false
        [init] templateDir = {home / "template"}
        [init] defaultBranch = trunk
        [init] defaultObjectFormat = sha256
        [filter "upper"] clean = tr a-z A-Z
        [filter "upper"] smudge = tr a-z A-Z
        [status] showUntrackedFiles = no
        [i18n] commitEncoding = latin1
    """
    (home / ".gitconfig").write_text(settings)
    (home / "attributes").write_text("* text eol=crlf filter=upper ident\n")
    elsewhere = tmp_path / "elsewhere"
    git("init", "--quiet", str(elsewhere))
    for key, value in {
        "HOME": str(home),
        "XDG_CONFIG_HOME": str(home),
        "GIT_CONFIG_GLOBAL": str(home / ".gitconfig"),
        "GIT_CONFIG_SYSTEM": str(home / ".gitconfig"),
        "GIT_CONFIG_PARAMETERS": "'core.autocrlf=true' 'core.bare=true'",
        "GIT_DIR": str(elsewhere / ".git"),
        "GIT_WORK_TREE": str(elsewhere),
        "GIT_INDEX_FILE": str(elsewhere / "index"),
        "GIT_OBJECT_DIRECTORY": str(elsewhere / ".git" / "objects"),
        "GIT_TEMPLATE_DIR": str(home / "template"),
        "GIT_AUTHOR_NAME": "Real Name",
        "GIT_COMMITTER_EMAIL": "real@host.example",
        "GIT_AUTHOR_DATE": "2001-01-01T00:00:00 +0530",
        "GIT_DEFAULT_HASH": "sha256",
        "TZ": "Asia/Kolkata",
    }.items():
        monkeypatch.setenv(key, value)
    return ran


def test_the_users_settings_have_no_influence(fixture: LocalFixture, tmp_path: Path, hostile_user: Path) -> None:
    contents = [make_content(fixture.dist, "odd", ODD_NAMES), make_content(fixture.dist / "again", "main", ODD_NAMES)]
    fixture.publish(contents)
    (contents[1].folder / "README.md").write_bytes(b"$Id$ second\r\n")
    contents[1] = describe(contents[1].folder, "main")
    fixture.publish(contents)
    assert files_in(fixture.repository) == {**ODD_NAMES, "README.md": b"$Id$ second\r\n"}
    assert_published(contents, fixture.repository, tmp_path)
    facts = git("log", "--all", "--format=%an|%ae|%cn|%ce|%G?|%ai|%ci|%e", cwd=fixture.repository).splitlines()
    assert len(facts) == 3
    for line in facts:
        *names, author_date, commit_date, encoding = line.split("|")
        assert names == [AUTHOR_NAME, AUTHOR_EMAIL, AUTHOR_NAME, AUTHOR_EMAIL, "N"]
        assert author_date == commit_date
        assert author_date.endswith("+0000")
        assert not author_date.startswith("2001")
        assert encoding == ""
    assert not hostile_user.exists(), "a hook ran"
    assert not (fixture.repository / ".git" / "hooks").exists()
    assert "Real" not in (fixture.repository / ".git" / "logs" / "refs" / "heads" / "main").read_text()
    assert trees(tmp_path / "elsewhere") == {}


def test_the_users_own_git_finds_the_worktree_clean(fixture: LocalFixture, hostile_user: Path) -> None:
    fixture.publish([make_content(fixture.dist / "again", "main", ODD_NAMES)])
    environment = {key: value for key, value in os.environ.items() if key in ("HOME", "PATH")}
    command = ["git", "-C", str(fixture.repository), "status", "--porcelain", "--untracked-files=all"]
    assert subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout == ""


def test_an_edited_worktree_is_not_overwritten(fixture: LocalFixture) -> None:
    fixture.publish()
    (fixture.repository / "README.md").write_bytes(b"a person's words\n")
    (fixture.repository / "w.bin").unlink()
    (fixture.repository / "notes.txt").write_bytes(b"mine\n")
    (fixture.dist / "main" / "README.md").write_bytes(b"new card\n")
    contents = [describe(fixture.dist / "main", "main"), fixture.contents[1]]
    text = fixture.refused(StateError, contents)
    for part in ("README.md (edited)", "w.bin (deleted)", "notes.txt (untracked)", "stash --include-untracked"):
        assert part in text
    assert (fixture.repository / "README.md").read_bytes() == b"a person's words\n"
    git("stash", "--include-untracked", cwd=fixture.repository)
    assert fixture.publish(contents).outcomes[-1].plan.action == "update"
    assert git("show", "stash@{0}:README.md", cwd=fixture.repository) == "a person's words\n"
    assert git("show", "stash@{0}^3:notes.txt", cwd=fixture.repository) == "mine\n"


def test_staged_edits_are_not_overwritten(fixture: LocalFixture) -> None:
    fixture.publish()
    (fixture.repository / "README.md").write_bytes(b"staged\n")
    git("add", "README.md", cwd=fixture.repository)
    (fixture.repository / "README.md").write_bytes(b"card\n")
    assert "README.md (edited)" in fixture.refused(StateError)


def test_a_commit_of_another_person_stays_in_the_history(fixture: LocalFixture, tmp_path: Path) -> None:
    fixture.publish()
    (fixture.repository / "README.md").write_bytes(b"a person's words\n")
    git("commit", "--quiet", "--all", "--message", "edit", cwd=fixture.repository)
    theirs = heads(fixture.repository)["main"]
    report = fixture.publish()
    plan = report.outcomes[-1].plan
    assert (plan.action, plan.foreign_author) == ("update", "A Person <person@example.org>")
    assert git("rev-parse", "main^", cwd=fixture.repository).strip() == theirs
    assert (fixture.repository / "README.md").read_bytes() == b"card\n"
    assert_published(fixture.contents, fixture.repository, tmp_path)
    console = Console(width=160, record=True)
    print_plan(report.plan, console)
    assert f"on top of {theirs[:12]} by A Person <person@example.org>" in console.export_text()


def pushed(fixture: LocalFixture, folder: Path, branch: str, words: bytes) -> str:
    """Clone, edit and push as a person does; return what git says of a refusal, "" if the push is taken."""
    git("clone", "--quiet", "--branch", branch, str(fixture.repository), str(folder))
    (folder / "README.md").write_bytes(words)
    git("commit", "--quiet", "--all", "--message", "words", cwd=folder)
    try:
        git("push", "--quiet", cwd=folder)
    except AssertionError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("by_an_earlier_version", [False, True])
def test_a_person_pushes_to_any_branch(fixture: LocalFixture, tmp_path: Path, by_an_earlier_version: bool) -> None:
    fixture.publish()
    config = fixture.repository / ".git" / "config"
    if by_an_earlier_version:
        config.write_bytes(config.read_bytes().removesuffix(PUSHES))
        assert "branch is currently checked out" in pushed(fixture, tmp_path / "refused", "main", b"words\n")
        assert fixture.publish().notes == ("a push to main changes its files from now on; it was refused before",)
    assert fixture.publish().notes == ()
    for branch in ("main", VARIANT):
        assert not pushed(fixture, tmp_path / branch, branch, f"of {branch}\n".encode())
        assert git("show", f"{branch}:README.md", cwd=fixture.repository) == f"of {branch}\n"
    assert (fixture.repository / "README.md").read_bytes() == b"of main\n"
    assert git("status", "--porcelain", cwd=fixture.repository) == ""
    theirs = heads(fixture.repository)
    report = fixture.publish()
    assert {outcome.plan.foreign_author for outcome in report.outcomes} == {"A Person <person@example.org>"}
    assert git("rev-parse", "main^", f"{VARIANT}^", cwd=fixture.repository).split() == [theirs["main"], theirs[VARIANT]]
    assert_published(fixture.contents, fixture.repository, tmp_path / "published")
    assert git("status", "--porcelain", cwd=fixture.repository) == ""


def test_a_setting_of_the_owner_stays(fixture: LocalFixture) -> None:
    fixture.publish()
    config = fixture.repository / ".git" / "config"
    config.write_bytes(config.read_bytes().replace(b"updateInstead", b"refuse"))
    before = config.read_bytes()
    fixture.publish()
    assert config.read_bytes() == before
    git("init", "--quiet", str(fixture.root / "own"))
    own = (fixture.root / "own" / ".git" / "config").read_bytes()
    config.write_bytes(own)
    fixture.publish()
    assert config.read_bytes() == own, "nobody asked for a change of another repository's configuration"


@pytest.mark.parametrize("killed", [True, False])
def test_a_push_replaces_no_file_of_a_worktree_that_is_not_its_head(
    fixture: LocalFixture, tmp_path: Path, killed: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the files of a person, nor a checkout that a killed publish left between two commits."""
    fixture.publish()
    if killed:
        (fixture.dist / "main" / "README.md").write_bytes(b"new card\n")
        fixture.contents[0] = describe(fixture.dist / "main", "main")

        def die(*_: object) -> None:
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(LocalTarget, "_check_out", die)
            with pytest.raises(KeyboardInterrupt):
                fixture.publish()
    else:
        (fixture.repository / "w.bin").write_bytes(b"mine")
    before, files = heads(fixture.repository), files_in(fixture.repository)
    assert "Working directory has" in pushed(fixture, tmp_path / "clone", "main", b"words\n")
    assert (heads(fixture.repository), files_in(fixture.repository)) == (before, files)
    if killed:
        assert any("finished its checkout" in note for note in fixture.publish().notes)
        assert (fixture.repository / "README.md").read_bytes() == b"new card\n"


def test_executables_and_links_are_replaced_by_plain_files(fixture: LocalFixture) -> None:
    fixture.publish()
    git("update-index", "--chmod=+x", "README.md", cwd=fixture.repository)
    blob = git("rev-parse", "main:w.bin", cwd=fixture.repository).strip()
    git("update-index", "--cacheinfo", f"120000,{blob},w.bin", cwd=fixture.repository)
    git("commit", "--quiet", "--message", "modes", cwd=fixture.repository)
    git("reset", "--quiet", "--hard", cwd=fixture.repository)
    report = fixture.publish()
    assert [change.name for change in report.outcomes[-1].plan.changed] == ["README.md", "w.bin"]
    modes = {line.split()[0] for line in git("ls-tree", "-r", "main", cwd=fixture.repository).splitlines()}
    assert modes == {"100644"}
    assert not (fixture.repository / "w.bin").is_symlink()
    assert git("status", "--porcelain", cwd=fixture.repository) == ""


def test_another_branch_in_the_worktree_is_left_there(fixture: LocalFixture) -> None:
    fixture.publish()
    git("switch", "--quiet", VARIANT, cwd=fixture.repository)
    text = fixture.refused(PublishError)
    assert "does not have main checked out" in text
    assert f"git -C '{fixture.repository}' switch main" in text
    assert (fixture.repository / "sub" / "x.json").exists()


def test_a_branch_does_not_move_under_a_linked_worktree(fixture: LocalFixture, tmp_path: Path) -> None:
    fixture.publish()
    git("worktree", "add", "--quiet", str(tmp_path / "linked"), VARIANT, cwd=fixture.repository)
    assert fixture.publish().outcomes[0].plan.action == "unchanged"
    (fixture.dist / VARIANT / "new").write_bytes(b"n")
    contents = [fixture.contents[0], describe(fixture.dist / VARIANT, VARIANT)]
    text = fixture.refused(PublishError, contents)
    assert str(tmp_path / "linked") in text
    git("worktree", "remove", str(tmp_path / "linked"), cwd=fixture.repository)
    assert fixture.publish(contents).outcomes[0].plan.action == "update"


def test_a_branch_that_moves_during_a_publish_is_not_overwritten(fixture: LocalFixture) -> None:
    fixture.publish()
    observed = heads(fixture.repository)
    other = git("commit-tree", f"{VARIANT}^{{tree}}", "-m", "elsewhere", cwd=fixture.repository).strip()
    git("update-ref", f"refs/heads/{VARIANT}", other, cwd=fixture.repository)
    files = check_folders(fixture.contents)[VARIANT]
    with pytest.raises(PublishError, match=f"{VARIANT} moved"):
        fixture.target.commit(VARIANT, files, parent=observed[VARIANT], message="x")
    with pytest.raises(PublishError, match=f"{VARIANT} moved"):
        fixture.target.commit(VARIANT, files, parent=None, message="x")
    assert heads(fixture.repository)[VARIANT] == other


def test_foreign_files_at_the_path_are_not_touched(fixture: LocalFixture) -> None:
    fixture.repository.mkdir(parents=True)
    (fixture.repository / "thesis.tex").write_text("years of work")
    assert "holds something that is not a git repository" in fixture.refused(PublishError)
    assert sorted(path.name for path in fixture.root.rglob("*") if path.is_file()) == ["thesis.tex"]


def test_a_broken_repository_is_not_touched(fixture: LocalFixture) -> None:
    (fixture.repository / ".git").mkdir(parents=True)
    with pytest.raises(PublishError, match="not a git repository"):
        fixture.publish()
    assert list(fixture.root.rglob("*"))[-1] == fixture.repository / ".git"


def test_a_sha256_repository_is_refused(fixture: LocalFixture) -> None:
    fixture.repository.mkdir(parents=True)
    git("init", "--quiet", "--object-format=sha256", ".", cwd=fixture.repository)
    with pytest.raises(PublishError, match="object format is sha256"):
        fixture.publish()


def test_an_empty_folder_at_the_path_becomes_the_repository(fixture: LocalFixture) -> None:
    fixture.repository.mkdir(parents=True)
    fixture.publish()
    assert git("status", "--porcelain", cwd=fixture.repository) == ""


def test_an_existing_repository_is_published_into(fixture: LocalFixture, tmp_path: Path) -> None:
    fixture.repository.mkdir(parents=True)
    git("init", "--quiet", "--initial-branch=main", ".", cwd=fixture.repository)
    contents = [make_content(fixture.dist, "odd", ODD_NAMES), make_content(fixture.dist / "again", "main", ODD_NAMES)]
    fixture.publish(contents)
    assert files_in(fixture.repository) == ODD_NAMES
    assert_published(contents, fixture.repository, tmp_path)


def test_a_second_publisher_stops(fixture: LocalFixture) -> None:
    fixture.publish()
    (fixture.dist / "main" / "new").write_bytes(b"n")
    contents = [describe(fixture.dist / "main", "main")]
    with LocalTarget(fixture.root, REPOSITORY).exclusive():
        assert "another publisher is at work" in fixture.refused(PublishError, contents)
    code = (
        "import sys; from filelock import FileLock\n"
        "with FileLock(sys.argv[1]): print('held', flush=True); sys.stdin.read()"
    )
    lock = fixture.repository.with_name(f".{fixture.repository.name}.lock")
    command = [sys.executable, "-c", code, str(lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        assert holder.stdin is not None
        assert holder.stdout.readline() == b"held\n"
        assert "another publisher is at work" in fixture.refused(PublishError, contents)
        assert fixture.publish(contents, dry_run=True).outcomes[0].plan.action == "update"
        holder.stdin.close()
    with FileLock(str(lock), timeout=0):
        pass
    assert fixture.publish(contents).outcomes[0].plan.action == "update"


@pytest.mark.crash
def test_publishers_that_race_leave_one_result(fixture: LocalFixture, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from packager.errors import PublishError\n"
        "from packager.publish.branches import publish_branches\n"
        "from packager.publish.targets.local import LocalTarget\n"
        "from tests.publish_fixtures import REPOSITORY, describe\n"
        "contents = [describe(Path(folder), Path(folder).name) for folder in sys.argv[2:]]\n"
        "try: publish_branches(contents, LocalTarget(Path(sys.argv[1]), REPOSITORY), print)\n"
        "except PublishError as error: print(error); sys.exit(error.exit_code)"
    )
    folders = [str(content.folder) for content in fixture.contents]
    command = [sys.executable, "-c", code, str(fixture.root), *folders]
    cwd = Path(__file__).resolve().parent.parent
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=cwd) for _ in range(3)]
    for process in running:
        output, _ = process.communicate()
        assert process.returncode == 0 or (process.returncode == 10 and "another publisher is at work" in output)
    assert 0 in [process.returncode for process in running]
    assert_published(fixture.contents, fixture.repository, tmp_path)
    assert leftovers(fixture.root) == []


def test_without_git_the_error_names_it(fixture: LocalFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    text = fixture.refused(MachineError)
    assert "git is not on the PATH" in text
    assert "apt-get install git" in text
    assert not fixture.root.exists()


def test_without_git_gitpython_cannot_even_be_imported(fixture: LocalFixture, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from packager.errors import MachineError\n"
        "from packager.publish.targets.local import LocalTarget\n"
        "try: LocalTarget(Path(sys.argv[1]), 'a/b').check(())\n"
        "except MachineError as error: print(error)"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    cwd = Path(__file__).resolve().parent.parent
    environment = {"PATH": str(tmp_path)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd=cwd)
    assert result.stdout.startswith("git is not on the PATH\n")


def test_an_old_git_is_refused(fixture: LocalFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shim(tmp_path / "bin", 'if [ "$1" = version ]; then echo git version 2.25.1; exit 0; fi', monkeypatch)
    assert "git 2.25.1 is too old" in fixture.refused(MachineError)
    assert not fixture.root.exists()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("hash-object", "fatal: unable to write loose object file: No space left on device"),
        ("write-tree", "fatal: unable to write loose object file: No space left on device"),
        ("update-ref", "fatal: unable to write loose object file: No space left on device"),
        ("update-index", "fatal: sha1 file '.git/.tmp-x/index.lock' write error. Out of diskspace"),
    ],
)
def test_a_full_disk_is_an_error_and_the_next_run_continues(
    fixture: LocalFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str, words: str
) -> None:
    shim(tmp_path / "bin", f'if [ "$1" = {command} ]; then echo "{words}" >&2; exit 128; fi', monkeypatch)
    text = fixture.refused(MachineError)
    assert "the disk is full" in text
    assert words in text
    monkeypatch.undo()
    fixture.publish()
    assert_published(fixture.contents, fixture.repository, tmp_path)


@pytest.mark.parametrize("is_full", sampled([False, True], True))
def test_a_branch_that_git_cannot_write_has_not_moved(
    fixture: LocalFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_full: bool
) -> None:
    """Git does not print why it could not write a branch; on a full disk it said that somebody had moved the branch."""
    words = "fatal: cannot update ref 'refs/heads/x': couldn't write 'refs/heads/x.lock'"
    shim(tmp_path / "bin", f'if [ "$1" = update-ref ]; then echo "{words}" >&2; exit 128; fi', monkeypatch)
    if is_full:
        monkeypatch.setattr("packager.system.files._free_bytes", lambda _: 0)
    text = fixture.refused(MachineError if is_full else PublishError)
    assert words in text
    assert ("the disk is full" if is_full else "git update-ref failed") in text
    assert "moved" not in text
    monkeypatch.undo()
    fixture.publish()
    assert_published(fixture.contents, fixture.repository, tmp_path)


@pytest.mark.parametrize("content", [None, b"", b"garbage"])
def test_a_damaged_object_is_an_error(fixture: LocalFixture, content: bytes | None) -> None:
    """git lists the file with the size BAD, which ended in a traceback."""
    fixture.publish()
    blob_id = git("rev-parse", "main:w.bin", cwd=fixture.repository).strip()
    path = fixture.repository / ".git" / "objects" / blob_id[:2] / blob_id[2:]
    path.unlink()
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(PublishError, match=f"git cannot read the object {blob_id}"):
        LocalTarget(fixture.root, REPOSITORY).read_branches()


def test_stored_files_are_read_again(fixture: LocalFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fixture.publish()
    (fixture.dist / VARIANT / "w.bin").write_bytes(b"better")
    contents = [fixture.contents[0], describe(fixture.dist / VARIANT, VARIANT)]
    script = 'if [ "$2" = --batch ]; then "$real" "$@" | sed s/^better$/rotten/; exit 0; fi'
    shim(tmp_path / "bin", script, monkeypatch)
    with pytest.raises(PublishError, match="does not hold the files that were built") as caught:
        fixture.publish(contents)
    assert "w.bin: 6 bytes of other content" in str(caught.value)
    assert "git fsck" in str(caught.value)


def test_a_new_branch_that_is_stored_wrongly_is_deleted_again(
    fixture: LocalFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (fixture.dist / VARIANT / "w.bin").write_bytes(b"better")
    contents = [fixture.contents[0], describe(fixture.dist / VARIANT, VARIANT)]
    script = 'if [ "$2" = --batch ]; then "$real" "$@" | sed s/^better$/rotten/; exit 0; fi'
    shim(tmp_path / "bin", script, monkeypatch)
    with pytest.raises(PublishError, match="the new branch was deleted again"):
        fixture.publish(contents)
    monkeypatch.undo()
    assert VARIANT not in heads(fixture.repository)
    fixture.publish(contents)
    assert_published(contents, fixture.repository, tmp_path)


@pytest.mark.parametrize(
    ("script", "match"),
    [
        ("sed 's/ blob 6$/ missing/'", "does not give the blob"),
        ("head -c 60", "does not give the blob"),
        ("head -c 60; echo broken >&2; exit 1", "git cat-file failed.*broken"),
        ("sed 's/ blob 6$/ tree 6/'", "does not give the blob"),
    ],
    ids=["lacks it", "breaks off", "fails", "another kind"],
)
def test_what_cannot_be_read_again_is_an_error(
    fixture: LocalFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, match: str
) -> None:
    (fixture.dist / VARIANT / "w.bin").write_bytes(b"better")
    shim(tmp_path / "bin", f'if [ "$2" = --batch ]; then "$real" "$@" | ({script}); exit $?; fi', monkeypatch)
    with pytest.raises(PublishError, match=f"(?s){match}"):
        fixture.publish([fixture.contents[0], describe(fixture.dist / VARIANT, VARIANT)])


def test_a_truncated_blob_is_not_checked_out(
    fixture: LocalFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture.publish()
    (fixture.dist / "main" / "w.bin").write_bytes(b"better")
    contents = [describe(fixture.dist / "main", "main"), fixture.contents[1]]
    blob = read_local_file(fixture.dist / "main" / "w.bin").blob_id
    script = f'if [ "$1" = cat-file ] && [ "$3" = {blob} ]; then printf be; echo broken >&2; exit 1; fi'
    shim(tmp_path / "bin", script, monkeypatch)
    with pytest.raises(PublishError, match="git cat-file failed"):
        fixture.publish(contents)
    assert (fixture.repository / "w.bin").read_bytes() == b"weights"
    monkeypatch.undo()
    report = fixture.publish(contents)
    assert report.notes[-1].startswith("finished its checkout of main")
    assert (fixture.repository / "w.bin").read_bytes() == b"better"
    assert git("status", "--porcelain", cwd=fixture.repository) == ""


class MemoryTarget:
    """A target that knows large files by sha256 and the others by blob id, as the Hub does."""

    where = "memory"
    is_public = False
    identifies_by_blob = False

    def __init__(self, remote: Mapping[str, BranchState]) -> None:
        self.remote = remote
        self.commits: list[tuple[str, str | None]] = []
        self.stored: Mapping[str, StoredFile] = {}

    def read_branches(self) -> Mapping[str, BranchState]:
        return self.remote

    def check(self, changing: Collection[str]) -> None:
        self.changing = tuple(changing)

    @contextmanager
    def exclusive(self) -> Iterator[Sequence[str]]:
        yield ()

    def commit(self, branch: str, files: Mapping[str, LocalFile], *, parent: str | None, message: str) -> str:
        assert message
        self.commits.append((branch, parent))
        self.stored = {name: StoredFile(size_bytes=f.size_bytes, sha256=f.sha256) for name, f in files.items()}
        return "f" * 40

    def read_back(self, commit: str) -> Mapping[str, StoredFile]:
        assert commit == "f" * 40
        return self.stored

    def read_bytes(self, commit: str, name: str, *, start: int = 0, size: int | None = None) -> bytes:
        raise NotImplementedError

    def export(self, commit: str, name: str, path: Path) -> None:
        raise NotImplementedError

    def history(self, branch: str) -> Sequence[CommitRecord]:
        raise NotImplementedError

    def restore(
        self, branch: str, commit: str, *, parent: str, message: str, replacing: Mapping[str, LocalFile] = NO_FILES
    ) -> str:
        raise NotImplementedError

    def remove(self, branch: str, *, head: str) -> str:
        raise NotImplementedError

    def read_tag(self, name: str) -> Mapping[str, str]:
        raise NotImplementedError

    def tag(self, name: str, commits: Mapping[str, str], notes: str) -> None:
        raise NotImplementedError


def test_a_remote_that_answers_with_either_digest_is_compared(fixture: LocalFixture) -> None:
    files = check_folders(fixture.contents)
    stored = {
        branch: {
            name: StoredFile(size_bytes=file.size_bytes, sha256=file.sha256)
            if name == "w.bin"
            else StoredFile(size_bytes=file.size_bytes, blob_id=file.blob_id)
            for name, file in of_branch.items()
        }
        for branch, of_branch in files.items()
    }
    stored[VARIANT]["w.bin"] = replace(stored[VARIANT]["w.bin"], sha256="0" * 64)
    remote = {name: BranchState(commit=name[0] * 40, foreign_author="", files=held) for name, held in stored.items()}
    target = MemoryTarget(remote)
    report = publish_branches(fixture.contents, target, print)
    assert [outcome.plan.action for outcome in report.outcomes] == ["update", "unchanged"]
    assert target.commits == [(VARIANT, "g" * 40)]
    assert target.changing == (VARIANT,)


def test_the_plan_is_shown_before_the_first_effect(fixture: LocalFixture) -> None:
    seen: list[bool] = []
    publish_branches(
        fixture.contents,
        fixture.target,
        print,
        show_plan=lambda _: seen.append((fixture.repository / "w.bin").exists()),
    )
    assert seen == [False]


def test_the_text_of_the_plan_and_of_the_report(fixture: LocalFixture) -> None:
    plan = plan_publish(check_folders(fixture.contents), {}, where="a place [bold]")
    console = Console(width=100, record=True)
    print_plan(plan, console)
    text = console.export_text()
    assert "To publish in a place [bold]" in text
    rows = [" ".join(line.split()) for line in text.splitlines()]
    variant = rows.index(f"+ {VARIANT} create: 3 files, 12 B; 12 B to send")
    assert rows[variant + 1 : variant + 4] == ["+ README.md 5 B", "+ sub/x.json 2 B", "+ w.bin 5 B"]
    assert "+ main create: 2 files, 12 B; 12 B to send" in rows[variant + 4 :]
    assert json.loads(json.dumps(plan_json(plan)))["branches"][0]["added"][0] == {"name": "README.md", "size_bytes": 5}
    report = fixture.publish()
    print_report(report, console)
    assert report.outcomes[0].commit is not None
    assert report.outcomes[0].commit[:12] in console.export_text()
    values = json.loads(json.dumps(report_json(report)))
    assert values["branches"][1]["commit"] == heads(fixture.repository)["main"]
    assert (values["dry_run"], values["notes"], values["written_bytes"]) == (False, [], 24)
