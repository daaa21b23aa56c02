"""Which files of a base model are used: links, names in an index, kinds, sizes, and files that change meanwhile."""

import json
import os
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from packager.errors import SourceError
from packager.inputs.base_model import check_folder_of, open_source
from packager.inputs.source_files import list_source_files
from packager.model.branch_config import branch_file
from packager.model.branch_rules import ModelFacts
from packager.model.contract_files import CONTENT_RULES, MOST_LICENSE_BYTES, check_content
from packager.model.model_folder import open_inside, read_inside
from packager.model.safetensors_file import TensorInfo, layout, read_header
from packager.model.strict_json import MOST_JSON_VALUES
from packager.pipeline.lock_recipes import lock_recipes
from packager.pipeline.pack import is_packed
from packager.receipt import CONFIG, TOKENIZER_FILES
from packager.recipe.file import RecipeFile
from tests.locks import write_lock_of_folder
from tests.sources import open_folder
from tests.tiny_recipe import build, write_all

pytestmark = pytest.mark.usefixtures("in_process")

PRIVATE = "payroll: alice 90000\n"


@pytest.fixture
def recipe(tmp_path: Path) -> RecipeFile:
    return RecipeFile.load(write_all(tmp_path / "recipe"))


@pytest.fixture
def model(recipe: RecipeFile) -> Path:
    return recipe.folder / "model"


def open_again(recipe: RecipeFile) -> list[str]:
    """Open the base model as a build does, and return the lines of the log."""
    lines: list[str] = []
    check_folder_of(recipe)
    open_source(recipe, lines.append)
    return lines


@pytest.mark.parametrize("name", ["merges.txt", "chat_template.jinja", "vocab.json", "tokenizer.model"])
def test_a_private_file_behind_a_link_is_neither_read_nor_published(
    recipe: RecipeFile, model: Path, tmp_path: Path, name: str
) -> None:
    (tmp_path / "private.txt").write_text(PRIVATE)
    (model / name).unlink(missing_ok=True)
    (model / name).symlink_to("../../private.txt")
    with pytest.raises(SourceError, match="the link leads out of the folder") as caught:
        build(recipe, tmp_path / "dist")
    assert caught.value.where == str(model / name)
    assert not list((tmp_path / "dist").rglob(name))


def test_links_inside_the_folder_are_followed(recipe: RecipeFile, model: Path) -> None:
    (model / "files").mkdir()
    for name in ("tokenizer.json", "model.safetensors"):
        (model / name).rename(model / "files" / name)
        (model / name).symlink_to(f"files/{name}")
    open_again(recipe)


def test_a_snapshot_of_the_hub_s_cache_links_to_its_blobs_and_nowhere_else(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "hub" / "models--tester--tiny"
    snapshot = cache / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (cache / "blobs").mkdir()
    for number, path in enumerate(sorted(model.iterdir())):
        shutil.copy(path, cache / "blobs" / f"{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    source = open_folder(snapshot, base_id="tester/tiny")
    assert source.record.digest == open_folder(model, base_id="tester/tiny").record.digest
    assert source.copied("tokenizer.json") == open_folder(model, base_id="tester/tiny").copied("tokenizer.json")
    (cache / "refs").write_text(PRIVATE)
    (snapshot / "merges.txt").symlink_to("../../refs")
    with pytest.raises(SourceError, match="the link leads out of the folder"):
        open_folder(snapshot, base_id="tester/tiny")
    shutil.move(tmp_path / "hub" / "models--tester--tiny", tmp_path / "other")  # not a cache: any folder may have blobs
    (tmp_path / "other" / "snapshots" / ("0" * 40) / "merges.txt").unlink()
    with pytest.raises(SourceError, match="the link leads out of the folder"):
        open_folder(tmp_path / "other" / "snapshots" / ("0" * 40), base_id="tester/tiny")


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "a\0.safetensors"])
def test_an_index_names_files_of_the_folder(recipe: RecipeFile, model: Path, name: str) -> None:
    shutil.move(model / "model.safetensors", recipe.folder)
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(SourceError, match="names a file outside the base model's folder"):
        check_folder_of(recipe)


def sharded(model: Path) -> dict[str, str]:
    """Split the weights into two files with an index, and return its weight map."""
    tensors = load_file(model / "model.safetensors")
    (model / "model.safetensors").unlink()
    parts = {f"model-0000{number + 1}-of-00002.safetensors": list(tensors)[number::2] for number in range(2)}
    for name, keys in parts.items():
        save_file({key: tensors[key] for key in keys}, model / name, {"format": "pt"})
    weight_map = {key: name for name, keys in parts.items() for key in keys}
    write_index(model, weight_map)
    return weight_map


