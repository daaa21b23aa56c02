"""Builds whose texts are datasets on a Hub: the real client against the loopback Hub."""

import csv
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow
import pytest
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from pyarrow import parquet

from packager.errors import CalibrationError, SourceError
from packager.inputs.texts import TextSets, prepare
from packager.pipeline.lock_recipes import lock_recipes
from packager.recipe.file import RecipeFile
from tests import tiny_recipe
from tests.loopback_hub import Account, LoopbackHub
from tests.publish_fixtures import log_in
from tests.samples import sampled
from tests.sources import open_folder
from tests.tiny_recipe import sentences, write_inputs, write_recipe

# huggingface_hub's own way of sending a file to its HTTP client.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
    pytest.mark.usefixtures("in_process"),
]

DATASET = "acme/texts"
ROWS = sentences(60, seed=1).splitlines()
PARTS = (ROWS[:25], ROWS[25:26], ROWS[26:])  # of the split train, file by file
HELD_OUT = sentences(40, seed=2).splitlines()


def encoded(rows: Sequence[str], kind: str, column: str = "text") -> bytes:
    """Return a file of texts with a second column."""
    numbers = range(len(rows))
    if kind == "parquet":
        sink = io.BytesIO()
        parquet.write_table(pyarrow.table({"number": list(numbers), column: list(rows)}), sink)
        return sink.getvalue()
    if kind == "csv":
        text = io.StringIO(newline="")
        writer = csv.writer(text)
        writer.writerows([("number", column), *zip(numbers, rows, strict=True)])
        return text.getvalue().encode()
    return "".join(json.dumps({"number": number, column: row}) + "\n" for number, row in enumerate(rows)).encode()


def readme(*, license_id: str = "cc0-1.0", config: str = "default") -> bytes:
    files = [{"split": "train", "path": "data/train-*"}, {"split": "held_out", "path": "more/**"}]
    front = {"license": license_id, "configs": [{"config_name": config, "data_files": files}]}
    return f"---\n{json.dumps(front)}\n---\n# Texts\n".encode()


def files_of(kind: str) -> dict[str, bytes]:
    parts = {f"data/train-{number:05}-of-00003.{kind}": encoded(part, kind) for number, part in enumerate(PARTS)}
    return {"README.md": readme(), **parts, f"more/deep/rows.{kind}": encoded(HELD_OUT, kind)}


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    tokens = {"hf_write": Account("alice", orgs=("acme",)), "hf_read": Account("alice", "read", orgs=("acme",)),
              "hf_other": Account("mallory")}  # fmt: skip
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    with LoopbackHub(tmp_path / "hub", tokens=tokens) as made:
        log_in(made, "hf_write", monkeypatch)
        # Made of the address when the client is imported; files are downloaded by it.
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.partition("/{repo_id}")
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", "".join([made.endpoint, *template[1:]]))
        yield made
        huggingface_hub.close_session()


def upload(files: dict[str, bytes], *, private: bool = False, delete: Sequence[str] = ()) -> str:
    """Commit files of the dataset, which is made if it is not there, and return the commit."""
    api = HfApi()
    api.create_repo(DATASET, repo_type="dataset", private=private, exist_ok=True)
    operations = [CommitOperationAdd(name, data) for name, data in files.items()]
    gone = [CommitOperationDelete(name) for name in delete]
    made = api.create_commit(DATASET, [*operations, *gone], commit_message="texts", repo_type="dataset")
    return str(made.oid)


def recipe_of(folder: Path, commit: str, *, variants: int = 3, **more: Any) -> Path:
    """Write a recipe whose two texts are the dataset's splits at a commit."""
    rows = {"num_samples": 12, "seq_len": 32, "seed": 3}
    return write_recipe(folder, {
        "calibration": {"dataset": DATASET, "revision": commit, "split": "train", **rows, **more},
        "evaluation": {"dataset": DATASET, "revision": commit, "split": "held_out", "num_tokens": 256, "seq_len": 32},
        "variants": tiny_recipe.RECIPE["variants"][:variants],
    })  # fmt: skip


def texts_of(recipe: Path) -> TextSets:
    source = open_folder(recipe.parent / "model", base_id="tester/tiny")
    return prepare(RecipeFile.load(recipe), source)


def local_texts(folder: Path, kind: str) -> TextSets:
    """Return the texts of a recipe that names local files with the same rows."""
    (folder / f"train.{kind}").write_bytes(encoded(ROWS, kind))
    (folder / f"held_out.{kind}").write_bytes(encoded(HELD_OUT, kind))
    recipe = write_recipe(folder, {
        "calibration": {"path": f"train.{kind}", "num_samples": 12, "seq_len": 32, "seed": 3},
        "evaluation": {"path": f"held_out.{kind}", "num_tokens": 256, "seq_len": 32},
    }, name="local.yaml")  # fmt: skip
    return texts_of(recipe)


