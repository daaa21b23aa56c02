"""Every command of every published card, run against the loopback Hub.

The cards are those of the published repositories. What a card's Python code does with a model needs the loaders'
environments: tests/test_release.py runs it, with the demo from a local target.
"""

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from packager.card import HUB
from packager.card.markdown import CodeBlock, extract_code_blocks
from packager.prove.audit import audit
from packager.system.files import file_record
from packager.variant import Layout, Place, place_of
from tests import tiny_recipe
from tests.git_servers import require_git_lfs
from tests.loopback_hub import Account, LoopbackHub
from tests.reader_fixtures import (
    BIN,
    Environ,
    assert_audit_passes,
    fetch,
    new_reader,
    on_the_hub,
    published_files,
    succeed,
)
from tests.tiny_recipe import ACT_ORDER, BRANCHES, MAIN

pytestmark = pytest.mark.slow

TOKEN = "hf_writes_0123456789"  # noqa: S105 - the loopback Hub's
POINTER = re.compile(rb"version https://git-lfs\.github\.com/spec/v1\noid sha256:([0-9a-f]{64})\nsize ([0-9]+)\n")
ATTRIBUTES = ".gitattributes"  # the Hub's, in every repository


class Release:
    """A recipe that was built, and published to a loopback Hub by the command line."""

    def __init__(self, folder: Path, hub: LoopbackHub, layout: Layout) -> None:
        self.hub, self.layout, self._home = hub, layout, folder
        recipe = tiny_recipe.write_all(folder, {"repository.target": "hub", "repository.layout": layout})
        tiny_recipe.build(recipe, folder / "dist")
        self.built = {branch: tiny_recipe.workspace(folder / "dist").folder(branch) for branch in BRANCHES}
        self._environ = on_the_hub(new_reader(folder / "home", f"{hub.endpoint}/"), hub.endpoint, xet=True)
        # The command line turns Xet off where it is not the Hub's, unless a variable turns it on.
        self._environ |= {"HF_TOKEN": TOKEN, **({"HF_HUB_DISABLE_XET": "0"} if hub.xet else {})}
        self._command: list[str | Path] = [f"{BIN}/packager", "publish", recipe, "--dist", folder / "dist", "--yes"]
        self.publish()

    def publish(self) -> None:
        succeed(self._command, self._environ, self._home)

    def place(self, branch: str) -> Place:
        return place_of(tiny_recipe.REPOSITORY, self.layout, branch)

    def blocks(self, branch: str) -> list[CodeBlock]:
        """Return the code of a variant's published card that can be run."""
        place = self.place(branch)
        card = self.hub.repository(place.repository).git("show", f"{place.revision}:README.md").decode()
        return [block for block in extract_code_blocks(card) if block.run]

    def commands(self, branch: str, program: str) -> Iterator[tuple[str, str]]:
        """Yield each command of a variant's card that runs `program`, and the variant that it is to fetch.

        The card of main names another branch as an example; there its name is replaced by main's, too.
        """
        (block,) = [block for block in self.blocks(branch) if block.text.startswith(program)]
        if self.layout == "repos" or branch != MAIN:
            yield block.text, branch
        else:
            assert ACT_ORDER in block.text
            yield block.text, ACT_ORDER
            yield block.text.replace(ACT_ORDER, MAIN), MAIN


@pytest.fixture(scope="module", params=["branches", "repos"])
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Release]:
    """One layout on a server without Xet, the other on one that has it."""
    folder = tmp_path_factory.mktemp(request.param)
    xet = request.param == "repos"
    with LoopbackHub(folder / "hub", tokens={TOKEN: Account("tester")}, xet=xet) as hub:
        (folder / "project").mkdir()
        yield Release(folder / "project", hub, request.param)


@pytest.fixture
def reader(release: Release, tmp_path: Path) -> dict[str, str]:
    """The environment of a reader whose Hub is the loopback Hub, for git and for the Hub's own clients."""
    environ = new_reader(tmp_path / "home", f"{release.hub.endpoint}/")
    return on_the_hub(environ, release.hub.endpoint, xet=release.hub.xet)


def assert_holds(fetched: Path, built: Path) -> None:
    """Check that a reader has exactly what was built, and the Hub's own file."""
    found = published_files(fetched)
    assert found.pop(ATTRIBUTES)
    assert found == published_files(built)


@pytest.mark.parametrize("branch", BRANCHES)
def test_the_hf_command_downloads_the_variant(branch: str, release: Release, reader: Environ, tmp_path: Path) -> None:
    release.hub.requests.clear()
    for number, (command, variant) in enumerate(release.commands(branch, "hf download ")):
        fetched = fetch(command, reader, tmp_path / str(number))
        assert_holds(fetched, release.built[variant])
        assert audit(fetched).findings == ()
    asked = {request.path.split("/")[1] for request in release.hub.requests if request.status in (200, 206)}
    assert ("_xet" in asked, "_lfs" in asked) == (release.hub.xet, not release.hub.xet)


@pytest.mark.parametrize("branch", BRANCHES)
def test_the_python_code_downloads_the_variant(branch: str, release: Release, reader: Environ, tmp_path: Path) -> None:
    for command, variant in release.commands(branch, "from huggingface_hub import snapshot_download\n"):
        fetched = succeed([sys.executable, "-c", command], reader, tmp_path).strip()
        assert_holds(Path(fetched), release.built[variant])


@pytest.mark.parametrize("branch", BRANCHES)
def test_without_git_lfs_a_clone_holds_pointers_that_the_audit_refuses(
    branch: str, release: Release, reader: Environ, tmp_path: Path
) -> None:
    for number, (command, variant) in enumerate(release.commands(branch, "git clone ")):
        assert f" {HUB}/" in command
        fetched = fetch(command, reader, tmp_path / str(number))
        found, built = published_files(fetched), release.built[variant]
        pointers = {name: POINTER.fullmatch((fetched / name).read_bytes()) for name in found}
        assert [name for name, pointer in pointers.items() if pointer] == ["model.safetensors"]
        digests = {name: pointer[1].decode() if pointer else found[name] for name, pointer in pointers.items()}
        assert digests.pop(ATTRIBUTES)
        assert digests == published_files(built)
        size = int((pointers["model.safetensors"] or [0, 0, 0])[2])
        assert size == file_record(built / "model.safetensors").size_bytes
        assert not audit(fetched).passed


@pytest.mark.release
@pytest.mark.parametrize("branch", BRANCHES)
def test_with_git_lfs_a_clone_is_the_variant(branch: str, release: Release, reader: Environ, tmp_path: Path) -> None:
    require_git_lfs()
    succeed(["git", "lfs", "install", "--skip-repo"], reader, tmp_path)
    for number, (command, variant) in enumerate(release.commands(branch, "git clone ")):
        fetched = fetch(command, reader, tmp_path / str(number))
        assert_holds(fetched, release.built[variant])
        succeed(["git", "lfs", "fsck"], reader, fetched)
        assert succeed(["git", "status", "--porcelain"], reader, fetched) == ""
        assert_audit_passes(fetched, reader)


def test_downloaded_files_are_not_sent_again(release: Release) -> None:
    before = len(release.hub.requests)
    release.publish()
    written = [request for request in release.hub.requests[before:] if request.method != "GET"]
    assert [request for request in written if request.status != 409] == []  # a collection that is there is a conflict
