"""Refusals of a build or a publish: the right error, a helpful text, and nothing lost."""

import errno
import importlib
import io
import itertools
import json
import os
import re
import resource
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from packager.cli import main
from packager.errors import (
    CalibrationError,
    CardError,
    LoaderError,
    MachineError,
    PackagerError,
    PackError,
    PublishError,
    RecipeError,
    SourceError,
    StateError,
)
from packager.pipeline import flow
from packager.pipeline.build_state import BuildState
from packager.pipeline.plan import make_plan
from packager.pipeline.quantize_stage import quantize_and_pack
from packager.pipeline.workspace import Workspace
from packager.quantize.block_store import BlockStore
from packager.quantize.engines import ENGINE_VERSION
from packager.receipt import LoaderRecord, LoaderStatus
from packager.recipe.file import RecipeFile
from packager.system.terminal import Terminal
from packager.system.text import format_bytes
from tests.checkpoints import edit_json
from tests.tiny_models import save_model
from tests.tiny_recipe import (
    BRANCHES,
    MAIN,
    REPOSITORY,
    build,
    built_files,
    hub_folder,
    leftovers,
    options,
    publish,
    save_tokenizer,
    sentences,
    workspace,
    write_all,
    write_recipe,
)

pytestmark = pytest.mark.slow

