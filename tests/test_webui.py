"""text-generation-webui's way to download `repo:branch`, against the loopback Hub."""

from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError

import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, constants

from packager.variant import branch_name, branch_problem
from tests.loopback_hub import Account, LoopbackHub
from tests.webui_download import webui_download

pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

REPO = "acme/tiny-GPTQ"
BRANCH = branch_name(bits=4, group_size=32, act_order="full")
TAKEN = (
    "README.md", "config.json", "generation_config.json", "model.safetensors", "provenance.json",
    "quantize_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "LICENSE.txt",
)  # fmt: skip
LEFT = ("Notice", "chat_template.jinja", "quality-light.png", ".gitattributes")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub with pages of three entries, and a repository of two branches whose files differ."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    with LoopbackHub(tmp_path / "hub", tokens={"hf_write": Account("alice", orgs=("acme",))}, page_size=3) as hub:
        api = HfApi(endpoint=hub.endpoint, token="hf_write")  # noqa: S106 - a test's
        api.create_repo(REPO)
        api.create_branch(REPO, branch=BRANCH)
        for branch in ("main", BRANCH):
            additions = [CommitOperationAdd(name, content(branch, name)) for name in (*TAKEN, *LEFT[:-1])]
            api.create_commit(REPO, additions, commit_message="all", revision=branch)
        yield hub
    huggingface_hub.close_session()


def content(branch: str, name: str) -> bytes:
    front = "---\nlicense: mit\n---\n" if name == "README.md" else ""
    return front.encode() + f"{branch} {name}\n".encode() * 40


@pytest.mark.parametrize(
    ("asked", "branch", "folder"),
    [(REPO, "main", "acme_tiny-GPTQ"), (f"{REPO}:{BRANCH}", BRANCH, f"acme_tiny-GPTQ_{BRANCH}")],
)
def test_a_branch_is_downloaded_by_its_name(
    hub: LoopbackHub, asked: str, branch: str, folder: str, tmp_path: Path
) -> None:
    """The card says what is left out, and names the folder that the page then offers."""
    found = webui_download(hub.endpoint, asked, tmp_path / "models")
    assert found.folder == tmp_path / "models" / folder
    assert sorted(found.files) == sorted(TAKEN)
    for name in TAKEN:
        assert (found.folder / name).read_bytes() == content(branch, name)
    assert found.checked() == list(found.digests)
    assert "model.safetensors" in found.digests
    pages = [call for call in hub.requests if f"/tree/{branch}" in call.path]
    assert len(pages) == 6  # 14 entries by three, and an empty page


def test_a_hub_that_ignores_the_cursor_is_noticed(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """olah 0.5.4 does: the script then never ends."""
    hub.page_size = 1000
    monkeypatch.setattr("tests.loopback_hub.listings.first_of_page", lambda _cursor, _items: 0)
    with pytest.raises(ValueError, match="does not end"):
        webui_download(hub.endpoint, REPO, tmp_path / "models")


def test_every_name_of_a_branch_is_one_that_the_script_takes() -> None:
    for order in ("none", "group", "static", "full"):
        name = branch_name(bits=4, group_size=-1, act_order=order)
        assert branch_problem(name) == ""
        with pytest.raises(URLError, match="refused"):  # it gets as far as the address
            webui_download("http://127.0.0.1:1", f"a/b:{name}", Path("nowhere"))
    with pytest.raises(ValueError, match="invalid branch name"):
        webui_download("http://127.0.0.1:1", "a/b:c/d", Path("nowhere"))
