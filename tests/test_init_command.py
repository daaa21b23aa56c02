"""`packager init`: what the recipe of a model says, where each part comes from, and what stops it."""

import gzip
import json
import os
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner, Result

from packager.cli import init
from packager.cli.main import app
from packager.errors import CalibrationError, PlanError, RecipeError, SourceError
from packager.inputs import hub_models
from packager.inputs.named_model import NamedModel, find_model
from packager.model.lock import LockedExperts
from packager.pipeline import init_recipe
from packager.pipeline.draft_recipe import Wishes, draft_recipe, variants_of
from packager.pipeline.draft_texts import documents_note
from packager.pipeline.plan import make_plan
from packager.recipe import Recipe
from packager.recipe.draft import draft_text
from packager.recipe.file import RecipeFile
from packager.recipe.lock_file import lock_path
from packager.recipe.schema import schema_text
from packager.recipe.text_models import Calibration, Evaluation
from packager.recipe.yaml import parse
from tests.locks import lock_of
from tests.loopback_hub import Account, LoopbackHub
from tests.publish_fixtures import log_in
from tests.tiny_models import CONFIGS
from tests.tiny_recipe import build, sentences, write_inputs

pytestmark = pytest.mark.filterwarnings("ignore:Use .content=:DeprecationWarning")  # of the Hub's client
TOKEN = "hf_init_0123456789"  # noqa: S105 - the loopback Hub's
CARD = "---\nlicense: mit\nlanguage: [en, de, multilingual]\n---\n# Tiny\n"


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["init", *map(str, arguments)], prog_name="packager")


