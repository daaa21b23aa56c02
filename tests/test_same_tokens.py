"""The tokenizer of a branch gives the ids and the chats of its base model's, in the runtimes of a recipe."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from packager.inputs.chat_template import template_beside
from packager.inputs.source_files import read_small
from packager.model.branch_config import branch_file
from packager.model.branch_rules import ModelFacts
from packager.receipt import CONFIG, TOKENIZER, TOKENIZER_CONFIG, TOKENIZER_FILES
from tests import same_tokens

Change = Callable[[dict[str, Any], dict[str, Any]], object]


def _nothing(_: dict[str, Any], __: dict[str, Any]) -> None:
    """Leave what transformers 5 wrote."""


def _more_tokens(config: dict[str, Any], _: dict[str, Any]) -> None:
    config["extra_special_tokens"] = ["<extra>"]


def _adds_bos(_: dict[str, Any], tokenizer: dict[str, Any]) -> None:
    tokenizer["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
    }


def _old(config: dict[str, Any], _: dict[str, Any]) -> None:
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    config["additional_special_tokens"] = ["<extra>"]


def _cleaned_up(config: dict[str, Any], tokenizer: dict[str, Any]) -> None:
    _old(config, tokenizer)
    config["clean_up_tokenization_spaces"] = True
    del config["backend"]


def _another_template(config: dict[str, Any], _: dict[str, Any]) -> None:
    config["chat_template"] = "{{ 'another' }}"


CHANGES: Mapping[str, Change] = {
    "as transformers 5 writes it": _nothing, "more special tokens": _more_tokens, "a post-processor": _adds_bos,
    "of transformers 4": _cleaned_up, "of both": _old, "another template in the config": _another_template,
}  # fmt: skip


@pytest.fixture(params=list(CHANGES))
def base(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a base model without weights."""
    pytest.importorskip("torch")
    from tests.tiny_recipe import save_tokenizer

    folder = tmp_path / "base"
    folder.mkdir()
    save_tokenizer(folder)
    (folder / CONFIG).write_text(json.dumps({"model_type": "llama", "vocab_size": 128}))
    documents = {name: json.loads((folder / name).read_text()) for name in (TOKENIZER_CONFIG, TOKENIZER)}
    CHANGES[request.param](documents[TOKENIZER_CONFIG], documents[TOKENIZER])
    for name, document in documents.items():
        (folder / name).write_text(json.dumps(document))
    return folder


def branch_of(base: Path, folder: Path) -> Path:
    """Write the tokenizer's files of a branch."""
    folder.mkdir()
    facts = facts_of(base)
    for name in (CONFIG, *TOKENIZER_FILES):
        if (base / name).exists():
            (folder / name).write_bytes(branch_file(name, read_small(base, name), facts).data)
    return folder


def facts_of(base: Path) -> ModelFacts:
    return ModelFacts.of(json.loads((base / CONFIG).read_text()), template=template_beside(base))


def test_transformers_reads_a_branchs_tokenizer_as_its_bases(base: Path, tmp_path: Path) -> None:
    branch = branch_of(base, tmp_path / "branch")
    assert same_tokens.tokens_of(branch) == same_tokens.tokens_of(base)


@pytest.mark.release
def test_auto_gptqs_transformers_reads_it_as_transformers_5(
    base: Path, tmp_path: Path, pytestconfig: pytest.Config
) -> None:
    from packager.prove.environments import environment_name
    from packager.prove.loaders import LOADERS

    loaders = Path(pytestconfig.getoption("--cache-folder")).expanduser() / "loaders"
    python = loaders / environment_name(LOADERS["autogptq"]) / "bin" / "python"
    if not python.exists():
        pytest.skip(f"there is no environment of AutoGPTQ in {loaders}")
    branch = branch_of(base, tmp_path / "branch")
    script = shutil.copy(same_tokens.__file__, tmp_path / "same_tokens.py")
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environ.pop("PYTHONPATH", None)
    done = subprocess.run([python, script, branch], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == same_tokens.tokens_of(base)