WEIGHTS = "model.safetensors"
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a recipe and what it builds; tests only read it."""
    root = tmp_path_factory.mktemp("made")
    build(write_all(root / "recipe"), root / "dist")
    return root


@pytest.fixture
def recipe(made: Path, tmp_path: Path) -> Path:
    """A copy of the recipe to spoil."""
    shutil.copytree(made / "recipe", tmp_path / "recipe")
    return tmp_path / "recipe" / "recipe.yaml"


@pytest.fixture
def dist(made: Path, tmp_path: Path) -> Path:
    """A copy of what was built."""
    shutil.copytree(made / "dist", tmp_path / "dist")
    return tmp_path / "dist"


def refused(error: type[PackagerError], code: int, run: Callable[..., object], *arguments: object) -> str:
    """Return the text of the error that `run` must end in."""
    with pytest.raises(PackagerError) as caught:
        run(*arguments)
    assert type(caught.value) is error, caught.value
    assert caught.value.exit_code == code
    return str(caught.value)


def edit_weights(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model" / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / "model" / WEIGHTS, metadata={"format": "pt"})


def split_weights(folder: Path) -> None:
    """Make two shards and an index of the weights, and lose the second shard."""
    tensors = load_file(folder / "model" / WEIGHTS)
    (folder / "model" / WEIGHTS).unlink()
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    save_file({name: tensors[name] for name in names[:9]}, folder / "model" / "model-00001-of-00002.safetensors")
    index = {"weight_map": {name: shard for shard, members in shards.items() for name in members}}
    (folder / "model" / "model.safetensors.index.json").write_text(json.dumps(index))


def split_weights_without_index(folder: Path) -> None:
    split_weights(folder)
    (folder / "model" / "model.safetensors.index.json").unlink()


def cut(name: str, keep: int) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        os.truncate(folder / name, keep)

    return change


def poison(name: str, value: float) -> Callable[[Path], None]:
    def change(tensors: Tensors) -> None:
        tensors[name].view(-1)[5] = value

    return lambda folder: edit_weights(folder, change)


def damaged_index(folder: Path) -> None:
    """transformers reads an index only where there is no model.safetensors."""
    (folder / "model" / "model.safetensors").rename(folder / "model" / "model-00001-of-00001.safetensors")
    (folder / "model" / "model.safetensors.index.json").write_text("{")


def replaced(name: str, content: str | bytes) -> Callable[[Path], object]:
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(data)


def quantized_config(folder: Path) -> None:
    edit_json(folder / "model", "config.json", lambda config: config.update(quantization_config={"bits": 4}))


def config(**changes: object) -> Callable[[Path], None]:
    return lambda folder: edit_json(folder / "model", "config.json", lambda values: values.update(changes))


def chat_template(template: str) -> Callable[[Path], object]:
    return replaced("model/chat_template.jinja", template)


OVERLAP = sentences(3, seed=2) + sentences(60, seed=1)
SYSTEM_REFUSED = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{% for m in messages %}[INST] {{ m['content'] }} [/INST]{% endfor %}"
)

BAD_MODELS: dict[str, tuple[Callable[[Path], object], Mapping[str, Any], tuple[str, ...]]] = {
    "no weights": (
        lambda folder: (folder / "model" / WEIGHTS).unlink(),
        {},
        ("recipe/model: no safetensors weights", "no weights at all"),
    ),
    "pickle only": (
        lambda folder: (folder / "model" / WEIGHTS).rename(folder / "model" / "pytorch_model.bin"),
        {},
        ("only pickles are there: pytorch_model.bin", "a pickle can run code when it is opened"),
    ),
    "cut off": (cut(f"model/{WEIGHTS}", 200_000), {}, (f"model/{WEIGHTS}", "the file holds", "download it again")),
    "cut off in the header": (cut(f"model/{WEIGHTS}", 500), {}, (WEIGHTS, "cut off inside its header")),
    "empty": (cut(f"model/{WEIGHTS}", 0), {}, (WEIGHTS, "not a safetensors file")),
    "lost shard": (split_weights, {}, ("1 of 2 weights files are missing", "model-00002-of-00002.safetensors")),
    "lost shard, no index": (
        split_weights_without_index,
        {},
        ("the weights are not those that the lock describes", "missing model.layers", "more", "a shard may be missing"),
    ),
    "damaged index": (
        damaged_index,
        {},
        ("model.safetensors.index.json: the index of the weights cannot be read",),
    ),
    "wrong shape": (
        lambda folder: edit_weights(folder, lambda t: t.update({"model.norm.weight": torch.ones(65).half()})),
        {},
        ("model.norm.weight is [65], the lock has [64]",),
    ),
    "wrong dtype": (
        lambda folder: edit_weights(folder, lambda t: t.update({"model.norm.weight": torch.ones(64)})),
        {},
        ("model.norm.weight is F32, the lock has F16",),
    ),
    "extra tensor": (
        lambda folder: edit_weights(folder, lambda t: t.update({"model.extra": torch.ones(2).half()})),
        {},
        ("unexpected model.extra",),
    ),
    "NaN in a block": (
        poison("model.layers.1.mlp.up_proj.weight", float("nan")),
        {},
        ("model.layers.1.mlp.up_proj.weight: the weights contain NaN or Inf", "damaged"),
    ),
    "NaN in the head": (poison("lm_head.weight", float("nan")), {}, ("lm_head.weight: the weights contain NaN",)),
    "Inf in the embedding": (
        poison("model.embed_tokens.weight", float("inf")),
        {},
        ("model.embed_tokens.weight: the weights contain NaN or Inf",),
    ),
    "quantized, unlike the lock": (
        quantized_config,
        {},
        ("model/config.json: the base model is already quantized", "name the fp16 model"),
    ),
    "unlike the lock": (
        config(intermediate_size=128, rope_theta=500_000.0),
        {},
        (
            "model/config.json: the base model's config.json is not the one that the lock was made of",
            "intermediate_size is 128, in the lock 96; rope_theta is 500000.0, in the lock absent",
            "make the lock anew: packager lock RECIPE",
        ),
    ),
}


@pytest.mark.parametrize("name", BAD_MODELS)
def test_a_base_model_that_cannot_be_used(recipe: Path, tmp_path: Path, name: str) -> None:
    spoil, changes, texts = BAD_MODELS[name]
    path = write_recipe(recipe.parent, changes)  # with the lock of the model as it was
    spoil(recipe.parent)
    text = refused(SourceError, 3, build, path, tmp_path / "new")
    for part in texts:
        assert part in text
    assert leftovers(tmp_path / "new") == []
    assert not (tmp_path / "new" / "builds").exists()


BAD_TEXTS: dict[str, tuple[Callable[[Path], object], Mapping[str, Any], tuple[str, ...]]] = {
    "ids beyond the vocabulary": (
        lambda folder: save_tokenizer(folder / "model", vocab_size=140),
        {},
        ("cannot be part of a branch", "tokenizer.json: the highest token id is 139, vocab_size is 128"),
    ),
    "no tokenizer": (
        lambda folder: [path.unlink() for path in (folder / "model").glob("tokenizer*")],
        {},
        ("model: the base model has no tokenizer", "tokenizer_config.json", "from the same revision"),
    ),
    "damaged tokenizer": (
        replaced("model/tokenizer.json", '{"model": {}}'),
        {},
        ("cannot be part of a branch", "tokenizer.json: a token has the id null"),
    ),
    "too little calibration text": (
        replaced("calibration.txt", sentences(2, seed=1)),
        {},
        ("calibration.txt: too little text: ", " tokens are missing", "12 rows of 32 tokens need 384; the text has "),
    ),
    "too little evaluation text": (
        replaced("evaluation.txt", "a river"),
        {},
        ("evaluation.txt: too little text: 2", "8 rows of 32 tokens need 256; the text has "),
    ),
    "overlap": (
        replaced("evaluation.txt", OVERLAP),
        {},
        (
            "the evaluation text overlaps the calibration text",
            " of its words are in both, for example ",
            "another split",
        ),
    ),
    "broken JSONL": (
        replaced("text.jsonl", '{"text": "a river"}\n\n{"text": \n'),
        {"calibration.path": "text.jsonl"},
        ("text.jsonl:3: a line is not JSON", "Expecting value"),
    ),
    "JSONL without the field": (
        replaced("text.jsonl", '{"text": "a river"}\n{"txt": "a river"}\n'),
        {"evaluation.path": "text.jsonl"},
        ("text.jsonl: too little text: 251 tokens are missing", "1 of its rows have no 'text'"),
    ),
    "not UTF-8": (
        replaced("calibration.txt", b"caf\xe9"),
        {},
        ("calibration.txt: the text cannot be read", "can't decode byte 0xe9"),
    ),
    "a question without an answer": (
        replaced("questions.jsonl", '{"prompt": "a", "answer": "b"}\n{"prompt": "a"}\n'),
        {},
        ("questions.jsonl:2: a question is not",),
    ),
    "an answer of nothing": (
        replaced("questions.jsonl", '{"prompt": "a", "answer": "b"}\n{"prompt": "a", "answer": ""}\n'),
        {},
        ("questions.jsonl:2: the answer of a question is empty",),
    ),
    "a broken question": (replaced("questions.jsonl", "a river\n"), {}, ("questions.jsonl:1: a line is not JSON",)),
    "another prompt template": (
        lambda _: None,
        {"card.prompt_template.template": "User: {prompt}"},
        ("is not the model's chat template", 'the card has "User: {prompt}"', 'renders "<s>[INST] {prompt} [/INST]"'),
    ),
    "no system messages": (
        chat_template(SYSTEM_REFUSED),
        {"card.system_prompt": "Be brief."},
        ("the model's chat template cannot be rendered", "for messages of system, user: no system role"),
    ),
    "a damaged chat template": (
        chat_template("{% for m in messages %}"),
        {},
        ("cannot be part of a branch", "chat_template.jinja: jinja2 cannot read it"),
    ),
    "no chat template": (
        lambda folder: (folder / "model" / "chat_template.jinja").unlink(),
        {},
        ("the base model has no chat template", "leave out loaders.prompts and evaluation.questions"),
    ),
}

# Found by the audit of what is copied, before a text is read.
FILES_OF_THE_BASE = {"ids beyond the vocabulary", "damaged tokenizer", "a damaged chat template"}


@pytest.mark.parametrize("name", BAD_TEXTS)
def test_text_or_a_tokenizer_that_cannot_be_used(recipe: Path, tmp_path: Path, name: str) -> None:
    spoil, changes, texts = BAD_TEXTS[name]
    spoil(recipe.parent)
    error, code = (SourceError, 3) if name in FILES_OF_THE_BASE else (CalibrationError, 4)
    text = refused(error, code, build, write_recipe(recipe.parent, changes), tmp_path / "new")
    for part in texts:
        assert part in text
    assert not (tmp_path / "new" / "builds").exists()


def test_the_stated_number_of_missing_tokens_is_exact(recipe: Path, tmp_path: Path) -> None:
    """With fewer rows, by as many tokens as the message states, it builds."""
    (recipe.parent / "calibration.txt").write_text(sentences(12, seed=1))
    text = refused(CalibrationError, 4, build, write_recipe(recipe.parent, {"calibration.num_samples": 40}), tmp_path)
    missing = int(text.partition("too little text: ")[2].split()[0])
    enough = 40 - -(-missing // 32)
    build(write_recipe(recipe.parent, {"calibration.num_samples": enough}), tmp_path)


def test_a_line_separator_inside_a_json_string_ends_no_line(recipe: Path, tmp_path: Path) -> None:
    lines = [
        json.dumps({"text": line + "\u2028\u0085seven"}, ensure_ascii=False)
        for line in sentences(60, seed=1).split("\n")
    ]
    (recipe.parent / "text.jsonl").write_text("\n".join(lines), encoding="utf-8")
    build(write_recipe(recipe.parent, {"calibration.path": "text.jsonl"}), tmp_path / "new")


def test_recipes_that_cannot_be_built_name_line_and_column(recipe: Path, tmp_path: Path) -> None:
    text = refused(RecipeError, 2, build, write_recipe(recipe.parent, {"defaults.group_size": 24}), tmp_path / "new")
    assert re.search(r"recipe\.yaml:\d+:\d+: group_size 24 does not divide the 64 in_features of q_proj", text)
    path = write_recipe(recipe.parent)
    quantized_config(recipe.parent)
    text = refused(SourceError, 3, build, path, tmp_path / "new")
    assert "the base model is already quantized" in text
    assert not (tmp_path / "new").exists()


def test_a_missing_license_file_is_an_error_before_anything_is_computed(recipe: Path, tmp_path: Path) -> None:
    changed = write_recipe(recipe.parent, {"card.license.base_files": ["NOTICE.md"]})
    text = refused(RecipeError, 2, build, changed, tmp_path / "new")
    assert "NOTICE.md" in text
    run = BuildState(RecipeFile.load(write_recipe(recipe.parent)), options(tmp_path / "new"), Terminal(quiet=True))
    license_ = run.recipe.card.license.model_copy(update={"base_files": ("NOTICE.md",)})
    object.__setattr__(run.recipe.card, "license", license_)  # as for a model on the Hub, whose files are not known
    text = refused(PackError, 6, quantize_and_pack, run)
    assert "the base model has no file NOTICE.md" in text
    assert not run.workspace.work.exists()


def test_a_card_header_that_is_no_text_is_refused(recipe: Path, dist: Path) -> None:
    (recipe.parent / "header.md").write_bytes(b"\xff\xfe")
    before = built_files(dist)
    text = refused(CardError, 9, build, write_recipe(recipe.parent, {"card.header": "header.md"}), dist)
    assert "header.md: a text of the card cannot be read" in text
    assert built_files(dist) == before


class Disk:
    """A disk with so many bytes left: what does not fit is cut off and refused, as the kernel does it."""

    def __init__(self, free: int) -> None:
        self.free = free
        self.written = 0

    def open(self, file: int | str, mode: str) -> io.BufferedWriter:
        disk = self

        class Stream(io.FileIO):
            def write(self, data: Any) -> int:
                room = min(len(data), disk.free)
                disk.free -= room
                disk.written += room
                if room < len(data):
                    super().write(bytes(data)[:room])
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                return super().write(data)

        return io.BufferedWriter(Stream(file, mode))

    def reserve(self, _descriptor: int, _offset: int, size: int) -> None:
        """Take space now; writing there later takes none."""
        if size > self.free:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.free -= size
        self.written += size


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    """Every file that is opened for writing lies on this disk."""
    disk, opened, fdopen = Disk(1 << 40), Path.open, os.fdopen

    def path_open(path: Path, mode: str = "r", *rest: Any, **options: Any) -> Any:
        return disk.open(str(path), mode) if mode == "wb" else opened(path, mode, *rest, **options)

    def descriptor_open(descriptor: int, mode: str = "r", *rest: Any, **options: Any) -> Any:
        return disk.open(descriptor, mode) if mode == "wb" else fdopen(descriptor, mode, *rest, **options)

    monkeypatch.setattr(Path, "open", path_open)
    monkeypatch.setattr(os, "fdopen", descriptor_open)
    monkeypatch.setattr(os, "posix_fallocate", disk.reserve)
    return disk


@pytest.mark.slow
def test_a_disk_that_fills_up_at_any_point(recipe: Path, made: Path, tmp_path: Path, disk: Disk) -> None:
    build(recipe, tmp_path / "roomy")
    whole, stages = disk.written, set()
    for percent in (10, 40, 70, 90, 97):
        disk.free = whole * percent // 100
        dist = tmp_path / str(percent)
        text = refused(MachineError, 12, build, recipe, dist)
        assert "the disk is full" in text
        assert "No space left on device" in text
        assert "free some space and run the same command again" in text
        assert leftovers(dist) == []
        visible = {name.rpartition("/")[0] for name in built_files(dist)}
        assert all((workspace(dist).folder(branch) / WEIGHTS).exists() for branch in visible)
        stages.add(text.partition(":")[0].removeprefix(f"{dist}/").partition("/")[0])
    assert stages == {"work", "builds", "receipts"}
    disk.free = 1 << 40
    for percent in (10, 70, 97):
        build(recipe, tmp_path / str(percent))
        assert built_files(tmp_path / str(percent)) == built_files(made / "dist")


def test_a_limit_on_the_size_of_files_is_an_error(recipe: Path, made: Path, tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        text = refused(MachineError, 12, build, recipe, tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "allows no file of this size" in text
    assert "ulimit -f" in text
    assert leftovers(tmp_path / "new") == []
    build(recipe, tmp_path / "new")
    assert built_files(tmp_path / "new") == built_files(made / "dist")


def build_blocks(monkeypatch: pytest.MonkeyPatch, count: int, recipe: Path, dist: Path) -> None:
    """Build, interrupted after `count` blocks."""
    original, numbers = BlockStore.write, itertools.count(1)

    def write_or_stop(store: BlockStore, *rest: Any) -> None:
        if next(numbers) > count:
            raise KeyboardInterrupt
        original(store, *rest)

    with monkeypatch.context() as context:
        context.setattr(BlockStore, "write", write_or_stop)
        with pytest.raises(KeyboardInterrupt):
            build(recipe, dist)


def set_free_bytes(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free))


def test_too_little_disk_space_is_an_error_before_anything_is_written(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    new = tmp_path / "new"
    free = make_plan(RecipeFile.load(recipe)).disk.builds_bytes - 1
    set_free_bytes(monkeypatch, free)
    text = refused(MachineError, 12, build, recipe, new)
    assert f"{new}: not enough free disk space" in text
    assert f"{format_bytes(free + 1)} needed, {format_bytes(free)} free" in text
    assert "point --dist at another disk" in text
    assert not workspace(new).work.exists()
    monkeypatch.undo()
    build_blocks(monkeypatch, 8, recipe, new)
    set_free_bytes(monkeypatch, free)  # what is there already is not needed again
    build(recipe, new)


def test_one_more_variant_does_not_need_the_space_of_all(
    recipe: Path, dist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = {"variants": [{"branch": MAIN}, {"branch": "eight", "bits": 8}]}
    changed = write_recipe(recipe.parent, changes)
    set_free_bytes(monkeypatch, make_plan(RecipeFile.load(changed)).disk.builds_bytes - 1)
    assert build(changed, dist).quantized == ("eight",)


def spoil_folder(folder: Path) -> None:
    """Change, remove and add a file."""
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").unlink()
    (folder / "adapter.safetensors").write_bytes(b"mine")


@pytest.mark.parametrize(
    ("command", "changes"),
    [(build, {}), (publish, {}), (build, {"calibration.seed": 1})],
    ids=["build", "publish", "build of a changed recipe"],
)
def test_an_edited_folder_is_never_replaced(
    recipe: Path, dist: Path, changes: Mapping[str, Any], command: Callable[..., object]
) -> None:
    spoil_folder(workspace(dist).folder(MAIN))
    before = built_files(dist)
    text = refused(StateError, 11, command, write_recipe(recipe.parent, changes), dist)
    assert f"{workspace(dist).folder(MAIN)}: a built folder differs from its receipt" in text
    for part in ("config.json was changed", "tokenizer.json is missing", "adapter.safetensors is not in the receipt"):
        assert part in text
    assert "move your changes elsewhere, then delete the folder and run build again" in text
    assert built_files(dist) == before
    shutil.rmtree(workspace(dist).folder(MAIN))
    build(recipe, dist)


@pytest.mark.parametrize("name", ["README.md", "provenance.json", "LICENSE.txt"])
@pytest.mark.parametrize(
    "changes", [{}, {"card.title": "Another"}, {"calibration.seed": 1}], ids=["same", "card", "weights"]
)
def test_a_card_edited_by_hand_is_never_replaced(
    recipe: Path, dist: Path, name: str, changes: Mapping[str, Any]
) -> None:
    edited = workspace(dist).folder(MAIN) / name
    edited.write_text(edited.read_text() + "my words\n")
    before = built_files(dist)
    text = refused(StateError, 11, build, write_recipe(recipe.parent, changes), dist)
    assert f"{edited}: {name} was edited by hand" in text
    assert "then delete the file and run the command again" in text
    assert built_files(dist) == before
    if not changes:
        assert name in refused(StateError, 11, publish, recipe, dist)
        assert not hub_folder(dist).exists()
    edited.unlink()
    if not changes:
        assert "run packager card first" in refused(PublishError, 10, publish, recipe, dist)
    build(recipe, dist)


@pytest.mark.parametrize("damage", [lambda data: data[:900], lambda _: b"{}", lambda data: b"\xff" + data])
def test_a_damaged_receipt_is_an_error(recipe: Path, made: Path, dist: Path, damage: Callable[[bytes], bytes]) -> None:
    path, folder = workspace(dist).receipt_path(MAIN), workspace(dist).folder(MAIN)
    path.write_bytes(damage(path.read_bytes()))
    before = built_files(dist)
    for command in (build, publish):
        text = refused(StateError, 11, command, recipe, dist)
        assert f"{path}: a receipt cannot be read" in text
        assert f"delete it and {folder} to build that again" in text
    assert built_files(dist) == before
    path.unlink()
    shutil.rmtree(folder)
    assert build(recipe, dist).quantized == (MAIN,)
    assert built_files(dist) == built_files(made / "dist")


@pytest.mark.parametrize("first", [True, False], ids=["nothing built yet", "others built"])
def test_a_foreign_folder_at_a_variants_path_is_not_replaced(
    recipe: Path, dist: Path, tmp_path: Path, first: bool
) -> None:
    place = tmp_path / "new" if first else dist
    if not first:
        workspace(dist).receipt_path(MAIN).unlink()
    folder = workspace(place).folder(MAIN)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "thesis.txt").write_text("years of work")
    text = refused(StateError, 11, build, recipe, place)
    assert f"{folder}: the folder of a variant exists, and packager did not make it" in text
    assert (folder / "thesis.txt").read_text() == "years of work"
    shutil.rmtree(folder)
    folder.write_text("a file")
    assert str(folder) in refused(StateError, 11, build, recipe, place)
    folder.unlink()
    folder.mkdir()  # an empty folder may be replaced
    build(recipe, place)


def test_an_edited_folder_of_a_killed_build_is_not_replaced(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    new = tmp_path / "new"
    monkeypatch.setattr(Workspace, "write_receipt", die)
    with pytest.raises(KeyboardInterrupt):
        build(recipe, new)
    monkeypatch.undo()
    edited = workspace(new).folder(MAIN) / "config.json"
    before = edited.read_bytes()
    edited.write_text("{}")
    text = refused(StateError, 11, build, recipe, new)
    assert f"{edited.parent}: the folder of a variant exists, and packager did not make it" in text
    assert edited.read_text() == "{}"
    edited.write_bytes(before)
    monkeypatch.setattr(BlockStore, "write", die)  # every block is finished
    build(recipe, new)


def test_an_output_folder_that_is_a_file_is_refused(recipe: Path, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    text = refused(MachineError, 12, build, recipe, tmp_path / "taken")
    assert "the folder cannot be written" in text
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.parametrize("command", [build, publish])
def test_a_second_build_at_the_same_time_is_refused(recipe: Path, dist: Path, command: Callable[..., object]) -> None:
    with workspace(dist).locked():
        text = refused(StateError, 11, command, recipe, dist)
    assert f"another build of {REPOSITORY} is in progress" in text
    assert "wait for it, or stop it" in text
    command(recipe, dist)


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (f"{MAIN}/block-00000.json", lambda data: data[:-9]),
        (f"{MAIN}/block-00001.json", lambda _: b""),
        (f"{MAIN}/block-00000.json", lambda data: data.replace(b"linears", b"lineals")),
        (f"{MAIN}/checkpoint/{WEIGHTS}", lambda data: data[:-9]),
        (f"{MAIN}/checkpoint/{WEIGHTS}", lambda data: data[:90_000] + bytes(20_000) + data[110_000:]),
    ],
)
def test_a_damaged_work_file_is_made_again(
    recipe: Path,
    made: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    damage: Callable[[bytes], bytes],
) -> None:
    build_blocks(monkeypatch, 5, recipe, tmp_path / "new")
    work = workspace(tmp_path / "new").work
    assert len(list(work.rglob("block-*.json"))) == 5
    damaged = damage((work / name).read_bytes())
    assert damaged != (work / name).read_bytes()
    (work / name).write_bytes(damaged)
    build(recipe, tmp_path / "new")
    assert built_files(tmp_path / "new") == built_files(made / "dist")


def test_blocks_of_another_version_of_the_engine_are_not_those_of_another_recipe(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    new, present = tmp_path / "new", ENGINE_VERSION
    build_blocks(monkeypatch, 1, recipe, new)
    monkeypatch.setattr("packager.quantize.engines.ENGINE_VERSION", present + 1)

    def die(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(BlockStore, "write", die)
    with pytest.raises(KeyboardInterrupt):
        flow.build(RecipeFile.load(recipe), options(new), Terminal())
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "not resumed" in line]
    assert line.endswith(f"1 finished block is not resumed: the engine's version was {present} and is {present + 1}")


def test_publishing_without_a_build_is_refused(recipe: Path, dist: Path, tmp_path: Path) -> None:
    text = refused(PublishError, 10, publish, recipe, tmp_path / "new")
    assert f"not every variant is ready: {', '.join(BRANCHES)}" in text
    assert "run packager build first" in text
    text = refused(PublishError, 10, publish, write_recipe(recipe.parent, {"calibration.seed": 1}), dist)
    assert "the stage 'weights' has not been done with the present recipe and files" in text
    text = refused(PublishError, 10, publish, write_recipe(recipe.parent, {"card.title": "Another"}), dist)
    assert f"the cards are not the present recipe's: {', '.join(BRANCHES)}" in text
    assert "run packager card first" in text
    assert not hub_folder(dist).exists()


def test_publishing_without_git_is_refused(recipe: Path, dist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importlib.import_module("git")  # without git its first import fails, and the second finds half a module
    monkeypatch.setenv("PATH", "")
    text = refused(MachineError, 12, publish, recipe, dist)
    assert "git is not on the PATH" in text
    assert "install git" in text
    assert not (dist / "hub").exists()
    monkeypatch.undo()
    publish(recipe, dist)


def record_loader(recipe: Path, dist: Path, status: LoaderStatus, *, required: bool) -> None:
    """Write into the receipts what a verify stage would have found, and the cards."""
    run = BuildState(RecipeFile.load(recipe), options(dist), Terminal(quiet=True))
    record = LoaderRecord(loader="autogptq", required=required, status=status, reason="needs a CUDA device")
    for branch in BRANCHES:
        receipt = run.workspace.read_receipt(branch)
        assert receipt is not None
        provenance = receipt.provenance.model_copy(update={"loaders": (record,)})
        stages = {**receipt.stages, "verify": run.keys[branch]["verify"]}
        run.workspace.write_receipt(receipt.model_copy(update={"provenance": provenance, "stages": stages}))
    flow.render(RecipeFile.load(recipe), options(dist), Terminal(quiet=True), branch=MAIN)


def test_publishing_without_a_pass_of_a_required_loader_is_refused(recipe: Path, dist: Path) -> None:
    required = write_recipe(recipe.parent, {"loaders.required": ["autogptq"]})
    record_loader(required, dist, "not run", required=True)
    text = refused(PublishError, 10, publish, required, dist)
    assert "a required loader has not passed" in text
    assert f"{MAIN}: autogptq not run: needs a CUDA device" in text
    assert "move the loader to loaders.if_available" in text
    assert not hub_folder(dist).exists()
    optional = write_recipe(recipe.parent, {"loaders.if_available": ["autogptq"]})
    record_loader(optional, dist, "not run", required=False)
    publish(optional, dist)


def test_a_loader_with_other_values_fails_every_build(recipe: Path, dist: Path) -> None:
    optional = write_recipe(recipe.parent, {"loaders.if_available": ["autogptq"]})
    record_loader(optional, dist, "failed", required=False)
    for _ in range(2):
        text = refused(LoaderError, 8, build, optional, dist)
        assert f"{MAIN}: autogptq: needs a CUDA device" in text


@pytest.mark.parametrize("command", [build, publish])
def test_a_loader_that_a_rule_refuses_stops_neither_a_build_nor_a_release(
    recipe: Path, dist: Path, command: Callable[[Path, Path], object]
) -> None:
    optional = write_recipe(recipe.parent, {"loaders.if_available": ["autogptq"]})
    record_loader(optional, dist, "refused", required=False)
    assert BuildState(RecipeFile.load(optional), options(dist), Terminal(quiet=True)).loaders_to_run() == ("autogptq",)
    run = BuildState(RecipeFile.load(optional), options(dist), Terminal(quiet=True))
    run.read_receipts()
    assert run.loaders_to_run() == ()
    command(optional, dist)


SECRETS = {
    "HF_TOKEN": "hf_" + "Aq7" * 12,
    "HUGGING_FACE_HUB_TOKEN": "hf_" + "Bq7" * 12,
    "GITHUB_TOKEN": "ghp_" + "Cq7" * 12,
    "AWS_SECRET_ACCESS_KEY": "Dq7" * 13,
    "PIP_INDEX_URL": "https://user:Eq7Eq7Eq7@example.org/simple",
}


@pytest.mark.parametrize("good", [True, False], ids=["built and published", "refused"])
def test_no_secret_of_the_environment_is_written(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], good: bool
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    if not good:
        save_model(recipe.parent / "model", "llama", seed=3)
        poison("lm_head.weight", float("nan"))(recipe.parent)
    printed = ""
    for command in ("build", "publish", "status"):
        monkeypatch.setattr(sys, "argv", ["packager", command, str(recipe), "--dist", str(tmp_path / "new")])
        with pytest.raises(SystemExit) as end:
            main.main()
        assert (end.value.code in (0, None)) == (good or command == "status")
        printed += "".join(capfd.readouterr())
    written = b"".join(path.read_bytes() for path in (tmp_path / "new").rglob("*") if path.is_file())
    assert len(written) > 1000 or not good
    for value in SECRETS.values():
        assert value not in printed
        assert value.encode() not in written