def write_index(model: Path, weight_map: Mapping[str, str]) -> None:
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def opened_as_transformers_does(recipe: RecipeFile, model: Path) -> bool:
    """Return whether a base model's tensors are those that transformers loads from the same folder."""
    source = open_source(recipe, lambda _: None)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="auto").state_dict()
    return all(torch.equal(source.read(name), loaded[name]) for name in source.tensors)


@pytest.mark.parametrize("beside", ["single", "stray shard", "pytorch_model.bin", "consolidated.safetensors"])
def test_of_two_sets_of_weights_the_one_that_transformers_loads_is_read(
    recipe: RecipeFile, model: Path, beside: str
) -> None:
    tensors = {name: tensor + 1 for name, tensor in load_file(model / "model.safetensors").items()}
    if beside == "pytorch_model.bin":
        torch.save(tensors, model / beside)
    else:
        if beside != "consolidated.safetensors":
            sharded(model)
        name = {"single": "model.safetensors", "stray shard": "model-00003-of-00003.safetensors"}.get(beside, beside)
        save_file(tensors, model / name, {"format": "pt"})
    assert opened_as_transformers_does(recipe, model)


def test_an_index_that_names_tensors_in_other_shards_is_read_as_transformers_reads_it(
    recipe: RecipeFile, model: Path
) -> None:
    weight_map = sharded(model)
    first, second = sorted(set(weight_map.values()))
    write_index(model, {**dict.fromkeys(weight_map, first), "gone.weight": second})
    assert opened_as_transformers_does(recipe, model)


def test_a_shard_that_the_index_does_not_name_is_missed_by_name(recipe: RecipeFile, model: Path) -> None:
    weight_map = sharded(model)
    first = min(weight_map.values())
    write_index(model, dict.fromkeys(weight_map, first))
    lost = next(name for name, shard in weight_map.items() if shard != first)
    assert lost in lock_error(recipe).why
    with pytest.raises(SourceError, match="not those that the lock describes") as caught:
        open_again(recipe)
    assert f"missing {lost}" in caught.value.why


def test_weights_under_a_name_of_their_own_are_refused_with_the_way_out(recipe: RecipeFile, model: Path) -> None:
    path = model / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "transformers_weights": "other.safetensors"}))
    error = lock_error(recipe)
    assert "other.safetensors" in error.why
    assert "base_model.path" in error.hint


def lock_error(recipe: RecipeFile) -> SourceError:
    with pytest.raises(SourceError) as caught:
        list(lock_recipes([recipe.path], print))
    return caught.value


def test_a_shard_may_not_be_a_link_out_of_the_folder(recipe: RecipeFile, model: Path) -> None:
    (model / "model.safetensors").rename(recipe.folder / "weights.safetensors")
    (model / "model.safetensors").symlink_to("../weights.safetensors")
    with pytest.raises(SourceError, match="the link leads out of the folder"):
        check_folder_of(recipe)


def test_what_is_not_used_is_listed_and_not_read(recipe: RecipeFile, model: Path) -> None:
    (model / "README.md").write_text("a card")
    (model / "pipe").symlink_to("/dev/zero")
    os.mkfifo(model / "fifo.json")
    (model / "modeling_evil.py").write_text("raise SystemExit")
    assert open_again(recipe) == [
        "not used and not copied of the base model: README.md, fifo.json, modeling_evil.py, pipe"
    ]
    assert {path.name for path in list_source_files(model).paths} <= {*CONTENT_RULES, "model.safetensors"}


def test_templates_in_a_folder_are_read_and_part_of_the_record(recipe: RecipeFile, model: Path) -> None:
    folder = model / "additional_chat_templates"
    folder.mkdir()
    for name in ("tool_use.jinja", "notes.txt", ".jinja"):
        (folder / name).write_text("{{ messages }}")
    write_lock_of_folder(recipe.path, "tester/tiny", model)
    source = open_source(RecipeFile.load(recipe.path), lambda _: None)
    assert source.files.templates == ("chat_template.jinja", "additional_chat_templates/tool_use.jinja")
    assert set(source.files.templates) <= source.record.files.keys()
    assert not set(source.files.templates) & set(source.files.copied)
    before = source.record.digest
    (folder / "tool_use.jinja").write_text("{{ messages[0] }}")
    with pytest.raises(SourceError, match="chat template is not the one that the lock was made of"):
        open_source(RecipeFile.load(recipe.path), lambda _: None)
    write_lock_of_folder(recipe.path, "tester/tiny", model)
    assert open_source(RecipeFile.load(recipe.path), lambda _: None).record.digest != before