@pytest.mark.parametrize("kind", sampled(["parquet", "jsonl", "csv"], "parquet"))
def test_rows_of_a_dataset_are_those_of_the_same_text_in_a_file(hub: LoopbackHub, tmp_path: Path, kind: str) -> None:
    commit = upload(files_of(kind))
    write_inputs(tmp_path)
    found, expected = texts_of(recipe_of(tmp_path, commit)), local_texts(tmp_path, kind)
    for name in ("calibration", "evaluation"):
        rows, local = getattr(found, name), getattr(expected, name)
        assert rows.ids.tolist() == local.ids.tolist()
        assert (rows.record.digest, rows.record.text_sha256) == (local.record.digest, local.record.text_sha256)
        assert (rows.record.source, rows.record.revision, rows.record.license) == (DATASET, commit, "cc0-1.0")
    large = [entry.path for entry in hub.repository(f"datasets/{DATASET}").files(commit).values() if entry.sha256]
    assert len(large) == (4 if kind == "parquet" else 0), "parquet is stored as the Hub stores it, by its digest"


@pytest.mark.slow
def test_a_build_with_a_dataset(hub: LoopbackHub, tmp_path: Path) -> None:
    commit = upload(files_of("parquet"))
    write_inputs(tmp_path)
    tiny_recipe.build(recipe_of(tmp_path, commit, variants=1), tmp_path / "dist")
    asked = len(hub.requests)
    made = tiny_recipe.build(recipe := recipe_of(tmp_path, commit), tmp_path / "dist")
    assert len(made.quantized) == 2
    assert len(hub.requests) == asked, "the rows are kept, and the commit identifies the text"
    local_texts(tmp_path, "parquet")
    local = tiny_recipe.build(tmp_path / "local.yaml", tmp_path / "local")
    for of_hub, of_file in zip(made.receipts, local.receipts, strict=True):
        assert of_hub.provenance.weights_files == of_file.provenance.weights_files
        assert of_hub.provenance.quality == of_file.provenance.quality
    card = (tiny_recipe.workspace(tmp_path / "dist").folder("main") / "README.md").read_text()
    assert f"https://huggingface.co/datasets/{DATASET}/tree/{commit}" in card
    assert tiny_recipe.build(recipe, tmp_path / "dist").nothing_to_do
    assert len(hub.requests) == asked


def test_a_private_dataset_needs_its_token(hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = upload(files_of("jsonl"), private=True)
    write_inputs(tmp_path)
    recipe = recipe_of(tmp_path, commit)
    monkeypatch.delenv("HF_TOKEN")
    for token in ("", "hf_other"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(SourceError, match="not on the Hub, or is private") as caught:
            texts_of(recipe)
        assert "hf auth login" in caught.value.hint
        assert DATASET in caught.value.what
    monkeypatch.setenv("HF_TOKEN", "hf_read")
    assert texts_of(recipe).calibration.ids.tolist() == local_texts(tmp_path, "jsonl").calibration.ids.tolist()


@pytest.mark.slow
def test_a_branch_that_moved_is_read_at_the_locks_commit(hub: LoopbackHub, tmp_path: Path) -> None:
    first = upload(files_of("jsonl"))
    write_inputs(tmp_path)
    recipe = recipe_of(tmp_path, "main")
    (locked,) = lock_recipes([recipe], lambda _: None)
    assert locked.lock.datasets == {f"{DATASET}@main": first}
    before = texts_of(recipe)
    second = upload({"data/train-00000-of-00003.jsonl": encoded(sentences(30, seed=9).splitlines(), "jsonl")})
    assert second != first
    again = texts_of(recipe)
    assert (again.calibration.record.revision, again.calibration.record.digest) == (
        first, before.calibration.record.digest,
    )  # fmt: skip
    (compared,) = lock_recipes([recipe], lambda _: None, check=True)
    assert (compared.status, compared.lock.datasets) == ("differs", {f"{DATASET}@main": second})
    list(lock_recipes([recipe], lambda _: None))
    moved = texts_of(recipe).calibration.record
    assert moved.revision == second
    assert moved.digest != before.calibration.record.digest


def test_a_commit_that_is_gone_is_an_error(hub: LoopbackHub, tmp_path: Path) -> None:
    upload(files_of("jsonl"))
    write_inputs(tmp_path)
    with pytest.raises(SourceError, match="no such revision") as caught:
        texts_of(recipe_of(tmp_path, "f" * 40))
    assert "ffffffffffff" in caught.value.what


def test_a_column_that_is_missing_is_named_with_those_that_are_there(hub: LoopbackHub, tmp_path: Path) -> None:
    write_inputs(tmp_path)
    for kind in ("parquet", "csv", "jsonl"):
        commit = upload(files_of(kind))
        with pytest.raises(CalibrationError, match="the text has no column 'texts'") as caught:
            texts_of(recipe_of(tmp_path, commit, text_field="texts"))
        assert caught.value.why == "its columns are 'number', 'text'"
        assert caught.value.hint == "did you mean 'text'?"
        assert f"{DATASET}: data/train-00000-of-00003.{kind}" in caught.value.where
        upload({"left": b""}, delete=[name for name in files_of(kind) if name != "README.md"])


def test_a_part_that_is_missing_is_an_error(hub: LoopbackHub, tmp_path: Path) -> None:
    upload(files_of("jsonl"))
    commit = upload({"left": b""}, delete=["data/train-00001-of-00003.jsonl"])
    write_inputs(tmp_path)
    with pytest.raises(SourceError) as caught:
        texts_of(recipe_of(tmp_path, commit))
    assert "data/train-00001-of-00003.jsonl" in str(caught.value)