@pytest.fixture
def folder(tmp_path: Path, in_process: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a model's folder, two texts, and no recipe; it is the current one."""
    write_inputs(tmp_path)
    (tmp_path / "model" / "README.md").write_text(CARD)
    (tmp_path / "model" / "LICENSE.txt").write_text("Do what you like.\n")
    (tmp_path / "model" / "licenses.py").write_text("")
    (tmp_path / "calibration.txt").write_text(sentences(600, seed=3))
    monkeypatch.chdir(tmp_path)
    return tmp_path


LOCAL = ("./model", "--id", "tester/Tiny-1B_chat", "--owner", "me", "--format", "json")


def test_a_local_model_becomes_a_recipe_with_a_green_plan(folder: Path) -> None:
    done = run(*LOCAL, "--calibration", "calibration.txt", "--evaluation", "evaluation.txt")
    assert done.exit_code == 0, done.output
    answer = json.loads(done.stdout)
    assert answer["recipe"] == "tiny-1b_chat.yaml"
    assert answer["written"] == ["tiny-1b_chat.lock.json", "recipe.schema.json", "tiny-1b_chat.yaml"]
    assert (folder / "recipe.schema.json").read_text() == schema_text()
    recipe = RecipeFile.load(folder / "tiny-1b_chat.yaml").recipe
    assert (recipe.repository.id, recipe.repository.target) == ("me/Tiny-1B_chat-GPTQ", "local")
    assert (recipe.base_model.id, recipe.base_model.path) == ("tester/Tiny-1B_chat", "model")
    assert (recipe.card.title, recipe.card.creator, recipe.card.quantized_by) == ("Tiny 1B chat", "tester", "me")
    assert (recipe.card.license.id, recipe.card.license.base_files) == ("mit", ("LICENSE.txt",))
    assert recipe.card.language == ("en", "de")
    assert recipe.card.prompt_template.template == "<s>[INST] {prompt} [/INST]"
    tokens = (folder / "calibration.txt").stat().st_size // 6
    assert (recipe.calibration.num_samples, recipe.calibration.seq_len) == (tokens // 64, 64)
    assert [variant.group_size for variant in recipe.expanded_variants()] == [32, 32]  # 64 does not divide 96
    assert recipe.loaders.required == ("autogptq", "transformers", "onnxruntime")
    assert recipe.loaders.if_available == ("exllamav2",)


@pytest.mark.parametrize("shared", [{"engine": "auto-gptq"}, {"true_sequential": False}, {"damp_percent": 0.05}, None])
def test_shared_defaults_are_the_defaults(folder: Path, shared: dict[str, Any] | None) -> None:
    content = {"schema_version": 1, **({"defaults": shared} if shared else {"repository": {"target": "hub"}})}
    (folder / "defaults.yaml").write_text(json.dumps(content))
    texts = ("--calibration", "calibration.txt", "--evaluation", "evaluation.txt")
    done = run(*LOCAL, *texts, "--set", "classic", "--extends", "defaults.yaml")
    assert done.exit_code == 0, done.output
    found = RecipeFile.load(folder / "tiny-1b_chat.yaml").recipe.defaults
    assert found.target_correction == (0 if shared else 0.5)
    assert {key: getattr(found, key) for key in shared or {}} == (shared or {})


def test_what_a_shared_file_gives_is_not_in_the_recipe(folder: Path) -> None:
    shared = {
        "schema_version": 1,
        "repository": {"target": "hub"},
        "calibration": {"path": "calibration.txt", "num_samples": 3, "seq_len": 16},
        "variants": [{"branch": "main", "group_size": 16}],
        "loaders": {"required": []},
        "card": {"quantized_by": "somebody else"},
    }
    (folder / "defaults.yaml").write_text(json.dumps(shared))
    done = run(*LOCAL, "--evaluation", "evaluation.txt", "--extends", "defaults.yaml")
    assert done.exit_code == 0, done.output
    path = folder / "tiny-1b_chat.yaml"
    written = path.read_text()
    for key in (
        "target:",
        "calibration.txt",
        "num_samples:",
        "variants:",
        "loaders:\n  required",
        "quantized_by:",
        "wikitext",
    ):
        assert key not in written
    assert written.splitlines()[1:3] == ["schema_version: 1", "extends: defaults.yaml"]
    recipe = RecipeFile.load(path).recipe
    assert (recipe.repository.target, recipe.calibration.path, recipe.card.quantized_by) == (
        "hub", "calibration.txt", "somebody else",
    )  # fmt: skip
    assert [variant.group_size for variant in recipe.expanded_variants()] == [16]
    assert "no loader that runs on every machine" in done.stdout


def test_a_text_that_an_option_names_is_the_recipes_whatever_the_shared_file_gives(folder: Path) -> None:
    (folder / "defaults.yaml").write_text('{"schema_version": 1, "calibration": {"path": "evaluation.txt"}}')
    done = run(
        *LOCAL, "--calibration", "calibration.txt", "--evaluation", "evaluation.txt", "--extends", "defaults.yaml"
    )
    assert done.exit_code == 0, done.output
    assert RecipeFile.load(folder / "tiny-1b_chat.yaml").recipe.calibration.path == "calibration.txt"


@pytest.mark.parametrize(
    ("text", "name", "why"),
    [
        ("schema_version: 1\ncard: {titel: x}\n", "defaults.yaml", "defaults.yaml:2:8: "),
        ("", "nowhere.yaml", "nowhere.yaml"),
        ("schema_version: 1\n", "../defaults.yaml", "extends"),
    ],
)
def test_a_shared_file_with_mistakes_is_reported_and_nothing_is_written(
    folder: Path, text: str, name: str, why: str
) -> None:
    (folder / "defaults.yaml").write_text(text)
    done = run(*LOCAL[:-2], "--evaluation", "evaluation.txt", "--extends", name)
    assert done.exit_code == RecipeError.exit_code
    assert why in done.stderr
    assert not list(folder.glob("tiny-1b_chat*"))


@pytest.mark.slow
def test_what_init_writes_is_built(folder: Path) -> None:
    assert run(*LOCAL, "--calibration", "calibration.txt", "--evaluation", "evaluation.txt").exit_code == 0
    path = folder / "tiny-1b_chat.yaml"
    path.write_text(path.read_text().replace("  required: [autogptq, transformers, onnxruntime]\n", ""))
    receipts = build(path, folder / "dist").receipts
    assert [receipt.provenance.branch for receipt in receipts] == ["main", "gptq-4bit-32g-actorder_True"]
    assert all(receipt.provenance.quality is not None for receipt in receipts)


def test_an_owner_that_nobody_named_is_said(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.setattr("getpass.getuser", unknown)
    done = run("./model", "--id", "tester/Tiny", "--format", "json")
    assert done.exit_code == 0, done.output
    assert RecipeFile.load(folder / "tiny.yaml").recipe.repository.id == "owner/Tiny-GPTQ"
    note = "the owner is owner, the user's name on this machine (HF_HUB_OFFLINE is set): --owner NAME gives another"
    assert json.loads(done.stdout)["notes"][0] == note
    assert f"note: {note}" in done.stderr


def test_a_hub_that_does_not_name_the_account_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused() -> None:
        raise SourceError("the Hub names no account", why="its answer has no name")

    monkeypatch.setattr("getpass.getuser", lambda: "jo smith")
    monkeypatch.setattr("packager.inputs.hub_cache.is_offline", lambda: False)
    monkeypatch.setattr("packager.inputs.hub_account.has_token", lambda: True)
    monkeypatch.setattr("packager.inputs.hub_account.hub_account", refused)
    name, (note,) = init._owner()
    assert name == "jo-smith"
    assert "(the Hub names no account: its answer has no name)" in note


def test_a_recipe_that_is_there_stays(folder: Path) -> None:
    path = folder / "tiny-1b_chat.yaml"
    path.write_text("mine")
    done = run(*LOCAL)
    assert done.exit_code == 2
    assert "there is a recipe tiny-1b_chat.yaml" in done.stderr
    assert path.read_text() == "mine"
    assert not lock_path(path).exists()
    assert run(*LOCAL, "--force").exit_code == 0
    assert path.read_text() != "mine"


def test_a_model_of_few_positions_gets_rows_that_fit(folder: Path) -> None:
    config = folder / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "max_position_embeddings": 16}))
    done = run(*LOCAL)
    assert done.exit_code == 0, done.output
    recipe = RecipeFile.load(folder / "tiny-1b_chat.yaml").recipe
    assert (recipe.calibration.seq_len, recipe.evaluation.seq_len, recipe.loaders.seq_len) == (16, 16, 16)


