"""Tokenizer files with odd values, through everything that a build does with texts: an error of ours, or none."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from packager.errors import PackagerError
from packager.inputs.base_model import check_folder_of, open_source
from packager.inputs.texts import prepare
from packager.recipe.file import RecipeFile
from tests.tiny_recipe import write_all

ODD: tuple[Any, ...] = (True, -1, 10**30, 0.5, "", "x" * 10_000, "\x1b[2J", [], {}, [None], {"a": {}}, "/etc/passwd")
KEYS = {
    "tokenizer_config.json": (
        "tokenizer_class", "bos_token", "eos_token", "pad_token", "chat_template", "model_max_length", "auto_map",
        "added_tokens_decoder", "extra_special_tokens", "additional_special_tokens", "split_special_tokens", "backend",
        "add_bos_token", "padding_side", "clean_up_tokenization_spaces", "name_or_path", "model_type",
    ),
    "tokenizer.json": (
        "model", "added_tokens", "pre_tokenizer", "normalizer", "post_processor", "decoder", "truncation", "padding",
        "version",
    ),
    "special_tokens_map.json": ("bos_token", "unk_token", "x"),
    "added_tokens.json": ("old", "<new>"),
    "generation_config.json": ("eos_token_id",),
    "config.json": ("bos_token_id", "rope_scaling", "rope_parameters", "hidden_act", "auto_map", "sliding_window"),
}  # fmt: skip


_MAX_TEXT = 6000


def cases() -> Iterator[tuple[str, str, Any]]:
    for name, keys in KEYS.items():
        for key in keys:
            for value in ODD:
                yield name, key, value


def outcome(folder: Path, name: str, key: str, value: Any) -> str:
    """Return what a build says of a base model with another value of one key, "" where it says nothing."""
    path = folder / "model" / name
    document = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**document, key: value}), encoding="utf-8")
    try:
        recipe = RecipeFile.load(folder / "recipe.yaml")
        check_folder_of(recipe)
        prepare(recipe, open_source(recipe, lambda _: None))
    except PackagerError as error:
        return str(error)
    return ""


def check_cases(tmp_path: Path, chosen: list[tuple[str, str, Any]]) -> None:
    write_all(tmp_path / "sound")
    wrong = []
    for number, (name, key, value) in enumerate(chosen):
        folder = Path(shutil.copytree(tmp_path / "sound", tmp_path / str(number)))
        try:
            text = outcome(folder, name, key, value)
            if len(text) > _MAX_TEXT:
                wrong.append((name, key, str(value)[:40], text[:200]))
        except Exception as error:  # noqa: BLE001, all are collected
            wrong.append((name, key, str(value)[:40], f"{type(error).__name__}: {error}"[:200]))
        shutil.rmtree(folder)
    assert wrong == []


def test_a_few_odd_values_of_a_tokenizer(tmp_path: Path) -> None:
    check_cases(tmp_path, list(cases())[::60])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", [0, 5])  # so that workers share them
def test_some_odd_values_of_a_tokenizer(tmp_path: Path, first: int) -> None:
    """Every fifth case, which is two or three values of each key, and each value of some keys."""
    check_cases(tmp_path, list(cases())[first::10])


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("first", range(4))
def test_odd_values_of_a_tokenizer(tmp_path: Path, first: int) -> None:
    check_cases(tmp_path, list(cases())[first::4])
