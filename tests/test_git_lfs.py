"""The git target with git-lfs: large files over a path and over HTTP, read back by git-lfs itself."""

import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from packager.errors import PublishError
from packager.publish.branches import PublishReport, publish_branches
from packager.publish.targets import LARGE_BYTES, read_local_file
from packager.publish.targets.git import GitTarget
from tests.git_servers import Service, require_git_lfs, serve_git, serve_lfs
from tests.publish_fixtures import SHORT_WAITS, VARIANT, describe, files_in, git, heads, make_content

pytestmark = pytest.mark.release
TOKEN = "a-token-Secret"  # noqa: S105 - made up
NAME = "weights [1] of ü 1*.safetensors"


@pytest.fixture(autouse=True, scope="module")
def _git_lfs() -> None:
    require_git_lfs()


class GitLfsFixture:
    """Two branches that share one large file, a second large one, and a repository for them."""

    def __init__(self, tmp_path: Path) -> None:
        dice = random.Random(1)
        large, other = dice.randbytes(LARGE_BYTES + 1), dice.randbytes(LARGE_BYTES)
        small = {"README.md": b"card\n", "w.bin": b"weights"}
        self.tmp_path = tmp_path
        self.contents = [
            make_content(tmp_path / "dist", "main", {**small, NAME: large}),
            make_content(tmp_path / "dist", VARIANT, {**small, "sub/" + NAME: large, "other.safetensors": other}),
        ]
        self.repository = tmp_path / "served" / "a" / "b.git"
        self.url, self.token = str(self.repository), ""
        self.service: Service | None = None

    def target(self, staging: str = "staging") -> GitTarget:
        return GitTarget(self.url, self.tmp_path / staging, token=self.token, waits=SHORT_WAITS)

    def publish(self, staging: str = "staging") -> PublishReport:
        return publish_branches(self.contents, self.target(staging), print)

    def edit(self, branch: str, files: dict[str, bytes]) -> None:
        folder = self.tmp_path / "dist" / branch
        for name, data in files.items():
            (folder / name).write_bytes(data)
        self.contents = [describe(content.folder, content.branch) for content in self.contents]

    def clone(self, branch: str) -> Path:
        """Clone as a reader with git-lfs and the token."""
        folder = self.tmp_path / "clones" / branch
        shutil.rmtree(folder, ignore_errors=True)
        settings = [
            *("-c", "filter.lfs.smudge=git-lfs smudge -- %f", "-c", "filter.lfs.clean=git-lfs clean -- %f"),
            *("-c", "filter.lfs.required=true"),
            *("-c", f"credential.helper=!printf 'username=u\\npassword={self.token}\\n' #"),
        ]
        git(*settings, "clone", "--quiet", "--branch", branch, self.url, str(folder))
        git(*settings, "lfs", "fsck", cwd=folder)
        assert git(*settings, "status", "--porcelain", cwd=folder) == ""
        return folder

    def assert_published(self, *without: str) -> None:
        for content in self.contents:
            found = files_in(self.clone(content.branch))
            assert {name: data for name, data in found.items() if name not in without} == files_in(content.folder)


