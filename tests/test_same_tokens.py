"""The tokenizer of a branch gives the ids and the chats of its base model's, in the runtimes of a recipe."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from packager.inputs.branch_tokenizer import branch_tokenizer
from packager.inputs.chat_template import templates_beside
from packager.inputs.limits import ModelProcess
from packager.inputs.source_files import copied_names, read_small
from packager.model.branch_config import branch_file
from packager.model.branch_rules import ModelFacts
from packager.receipt import CONFIG, TOKENIZER, TOKENIZER_CONFIG
from tests import same_tokens
from tests.family_tokenizers import FAMILIES, save_family
from tests.samples import sampled

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


@pytest.fixture(scope="module")
def process() -> Iterator[ModelProcess]:
    with ModelProcess() as process:
        yield process


@pytest.fixture(params=sampled(list(FAMILIES), "llama 2", "llama without a prefix space", "fast"))
def family(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a base model without weights, with a tokenizer of a family."""
    pytest.importorskip("torch")
    folder = tmp_path / "base"
    folder.mkdir()
    save_family(folder, FAMILIES[request.param])
    return folder


def branch_of(base: Path, folder: Path, process: ModelProcess) -> Path:
    """Write the tokenizer's files of a branch."""
    folder.mkdir()
    config = json.loads((base / CONFIG).read_text())
    facts = ModelFacts.of(config, template=templates_beside(base))
    files = {name: branch_file(name, read_small(base, name), facts).data for name in copied_names(base)}
    made = branch_tokenizer(files, config, str(base), process).files
    (folder / CONFIG).write_text(json.dumps(config))
    for name, data in files.items():
        (folder / name).write_bytes(made[name].data if name in made else data)
    return folder


def test_transformers_reads_a_branchs_tokenizer_as_its_bases(base: Path, tmp_path: Path, process: ModelProcess) -> None:
    branch = branch_of(base, tmp_path / "branch", process)
    assert same_tokens.tokens_of(branch) == same_tokens.tokens_of(base)


def test_a_branch_gives_the_ids_of_its_bases_tokenizer_json_between_the_ends_that_are_asked_for(
    family: Path, tmp_path: Path, process: ModelProcess
) -> None:
    """Whatever reads it: transformers, and ExLlamaV2 and the servers, which read tokenizer.json alone."""
    branch = branch_of(family, tmp_path / "branch", process)
    found, base = same_tokens.tokens_of(branch), same_tokens.tokens_of(family)
    read = Tokenizer.from_file(str(branch / TOKENIZER))
    assert [read.encode(text).ids for text in same_tokens.TEXTS] == found["ids"]
    plain = found["without special tokens"]
    assert [read.encode(text, add_special_tokens=False).ids for text in same_tokens.TEXTS] == plain
    file = Tokenizer.from_file(str(family / TOKENIZER))
    own = [file.encode(text, add_special_tokens=False).ids for text in same_tokens.TEXTS]
    assert plain == (base["without special tokens"] if is_built_anew(family, branch) else own)
    before, after = ends(base["ids"][2], base["without special tokens"][2])
    assert found["ids"] == [[*before, *ids, *after] for ids in plain]


def is_built_anew(family: Path, branch: Path) -> bool:
    """Return whether every release builds the tokenizer anew: the config asks, or the model's family has a class."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    asked = json.loads((family / TOKENIZER_CONFIG).read_text()).get("add_prefix_space")
    return asked is not None or type(AutoTokenizer.from_pretrained(str(branch))) is not PreTrainedTokenizerFast


def ends(ids: list[int], plain: list[int]) -> tuple[list[int], list[int]]:
    """Return what stands before and after a text's own ids."""
    start = next(number for number in range(len(ids)) if ids[number : number + len(plain)] == plain)
    return ids[:start], ids[start + len(plain) :]


def test_only_what_is_asked_for_changes_tokenizer_json(family: Path, tmp_path: Path, process: ModelProcess) -> None:
    branch = branch_of(family, tmp_path / "branch", process)
    own = json.loads(branch_file(TOKENIZER, read_small(family, TOKENIZER), ModelFacts()).data)
    made = json.loads((branch / TOKENIZER).read_text())
    changed = {key for key in own if own[key] != made[key]}
    others = {"normalizer", "pre_tokenizer", "decoder", "model"} if is_built_anew(family, branch) else set()
    assert changed <= {"post_processor", *others}


@pytest.mark.release
def test_auto_gptqs_transformers_reads_it_as_transformers_5(
    base: Path, tmp_path: Path, process: ModelProcess, pytestconfig: pytest.Config
) -> None:
    branch = branch_of(base, tmp_path / "branch", process)
    assert in_auto_gptqs([branch], tmp_path, pytestconfig) == [same_tokens.tokens_of(base)]


@pytest.mark.release
def test_auto_gptqs_transformers_reads_each_family_as_transformers_5(
    tmp_path: Path, process: ModelProcess, pytestconfig: pytest.Config
) -> None:
    bases = {name: tmp_path / f"{number}-base" for number, name in enumerate(FAMILIES)}
    branches = []
    for name, base in bases.items():
        base.mkdir()
        save_family(base, FAMILIES[name])
        branches.append(branch_of(base, base.with_name(f"{base.name}-branch"), process))
    found = dict(zip(FAMILIES, in_auto_gptqs(branches, tmp_path, pytestconfig), strict=True))
    assert found == {name: same_tokens.tokens_of(branch) for name, branch in zip(bases, branches, strict=True)}


def in_auto_gptqs(branches: Sequence[Path], tmp_path: Path, pytestconfig: pytest.Config) -> list[Any]:
    """Return what the transformers of AutoGPTQ's environment makes of branches."""
    from packager.prove.environments import environment_name
    from packager.prove.loaders import LOADERS

    loaders = Path(pytestconfig.getoption("--cache-folder")).expanduser() / "loaders"
    python = loaders / environment_name(LOADERS["autogptq"]) / "bin" / "python"
    if not python.exists():
        pytest.fail(f"there is no environment of AutoGPTQ in {loaders}: nox -s build-all makes it", pytrace=False)
    script = shutil.copy(same_tokens.__file__, tmp_path / "same_tokens.py")
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environ.pop("PYTHONPATH", None)
    done = subprocess.run([python, script, *branches], env=environ, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found: list[Any] = json.loads(done.stdout.splitlines()[-1])
    return found