def test_nothing_is_written_of_a_recipe_without_a_plan(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PlanError("no")

    monkeypatch.setattr("packager.pipeline.init_recipe.make_plan", refused)
    before = sorted(folder.iterdir())
    assert run(*LOCAL).exit_code == PlanError.exit_code
    assert sorted(folder.iterdir()) == before


def _link(path: Path) -> None:
    path.symlink_to("nowhere")


def _twin(path: Path) -> None:
    path.with_suffix(".yml").write_text("another recipe, whose lock has the same name")


@pytest.mark.parametrize(
    ("prepare", "name", "options", "words"),
    [
        (Path.mkdir, "a.yaml", ("--force",), "is no file"),
        (os.mkfifo, "a.yaml", ("--force",), "is no file"),
        (_link, "a.yaml", (), "there is a recipe"),
        (_twin, "a.yaml", (), "would have the same lock, a.lock.json"),
        (lambda _: None, "a" * 252 + ".yaml", (), "File name too long"),
        (lambda _: None, "a" * 247 + ".yaml", (), "File name too long"),
    ],
)
def test_a_place_where_no_recipe_can_be_is_an_error_and_nothing_is_written(
    folder: Path, prepare: Any, name: str, options: tuple[str, ...], words: str
) -> None:
    prepare(folder / name)
    before = sorted(folder.iterdir())
    done = run(*LOCAL, "--output", name, *options)
    assert done.exit_code in (2, 12)
    assert words in done.stderr
    assert sorted(folder.iterdir()) == before


def test_the_lock_that_a_killed_run_left_is_replaced(folder: Path) -> None:
    (folder / "tiny-1b_chat.lock.json").write_text("{")
    assert run(*LOCAL).exit_code == 0
    RecipeFile.load(folder / "tiny-1b_chat.yaml")


def test_a_schema_that_is_there_is_used(folder: Path) -> None:
    (folder / "recipe.schema.json").write_text("{}")
    (folder / "recipes").mkdir()
    done = run("./model", "--id", "a/b", "--owner", "me", "--output", "recipes/b.yaml", "--format", "json")
    assert json.loads(done.stdout)["written"] == ["recipes/b.lock.json", "recipes/b.yaml"]
    first, *_ = (folder / "recipes" / "b.yaml").read_text().splitlines()
    assert first == "# yaml-language-server: $schema=../recipe.schema.json"
    assert RecipeFile.load(folder / "recipes" / "b.yaml").recipe.base_model.path == str(folder / "model")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("./model", "--owner", "me"), "the name of the model is not known"),
        (("./nothing", "--owner", "me"), "neither a folder nor the name of a model"),
        (("a/b/c",), "neither a folder nor the name of a model"),
        ((".", "--id", "a/b"), "it has no config.json"),
        (("./model", "--id", "a/b", "--owner", "not a name"), "must be namespace/name"),
        (("./model", "--id", "a/b", "--calibration", "questions.jsonl"), "is too short"),
        (("./model", "--id", "a/b", "--license", "other"), "the licence of the model is not known"),
        (("./model", "--id", "a/b", "--license", "apache2"), "did you mean apache-2.0?"),
        (("./model", "--id", "a//b"), "'a//b' is no name of a model"),
        (("./" + "b" * 5000,), "File name too long"),
    ],
)
def test_what_is_missing_is_said_and_nothing_is_written(folder: Path, arguments: Any, words: str) -> None:
    before = sorted(folder.iterdir())
    done = run(*arguments)
    assert words in done.stderr
    assert done.exit_code in (2, 3)
    assert "Traceback" not in done.output
    assert sorted(folder.iterdir()) == before