@pytest.fixture(params=["path", "http"])
def fixture(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[GitLfsFixture]:
    made = GitLfsFixture(tmp_path)
    if request.param == "path":
        yield made
        return
    git("init", "--quiet", "--bare", "--initial-branch=main", str(made.repository))
    git("config", "http.receivepack", "true", cwd=made.repository)
    python = os.environ.get("GIFTLESS_PYTHON", sys.executable)
    with serve_lfs(tmp_path / "lfs", python) as port, serve_git(tmp_path / "served", TOKEN, lfs_port=port) as service:
        made.url, made.token = f"{service.url}/a/b.git", TOKEN
        made.service = service
        yield made


def uploads(service: Service) -> list[str]:
    return [path for method, path, _ in service.seen if method == "PUT"]


def test_large_files_are_published_and_read(fixture: GitLfsFixture) -> None:
    assert [outcome.plan.action for outcome in fixture.publish().outcomes] == ["create", "create"]
    fixture.assert_published(".gitattributes")
    before = heads(fixture.repository)
    assert [outcome.plan.action for outcome in fixture.publish().outcomes] == ["unchanged", "unchanged"]
    again = fixture.publish("another")
    assert [outcome.plan.action for outcome in again.outcomes] == ["unchanged", "unchanged"]
    assert heads(fixture.repository) == before
    target = fixture.target("third")
    large = fixture.contents[0].folder / NAME
    stored = target.read_branches()["main"].files
    assert stored.keys() == {"README.md", "w.bin", NAME}
    assert stored[NAME].sha256 == read_local_file(large).sha256
    assert stored[NAME].size_bytes == LARGE_BYTES + 1
    assert target.read_bytes(before["main"], NAME, start=5, size=9) == large.read_bytes()[5:14]
    target.export(before["main"], NAME, fixture.tmp_path / "exported")
    assert (fixture.tmp_path / "exported").read_bytes() == large.read_bytes()


def test_present_files_are_not_uploaded_again(fixture: GitLfsFixture) -> None:
    fixture.publish()
    if service := fixture.service:
        assert len(uploads(service)) == 2  # three files, two contents
        service.seen.clear()
    fixture.edit("main", {"copy.safetensors": (fixture.contents[0].folder / NAME).read_bytes()})
    report = fixture.publish("another")
    assert report.outcomes[-1].plan.present_bytes == LARGE_BYTES + 1
    if service:
        assert uploads(service) == []
    fixture.assert_published(".gitattributes")


def test_restoring_uploads_nothing(fixture: GitLfsFixture) -> None:
    fixture.publish()
    first = heads(fixture.repository)["main"]
    fixture.edit("main", {NAME: bytes(LARGE_BYTES)})
    fixture.publish()
    target = fixture.target("another")
    second = target.read_branches()["main"].commit
    restored = target.restore("main", first, parent=second, message="Go back")
    assert target.read_back(restored) == target.read_back(first)
    assert target.read_bytes(restored, NAME, size=4) == random.Random(1).randbytes(LARGE_BYTES + 1)[:4]


def test_an_attributes_file_of_the_manifest_is_kept(fixture: GitLfsFixture) -> None:
    line = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
    fixture.edit("main", {".gitattributes": line, "tiny.safetensors": b"tiny"})
    fixture.publish()
    assert files_in(fixture.clone("main")) == files_in(fixture.contents[0].folder)
    stored = fixture.target().read_branches()["main"].files
    assert stored[".gitattributes"].size_bytes == len(line)
    assert stored["tiny.safetensors"].sha256  # what the manifest gives to git-lfs is there, whatever its size
    assert [outcome.plan.action for outcome in fixture.publish().outcomes] == ["unchanged", "unchanged"]


def test_an_attributes_file_that_leaves_a_large_file_out_is_refused(fixture: GitLfsFixture) -> None:
    fixture.edit("main", {".gitattributes": b"*.bin filter=lfs\n"})
    with pytest.raises(PublishError, match="is incomplete") as caught:
        fixture.publish()
    assert NAME in str(caught.value)
    assert "filter=lfs diff=lfs merge=lfs -text" in str(caught.value)
    (fixture.contents[0].folder / ".gitattributes").unlink()
    fixture.edit("main", {})
    fixture.publish()
    ours = fixture.clone("main") / ".gitattributes"
    fixture.edit("main", {".gitattributes": ours.read_bytes(), "w.bin": b"x"})
    with pytest.raises(PublishError, match="was written for another branch"):
        fixture.publish()


def test_pointers_without_attributes_are_repaired(fixture: GitLfsFixture) -> None:
    fixture.publish()
    folder = fixture.tmp_path / "work"
    git("clone", "--quiet", "--no-local", "--branch", "main", str(fixture.repository), str(folder))
    git("rm", "--quiet", ".gitattributes", cwd=folder)
    git("commit", "--quiet", "--message", "tidy", cwd=folder)
    git("push", "--quiet", cwd=folder)
    report = fixture.publish()
    assert [change.name for change in report.outcomes[-1].plan.changed] == [NAME]
    fixture.assert_published(".gitattributes")


def test_an_object_that_the_remote_lost_is_noticed(tmp_path: Path) -> None:
    fixture = GitLfsFixture(tmp_path)
    fixture.publish()
    commit = heads(fixture.repository)["main"]
    file = read_local_file(fixture.contents[0].folder / NAME)
    kept = fixture.repository / "lfs" / "objects" / file.sha256[:2] / file.sha256[2:4] / file.sha256
    assert fixture.target().read_back(commit)[NAME].holds(file)
    assert not kept.samefile(file.path)
    kept.chmod(0o644)
    with kept.open("r+b") as stream:
        stream.write(b"rotten")
    assert not fixture.target().read_back(commit)[NAME].holds(file)
    kept.unlink()
    assert not fixture.target("another").read_back(commit)[NAME].holds(file)
    with pytest.raises(PublishError, match="git-lfs has no object"):
        fixture.target().read_bytes(commit, NAME)


def test_nothing_is_copied_for_a_server(fixture: GitLfsFixture) -> None:
    if fixture.service is None:
        return
    sha256 = read_local_file(fixture.contents[0].folder / NAME).sha256
    objects = fixture.tmp_path / "staging" / ".git" / "lfs" / "objects"
    linked: list[bool] = []

    def look(line: str) -> None:
        if "created at" in line:
            staged = objects / sha256[:2] / sha256[2:4] / sha256
            linked.append(any(staged.samefile(each.folder / name) for each in fixture.contents for name in each.files))

    publish_branches(fixture.contents, fixture.target(), look)
    assert linked
    assert all(linked)
    assert not objects.exists(), "what has arrived takes no space here"
    found = subprocess.run(["grep", "-r", "Secret", "staging"], cwd=fixture.tmp_path, capture_output=True, check=False)
    assert found.stdout == b""
