"""Token ids that are kept for the next run of a build: when they are used, and when texts are read again."""

import base64
import json
import os
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from packager.errors import CalibrationError
from packager.inputs import kept_texts, texts
from packager.inputs.kept_texts import prepare_once
from packager.inputs.texts import TextSets, prepare
from packager.receipt import digest_of
from packager.recipe.fields import DRAWING_VERSION
from packager.recipe.file import RecipeFile
from tests import tiny_recipe
from tests.sources import open_folder
from tests.tiny_recipe import sentences, write_all, write_recipe


class Kept:
    """A recipe's folder with the file of its token ids.

    Attributes:
        logged: what the runs said.
        drawn: how often texts were read and tokenized.
    """

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.path = folder, folder / "dist" / "rows" / "rows.json"
        self.recipe = write_all(folder)
        self.logged: list[str] = []
        self.drawn = 0

        def counted(*args: Any) -> TextSets:
            self.drawn += 1
            return prepare(*args)

        monkeypatch.setattr(kept_texts, "prepare", counted)

    def texts(self) -> TextSets:
        source = open_folder(self.folder / "model", base_id="tester/tiny")
        return prepare_once(RecipeFile.load(self.recipe), source, self.path, self.logged.append)

    def edit(self, change: Callable[[dict[str, Any]], object], *, stated: bool = True) -> None:
        """Change the file; `stated`: with the digest of what it holds then."""
        content = json.loads(self.path.read_text())
        change(content)
        if stated:
            content["digest"] = digest_of({key: value for key, value in content.items() if key != "digest"})
        self.path.write_text(json.dumps(content))


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kept:
    return Kept(tmp_path, monkeypatch)


def same(a: TextSets, b: TextSets) -> bool:
    rows = [(x.calibration.ids.tolist(), x.evaluation.ids.tolist()) for x in (a, b)]
    records = [(x.calibration.record, x.evaluation.record, x.questions, x.prompts, x.tokenizer_files) for x in (a, b)]
    return rows[0] == rows[1] and records[0] == records[1]


def test_the_next_run_reads_what_the_first_one_kept(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    first = kept.texts()
    assert (kept.drawn, kept.logged) == (1, [])
    for module in ("load_tokenizer", "draw_rows", "ModelProcess"):
        monkeypatch.setattr(texts, module, None)
    again = kept.texts()
    assert kept.drawn == 1
    assert kept.logged == [f"rows are those that an earlier run drew: {kept.path}"]
    assert same(first, again)
    assert first.questions
    assert first.prompts
    assert again.calibration.ids.dtype == first.calibration.ids.dtype


def test_the_files_of_a_tokenizer_that_a_branch_gets_otherwise_are_kept(kept: Kept) -> None:
    path = kept.folder / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tokenizer_class": "LlamaTokenizerFast"}))
    first = kept.texts()
    assert set(first.tokenizer_files) == {"tokenizer_config.json"}
    assert same(first, kept.texts())
    assert kept.drawn == 1
    kept.edit(lambda content: content["tokenizer_files"][0].update(name="../README.md"))
    assert same(first, kept.texts())
    assert kept.drawn == 2


def calibration_text(folder: Path) -> None:
    (folder / "calibration.txt").write_text(sentences(60, seed=7))


def questions(folder: Path) -> None:
    (folder / "questions.jsonl").write_text('{"prompt": "seven", "answer": "old bird"}\n')


def tokenizer(folder: Path) -> None:
    path = folder / "model" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))


def chat_templates(folder: Path) -> None:
    """Change a chat template that a branch gets inside tokenizer_config.json."""
    path = folder / "model" / "additional_chat_templates" / "tool_use.jinja"
    path.write_text(path.read_text().replace("tools", "other tools"))