def test_a_folder_that_reads_like_a_name_is_asked_about(folder: Path) -> None:
    (folder / "model").rename(folder / "tiny")
    (folder / "org").mkdir()
    (folder / "tiny").rename(folder / "org" / "tiny")
    done = run("org/tiny")
    assert done.exit_code == 2
    assert "write ./org/tiny for the folder, or hub:org/tiny for the model on the Hub" in done.stderr


def model_of(folder: Path, card: bytes | str | None, *files: str) -> NamedModel:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text("{}")
    for name in files:
        (folder / name).write_text("text")
    if card is not None:
        (folder / "README.md").write_bytes(card.encode() if isinstance(card, str) else card)
    return find_model(str(folder), lambda _: None)


def wishes(folder: Path, **changes: Any) -> Wishes:
    fields: dict[str, Any] = {
        "path": folder / "recipe.yaml", "owner": "me", "variant_set": "classic", "target": "local", "model_id": "a/b",
        "license_id": "", "calibration": None, "evaluation": None,
    }  # fmt: skip
    return Wishes(**(fields | changes))


@pytest.mark.parametrize(
    ("front", "expected"),
    [
        ("license: Apache-2.0", {"id": "apache-2.0"}),
        (
            "license: other\nlicense_name: tongyi-qianwen\nlicense_link: https://a.b/LICENSE",
            {"id": "tongyi-qianwen", "link": "https://a.b/LICENSE"},
        ),
        ("license: other\nlicense_name: Some Licence\nlicense_link: LICENSE", {"id": "some-licence"}),
        ("license: mit\nlicense_link: 'https://a b'", {"id": "mit"}),
    ],
)
def test_the_licence_is_that_of_the_card(tmp_path: Path, front: str, expected: dict[str, Any]) -> None:
    model = model_of(tmp_path / "m", f"---\n{front}\n---\n")
    assert draft_recipe(model, wishes(tmp_path))["card"]["license"] == expected
    assert draft_recipe(model, wishes(tmp_path))["calibration"]["dataset"] == "Salesforce/wikitext"  # no chat template


@pytest.mark.parametrize(
    ("card", "why"),
    [
        (None, "there is no README.md"),
        ("# Title\n", "has no front matter"),
        ("---\n{\n---\n", "is not YAML"),
        ("---\n- a\n---\n", "is a list"),
        (b"---\nlicense: \xff\n---\n", "codec can't decode"),
        (b"---\n" + b"a: b\n" * 100_000 + b"---\n", "has 500000 characters"),
        (b"-" * 3_000_000, "larger than 2000000 bytes"),
    ],
)
def test_a_card_that_gives_nothing_is_no_error_but_is_said(tmp_path: Path, card: Any, why: str) -> None:
    model = model_of(tmp_path / "m", card)
    assert why in model.card_problem
    with pytest.raises(RecipeError, match="the licence of the model is not known"):
        draft_recipe(model, wishes(tmp_path))
    assert draft_recipe(model, wishes(tmp_path, license_id="mit"))["card"]["license"] == {"id": "mit"}


def test_licence_files_are_known_by_their_names(tmp_path: Path) -> None:
    files = ("LICENSE", "Notice.txt", "USE_POLICY.md", "LICENCE-MODEL", "license.json", "licensed.txt", "COPYING")
    model = model_of(tmp_path / "m", None, *files)
    assert model.license_files == ("COPYING", "LICENCE-MODEL", "LICENSE", "Notice.txt", "USE_POLICY.md")


@pytest.mark.parametrize(
    ("row", "fields"),
    [
        ({"text": "a" * 9, "url": "b" * 99}, {}),
        ({"id": "1", "content": "long words"}, {"text_field": "content"}),
        ({"id": 1, "conversations": [{"role": "user", "content": "a"}]}, {"messages_field": "conversations"}),
    ],
)
def test_the_column_of_a_local_text_is_found(tmp_path: Path, row: Any, fields: dict[str, str]) -> None:
    (tmp_path / "texts.jsonl").write_text((json.dumps(row) + "\n") * 5000)
    model = model_of(tmp_path / "m", CARD)
    recipe = draft_recipe(model, wishes(tmp_path, calibration=tmp_path / "texts.jsonl"))
    found = recipe["calibration"]
    assert {key: found[key] for key in found if key.endswith("_field")} == fields


CONTENT = "some words of a text that is long enough, "


def write_table(path: Path, rows: dict[str, list[Any]]) -> Path:
    table = pyarrow.table(rows)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
    else:
        pyarrow.csv.write_csv(table, path)
    return path


