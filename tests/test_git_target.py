"""The git target over paths and HTTP, without git-lfs; test_git_lfs.py has the tests with git-lfs."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from packager.errors import MachineError, PackagerError, PublishError
from packager.publish.branches import PublishReport, check_folders, publish_branches
from packager.publish.targets import LARGE_BYTES, HeadMovedError, StoredFile
from packager.publish.targets.git import GitTarget
from packager.publish.targets.git_locks import DEFAULT_WAITS, GitWaits
from packager.publish.targets.git_remote import RemoteGit
from packager.system.files import TEMPORARY_PREFIX
from tests.git_servers import Service, serve_git
from tests.publish_fixtures import SHORT_WAITS, VARIANT, describe, files_in, git, heads, make_content, shim, trees
from tests.samples import sampled

ROOT = Path(__file__).resolve().parent.parent
TOKEN = "hf_Secret/Token+1"  # noqa: S105 - made up
PUBLISH = (
    "import sys; from pathlib import Path; from packager.errors import PackagerError\n"
    "from packager.publish.branches import publish_branches; from packager.publish.targets.git import GitTarget\n"
    "from tests.publish_fixtures import describe\n"
    "contents = [describe(Path(folder), Path(folder).name) for folder in sys.argv[3:]]\n"
    "try: publish_branches(contents, GitTarget(sys.argv[1], Path(sys.argv[2])), print)\n"
    "except PackagerError as error: print(error); sys.exit(error.exit_code)"
)


class GitFixture:
    """Two branches, a path to publish them to, and publishers, each with its own staging folder if need be."""

    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.dist, self.staging = tmp_path / "dist", tmp_path / "staging"
        self.repository = tmp_path / "remote" / "Model 100%.git"
        self.contents = [
            make_content(self.dist, "main", {"README.md": b"card\n", "w.bin": b"weights"}),
            make_content(self.dist, VARIANT, {"README.md": b"card\n", "w.bin": b"wei", "sub/ü x.json": b"{}\r\n"}),
        ]
        self.lines: list[str] = []

    def target(
        self, url: str = "", staging: str = "staging", token: str = "", waits: GitWaits = SHORT_WAITS
    ) -> GitTarget:
        staging_folder = self.tmp_path / staging
        return GitTarget(url or str(self.repository), staging_folder, token=token, log=self.lines.append, waits=waits)

    def publish(self, target: GitTarget | None = None, *, dry_run: bool = False) -> PublishReport:
        return publish_branches(self.contents, target or self.target(), self.lines.append, dry_run=dry_run)

    def refused(self, target: GitTarget | None = None, error: type[PackagerError] = PublishError) -> str:
        with pytest.raises(error) as caught:
            self.publish(target)
        return str(caught.value)

    def edit(self, branch: str, name: str, data: bytes | None) -> None:
        number = next(number for number, content in enumerate(self.contents) if content.branch == branch)
        path = self.contents[number].folder / name
        path.unlink() if data is None else path.write_bytes(data)
        self.contents[number] = describe(path.parent, branch)

    def assert_published(self) -> None:
        for content in self.contents:
            clone = self.tmp_path / "clones" / f"{content.branch}-{time.monotonic_ns()}"
            git("clone", "--quiet", "--branch", content.branch, str(self.repository), str(clone))
            assert files_in(clone) == files_in(content.folder)
        assert git("fsck", "--full", "--strict", "--no-dangling", cwd=self.repository) == ""


@pytest.fixture
def fixture(tmp_path: Path) -> GitFixture:
    return GitFixture(tmp_path)


def actions(report: PublishReport) -> list[str]:
    return [outcome.plan.action for outcome in report.outcomes]


@pytest.mark.parametrize("as_url", sampled([False, True], False), ids=["path", "file"])
def test_branches_are_created_with_their_bytes(fixture: GitFixture, as_url: bool) -> None:
    url = f"file://{quote(str(fixture.repository))}" if as_url else str(fixture.repository)
    target = fixture.target(url)
    assert (target.where, target.is_public, target.identifies_by_blob) == (url, True, False)
    assert target.read_branches() == {}
    assert not fixture.repository.exists()
    assert actions(fixture.publish(target)) == ["create", "create"]
    fixture.assert_published()
    assert git("rev-list", "--count", "--all", cwd=fixture.repository).strip() == "2"  # two roots
    assert git("symbolic-ref", "HEAD", cwd=fixture.repository).strip() == "refs/heads/main"
    assert sorted(path.name for path in fixture.repository.parent.iterdir()) == [fixture.repository.name]


def test_a_dry_run_makes_nothing(fixture: GitFixture) -> None:
    assert actions(fixture.publish(dry_run=True)) == ["create", "create"]
    assert not fixture.repository.parent.exists()


def test_a_second_publish_makes_no_commit(fixture: GitFixture) -> None:
    fixture.publish()
    before = heads(fixture.repository)
    assert actions(fixture.publish()) == ["unchanged", "unchanged"]
    assert actions(fixture.publish(fixture.target(staging="another"))) == ["unchanged", "unchanged"]
    assert heads(fixture.repository) == before


def test_what_changed_is_updated_and_what_is_gone_is_removed(fixture: GitFixture) -> None:
    fixture.publish()
    before = heads(fixture.repository)
    fixture.edit("main", "README.md", b"new\n")
    fixture.edit("main", "w.bin", None)
    report = fixture.publish(fixture.target(staging="another"))
    plan = report.outcomes[-1].plan
    assert actions(report) == ["unchanged", "update"]
    assert [[change.name for change in changes] for changes in (plan.changed, plan.removed)] == [
        ["README.md"],
        ["w.bin"],
    ]
    assert git("rev-parse", "main^", cwd=fixture.repository).strip() == before["main"]
    assert heads(fixture.repository)[VARIANT] == before[VARIANT]
    fixture.assert_published()


@pytest.mark.slow
def test_history_is_read_restored_and_tagged(fixture: GitFixture, tmp_path: Path) -> None:
    fixture.publish()
    first = heads(fixture.repository)["main"]
    for text in (b"2\n", b"3\n"):
        fixture.edit("main", "README.md", text)
        fixture.publish()
    target = fixture.target(staging="another")
    target.read_branches()
    assert target.history("nowhere") == ()
    records = target.history("main")
    assert [record.commit for record in records][-1] == first
    assert [(record.author, record.title) for record in records] == [("", "Publish main")] * 3
    assert target.read_bytes(first, "README.md") == b"card\n"
    assert fixture.target(staging="third").read_bytes(first, "w.bin", start=2, size=3) == b"igh"
    target.export(first, "w.bin", tmp_path / "w")
    assert (tmp_path / "w").read_bytes() == b"weights"
    assert target.read_back(first)["README.md"].size_bytes == 5
    for name, commit in (("README.me", first), ("README.md", "0" * 39 + "1")):
        with pytest.raises(PublishError):
            target.read_bytes(commit, name)
    with pytest.raises(HeadMovedError):
        target.restore("main", first, parent=first, message="Go back")
    restored = fixture.target(staging="fourth").restore("main", first, parent=records[0].commit, message="Go back")
    assert heads(fixture.repository)["main"] == restored
    assert trees(fixture.repository)["main"] == git("rev-parse", f"{first}^{{tree}}", cwd=fixture.repository).strip()
    assert target.read_tag("v1") == {"main": ""}
    target.tag("v1", {"main": first}, "notes")
    fixture.target(staging="fifth").tag("v1", {"main": first}, "notes")
    assert target.read_tag("v1") == {"main": first}
    with pytest.raises(PublishError, match="the tag v1 exists and names"):
        target.tag("v1", {"main": restored}, "notes")
    assert git("rev-parse", "v1^{commit}", cwd=fixture.repository).strip() == first
    assert "\n\nnotes\n" in git("cat-file", "tag", "v1", cwd=fixture.repository)
    assert git("fsck", "--full", "--strict", cwd=fixture.repository) == ""


def test_a_head_that_moves_meanwhile_stops_with_what_changed(
    fixture: GitFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture.publish()
    fixture.edit(VARIANT, "w.bin", b"ours")
    git("clone", "--quiet", "--branch", VARIANT, str(fixture.repository), str(tmp_path / "theirs"))
    (tmp_path / "theirs" / "README.md").write_bytes(b"a person's words\n")
    (tmp_path / "theirs" / "extra").write_bytes(b"x")
    git("add", "--all", cwd=tmp_path / "theirs")
    git("commit", "--quiet", "--message", "edit", cwd=tmp_path / "theirs")
    theirs = f'env -i PATH="$PATH" "$real" -C \'{tmp_path}/theirs\' push --quiet origin HEAD'
    dry = 'case "$*" in *dry-run*) exec "$real" "$@";; esac'
    shim(tmp_path / "bin", f'if [ "$1" = push ]; then {dry}; {theirs}; fi', monkeypatch)
    text = fixture.refused(error=HeadMovedError)
    assert f"{VARIANT} moved" in text
    assert "by A Person <person@example.org>, README.md was changed, extra was added" in text
    head = git("rev-parse", "HEAD", cwd=tmp_path / "theirs").strip()
    assert heads(fixture.repository)[VARIANT] == head
    monkeypatch.undo()
    report = fixture.publish()
    assert report.outcomes[0].plan.foreign_author == "A Person <person@example.org>"
    assert git("rev-parse", f"{VARIANT}^", cwd=fixture.repository).strip() == head
    fixture.assert_published()


def test_a_branch_that_is_there_is_not_created_again(fixture: GitFixture) -> None:
    fixture.publish()
    fixture.edit("main", "w.bin", b"other")
    files = check_folders(fixture.contents)["main"]
    with pytest.raises(HeadMovedError):
        fixture.target().commit("main", files, parent=None, message="x")
    files = check_folders(fixture.contents)[VARIANT]
    with pytest.raises(HeadMovedError):
        fixture.target().commit("gone", files, parent="1" * 40, message="x")


@pytest.mark.crash
def test_publishers_that_race_leave_one_result(fixture: GitFixture, tmp_path: Path) -> None:
    other = tmp_path / "other"
    theirs = [make_content(other, content.branch, {"README.md": b"theirs\n"}) for content in fixture.contents]
    running = [
        subprocess.Popen(
            [sys.executable, "-c", PUBLISH, str(fixture.repository), str(tmp_path / f"stage{number}"),
             *(str(content.folder) for content in contents)],
            stdout=subprocess.PIPE, text=True, cwd=ROOT,
        )
        for number, contents in enumerate([fixture.contents, theirs, fixture.contents, theirs])
    ]  # fmt: skip
    for process in running:
        output, _ = process.communicate()
        assert process.returncode == 0 or (process.returncode == 10 and "moved" in output), output
    assert 0 in [process.returncode for process in running]
    possible = [{content.branch: files_in(content.folder) for content in side} for side in (fixture.contents, theirs)]
    for branch in heads(fixture.repository):
        git("clone", "--quiet", "--branch", branch, str(fixture.repository), str(tmp_path / "clones" / branch))
        assert files_in(tmp_path / "clones" / branch) in [side[branch] for side in possible]
    assert git("fsck", "--full", "--strict", "--no-dangling", cwd=fixture.repository) == ""


def test_a_second_publisher_in_the_same_staging_folder_stops(fixture: GitFixture) -> None:
    with fixture.target().exclusive():
        text = fixture.refused()
    assert "another publisher is at work" in text
    assert str(fixture.staging) in text
    fixture.publish()


@pytest.mark.crash
def test_a_lock_that_a_killed_run_leaves_for_an_instant_is_waited_for(fixture: GitFixture) -> None:
    """Its child holds it between fork and exec."""
    lock = fixture.staging.with_name(f".{fixture.staging.name}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    hold = "import fcntl, sys, time; fcntl.flock(open(sys.argv[1], 'w'), fcntl.LOCK_EX); print(flush=True); "
    hold += "time.sleep(0.3)"
    with subprocess.Popen([sys.executable, "-c", hold, str(lock)], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        fixture.publish(fixture.target(waits=DEFAULT_WAITS))
    fixture.assert_published()


def test_a_checked_out_branch_is_refused(fixture: GitFixture) -> None:
    git("init", "--quiet", "--initial-branch=main", str(fixture.repository))
    text = fixture.refused()
    assert "refusing to update checked out branch" in text


def test_a_full_disk_at_the_remote_is_told_as_such(
    fixture: GitFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "error: remote unpack failed: No space left on device\\n ! [remote rejected] x -> main (unpacker error)"
    script = f'case "$*" in *dry-run*) ;; push*) printf "{words}\\n" >&2; exit 1;; esac'
    shim(tmp_path / "bin", script, monkeypatch)
    text = fixture.refused()
    assert "the repository refused the push" in text
    assert "No space left on device" in text


def test_a_full_disk_here_is_told_as_such(fixture: GitFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = "fatal: unable to write loose object file: No space left on device"
    shim(tmp_path / "bin", f'if [ "$1" = hash-object ]; then echo "{words}" >&2; exit 128; fi', monkeypatch)
    assert "the disk is full" in fixture.refused(error=MachineError)


@pytest.mark.crash
@pytest.mark.parametrize("branches", ["all", "one"])
def test_a_lost_answer_is_looked_up(
    fixture: GitFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, branches: str
) -> None:
    which = "*refs/heads/main" if branches == "one" else "*"
    lost = '"$real" "$@"; echo "fatal: something unheard of" >&2; exit 128'
    script = f'case "$*" in *dry-run*) ;; push{which}) {lost};; esac'
    shim(tmp_path / "bin", script, monkeypatch)
    assert actions(fixture.publish()) == ["create", "create"]
    fixture.assert_published()
    fixture.edit("main", "w.bin", b"other")
    assert actions(fixture.publish()) == ["unchanged", "update"]
    assert git("rev-list", "--count", "--all", cwd=fixture.repository).strip() == "3"


@pytest.mark.slow
def test_the_same_commit_of_another_publisher_is_ours(fixture: GitFixture) -> None:
    fixture.publish()
    parent = heads(fixture.repository)["main"]
    fixture.edit("main", "w.bin", b"other")
    files = check_folders(fixture.contents)["main"]
    first = fixture.target(staging="another").commit("main", files, parent=parent, message="first")
    assert fixture.target().commit("main", files, parent=parent, message="second") == first


def test_a_network_that_comes_back_is_waited_for(
    fixture: GitFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = tmp_path / "tries"
    words = "fatal: unable to access: Could not resolve host: example.org"
    fail = f'if [ $(wc -l < {tries}) -lt 3 ]; then echo >> {tries}; echo "{words}" >&2; exit 128; fi'
    tries.write_text("")
    shim(tmp_path / "bin", f'case "$*" in *dry-run*) ;; push*) {fail};; esac', monkeypatch)
    fixture.publish()
    waits = [line for line in fixture.lines if "trying again" in line]
    assert [line.rpartition("again in ")[2] for line in waits] == ["0.01 s", "0.02 s", "0.03 s"]
    assert "Could not resolve host" in waits[0]
    fixture.assert_published()


def test_a_network_that_does_not_is_given_up(
    fixture: GitFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "ssh: connect to host example.org port 22: Connection refused"
    shim(tmp_path / "bin", f'if [ "$1" = push ]; then echo "{words}" >&2; exit 128; fi', monkeypatch)
    text = fixture.refused()
    assert "the repository cannot be reached" in text
    assert words in text
    assert "run again" in text
    assert len([line for line in fixture.lines if "trying again" in line]) == 4


def test_nothing_is_made_before_the_answer(fixture: GitFixture) -> None:
    def no(_: object) -> None:
        raise PublishError("no")

    with pytest.raises(PublishError, match="no"):
        publish_branches(fixture.contents, fixture.target(), fixture.lines.append, confirm=no)
    assert not fixture.repository.exists()


@pytest.mark.slow
def test_a_branch_that_has_moved_is_done_whatever_becomes_of_the_cache(
    fixture: GitFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture.publish()
    fixture.edit("main", "README.md", b"new\n")
    transfer = RemoteGit.transfer

    def locking(self: RemoteGit, *arguments: str, **options: Any) -> Any:
        answer = transfer(self, *arguments, **options)
        if arguments[0] == "push" and "--dry-run" not in arguments:
            lock = fixture.staging / ".git" / "refs" / "published" / "main.lock"
            lock.parent.mkdir(parents=True, exist_ok=True)
            lock.touch()
        return answer

    monkeypatch.setattr(RemoteGit, "transfer", locking)
    fixture.publish(fixture.target(waits=replace(SHORT_WAITS, staging_s=0.1)))
    assert git("show", "main:README.md", cwd=fixture.repository) == "new\n"


def test_a_token_with_a_line_end_is_the_token_without(tmp_path: Path) -> None:
    remote = RemoteGit(tmp_path, "https://h/r", host="h", token=f"{TOKEN}\n", log=print, retries_s=())
    assert remote._scrubbed(f"fatal: {TOKEN} refused") == "fatal: *** refused"


@pytest.mark.parametrize(
    "url",
    [
        f"https://user:{TOKEN.replace('/', '%2F')}@example.org/a/b.git",
        "https://hf_SecretToken@example.org/a/b.git",
        "https://example.org/a/b.git?private_token=hf_SecretToken",
        "ssh://git:hf_SecretToken@example.org/a/b.git",
    ],
)
def test_credentials_in_the_url_are_refused(fixture: GitFixture, url: str) -> None:
    with pytest.raises(PublishError, match="the address contains credentials") as caught:
        fixture.target(url)
    assert "Secret" not in str(caught.value)
    assert "example.org/a/b.git" in str(caught.value)
    assert not fixture.staging.exists()


def test_other_addresses_that_cannot_be_published_to(fixture: GitFixture) -> None:
    with pytest.raises(PublishError, match="ext addresses are not supported"):
        fixture.target("ext://sh -c x")
    with pytest.raises(PublishError, match="git addresses are not supported"):
        fixture.target("git://example.org/x")
    with pytest.raises(PublishError, match="unencrypted"):
        fixture.target("http://example.org/x.git", token=TOKEN)


def test_something_else_at_the_path_is_not_touched(fixture: GitFixture) -> None:
    fixture.repository.mkdir(parents=True)
    (fixture.repository / "thesis.tex").write_text("years of work")
    assert "not a git repository" in fixture.refused()
    assert [path.name for path in fixture.repository.iterdir()] == ["thesis.tex"]


def test_a_staging_folder_that_was_being_marked_is_marked(fixture: GitFixture) -> None:
    fixture.staging.mkdir(parents=True)
    (fixture.staging / f"{TEMPORARY_PREFIX}abc").write_bytes(b"A cache of a pub")
    fixture.publish()
    assert not list(fixture.staging.glob(f"{TEMPORARY_PREFIX}*"))


def test_something_else_in_the_staging_folder_is_not_touched(fixture: GitFixture) -> None:
    git("init", "--quiet", str(fixture.staging))
    fixture.publish(fixture.target(staging="another"))
    assert "the staging folder holds something else" in fixture.refused()
    assert (fixture.staging / ".git" / "HEAD").exists()


@pytest.fixture
def service(fixture: GitFixture) -> Iterator[Service]:
    fixture.repository = fixture.tmp_path / "served" / "a" / "b.git"
    git("init", "--quiet", "--bare", "--initial-branch=main", str(fixture.repository))
    git("config", "http.receivepack", "true", cwd=fixture.repository)
    with serve_git(fixture.tmp_path / "served", TOKEN) as running:
        yield running


def test_a_hook_that_refuses_is_quoted(fixture: GitFixture, service: Service) -> None:
    target = fixture.target(f"{service.url}/a/b.git", token=TOKEN)
    fixture.publish(target)
    before = heads(fixture.repository)
    hook = fixture.repository / "hooks" / "pre-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text("#!/bin/sh\necho 'no weights on Fridays: connection refused' >&2\nexit 1\n")
    hook.chmod(0o755)
    fixture.edit("main", "w.bin", b"other")
    text = fixture.refused(target)
    assert "the repository refused the push" in text
    assert "no weights on Fridays" in text
    assert "pre-receive hook declined" in text
    assert heads(fixture.repository) == before
    assert not any("trying again" in line for line in fixture.lines)


def test_over_http_with_a_token_that_nothing_shows(
    fixture: GitFixture, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim(tmp_path / "bin", f'printf "%s\\n" "$*" >> {tmp_path}/argv', monkeypatch)
    url = f"{service.url}/a/b.git"
    assert actions(fixture.publish(fixture.target(url, token=TOKEN))) == ["create", "create"]
    fixture.edit("main", "w.bin", b"other")
    assert actions(fixture.publish(fixture.target(url, token=f"somebody:{TOKEN}"))) == ["unchanged", "update"]
    fixture.assert_published()
    service.read_only = True
    fixture.edit("main", "w.bin", b"third")
    texts = [fixture.refused(fixture.target(url, token=TOKEN)), *fixture.lines, (tmp_path / "argv").read_text()]
    texts += [path.read_bytes().decode("latin-1") for path in fixture.staging.rglob("*") if path.is_file()]
    assert "push --quiet" in texts[len(fixture.lines) + 1]
    forms = (TOKEN, quote(TOKEN, safe=""), "SecretToken", "Secret/Token")
    assert not [text for text in texts if any(form in text for form in forms)]


def test_git_words_are_scrubbed_of_the_token(
    fixture: GitFixture, service: Service, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture.publish(fixture.target(f"{service.url}/a/b.git", token=TOKEN))
    words = f"fatal: no access with {TOKEN} or {quote(TOKEN, safe='')} to 'https://x:{TOKEN}@h/'"
    shim(tmp_path / "bin", f'if [ "$1" = fetch ]; then echo "{words}" >&2; exit 128; fi', monkeypatch)
    text = fixture.refused(fixture.target(f"{service.url}/a/b.git", token=TOKEN))
    assert "no access with *** or *** to 'https://h/'" in text
    assert "Secret" not in text


@pytest.mark.parametrize("token", ["", "wrong"])
def test_without_the_right_token_access_is_refused(fixture: GitFixture, service: Service, token: str) -> None:
    text = fixture.refused(fixture.target(f"{service.url}/a/b.git", token=token))
    assert "the repository refuses access" in text
    assert "https needs a token" in text


def test_who_may_only_read_is_told_before_anything_is_sent(fixture: GitFixture, service: Service) -> None:
    service.read_only = True
    text = fixture.refused(fixture.target(f"{service.url}/a/b.git", token=TOKEN))
    assert "the repository refuses access" in text
    assert "403" in text
    assert not any(method == "POST" and "git-receive-pack" in path for method, path, _ in service.seen)


def test_a_repository_that_is_not_there_is_not_made_by_push(fixture: GitFixture, service: Service) -> None:
    text = fixture.refused(fixture.target(f"{service.url}/a/none.git", token=TOKEN))
    assert "the repository does not exist" in text
    assert "create an empty one there first" in text


def test_a_busy_server_is_waited_for(fixture: GitFixture, service: Service) -> None:
    service.failures = [503, 429, 500]
    assert actions(fixture.publish(fixture.target(f"{service.url}/a/b.git", token=TOKEN))) == ["create", "create"]
    assert sum("trying again" in line for line in fixture.lines) == 3
    fixture.assert_published()


def test_the_token_goes_to_no_other_host(fixture: GitFixture, service: Service) -> None:
    target = fixture.target(f"{service.url}/a/b.git", token=TOKEN)
    target.read_branches()
    script = fixture.staging / "packager-askpass"
    host = service.url.removeprefix("http://")
    environment = {"PACKAGER_GIT_HOST": host, "PACKAGER_GIT_USER": "u", "PACKAGER_GIT_PASSWORD": TOKEN}

    def ask(prompt: str) -> tuple[int, str]:
        done = subprocess.run([script, prompt], env=environment, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout

    assert ask(f"Password for 'http://u@{host}': ") == (0, f"{TOKEN}\n")
    assert ask(f"Username for 'http://{host}': ") == (0, "u\n")
    assert ask(f'Password for "http://u@{host}": ') == (0, f"{TOKEN}\n")
    for other in (f"{host}.example.org", f"evil.org/{host}", f"x{host}"):
        assert ask(f"Password for 'http://u@{other}': ") == (1, "")


def test_large_files_need_git_lfs_and_nothing_is_sent(
    fixture: GitFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shim(tmp_path / "bin", 'if [ "$1" = lfs ]; then echo "git: lfs is not a git command" >&2; exit 1; fi', monkeypatch)
    fixture.publish()
    before = heads(fixture.repository)
    fixture.edit(VARIANT, "w.bin", bytes(LARGE_BYTES))
    text = fixture.refused(error=MachineError)
    assert "git-lfs is not on the PATH" in text
    assert "w.bin" in text
    assert "apt-get install git-lfs" in text
    assert heads(fixture.repository) == before


def test_a_file_that_changes_meanwhile_is_noticed(fixture: GitFixture) -> None:
    fixture.publish()
    files = dict(check_folders(fixture.contents)["main"])
    files["w.bin"] = replace(files["w.bin"], blob_id="0" * 39 + "1")
    with pytest.raises(PublishError, match="changed while it was being published"):
        fixture.target().commit("main", files, parent=heads(fixture.repository)["main"], message="x")


def publish_killed(fixture: GitFixture, seconds: float) -> None:
    """Publish in a process group of its own and kill all of it, git too, after some seconds."""
    folders = [str(content.folder) for content in fixture.contents]
    command = [sys.executable, "-c", PUBLISH, str(fixture.repository), str(fixture.staging), *folders]
    reader, writer = os.pipe()
    command[2] = f"import os, git.cmd, packager.publish.targets.git\nos.write({writer}, b'x')\n{PUBLISH}"
    with subprocess.Popen(
        command, cwd=ROOT, start_new_session=True, pass_fds=[writer], stdout=subprocess.DEVNULL
    ) as process:
        os.close(writer)
        os.read(reader, 1)
        time.sleep(seconds)
        os.killpg(process.pid, signal.SIGKILL)
    os.close(reader)


@pytest.mark.crash
@pytest.mark.parametrize("count", [8, pytest.param(30, marks=pytest.mark.long)])
def test_killed_at_random_moments_the_next_run_ends_the_same(fixture: GitFixture, tmp_path: Path, count: int) -> None:
    fixture.publish()
    old = trees(fixture.repository)
    fixture.edit("main", "README.md", b"new\n")
    fixture.edit(VARIANT, "w.bin", random.Random(1).randbytes(100_000))
    new: dict[str, str] = {}
    dice = random.Random(20261123)
    start, seen = tmp_path / "start", set()
    fixture.repository.rename(start)
    for number in range(count):
        for folder in (fixture.repository, fixture.staging):
            subprocess.run(["rm", "-rf", str(folder)], check=True)
        if number % 3:
            subprocess.run(["cp", "-R", str(start), str(fixture.repository)], check=True)
        publish_killed(fixture, dice.uniform(0.0, 0.9))
        between = trees(fixture.repository) if fixture.repository.exists() else {}
        fixture.publish()
        new = new or trees(fixture.repository)
        assert trees(fixture.repository) == new
        assert all(tree in (old.get(branch), new[branch]) for branch, tree in between.items())
        assert between.get("main") != new["main"] or between == new
        assert git("fsck", "--full", "--strict", "--no-dangling", cwd=fixture.repository) == ""
        assert not list(fixture.repository.parent.rglob("*.lock"))
        seen.add(json.dumps(between, sort_keys=True))
    fixture.assert_published()
    assert len(seen) > 1


@pytest.mark.crash
def test_what_a_killed_run_left_is_put_right_and_named(fixture: GitFixture) -> None:
    fixture.publish()
    fixture.edit("main", "w.bin", b"other")
    locks = [fixture.staging / ".git" / "shallow.lock", fixture.repository / "refs" / "heads" / "main.lock"]
    for lock in locks:
        lock.write_bytes(b"")
    (fixture.staging / ".git" / "packager-pushing").write_text("refs/heads/main")
    (fixture.staging / ".tmp-proof").mkdir()
    report = fixture.publish()
    assert sorted(report.notes) == sorted(f"removed the stale lock {lock} of a killed publish" for lock in locks)
    assert not (fixture.staging / ".tmp-proof").exists()
    assert not (fixture.staging / ".git" / "packager-pushing").exists()
    fixture.assert_published()


@pytest.mark.parametrize("damage", sampled(["object", "half made", "gone"], "object"))
def test_a_staging_folder_that_is_not_whole_is_made_anew(fixture: GitFixture, damage: str) -> None:
    fixture.publish()
    fixture.edit("main", "w.bin", b"other")
    if damage == "object":
        for path in (fixture.staging / ".git" / "objects").glob("??/*"):
            path.unlink()
    elif damage == "half made":
        (fixture.staging / ".git" / "HEAD").unlink()
    else:
        subprocess.run(["rm", "-rf", str(fixture.staging)], check=True)
    report = fixture.publish()
    assert list(report.notes) == ([] if damage == "gone" else ["the staging folder was incomplete: it is made again"])
    fixture.assert_published()


def test_what_the_remote_sends_is_what_is_compared(
    fixture: GitFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fixture.publish()
    fixture.edit("main", "w.bin", b"better")
    blob = check_folders(fixture.contents)["main"]["w.bin"].blob_id
    # The remote loses an object right after the push: a staging repository would not notice.
    lose = f'"$real" "$@"; rm -f \'{fixture.repository}\'/objects/{blob[:2]}/{blob[2:]}; exit 0'
    shim(tmp_path / "bin", f'case "$*" in *dry-run*) ;; push*) {lose};; esac', monkeypatch)
    git("config", "receive.unpackLimit", "1000", cwd=fixture.repository)
    assert "git fetch failed" in fixture.refused()


def test_ssh_asks_nothing_and_keeps_the_users_settings(
    fixture: GitFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bin").mkdir()
    words = "git@example.org: Permission denied (publickey)."
    ssh = f'#!/bin/sh\necho "$* $HOME $SSH_AUTH_SOCK" >> {tmp_path}/ssh\necho "{words}" >&2\nexit 255\n'
    (tmp_path / "bin" / "ssh").write_text(ssh)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SSH_AUTH_SOCK", "/the/agent")
    monkeypatch.delenv("GIT_SSH_COMMAND", raising=False)
    text = fixture.refused(fixture.target("git@example.org:a/b.git"))
    assert "the repository refuses access" in text
    assert words in text
    asked = (tmp_path / "ssh").read_text()
    assert "-o BatchMode=yes" in asked
    assert f"{os.environ['HOME']} /the/agent" in asked


@pytest.mark.slow
def test_a_foreign_attributes_file_is_a_file_like_others(fixture: GitFixture, tmp_path: Path) -> None:
    fixture.publish()
    git("clone", "--quiet", str(fixture.repository), str(tmp_path / "theirs"))
    (tmp_path / "theirs" / ".gitattributes").write_bytes(b"*.bin filter=lfs\n* text=auto eol=crlf\n")
    git("add", ".gitattributes", cwd=tmp_path / "theirs")
    git("commit", "--quiet", "--message", "attributes", cwd=tmp_path / "theirs")
    git("push", "--quiet", cwd=tmp_path / "theirs")
    report = fixture.publish()
    assert [change.name for change in report.outcomes[-1].plan.removed] == [".gitattributes"]
    fixture.assert_published()


def test_a_branch_that_is_stored_wrongly_is_taken_back(fixture: GitFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    main, variant = fixture.contents
    fixture.contents = [main]
    first = fixture.publish().head("main")
    read = GitTarget.read_back

    def forgetful(self: GitTarget, commit: str) -> Mapping[str, StoredFile]:
        files = dict(read(self, commit))
        if b"better" in self.read_bytes(commit, "README.md"):
            files.pop("README.md")
        return files

    monkeypatch.setattr(GitTarget, "read_back", forgetful)
    for content in (main, variant):
        (content.folder / "README.md").write_bytes(b"better")
    fixture.contents = [describe(main.folder, "main")]
    assert f"the branch has the files of {first[:12]} again" in fixture.refused()
    assert trees(fixture.repository)["main"] == git("rev-parse", f"{first}^{{tree}}", cwd=fixture.repository).strip()
    fixture.contents = [describe(variant.folder, VARIANT)]
    assert "the new branch was deleted again" in fixture.refused()
    assert VARIANT not in heads(fixture.repository)
    with pytest.raises(PublishError):
        fixture.target().remove("main", head=first)
    assert "main" in heads(fixture.repository)
