"""Reading base models and datasets from the Hub, at the client's own calls: what it returns and what it raises."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants
from huggingface_hub import errors as hub

from packager.errors import SourceError
from packager.inputs.base_model import open_source
from packager.inputs.hub_models import access_problem
from packager.recipe.file import RecipeFile
from packager.system.files import sha256_file
from tests.hub_http import httpx
from tests.locks import write_lock
from tests.tiny_recipe import build, write_all, write_recipe

REVISION = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


@pytest.fixture
def recipe(tmp_path: Path) -> RecipeFile:
    """A recipe whose base model is on the Hub, with its lock."""
    write_all(tmp_path)
    path = write_recipe(tmp_path, {"base_model": {"id": "tester/tiny", "revision": REVISION}})
    write_lock(path, json.loads((tmp_path / "model" / "config.json").read_text()), "tester/tiny", REVISION)
    return RecipeFile.load(path)


class FakeHub:
    """Answers the two calls that fetching a model makes, from a folder, and records the requests."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.asked: list[tuple[Any, ...]] = []
        self.wrong_digest = ""
        self.hidden: tuple[str, ...] = ()
        self.sizes: dict[str, int] = {}
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", self._model_info)
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self._snapshot_download)

    def _model_info(self, repo_id: str, *, revision: str, files_metadata: bool) -> SimpleNamespace:
        self.asked.append(("model_info", repo_id, revision, files_metadata))
        siblings = []
        for path in sorted(self.folder.iterdir()):
            if path.name in self.hidden:
                continue
            digest = "0" * 64 if path.name == self.wrong_digest else sha256_file(path)
            lfs = SimpleNamespace(sha256=digest) if path.suffix == ".safetensors" else None
            siblings.append(SimpleNamespace(rfilename=path.name, lfs=lfs, size=self.sizes.get(path.name, 1)))
        return SimpleNamespace(sha=revision, siblings=siblings)

    def _snapshot_download(self, repo_id: str, *, revision: str, allow_patterns: list[str]) -> str:
        is_small = "model.safetensors" not in allow_patterns
        self.asked.append(("small files" if is_small else "weights", repo_id, revision))
        there = {path.name for path in self.folder.iterdir()}  # no README, no code, no pickle
        assert set(allow_patterns) == (there - {"model.safetensors"} if is_small else {"model.safetensors"})
        return str(self.folder)


@pytest.fixture
def fake_hub(recipe: RecipeFile, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    return FakeHub(recipe.folder / "model", monkeypatch)


@pytest.mark.slow
def test_a_model_on_the_hub_is_read_at_its_commit_and_builds(recipe: RecipeFile, fake_hub: FakeHub, tmp_path: Path):
    result = build(recipe, tmp_path / "dist")
    record = result.receipts[0].provenance.base_model
    assert record.revision == REVISION
    assert fake_hub.asked == [
        ("model_info", "tester/tiny", REVISION, True),
        ("small files", "tester/tiny", REVISION),
        ("weights", "tester/tiny", REVISION),
    ]
    # The commit identifies the bytes: a second build makes no request.
    assert build(recipe, tmp_path / "dist").nothing_to_do
    assert len(fake_hub.asked) == 3


def test_small_files_that_cannot_be_published_are_refused_before_the_weights_are_downloaded(
    recipe: RecipeFile, fake_hub: FakeHub, tmp_path: Path
):
    path = fake_hub.folder / "generation_config.json"
    path.write_text(json.dumps({"do_sample": "yes"}))
    with pytest.raises(SourceError, match="cannot be part of a branch") as caught:
        build(recipe, tmp_path / "dist")
    assert 'generation_config.json: do_sample: do_sample is "yes", expected true or false' in caught.value.why
    assert "base_model.path" in caught.value.hint
    assert [call[0] for call in fake_hub.asked] == ["model_info", "small files"]


def test_a_download_with_another_digest_is_refused(recipe: RecipeFile, fake_hub: FakeHub):
    fake_hub.wrong_digest = "model.safetensors"
    with pytest.raises(SourceError, match="damaged") as caught:
        open_source(recipe, lambda _: None)
    assert "model.safetensors" in caught.value.where


def test_a_text_that_is_too_large_is_refused_before_the_download(recipe: RecipeFile, fake_hub: FakeHub):
    fake_hub.sizes = {"tokenizer.json": 10**12}
    with pytest.raises(SourceError, match="too large") as caught:
        open_source(recipe, lambda _: None)
    assert caught.value.where == "tester/tiny: tokenizer.json"
    assert [call[0] for call in fake_hub.asked] == ["model_info"]


def test_a_revision_without_safetensors_is_refused_before_the_download(recipe: RecipeFile, fake_hub: FakeHub):
    fake_hub.hidden = ("model.safetensors",)
    with pytest.raises(SourceError, match="no safetensors"):
        open_source(recipe, lambda _: None)
    assert [call[0] for call in fake_hub.asked] == ["model_info"]


def test_a_config_that_differs_from_the_locks_is_refused(recipe: RecipeFile, fake_hub: FakeHub):
    config = {**recipe.config, "intermediate_size": 64}
    write_lock(recipe.path, config, "tester/tiny", REVISION)
    recipe = RecipeFile.load(recipe.path)
    with pytest.raises(SourceError, match="not the one that the lock was made of") as caught:
        open_source(recipe, lambda _: None)
    assert caught.value.why == "intermediate_size is 96, in the lock 64"


def response(status: int) -> httpx.Response:
    return httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co/x"))


FAILURES = [
    (hub.GatedRepoError("403 gated", response=response(403)), "gated", "accept the licence"),
    (hub.RepositoryNotFoundError("404", response=response(404)), "not on the Hub, or is private", "hf auth login"),
    (hub.RevisionNotFoundError("404", response=response(404)), "no such revision", "full commit id"),
    (hub.HfHubHTTPError("503 Service Unavailable", response=response(503)), "could not be downloaded", "run the same"),
    (hub.OfflineModeIsEnabled("offline"), "could not be asked for", "unset HF_HUB_OFFLINE"),
    (ConnectionError("no route to host"), "could not be downloaded", "run the same"),
    (httpx.ConnectError("name resolution failed"), "could not be downloaded", "run the same"),
]


@pytest.mark.parametrize(("failure", "what", "hint"), FAILURES, ids=lambda value: type(value).__name__)
def test_an_error_of_the_client_becomes_one_with_a_hint(
    recipe: RecipeFile, monkeypatch: pytest.MonkeyPatch, failure: Exception, what: str, hint: str
):
    def fail(*_: object, **__: object) -> None:
        raise failure

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", fail)
    with pytest.raises(SourceError) as caught:
        open_source(recipe, lambda _: None)
    assert what in caught.value.what
    assert hint in caught.value.hint
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", fail)
    assert what in access_problem("tester/tiny")


def test_access_to_an_open_model_is_no_problem(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(huggingface_hub.HfApi, "auth_check", lambda _self, _id: None)
    assert access_problem("tester/tiny") == ""