@pytest.mark.parametrize("name", ["a.csv", "a.parquet"])
@pytest.mark.parametrize(
    ("rows", "fields"),
    [
        ({"text": [CONTENT] * 9000, "url": ["u" * 99] * 9000}, {}),
        ({"id": [1] * 9000, "body": [CONTENT] * 9000, "lang": ["en"] * 9000}, {"text_field": "body"}),
    ],
)
def test_the_column_of_a_table_is_found(
    tmp_path: Path, name: str, rows: dict[str, list[Any]], fields: dict[str, str]
) -> None:
    path = write_table(tmp_path / name, rows)
    found = draft_recipe(model_of(tmp_path / "m", CARD), wishes(tmp_path, calibration=path))["calibration"]
    assert {key: found[key] for key in found if key.endswith("_field")} == fields
    assert found["num_samples"] * found["seq_len"] > 9000


def gzipped(text: str) -> bytes:
    return gzip.compress(text.encode())


@pytest.mark.parametrize(
    ("name", "content", "error", "words"),
    [
        ("a.txt", b"\n \t\n" * 100_000, RecipeError, "is too short"),
        ("a.jsonl", b'{"text": "  "}\n' * 50_000, RecipeError, "is too short"),
        ("a.jsonl", b'{"tokens": [1, 2]}\n' * 50_000, RecipeError, "no column of 'a.jsonl' is a text"),
        ("a.jsonl", b'["text"]\n' * 50_000, CalibrationError, "a line is not a JSON object"),
        ("a.csv", b"id,n\n" + b"1,2\n" * 50_000, RecipeError, "no column of 'a.csv' is a text"),
        ("a.parquet", b"PAR1" + b"x" * 100_000, CalibrationError, "the text cannot be read"),
        ("a.csv", b"", CalibrationError, "the text cannot be read"),
        ("a.txt.gz", gzipped("\n" * 10_000_000), RecipeError, "is too short"),
        ("a.txt.gz", b"no gzip" * 10_000, CalibrationError, "the text cannot be read"),
        ("a.pdf", b"%PDF" * 10_000, RecipeError, "is of no kind that is read"),
    ],
)
def test_a_text_that_a_build_would_refuse_is_refused_now(
    tmp_path: Path, name: str, content: bytes, error: type[Exception], words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(error, match=words):
        draft_recipe(model_of(tmp_path / "m", CARD), wishes(tmp_path, calibration=tmp_path / name))


def test_a_packed_text_counts_as_long_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(CONTENT * 9000)
    (tmp_path / "b.txt.gz").write_bytes(gzipped(CONTENT * 9000))
    model, rows = model_of(tmp_path / "m", CARD), []
    for name in ("a.txt", "b.txt.gz"):
        found = draft_recipe(model, wishes(tmp_path, calibration=tmp_path / name))["calibration"]
        rows.append((found["num_samples"], found["seq_len"]))
    assert rows[0] == rows[1]


def test_a_licence_file_that_holds_nothing_is_left_out_and_said(folder: Path) -> None:
    (folder / "model" / "NOTICE").touch()
    done = run(*LOCAL)
    assert done.exit_code == 0, done.output
    license_ = RecipeFile.load(folder / "tiny-1b_chat.yaml").recipe.card.license
    assert license_.base_files == ("LICENSE.txt",)
    assert "empty, so no licence file of a branch: NOTICE" in json.loads(done.stdout)["notes"]


@pytest.mark.parametrize("name", ["recipe.schema.json", "a.lock.json"])
def test_a_schema_or_a_lock_is_no_recipe(folder: Path, name: str) -> None:
    (folder / name).write_text("mine")
    done = run(*LOCAL, "--output", name, "--force")
    assert (done.exit_code, f"{name} is the name of a schema or a lock" in done.stderr) == (2, True)
    assert (folder / name).read_text() == "mine"


def test_of_two_runs_at_once_one_writes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another run writes its recipe after this one has looked, and before it writes."""
    path = folder / "tiny-1b_chat.yaml"
    plan = make_plan

    def meanwhile(*arguments: Any) -> Any:
        path.write_text("the other's")
        return plan(*arguments)

    monkeypatch.setattr(init_recipe, "make_plan", meanwhile)
    done = run(*LOCAL)
    assert (done.exit_code, "there is a recipe tiny-1b_chat.yaml" in done.stderr) == (2, True)
    assert path.read_text() == "the other's"
    assert not lock_path(path).exists()


def test_a_run_waits_while_another_writes(tmp_path: Path) -> None:
    order = []
    with init_recipe._folder_to_itself(tmp_path / "new"):

        def write() -> None:
            with init_recipe._folder_to_itself(tmp_path / "new"):
                order.append("second")

        thread = threading.Thread(target=write)
        thread.start()
        thread.join(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_conversations_for_a_model_without_a_chat_template_are_refused(folder: Path) -> None:
    path = folder / "model" / "tokenizer_config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key != "chat_template"}
    path.write_text(json.dumps(config))
    (folder / "model" / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "chats.jsonl").write_text(f'{{"messages": [{{"role": "user", "content": "{"hello " * 99}"}}]}}\n')
    before = sorted(folder.iterdir())
    done = run(*LOCAL, "--calibration", "chats.jsonl")
    assert done.exit_code == 2
    assert "'chats.jsonl' holds conversations, and the model has no chat template" in done.stderr
    assert sorted(folder.iterdir()) == before


def test_a_text_outside_the_recipes_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("words " * 10_000)
    (tmp_path / "recipes").mkdir()
    model = model_of(tmp_path / "m", CARD)
    with pytest.raises(RecipeError, match=r"is not in the recipe's folder"):
        draft_recipe(model, wishes(tmp_path / "recipes", calibration=tmp_path / "a.txt"))


@pytest.mark.parametrize(
    ("width", "variant_set", "expected"),
    [
        (256, "classic", ["128 static", "32 full", "64 full", "128 full"]),
        (256, "modern", ["128 group", "64 group", "32 group"]),
        (576, "classic", ["64 static", "32 full", "64 full"]),
        (96, "modern", ["32 group"]),
        (48, "classic", ["-1 static", "-1 full"]),
        (
            256, "wide",
            ["128 static", "32 full", "64 full", "128 full", "8-bit 128 static", "8-bit 128 full", "3-bit 128 full"],
        ),
    ],
)  # fmt: skip
def test_a_set_has_the_groups_that_divide_the_model(width: int, variant_set: Any, expected: list[Any]) -> None:
    from packager.model.architecture import architecture_of

    config = {
        **json.loads(CONFIGS["llama"]().to_json_string()),
        "hidden_size": width,
        "intermediate_size": width,
        "head_dim": width // 4,
    }
    architecture = architecture_of(lock_of(config, "a/b").model, "a/b")
    found = [
        f"{str(entry.get('bits', '')) + '-bit ' if 'bits' in entry else ''}{entry['group_size']} {entry['act_order']}"
        for entry in variants_of(variant_set, architecture)
    ]
    assert found == expected


def test_a_model_too_large_for_a_cpu_needs_no_runtime_that_computes_on_nothing_else(tmp_path: Path) -> None:
    from packager.model.architecture import architecture_of
    from packager.pipeline.draft_recipe import notes_on

    model = model_of(tmp_path / "m", CARD)
    for layers, required in ((3, ["autogptq", "transformers", "onnxruntime"]), (40, ["autogptq", "transformers"])):
        widths = {"hidden_size": 2048, "intermediate_size": 8192, "head_dim": 512, "num_hidden_layers": layers}
        config = {**json.loads(CONFIGS["llama"]().to_json_string()), **widths}
        architecture = architecture_of(lock_of(config, "a/b").model, "a/b")
        recipe = draft_recipe(model, wishes(tmp_path), architecture)
        assert recipe["loaders"]["required"] == required
        whole = Recipe.model_validate_json(json.dumps(recipe))
        notes = " ".join(notes_on(model, whole, architecture, None))
        assert ("too slowly for this model, compute onnxruntime, vllm-cpu" in notes) == (layers == 40)


@given(
    st.recursive(
        st.text() | st.integers(-(10**9), 10**9) | st.booleans(),
        lambda inner: (
            st.lists(inner, min_size=1, max_size=3)
            | st.dictionaries(st.text(min_size=1), inner, min_size=1, max_size=3)
        ),
        max_leaves=8,
    )
)
def test_any_value_is_written_so_that_a_recipe_has_it(value: Any) -> None:
    root, problems = parse(draft_text({"card": {"value": value}}, schema="s.json"))
    if problems:  # no text of a recipe has such characters
        assert not all(text.isprintable() for text in _texts(value))
        return
    assert root is not None
    assert root.plain() == {"card": {"value": _tuples(value)}}


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list | dict):
        for item in [*value, *(value.values() if isinstance(value, dict) else ())]:
            yield from _texts(item)


def _tuples(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_tuples(item) for item in value)
    return {key: _tuples(item) for key, item in value.items()} if isinstance(value, dict) else value


@pytest.fixture
def hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LoopbackHub]:
    """A Hub that has the model."""
    with LoopbackHub(folder / "hub", tokens={TOKEN: Account("tester")}) as hub:
        log_in(hub, TOKEN, monkeypatch)
        constants = huggingface_hub.constants
        address = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace("https://huggingface.co", hub.endpoint)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder / "cache"))
        huggingface_hub.HfApi().create_repo("tester/tiny")
        huggingface_hub.HfApi().upload_folder(repo_id="tester/tiny", folder_path=folder / "model")
        yield hub


def test_a_model_on_the_hub_is_named_by_its_branch_and_locked_by_its_commit(hub: LoopbackHub, folder: Path) -> None:
    done = run("tester/tiny", "--format", "json")
    assert done.exit_code == 0, done.output
    commit = huggingface_hub.HfApi().model_info("tester/tiny").sha
    text = (folder / "tiny.yaml").read_text()
    lock = json.loads((folder / "tiny.lock.json").read_text())
    assert "revision: main" in text
    assert (lock["base_model"]["requested"], lock["base_model"]["revision"]) == ("main", commit)
    recipe = RecipeFile.load(folder / "tiny.yaml").recipe
    assert recipe.base_model.revision == commit
    assert recipe.repository.id == "tester/tiny-GPTQ"  # the account that is logged in
    assert recipe.card.license.base_files == ("LICENSE.txt",)
    # A model with a chat template is calibrated on conversations, and measured on what others are measured on.
    chats = recipe.calibration
    assert (chats.dataset, chats.split) == ("HuggingFaceH4/ultrachat_200k", "test_sft")
    assert (chats.messages_field, len(chats.revision or "")) == ("messages", 40)
    assert (recipe.evaluation.dataset, recipe.evaluation.split) == ("Salesforce/wikitext", "test")
    assert "conversations of UltraChat" in done.output
    of_weights = [request for request in hub.requests if "model.safetensors" in request.path]
    assert all("Range" in request.headers for request in of_weights if request.method == "GET")


@pytest.mark.slow
def test_a_model_in_the_cache_needs_no_hub(hub: LoopbackHub, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot = Path(huggingface_hub.snapshot_download("tester/tiny"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert run("tester/tiny", "--owner", "me").exit_code == 0
    assert RecipeFile.load(folder / "tiny.yaml").recipe.base_model.revision == snapshot.name
    assert run(snapshot, "--owner", "me", "-o", "other.yaml").exit_code == 0
    assert RecipeFile.load(folder / "other.yaml").recipe.base_model.id == "tester/tiny"
    assert hub.requests == []
    done = run("tester/tiny@v2", "--owner", "me", "-o", "third.yaml")
    assert (done.exit_code, "hf download tester/tiny --revision v2" in done.stderr) == (3, True)


def test_a_card_that_is_too_large_is_not_downloaded(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packager.inputs.named_model._MOST_CARD_BYTES", len(CARD) - 1)
    model = find_model("tester/tiny", lambda _: None)
    assert model.card_problem == f"README.md is larger than {len(CARD) - 1} bytes"
    assert not [request for request in hub.requests if "README" in request.path]


def test_a_model_that_is_not_there_is_an_error(hub: LoopbackHub) -> None:
    with pytest.raises(SourceError, match="is not on the Hub"):
        find_model("tester/none", lambda _: None)
    with pytest.raises(SourceError, match="no such revision"):
        find_model("tester/tiny@v9", lambda _: None)


def test_a_hub_that_hangs_is_reported_soon(hub: LoopbackHub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert hub_models._PATIENCE_S <= 20
    monkeypatch.setattr(hub_models, "_PATIENCE_S", 0.3)
    hub.fault("GET .*/api/models/tester/tiny", "delay", seconds=3.0)
    started = time.monotonic()
    with pytest.raises(SourceError, match="could not be downloaded"):
        find_model("tester/tiny", lambda _: None)
    assert time.monotonic() - started < 3


def write_documents(path: Path, count: int, characters: int, *, key: str = "text") -> Path:
    """Write JSON lines of documents, all different, each of about so many characters."""
    documents = (sentences(2 + characters // 40, seed=number)[:characters] for number in range(count))
    path.write_text("".join(json.dumps({key: document}) + "\n" for document in documents))
    return path


def test_many_short_documents_that_are_joined_are_said_with_the_key(folder: Path) -> None:
    write_documents(folder / "calibration.jsonl", 300, 100)
    done = run(*LOCAL, "--calibration", "calibration.jsonl", "--evaluation", "evaluation.txt")
    assert done.exit_code == 0, done.output
    recipe = RecipeFile.load(folder / "tiny-1b_chat.yaml").recipe
    assert recipe.calibration.documents == "joined", "the default stays"
    assert (
        "the documents of calibration.jsonl are joined into one text, and most are far shorter than a row: if each is "
        "a text of its own, write documents: separate under calibration"
    ) in json.loads(done.stdout)["notes"]


@pytest.mark.parametrize(
    ("count", "characters", "changes", "said"),
    [
        pytest.param(32, 256, {}, True, id="two documents fill a row of 128 tokens"),
        pytest.param(31, 256, {}, False, id="few documents"),
        pytest.param(32, 257, {}, False, id="longer documents"),
        pytest.param(32, 100, {"documents": "separate"}, False, id="separate already"),
        pytest.param(32, 100, {"text_field": "body"}, True, id="another column"),
        pytest.param(32, 100, {"messages_field": "text"}, False, id="conversations are separate"),
    ],
)
def test_documents_are_short_beside_a_row(
    tmp_path: Path, count: int, characters: int, changes: dict[str, Any], said: bool
) -> None:
    write_documents(tmp_path / "a.jsonl", count, characters, key=changes.get("text_field", "text"))
    calibration = Calibration(path="a.jsonl", seq_len=128, **changes)
    assert bool(documents_note({"calibration": calibration}, tmp_path)) == said


def test_a_text_of_one_document_and_empty_rows_are_not_short_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("A line.\n" * 1000)
    assert documents_note({"evaluation": Evaluation(path="a.txt")}, tmp_path) == ""
    long = write_documents(tmp_path / "a.jsonl", 40, 300).read_text()
    (tmp_path / "a.jsonl").write_text(long + '{"text": ""}\n{"text": null}\n' * 100)
    assert documents_note({"evaluation": Evaluation(path="a.jsonl", seq_len=128)}, tmp_path) == ""


def test_two_texts_of_short_documents_are_one_note(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.jsonl"):
        write_documents(tmp_path / name, 40, 100)
    note = documents_note(
        {"calibration": Calibration(path="a.jsonl"), "evaluation": Evaluation(path="b.jsonl")}, tmp_path
    )
    assert note.startswith("the documents of a.jsonl and b.jsonl are joined")
    assert note.endswith("write documents: separate under calibration and evaluation")


@pytest.mark.parametrize("experts", [False, True])
def test_a_model_without_experts_gets_a_target_correction(tmp_path: Path, experts: bool) -> None:
    from packager.model.architecture import architecture_of
    from packager.pipeline.draft_recipe import notes_on

    architecture = architecture_of(lock_of(json.loads(CONFIGS["llama"]().to_json_string()), "a/b").model, "a/b")
    if experts:
        routed = LockedExperts(parameter="mlp.experts.down_proj", count=4, top_k=2, per_token=True)
        groups = [group.model_copy(update={"experts": routed}) for group in architecture.kinds[0].groups]
        architecture = replace(architecture, kinds=(replace(architecture.kinds[0], groups=tuple(groups)),))
    recipe = draft_recipe(model_of(tmp_path / "m", CARD), wishes(tmp_path), architecture)
    assert recipe.get("defaults") == (None if experts else {"target_correction": 0.5})
    whole = Recipe.model_validate_json(json.dumps(recipe))
    assert whole.expanded_variants()[0].target_correction == (0 if experts else 0.5)
    said = " ".join(notes_on(model_of(tmp_path / "m", CARD), whole, architecture, None))
    assert ("with target_correction quantizing takes 2.1 times as long on a GPU, 1.5 times on a CPU" in said) != experts
    if not experts:
        least, most = gains_by_half_a_correction()
        assert f"came out {least:.1f} to {most:.1f} times as near to its base model" in said


def gains_by_half_a_correction() -> tuple[float, float]:
    """Return the least and the largest KL without a correction over that with 0.5, from the tables of measurements."""
    page = (Path(__file__).parents[1] / "docs/explanation/measurements.md").read_text(encoding="utf-8")
    settings, _, few = page.partition("| | 64g static | 32g static | 32g full |")[2].partition("**Few rows, few bits**")
    cells = re.search(r"^\| 0\.5 \|(.*)", settings, re.MULTILINE)
    assert cells is not None
    columns = [row.split(" | ")[3] for row in few.split("\n\n")[1].splitlines()[2:]]
    ratios = [float(ratio) for ratio in re.findall(r"<br>([0-9.]+) ±", " ".join((cells[1], *columns)))]
    assert len(ratios) == 3 + 5
    return 1 / max(ratios), 1 / min(ratios)
