"""A tied tensor that files store all the same: equal bytes are dropped, others are kept."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from packager.errors import SourceError
from packager.inputs.base_model import open_source
from packager.model.decoder import Decoder, forward
from packager.model.lock import Lock
from packager.pipeline.lock_recipes import lock_recipes
from packager.prove.audit import audit
from packager.recipe.file import RecipeFile
from tests.sources import open_folder
from tests.tiny_models import save_model, token_rows
from tests.tiny_recipe import build, workspace, write_inputs, write_recipe

pytestmark = pytest.mark.usefixtures("in_process")


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tied"), "llama-tied")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(write_inputs(tmp_path, "llama-tied"), {"variants": [{"branch": "main"}]})


def store_head(folder: Path, change: float) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + change}, path, {"format": "pt"})


def locked(recipe: Path) -> Lock:
    (result,) = lock_recipes([recipe], print)
    return result.lock


@pytest.mark.slow
def test_a_stored_head_that_is_the_embedding_is_left_out(tied: Path, recipe: Path) -> None:
    store_head(tied, 0.0)
    assert "lm_head.weight" not in open_folder(tied).tensors
    store_head(recipe.parent / "model", 0.0)
    assert (locked(recipe).model.tied, locked(recipe).model.own) == (("lm_head.weight",), ())


@pytest.mark.slow
def test_a_head_of_its_own_is_kept_as_transformers_keeps_it(recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = recipe.parent / "model"
    store_head(model, 0.5)
    lock = locked(recipe)
    assert (lock.model.tied, lock.model.own) == ((), ("lm_head.weight",))
    assert "values of its own" in capsys.readouterr().out
    source = open_source(RecipeFile.load(recipe), print)
    assert source.config["tie_word_embeddings"] is False
    base = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    decoder = Decoder(model, source.read, names=source.tensors, device=torch.device("cpu"), dtype=torch.float32)
    rows = token_rows(2, 16).ids
    with torch.no_grad():
        ours, theirs = decoder.logits(torch.cat(forward(decoder, rows, rows=2))), base(rows).logits
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_branch_has_the_head_and_says_that_it_is_not_tied(recipe: Path, tmp_path: Path) -> None:
    store_head(recipe.parent / "model", 0.5)
    locked(recipe)
    build(recipe, tmp_path / "dist")
    folder = workspace(tmp_path / "dist").folder("main")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
    head = load_file(folder / "model.safetensors")["lm_head.weight"]
    assert torch.equal(head, load_file(recipe.parent / "model" / "model.safetensors")["lm_head.weight"])
    assert audit(folder).errors == ()


def test_a_lock_that_calls_such_a_head_tied_is_made_anew(tied: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tied, tmp_path / "model")
    store_head(folder, 0.5)
    with pytest.raises(SourceError, match=r"lm_head.weight.*values of its own") as caught:
        open_folder(folder)
    assert "packager lock" in caught.value.hint
