"""Which files of a tokenizer are made anew for a branch, and what they say."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from packager.errors import CalibrationError
from packager.inputs import branch_tokenizer
from packager.model.tokenizer_file import affixes, config_of_file, is_read_otherwise, other_parts
from packager.pipeline import flow
from packager.pipeline.lock_recipes import lock_recipes
from packager.recipe.file import RecipeFile
from packager.system.terminal import Terminal
from tests.tiny_recipe import options, workspace, write_all

pytestmark = pytest.mark.usefixtures("in_process")

Json = dict[str, Any]
TEXT = {"Sequence": {"id": "A", "type_id": 0}}


def special(*names: str) -> list[Json]:
    return [{"SpecialToken": {"id": name, "type_id": 0}} for name in names]


def template(*parts: Json) -> Json:
    return {"type": "TemplateProcessing", "single": list(parts)}


PROCESSORS: Mapping[str, tuple[object, tuple[str, ...], tuple[str, ...]]] = {
    "none": (None, (), ()),
    "bytes": ({"type": "ByteLevel", "trim_offsets": True}, (), ()),
    "a text alone": (template(TEXT), (), ()),
    "a start": (template(*special("<s>"), TEXT), ("<s>",), ()),
    "an end": (template(TEXT, *special("</s>")), (), ("</s>",)),
    "GLM's two": (template(*special("[gMASK]", "<sop>"), TEXT), ("[gMASK]", "<sop>"), ()),
    "BERT's": ({"type": "BertProcessing", "cls": ["[CLS]", 1], "sep": ["[SEP]", 2]}, ("[CLS]",), ("[SEP]",)),
    "Llama 3's": (
        {"type": "Sequence", "processors": [{"type": "ByteLevel"}, template(*special("<s>"), TEXT)]},
        ("<s>",),
        (),
    ),
    "one around another": (
        {
            "type": "Sequence",
            "processors": [template(*special("b"), TEXT, *special("c")), template(*special("a"), TEXT)],
        },
        ("a", "b"),
        ("c",),
    ),
    "no object": (["<s>"], (), ()),
}


@pytest.mark.parametrize(("processor", "before", "after"), PROCESSORS.values(), ids=PROCESSORS)
def test_the_special_tokens_around_a_text_are_read_from_the_post_processor(
    processor: object, before: tuple[str, ...], after: tuple[str, ...]
) -> None:
    assert affixes({"post_processor": processor}) == (before, after)


START = {"post_processor": template(*special("<s>"), TEXT)}
SPACED = {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}}
READ: Mapping[str, tuple[Json, Json, bool]] = {
    "flags that say what the file does": ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": True}, START, False),
    "defaults that say it": ({"tokenizer_class": "GemmaTokenizerFast"}, START, False),
    "a flag against the file": ({"tokenizer_class": "LlamaTokenizer", "add_bos_token": False}, START, True),
    "a default against the file": ({"tokenizer_class": "LlamaTokenizer"}, {}, True),
    "a default that adds none": ({"tokenizer_class": "GPTNeoXTokenizerFast"}, {}, False),
    "an end that the file does not add": ({"tokenizer_class": "CohereTokenizer", "add_eos_token": True}, START, True),
    "flags that no release reads": ({"tokenizer_class": "Qwen2Tokenizer", "add_bos_token": True}, {}, False),
    "a prefix space of Llama's": ({"tokenizer_class": "LlamaTokenizerFast", "add_prefix_space": False}, START, True),
    "a prefix space of the file": ({"tokenizer_class": "PreTrainedTokenizerFast"}, SPACED, True),
    "a prefix space of both": ({"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}, SPACED, False),
    "made of slow files": ({"tokenizer_class": "Qwen2Tokenizer", "from_slow": True}, {}, True),
    "no class": ({}, {}, True),
    "a class of no name": ({"tokenizer_class": None}, {}, True),
}


@pytest.mark.parametrize(("config", "document", "otherwise"), READ.values(), ids=READ)
def test_what_transformers_4_reads_otherwise_is_known(config: Json, document: Json, otherwise: bool) -> None:
    tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    assert is_read_otherwise(config, document, tokens) is otherwise
    made = config_of_file(config, document, {"padding_side": "left"})
    assert not is_read_otherwise(made, document, tokens)


def test_a_config_of_the_file_keeps_what_it_had_and_says_what_the_file_does() -> None:
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": False, "add_prefix_space": True,
              "padding_side": "right", "from_slow": True}  # fmt: skip
    assert config_of_file(config, START, {"padding_side": "left", "bos_token": "<s>"}) == {
        "tokenizer_class": "PreTrainedTokenizerFast", "legacy": False, "add_bos_token": True, "padding_side": "right",
        "bos_token": "<s>",
    }  # fmt: skip


def test_equal_parts_of_two_spellings_are_equal() -> None:
    own = {"post_processor": None, "model": {"type": "BPE", "continuing_subword_prefix": ""}, "decoder": None}
    made = {"post_processor": template(TEXT), "model": {"type": "BPE", "continuing_subword_prefix": None}}
    assert other_parts(own, made) == {}
    assert other_parts(own, {**made, **START}) == START
    assert list(other_parts(own, {**made, "model": {"type": "Unigram"}})) == ["model"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A base model of which transformers 4 and 5 read the tokenizer otherwise than its file says."""
    path = write_all(tmp_path, {"variants": [{"branch": "main"}]})
    own: Mapping[str, Json] = {
        "tokenizer_config.json": {"tokenizer_class": "GPT2TokenizerFast"},
        "tokenizer.json": SPACED,
    }
    for name, change in own.items():
        document = json.loads((tmp_path / "model" / name).read_text())
        document.pop("backend", None)
        (tmp_path / "model" / name).write_text(json.dumps({**document, **change}))
    return path


CHANGES = (
    'tokenizer_config.json: tokenizer_class is "PreTrainedTokenizerFast" and was "GPT2TokenizerFast": so that every '
    "release takes tokenizer.json as it is",
)


@pytest.mark.slow
def test_a_lock_names_what_a_branch_gets_otherwise(recipe: Path) -> None:
    (locked,) = lock_recipes([recipe], lambda _: None)
    assert set(CHANGES) <= set(locked.changes)


@pytest.mark.slow
def test_a_branch_holds_the_files_that_were_made(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    list(lock_recipes([recipe], lambda _: None))
    flow.build(RecipeFile.load(recipe), options(tmp_path / "dist"), Terminal())
    branch = workspace(tmp_path / "dist").folder("main")
    config, document = (
        json.loads((branch / name).read_bytes()) for name in ("tokenizer_config.json", "tokenizer.json")
    )
    assert config["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert document["pre_tokenizer"]["add_prefix_space"] is config["add_prefix_space"] is True  # as the file had it
    said = " ".join(capsys.readouterr().err.split())
    assert all(f"not as the base model has it: {change}" in said for change in CHANGES)


@pytest.mark.slow
def test_a_tokenizer_that_cannot_be_written_is_refused_with_the_way_out(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(branch_tokenizer, "_settings", lambda tokenizer: type(tokenizer).__name__)
    with pytest.raises(CalibrationError, match="so that every runtime reads it alike") as caught:
        list(lock_recipes([recipe], lambda _: None))
    assert caught.value.where.endswith("tokenizer_config.json")
    assert "save_pretrained" in caught.value.hint