OTHER_INPUTS = {
    "tokenizer: chat templates": chat_templates,
    "text of the calibration": calibration_text,
    "text of the evaluation": lambda folder: (folder / "evaluation.txt").write_text(sentences(40, seed=8)),
    "questions": questions,
    "tokenizer": tokenizer,
    "calibration": lambda folder: write_recipe(folder, {"calibration.seed": 1}),
    "evaluation": lambda folder: write_recipe(folder, {"evaluation.num_tokens": 128}),
    "prompts": lambda folder: write_recipe(folder, {"loaders.prompts": ["a stone"]}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHER_INPUTS)
def test_other_inputs_are_drawn_again(kept: Kept, name: str) -> None:
    (kept.folder / "model" / "additional_chat_templates").mkdir()
    (kept.folder / "model" / "additional_chat_templates" / "tool_use.jinja").write_text("tools: {{ messages }}")
    kept.texts()
    OTHER_INPUTS[name](kept.folder)
    again = kept.texts()
    assert kept.drawn == 2
    assert kept.logged == [f"rows are drawn again: rows.json is of other inputs: {name.partition(':')[0]}"]
    assert same(again, kept.texts())
    assert kept.drawn == 2, "the new rows are kept"


def test_rows_of_another_version_are_drawn_again(kept: Kept, monkeypatch: pytest.MonkeyPatch) -> None:
    kept.texts()
    monkeypatch.setattr(kept_texts, "DRAWING_VERSION", DRAWING_VERSION + 1)
    kept.texts()
    monkeypatch.setattr("importlib.metadata.version", lambda name: f"9 of {name}")
    kept.texts()
    assert kept.drawn == 3
    assert [line.partition(": rows.json ")[2] for line in kept.logged] == [
        "is of other inputs: packager",
        "is of other inputs: transformers, tokenizers, jinja2, pyarrow",
    ]


def test_a_template_that_differs_is_refused_although_rows_are_kept(kept: Kept) -> None:
    kept.texts()
    write_recipe(kept.folder, {"card.prompt_template.template": "{prompt} [/INST]"})
    source = open_folder(kept.folder / "model", base_id="tester/tiny")
    recipe = RecipeFile.load(kept.recipe)
    with pytest.raises(CalibrationError, match="the card's prompt template is not the model's"):
        prepare_once(recipe, source, kept.path, kept.logged.append)


def ids_of(content: dict[str, Any]) -> "array[int]":
    ids = array("i")
    ids.frombytes(base64.b64decode(content["calibration"]["ids"]))
    return ids


def set_ids(content: dict[str, Any], ids: "array[int]") -> None:
    content["calibration"]["ids"] = base64.b64encode(ids.tobytes()).decode()


def set_first(value: int) -> Callable[[dict[str, Any]], None]:
    def change(content: dict[str, Any]) -> None:
        ids = ids_of(content)
        ids[0] = value
        set_ids(content, ids)

    return change


def honest(value: int) -> Callable[[dict[str, Any]], None]:
    """Change an id, and the digest of the rows with it."""

    def change(content: dict[str, Any]) -> None:
        set_first(value)(content)
        ids = ids_of(content).tolist()
        rows = [ids[begin : begin + 32] for begin in range(0, len(ids), 32)]
        content["calibration"]["record"]["digest"] = digest_of(rows)

    return change


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], bool, str]] = {
    "edited": (lambda c: c["calibration"]["record"].update(source="other"), False, "does not have the digest"),
    "other rows": (set_first(3), True, "holds other rows than it states"),
    "an id beyond the vocabulary": (honest(128), True, "holds a token id that is not one of the 128"),
    "a negative id": (honest(-1), True, "holds a token id that is not one of the 128"),
    "an id of a question": (lambda c: c["questions"][0].update(answer_ids=[999]), True, "holds a token id"),
    "an id of a prompt": (lambda c: c.update(prompts=[[128]]), True, "holds a token id"),
    "fewer rows": (lambda c: set_ids(c, ids_of(c)[:32]), True, "holds 32 ids where 12 rows of 32 are wanted"),
    "half an id": (lambda c: c["calibration"].update(ids="AAAA"), True, ""),
    "no base64": (lambda c: c["calibration"].update(ids="*"), True, ""),
    "another key": (lambda c: c.update(more=1), True, "is damaged: Extra inputs are not permitted"),
    "no rows": (lambda c: c.pop("evaluation"), True, "is damaged: Field required"),
    "an id that is a text": (lambda c: c.update(prompts=[["1"]]), True, "is damaged: "),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_file_is_not_used(kept: Kept, name: str) -> None:
    change, stated, why = HOSTILE[name]
    first = kept.texts()
    kept.edit(change, stated=stated)
    assert same(first, kept.texts())
    assert kept.drawn == 2
    assert len(kept.logged) == 1
    assert kept.logged[0].startswith(f"rows are drawn again: rows.json {why}")
    assert same(first, kept.texts())
    assert kept.drawn == 2, "the file is whole again"


@pytest.mark.parametrize("where", ["dangling link", "link", "folder", "pipe", "empty", "cut", "large", "not utf-8"])
def test_what_is_no_whole_file_is_not_used(kept: Kept, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    first = kept.texts()
    data = kept.path.read_bytes()
    kept.path.unlink()
    if where == "dangling link":
        kept.path.symlink_to("nowhere")
    elif where == "link":
        other = kept.folder / "elsewhere.json"
        other.write_bytes(data)
        kept.path.symlink_to(other)
    elif where == "folder":
        kept.path.mkdir()
    elif where == "pipe":
        os.mkfifo(kept.path)
    elif where == "large":
        monkeypatch.setattr(kept_texts, "_OTHER_BYTES", 0)
        kept.path.write_bytes(data + b" " * len(data))
    else:
        kept.path.write_bytes(
            {"empty": b"", "cut": data[:-9], "not utf-8": data.replace(b"calibration", b"\xff")}[where]
        )
    assert same(first, kept.texts())
    assert kept.drawn == 2
    assert kept.logged[0].startswith("rows are drawn again: rows.json ")
    assert len(kept.logged) == (2 if where == "folder" else 1), "a folder is not replaced, and the log says so"


def test_a_folder_that_cannot_be_written_is_said(kept: Kept) -> None:
    kept.path.parent.parent.mkdir()
    kept.path.parent.write_text("a file in the place of the folder")
    assert kept.texts().calibration.ids.shape == (12, 32)
    assert len(kept.logged) == 1
    assert kept.logged[0].startswith("rows are not kept for the next run: ")


@pytest.mark.slow
def test_a_build_of_one_more_variant_draws_no_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when its calibration text is gone from the cache: nothing of it is read."""
    variants = tiny_recipe.RECIPE["variants"]
    recipe = write_all(tmp_path, {"variants": variants[:1]})
    tiny_recipe.build(recipe, tmp_path / "dist")
    write_recipe(tmp_path, {"variants": variants[:2]})
    monkeypatch.setattr(texts, "draw_rows", None)
    made = tiny_recipe.build(recipe, tmp_path / "dist")
    assert made.quantized == (tiny_recipe.ACT_ORDER,)
    calibrations = {receipt.provenance.calibration for receipt in made.receipts}
    assert len(calibrations) == 1