TEMPLATE_FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a link out of the folder": (
        lambda folder: folder.symlink_to(folder.parents[2] / "elsewhere"),
        "out of the folder",
    ),
    "a FIFO": (lambda folder: (folder.mkdir(), os.mkfifo(folder / "a.jinja")), "not a regular file"),
    "too many": (
        lambda folder: (folder.mkdir(), [(folder / f"{number}.jinja").touch() for number in range(21)]),
        "21, and a branch has 20 at most",
    ),
    "too large": (lambda folder: (folder.mkdir(), (folder / "a.jinja").write_text("a" * 1_000_001)), "1000000 bytes"),
}


@pytest.mark.parametrize(("make", "reason"), TEMPLATE_FOLDERS.values(), ids=TEMPLATE_FOLDERS)
def test_a_hostile_folder_of_templates_is_refused(
    recipe: RecipeFile, model: Path, tmp_path: Path, make: Callable[[Path], object], reason: str
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "private.jinja").write_text(PRIVATE)
    make(model / "additional_chat_templates")
    with pytest.raises(SourceError) as caught:
        check_folder_of(recipe)
    assert reason in caught.value.why
    assert "additional_chat_templates" in caught.value.where


def swap_for_link(path: Path) -> None:
    target = path.parents[1] / "elsewhere"
    shutil.copy(path, target)
    path.unlink()
    path.symlink_to(target)


CHANGES: dict[str, Callable[[Path], object]] = {
    "content": lambda path: path.write_bytes(path.read_bytes() + b" "),
    "fifo": lambda path: (path.unlink(), os.mkfifo(path)),
    "link": swap_for_link,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_file_that_is_replaced_after_the_check_is_not_copied(
    recipe: RecipeFile, model: Path, change: Callable[[Path], object]
) -> None:
    source = open_source(recipe, lambda _: None)
    change(model / "tokenizer_config.json")
    with pytest.raises(SourceError, match=r"changed during the build|cannot be used"):
        source.copied("tokenizer_config.json")


@pytest.mark.parametrize("name", ["model.safetensors", CONFIG])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_weights_that_are_replaced_during_a_build_are_noticed_at_its_end(
    recipe: RecipeFile, model: Path, change: Callable[[Path], object], name: str
) -> None:
    source = open_source(recipe, lambda _: None)
    source.check_unchanged()
    change(model / name)
    with pytest.raises(SourceError, match=r"changed during the build|cannot be used"):
        source.check_unchanged()


def test_a_folder_that_is_swapped_for_a_link_while_a_file_is_opened_is_not_followed(tmp_path: Path) -> None:
    """Two threads: one swaps a folder for a link to a private one, the other opens a file through it."""
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (tmp_path / "private").mkdir()
    (model / "sub" / "file").write_text("public")
    (tmp_path / "private" / "file").write_text(PRIVATE)
    done = threading.Event()

    def swap() -> None:
        while not done.is_set():
            (model / "sub").rename(model / "away")
            (model / "sub").symlink_to("../private")
            (model / "sub").unlink()
            (model / "away").rename(model / "sub")

    thread = threading.Thread(target=swap)
    thread.start()
    read: set[bytes] = set()
    try:
        # On a busy machine a thousand tries may all meet the link, or the folder while it is away.
        last, tries = time.monotonic() + 60, 0
        while tries < 1000 or (not read and time.monotonic() < last):
            tries += 1
            try:
                read.add(read_inside(model, "sub/file", 100))
            except OSError:
                continue
    finally:
        done.set()
        thread.join()
    assert read == {b"public"}


def test_a_folder_that_becomes_a_link_between_check_and_open_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    (model / "sub").mkdir(parents=True)
    (tmp_path / "private").mkdir()
    (model / "sub" / "file").write_text("public")
    (tmp_path / "private" / "file").write_text(PRIVATE)
    open_file = os.open

    def swap_and_open(path: Any, *args: Any, **kwargs: Any) -> int:
        if path == "sub":
            (model / "sub").rename(model / "away")
            (model / "sub").symlink_to("../private")
        return open_file(path, *args, **kwargs)

    monkeypatch.setattr(os, "open", swap_and_open)
    with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
        read_inside(model, "sub/file", 100)


def test_reading_a_fifo_does_not_wait(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(OSError, match="not a regular file"):
        open_inside(tmp_path, "fifo")


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "a//b", "a/./b", "", "a\0"])
def test_names_that_leave_the_folder_are_not_opened(tmp_path: Path, name: str) -> None:
    with pytest.raises(OSError, match="does not stay in the folder"):
        open_inside(tmp_path, name)


