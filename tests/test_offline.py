"""Builds with HF_HUB_OFFLINE=1: a full cache needs no Hub, and what an incomplete one lacks is named."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest

from packager.errors import SourceError
from packager.inputs.base_model import open_source
from packager.inputs.chat_template import chat_template_digest
from packager.pipeline.plan import make_plan
from packager.receipt import FileRecord
from packager.recipe.file import RecipeFile
from packager.recipe.lock_file import lock_path, lock_text
from packager.system.files import file_record
from tests.locks import lock_of
from tests.loopback_hub import Account, LoopbackHub
from tests.publish_fixtures import log_in
from tests.samples import sampled
from tests.tiny_recipe import build, write_all, write_recipe

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # of the Hub's client
TOKEN = "hf_offline_0123456789"  # noqa: S105 - the loopback Hub's


@dataclass(frozen=True, kw_only=True)
class Offline:
    """A recipe whose base model is on a Hub, its cache, and the Hub."""

    recipe: Path
    commit: str
    cache: Path
    hub: LoopbackHub

    def lock(self, files: dict[str, FileRecord]) -> RecipeFile:
        """Write the lock with records of `files` and load the recipe."""
        model = self.recipe.parent / "model"
        lock = lock_of(
            json.loads((model / "config.json").read_text()), "tester/tiny", self.commit,
            chat_template=chat_template_digest(model),
        )  # fmt: skip
        base = lock.base_model.model_copy(update={"files": files})
        lock_path(self.recipe).write_text(lock_text(lock.model_copy(update={"base_model": base})))
        return RecipeFile.load(self.recipe)

    def locked(self) -> RecipeFile:
        """Write the lock with all files, as `packager lock` does."""
        paths = sorted(path for path in (self.recipe.parent / "model").iterdir() if path.suffix != ".md")
        return self.lock({path.name: file_record(path) for path in paths})

    def snapshot(self) -> Path:
        return self.cache / "models--tester--tiny" / "snapshots" / self.commit


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Offline]:
    """The model is in the cache, HF_HUB_OFFLINE is set, and the Hub listens: a request would be seen."""
    write_all(tmp_path)
    with LoopbackHub(tmp_path / "hub", tokens={TOKEN: Account("tester")}) as hub:
        log_in(hub, TOKEN, monkeypatch)
        constants = huggingface_hub.constants
        address = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        api = huggingface_hub.HfApi()
        api.create_repo("tester/tiny")
        commit = api.upload_folder(repo_id="tester/tiny", folder_path=tmp_path / "model").oid
        recipe = write_recipe(tmp_path, {"base_model": {"id": "tester/tiny", "revision": commit}})
        found = Offline(recipe=recipe, commit=commit, cache=tmp_path / "cache", hub=hub)
        open_source(found.locked(), lambda _: None)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        hub.requests.clear()
        yield found
        assert hub.requests == []


@pytest.mark.slow
def test_a_full_cache_is_planned_and_built_without_a_request(offline: Offline, tmp_path: Path) -> None:
    recipe = offline.locked()
    make_plan(recipe)
    result = build(recipe, tmp_path / "dist")
    assert result.receipts[0].provenance.base_model.revision == offline.commit


@pytest.mark.parametrize("locked", [True, False])
@pytest.mark.parametrize("recorded", [True, False])
def test_a_full_cache_is_read_without_a_request(
    offline: Offline, monkeypatch: pytest.MonkeyPatch, locked: bool, recorded: bool
) -> None:
    recipe = offline.locked() if locked else offline.lock({})
    if not recorded:
        forget_record(monkeypatch)
    lines: list[str] = []
    assert open_source(recipe, lines.append).folder == offline.snapshot()
    assert "HF_HUB_OFFLINE is set" in lines[0]


def forget_record(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hide the client's record of a commit's files; clients before 2.0 keep none."""
    monkeypatch.setattr(huggingface_hub, "get_cached_repo_tree", None, raising=False)


def test_a_full_cache_is_read_when_the_hub_has_gone(offline: Offline, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = offline.locked()
    offline.hub.__exit__()
    assert open_source(recipe, lambda _: None).record.revision == offline.commit
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("time.sleep", lambda _: None)
    with pytest.raises(SourceError, match="could not be downloaded") as caught:
        open_source(recipe, lambda _: None)
    assert "HF_HUB_OFFLINE=1" in caught.value.hint


@pytest.mark.parametrize("recorded", [True, False])
@pytest.mark.parametrize(
    "name",
    sampled(["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"], "model.safetensors"),
)
def test_a_file_that_the_cache_lacks_is_named_with_the_command(
    offline: Offline, monkeypatch: pytest.MonkeyPatch, name: str, recorded: bool
) -> None:
    recipe = offline.locked()
    (offline.snapshot() / name).unlink()
    if not recorded:
        forget_record(monkeypatch)
    with pytest.raises(SourceError, match="cache lacks a file of the model tester/tiny") as caught:
        open_source(recipe, lambda _: None)
    assert caught.value.where == f"{name} at {offline.commit[:12]}"
    assert caught.value.hint.endswith(f": hf download tester/tiny {name} --revision {offline.commit}")


@pytest.mark.parametrize("left", [True, False])
def test_a_cache_that_knows_no_weights_is_refused_with_the_command(
    offline: Offline, monkeypatch: pytest.MonkeyPatch, left: bool
) -> None:
    recipe = offline.lock({})
    forget_record(monkeypatch)
    (offline.snapshot() / "model.safetensors").unlink()
    if not left:
        shutil.rmtree(offline.cache)
    with pytest.raises(SourceError, match="cache lacks the files of the model tester/tiny") as caught:
        open_source(recipe, lambda _: None)
    assert caught.value.hint.endswith(f": hf download tester/tiny --revision {offline.commit}")


def test_a_file_of_the_cache_with_another_digest_is_refused(offline: Offline) -> None:
    recipe = offline.locked()
    path = offline.snapshot() / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.unlink()
    path.write_bytes(data)
    with pytest.raises(SourceError, match="not those that the lock was made of"):
        open_source(recipe, lambda _: None)
