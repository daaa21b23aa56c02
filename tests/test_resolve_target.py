"""Which repository an address on the command line names."""

from pathlib import Path

import pytest

from packager.errors import PublishError
from packager.publish.targets import Target
from packager.publish.targets.git import GitTarget
from packager.publish.targets.hub import HubTarget
from packager.publish.targets.local import LocalTarget
from packager.publish.targets.resolve_target import resolve_target


def resolve(address: str, dist: Path) -> tuple[Target, list[str]]:
    lines: list[str] = []
    return resolve_target(address, dist, {}, lines.append), lines


@pytest.fixture
def dist(tmp_path: Path) -> Path:
    """An output folder with one local repository."""
    (tmp_path / "dist" / "hub" / "models" / "me" / "built" / ".git").mkdir(parents=True)
    (tmp_path / "dist" / "hub" / "models" / "me" / "empty").mkdir()
    return tmp_path / "dist"


def test_a_name_below_dist_is_the_local_repository_and_that_is_said(dist: Path) -> None:
    target, (line,) = resolve("me/built", dist)
    assert isinstance(target, LocalTarget)
    assert line == f"reading {dist}/hub/models/me/built; the repository of this name on the Hub is hub:me/built"


@pytest.mark.parametrize("address", ["hub:me/built", "me/other", "me/empty", "hub:me/other"])
def test_any_other_name_is_on_the_hub(dist: Path, address: str) -> None:
    target, lines = resolve(address, dist)
    assert isinstance(target, HubTarget)
    assert target.where == f"https://huggingface.co/{address.removeprefix('hub:')}"
    assert lines == []


@pytest.mark.parametrize("address", ["https://a.b/c/d", "git@a.b:c/d", "ssh://a.b/c"])
def test_an_url_is_a_git_remote(dist: Path, address: str) -> None:
    assert isinstance(resolve(address, dist)[0], GitTarget)


def test_a_published_folder_is_the_local_repository(dist: Path) -> None:
    assert isinstance(resolve(str(dist / "hub" / "models" / "me" / "built"), dist)[0], LocalTarget)


@pytest.mark.parametrize("address", ["", "me", "hub:me", "me/../x", "me/.git", "hub:hub:me/built", "a/b/c"])
def test_anything_else_names_no_repository(dist: Path, address: str) -> None:
    with pytest.raises(PublishError, match="not the address of a repository"):
        resolve(address, dist)
