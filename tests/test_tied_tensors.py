"""A tied tensor that files store all the same: equal bytes are dropped, other values stop the build."""

from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from packager.errors import SourceError
from tests.sources import open_folder
from tests.tiny_models import save_model


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("tied"), "llama-tied")


def store_head(folder: Path, change: float) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"] + change}, path, {"format": "pt"})


def test_a_stored_head_that_is_the_embedding_is_left_out(tied: Path) -> None:
    store_head(tied, 0.0)
    assert "lm_head.weight" not in open_folder(tied).tensors


def test_a_stored_head_with_values_of_its_own_is_refused_with_both_ways_out(tied: Path) -> None:
    store_head(tied, 0.5)
    with pytest.raises(SourceError, match=r"lm_head.weight.*values of its own") as caught:
        open_folder(tied)
    assert "tie_word_embeddings" in (caught.value.hint or "")
    assert "remove the tensor" in (caught.value.hint or "")