def test_every_file_that_is_copied_has_a_kind_and_a_size_limit() -> None:
    assert set(CONTENT_RULES) == {CONFIG, *TOKENIZER_FILES}
    assert all(is_packed(name) for name in CONTENT_RULES)


def test_the_format_s_page_states_the_rules() -> None:
    page = (Path(__file__).parents[1] / "docs" / "reference" / "format.md").read_text(encoding="utf-8")
    kinds = {"json": "a JSON object", "text": "UTF-8 text", "sentencepiece": "a sentencepiece model"}
    for name, rule in CONTENT_RULES.items():
        assert f"| `{name}` | {kinds[rule.kind]} | {rule.most_bytes:,} |" in page
    for number in (MOST_LICENSE_BYTES, MOST_JSON_VALUES):
        assert f"{number:,}" in page


def field(number: int, wire: int, content: bytes = b"") -> bytes:
    """Return a protobuf field of at most 127 bytes."""
    return bytes([number << 3 | wire]) + (bytes([len(content)]) if wire == 2 else b"") + content


PIECE = field(1, 2, field(1, 2, b"a"))


@pytest.mark.parametrize(
    ("data", "sound"),
    [
        (PIECE * 300, True),
        (PIECE + field(2, 2, b"trainer") + field(3, 2, b"normalizer"), True),
        (PIECE + b"\xc2\x0c\x01x", True),  # an extension, field 200
        (b"", False),
        (PRIVATE.encode(), False),
        (PIECE[:-1], False),
        (PIECE + field(6, 2, b"x"), False),
        (PIECE + field(1, 0, b"\x01"), False),
        (field(2, 2, b"x"), False),
        (b"\xff" * 30, False),
        (b"IQ== 0\nIg== 1\n", False),  # tiktoken's format
    ],
)
def test_tokenizer_model_is_a_sentencepiece_model(data: bytes, sound: bool) -> None:
    if sound:
        check_content("tokenizer.model", data)
    else:
        with pytest.raises(ValueError, match="not a sentencepiece model"):
            check_content("tokenizer.model", data)


@pytest.mark.parametrize("value", ["/etc/passwd", "../x.json", ["tokenizer.4.0.0.json"], {"a": 1}, 7])
def test_a_tokenizer_names_no_other_files(value: object) -> None:
    with pytest.raises(ValueError, match="names another file"):
        check_content("tokenizer_config.json", json.dumps({"fast_tokenizer_files": value}).encode())
    for key in ("tokenizer_file", "vocab_file"):
        # transformers 5 does not open it; a branch, and the copy that we read, are without the key.
        data = json.dumps({key: value}).encode()
        check_content("tokenizer_config.json", data)
        assert json.loads(branch_file("tokenizer_config.json", data, ModelFacts()).data) == {}
    check_content("tokenizer_config.json", b'{"tokenizer_file": null, "vocab_file": "tokenizer.model"}')


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.rotary_emb.inv_freq", "lm_head.weight"])
def test_a_tensor_that_is_not_used_is_no_reason_to_hash_a_terabyte(recipe: RecipeFile, model: Path, name: str) -> None:
    config = json.loads((model / CONFIG).read_text())
    (model / CONFIG).write_text(json.dumps({**config, "tie_word_embeddings": True}))
    write_lock_of_folder(recipe.path, recipe.recipe.base_model.id, model)
    path = model / "model.safetensors"
    header = read_header(path)
    kept = [tensor for tensor in header.tensors.values() if tensor.name != "lm_head.weight"]
    wide = TensorInfo(name=name, dtype="F16", shape=(1 << 20, 1 << 19))
    head, _ = layout(path, [*kept, wide])
    path.write_bytes(head)
    os.truncate(path, len(head) + sum(tensor.size_bytes for tensor in [*kept, wide]))
    with pytest.raises(SourceError, match="the weights are not those that the lock") as caught:
        check_folder_of(RecipeFile.load(recipe.path))
    assert f"unexpected {name}" in caught.value.why
