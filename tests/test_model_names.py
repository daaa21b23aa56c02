"""Kinds of base models of which no branch can be made are known by the names of their files."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from packager.errors import SourceError
from packager.inputs.model_names import check_names, left_out_line
from packager.inputs.source_files import list_source_files, safetensors_among
from packager.pipeline.plan import make_plan
from packager.recipe.file import RecipeFile
from tests.tiny_recipe import write_all

MODEL = ("config.json", "model.safetensors", "tokenizer_config.json")


@pytest.mark.parametrize(
    ("names", "hint"),
    [
        (("tokenizer.model",), "with sentencepiece and protobuf installed"),
        (("tokenizer.model.v3",), "with sentencepiece and protobuf installed"),
        (("spiece.model",), "with sentencepiece and protobuf installed"),
        (("sentencepiece.bpe.model",), "with sentencepiece and protobuf installed"),
        (("vocab.txt",), "AutoTokenizer of transformers"),
        (("vocab.json", "merges.txt"), "AutoTokenizer of transformers"),
        (("tekken.json",), "without mistral-common"),
        (("qwen.tiktoken",), "the code that the model's page names"),
        (("tiktoken.model",), "the code that the model's page names"),
    ],
)
def test_a_tokenizer_without_tokenizer_json_is_refused_with_the_way_out(names: Sequence[str], hint: str) -> None:
    with pytest.raises(SourceError, match=r"has no tokenizer\.json") as caught:
        check_names([*MODEL, *names], "a/b")
    assert caught.value.where == "a/b"
    assert f"its tokenizer is {' and '.join(names)}: " in caught.value.why
    assert hint in caught.value.hint
    assert "base_model.path" in caught.value.hint
    check_names([*MODEL, *names, "tokenizer.json"], "a/b")


@pytest.mark.parametrize("names", [(), ("vocab.json",), ("merges.txt",), ("old/tokenizer.model", "old/vocab.txt")])
def test_a_model_may_be_described_before_its_tokenizer_is_there(names: Sequence[str]) -> None:
    check_names([*MODEL, *names], "a/b")


@pytest.mark.parametrize(
    "names",
    [
        ("adapter_config.json", "adapter_model.safetensors"),
        ("adapter_config.json", "adapter_model.bin", "tokenizer.json", "tokenizer_config.json"),
        ("adapter_config.json", "adapter_model.safetensors", "config.json", "training_args.bin", "optimizer.pt"),
        ("adapter_config.json", "adapter_model.safetensors", "checkpoint-5/model.safetensors", "config.json"),
    ],
)
def test_an_adapter_is_refused_with_the_way_out(names: Sequence[str]) -> None:
    with pytest.raises(SourceError, match="is an adapter") as caught:
        check_names(names, "a/b")
    assert caught.value.where == "a/b: adapter_config.json"
    assert "merge_and_unload" in caught.value.hint
    assert "base_model.path" in caught.value.hint


def test_an_adapter_beside_a_model_is_left_out_and_named() -> None:
    left = ["adapter_config.json", "adapter_model.bin", "trainer_state.json"]
    check_names([*MODEL, "tokenizer.json", *left], "a/b")
    assert left_out_line(left) == (
        "not used and not copied of the base model: adapter_config.json, adapter_model.bin, trainer_state.json; "
        "with peft installed, transformers loads adapter_config.json in the place of the model's own weights"
    )
    shards = ["part-1.safetensors", "part-2.safetensors"]
    assert safetensors_among([*shards, "adapter_model.safetensors"]) == tuple(shards)


def test_a_folder_is_refused_by_its_plan_and_nothing_of_it_is_read(tmp_path: Path) -> None:
    recipe = RecipeFile.load(write_all(tmp_path))
    model = tmp_path / "model"
    (model / "tokenizer.json").rename(model / "tokenizer.model")
    with pytest.raises(SourceError, match=r"has no tokenizer\.json") as caught:
        make_plan(recipe)
    assert caught.value.where == str(model)
    for path in model.glob("*"):
        path.unlink()
    (model / "adapter_config.json").write_text("{")
    with pytest.raises(SourceError, match="is an adapter"):
        list_source_files(model)
