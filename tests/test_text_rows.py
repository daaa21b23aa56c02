"""Rows of token ids: what is drawn from which text, how rows begin, and texts that are not plain text."""

import codecs
import gzip
import json
import math
import random
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import torch
from pyarrow import parquet
from transformers import AutoModelForCausalLM

from packager.errors import CalibrationError
from packager.inputs.chat import render_messages
from packager.inputs.conversations import conversation
from packager.inputs.drawing import draw, drawn_numbers, pieces, stretches
from packager.inputs.limits import ModelProcess
from packager.inputs.overlap import check_overlap
from packager.inputs.rows import DrawnRows, cut_rows, draw_rows, token_rows
from packager.inputs.samples import Sample, WantedRows, draw_sample
from packager.inputs.text_files import TextFile, kind_of, read_plain
from packager.inputs.texts import TextSets, load_tokenizer
from packager.prove.evaluate import quality_of, run_base
from packager.recipe.field_groups import rows_by_weight
from packager.recipe.text_models import Evaluation, TextSource
from tests.sources import open_folder
from tests.tiny_recipe import sentences, write_all

BOS = 1


def jsonl(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def wanted(path: Path, *, rows: int = 3, seq_len: int = 16, seed: int = 0, **fields: Any) -> WantedRows:
    text = TextSource(path=path.name, **fields)
    return WantedRows(
        text=text, files=(TextFile(path=path, shown=path.name),), license=None, num_rows=rows, seq_len=seq_len,
        seed=seed,
    )  # fmt: skip


def sample_of(path: Path, **fields: Any) -> Sample:
    return draw_sample(wanted(path, **fields), 1, lambda chats: [str(chat.messages) for chat in chats])


def refusal(path: Path, **fields: Any) -> CalibrationError:
    with pytest.raises(CalibrationError) as caught:
        sample_of(path, **fields)
    return caught.value


@pytest.fixture
def process() -> Iterator[ModelProcess]:
    with ModelProcess() as process:
        yield process


def tokenizer_of(folder: Path, process: ModelProcess, *, bos: bool) -> Any:
    write_all(folder)
    path = folder / "model" / "tokenizer.json"
    if bos:
        whole = json.loads(path.read_text())
        whole["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
        }
        path.write_text(json.dumps(whole))
    return load_tokenizer(open_folder(folder / "model", base_id="tester/tiny"), process).opened


def rows_of(tokenizer: Any, process: ModelProcess, *texts: WantedRows) -> tuple[DrawnRows, ...]:
    return draw_rows(tokenizer, texts, lambda chats: render_messages(tokenizer, chats, process), process)


@pytest.mark.parametrize("bos", [True, False])
def test_a_row_begins_with_the_tokenizers_bos_and_has_it_nowhere_else(
    tmp_path: Path, process: ModelProcess, bos: bool
) -> None:
    """As wikitext: a row per line, and empty rows between them."""
    tokenizer = tokenizer_of(tmp_path, process, bos=bos)
    lines = [row for line in sentences(60, seed=1).splitlines() for row in (line, "", "")]
    path = jsonl(tmp_path / "calibration.jsonl", [{"text": line} for line in lines])
    stream, step = tokenizer("\n\n".join(lines), add_special_tokens=False)["input_ids"], 32 - bos
    windows = [stream[begin : begin + step] for begin in range(0, len(stream) - step + 1, step)]
    (drawn,) = rows_of(tokenizer, process, wanted(path, rows=len(windows), seq_len=32))
    ids = token_rows([drawn]).ids
    assert ids.shape == (len(windows), 32)
    assert ((ids == BOS).sum(dim=1) == int(bos)).all()
    assert (ids[:, 0] == BOS).all().item() is bos
    assert ids[:, int(bos) :].tolist() == windows
    assert drawn.prefix == (("<s>",) if bos else ())
    (fewer,) = rows_of(tokenizer, process, wanted(path, rows=12, seq_len=32))
    assert ((token_rows([fewer]).ids == BOS).sum(dim=1) == int(bos)).all()


def test_all_windows_of_a_text_are_those_of_the_usual_perplexity_script(tmp_path: Path, process: ModelProcess) -> None:
    """transformers' guide "Perplexity of fixed-length models" with stride = max_length, for a tokenizer without BOS."""
    tokenizer = tokenizer_of(tmp_path, process, bos=False)
    text = sentences(40, seed=2)
    path = tmp_path / "text.txt"
    path.write_text(text)
    encodings = tokenizer(text, return_tensors="pt").input_ids
    windows = [encodings[:, begin : begin + 32] for begin in range(0, encodings.shape[1] - 31, 32)]
    (drawn,) = rows_of(tokenizer, process, wanted(path, rows=len(windows), seq_len=32, seed=5))
    assert torch.equal(token_rows([drawn]).ids, torch.cat(windows))
    with pytest.raises(CalibrationError, match="too little text"):
        rows_of(tokenizer, process, wanted(path, rows=len(windows) + 1, seq_len=32))


def perplexity_of_the_usual_script(model: Any, encodings: torch.Tensor, max_length: int) -> float:
    """The loop of transformers' guide "Perplexity of fixed-length models" with stride = max_length.

    It leaves out the last window, which is shorter.
    """
    nll_sum, num_tokens = 0.0, 0
    for begin in range(0, encodings.shape[1] - max_length + 1, max_length):
        input_ids = encodings[:, begin : begin + max_length]
        with torch.no_grad():
            loss = model(input_ids, labels=input_ids.clone()).loss
        nll_sum += loss.item() * (max_length - 1)
        num_tokens += max_length - 1
    return math.exp(nll_sum / num_tokens)


def test_perplexity_of_a_whole_text_is_that_of_the_usual_script(tmp_path: Path, process: ModelProcess) -> None:
    tokenizer = tokenizer_of(tmp_path, process, bos=False)
    text = sentences(40, seed=2)
    path = tmp_path / "text.txt"
    path.write_text(text)
    encodings = tokenizer(text, return_tensors="pt").input_ids
    (drawn,) = rows_of(tokenizer, process, wanted(path, rows=encodings.shape[1] // 32, seq_len=32))
    rows = token_rows([drawn])
    source = open_folder(tmp_path / "model", base_id="tester/tiny")
    texts = TextSets(calibration=rows, evaluation=rows, questions=(), prompts=())
    base = run_base(source, texts, torch.device("cpu"))
    ours = quality_of(base, base, texts).perplexity
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert ours == pytest.approx(perplexity_of_the_usual_script(model, encodings, 32), rel=1e-3)


def test_rows_depend_on_the_seed_and_are_no_row_twice(tmp_path: Path, process: ModelProcess) -> None:
    tokenizer = tokenizer_of(tmp_path, process, bos=False)
    path = tmp_path / "text.txt"
    path.write_text(sentences(4000, seed=3))
    first, again, other = (
        rows_of(tokenizer, process, wanted(path, rows=20, seq_len=32, seed=seed))[0] for seed in (1, 1, 2)
    )
    assert not first.sample.everything
    assert len("".join(first.sample.texts)) < path.stat().st_size / 4
    assert first == again
    assert first.rows != other.rows
    assert len(set(first.rows)) == 20


def test_a_text_whose_tokens_are_long_is_drawn_again_larger(tmp_path: Path, process: ModelProcess) -> None:
    tokenizer = tokenizer_of(tmp_path, process, bos=False)
    path = tmp_path / "text.txt"
    path.write_text("".join(f"{line}{' ' * 40}\n" for line in sentences(400, seed=3).splitlines()))
    tokenizer.backend_tokenizer.normalizer = __import__("tokenizers").normalizers.Replace(" " * 40, "")
    (drawn,) = rows_of(tokenizer, process, wanted(path, rows=200, seq_len=32))
    assert len(drawn.rows) == 200


def test_a_draw_is_the_same_on_every_machine() -> None:
    assert drawn_numbers(5, of=1000, seed=0) == [40, 186, 402, 583, 993]
    assert drawn_numbers(3, of=3, seed=9) == [0, 1, 2]
    texts = [f"piece {number} " for number in range(50)]
    small, large = (set(draw(texts, len, least=least, seed=4).units) for least in (60, 200))
    assert small < large


@pytest.mark.parametrize("size", [1, 7, 4000])
def test_pieces_are_the_text_in_order_however_it_is_divided(size: int) -> None:
    text = sentences(30, seed=1) + "x" * 500 + " end"
    cut = list(pieces((text[begin : begin + size] for begin in range(0, len(text), size)), 64))
    assert "".join(cut) == text
    assert max(map(len, cut)) <= 64
    assert all(len(piece) >= 32 for piece in cut[:-1])
    assert cut == list(pieces([text], 64))
    assert stretches(draw(cut, len, least=10**6, seed=0)) == [text]


def test_a_file_of_one_long_line_needs_little_memory(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    dice = random.Random(1)
    path.write_text(" ".join(dice.choices(["river", "stone", "house"], k=3_000_000)))
    tracemalloc.start()
    sample = sample_of(path, rows=8, seq_len=64)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert not sample.everything
    assert peak < path.stat().st_size / 2


def test_rows_without_text_are_left_out_and_counted(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"text": "one river"},
        {"text": None},
        {"text": ""},
        {"other": 1},
        {"text": "two stones"},
    ]
    sample = sample_of(jsonl(tmp_path / "a.jsonl", rows))
    assert sample.texts == ("one river\n\n\n\ntwo stones",)
    assert sample.left_out == 2
    assert sample.everything


CHAT = [{"role": "user", "content": "old bird"}, {"role": "assistant", "content": "sings"}]


@pytest.mark.parametrize(
    ("value", "why", "hint"),
    [
        (CHAT, "a list of messages", "messages_field"),
        ([1], "a list", "a column of text"),
        ({"a": 1}, "an object", "a column of text"),
        (7, "a number", "a column of text"),
        (True, "true or false", "a column of text"),
    ],
)
def test_a_value_that_is_no_text_is_refused(tmp_path: Path, value: object, why: str, hint: str) -> None:
    error = refusal(jsonl(tmp_path / "a.jsonl", [{"text": "one"}, {"text": value}]))
    assert (error.what, error.where) == ("a row has no text", "a.jsonl:2")
    assert why in error.why
    assert hint in error.hint


def test_a_column_that_is_not_there_is_refused_with_a_similar_one(tmp_path: Path) -> None:
    rows = [{"texts": "one", "other": 1}] * 3
    names = [jsonl(tmp_path / "a.jsonl", rows), tmp_path / "a.parquet", tmp_path / "a.csv"]
    parquet.write_table(pyarrow.Table.from_pylist(rows), names[1])
    names[2].write_text("texts,other\none,1\n")
    for path in names:
        error = refusal(path)
        assert error.what == "the text has no column 'text'"
        assert error.hint == "did you mean 'texts'?"
    assert "null in every row" in refusal(jsonl(tmp_path / "b.jsonl", [{"text": None}])).what


@pytest.mark.parametrize(
    ("name", "data", "part"),
    [
        ("a.txt", b"caf\xe9 of", "can't decode byte 0xe9 at byte 3"),
        ("a.txt", b"caf\xc3", "can't decode byte 0xc3 at the end"),
        ("a.txt", b"a\0b", "NUL bytes"),
        ("a.txt", "river".encode("utf-16"), "UTF-16"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "half of a surrogate pair"),
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "not UTF-8"),
        ("a.jsonl", b'{"text": "a", "text": "b"}\n', "twice"),
        ("a.jsonl", b'["text"]\n', ""),
        ("a.jsonl", b'{"text": "' + b"\\n" * 4000 + b'"}\n', "spaces and line breaks"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:20], "ended"),
        ("a.parquet", b"PAR1", ""),
        ("a.csv", b"text,other\na\n", ""),
    ],
)
def test_a_damaged_text_is_refused_with_its_place(tmp_path: Path, name: str, data: bytes, part: str) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    error = refusal(path, rows=1, seq_len=8)
    assert error.where.startswith(name)
    assert part in error.why


def test_a_row_longer_than_the_limit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packager.inputs.text_files.MOST_ROW_BYTES", 1 << 20)
    path = jsonl(tmp_path / "a.jsonl", [{"text": "short"}, {"text": "a " * (1 << 20)}])
    error = refusal(path)
    assert (error.what, error.where) == ("a line is longer than 1 MiB", "a.jsonl:2")


def test_marks_of_an_editor_are_no_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(codecs.BOM_UTF8 + b"one river\r\ntwo\rstones\n")
    assert "".join(read_plain(TextFile(path=path, shown="a.txt"))) == "one river\ntwo\nstones\n"
    path = tmp_path / "a.jsonl"
    path.write_bytes(codecs.BOM_UTF8 + b'{"text": "one river"}\r\n')
    assert sample_of(path).texts == ("one river",)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.csv", "a.tsv", "a.parquet", "a.txt"])
def test_every_format_gives_the_same_text(tmp_path: Path, name: str) -> None:
    texts = ['one, "river"', "two\tstones and\nmore", "Straße"]
    path = tmp_path / name
    match kind_of(name):
        case ".parquet":
            parquet.write_table(pyarrow.table({"other": [1, 2, 3], "text": texts}), path)
        case ".csv" | ".tsv" as kind:
            mark = "," if kind == ".csv" else "\t"
            quoted = ['"' + text.replace('"', '""') + '"' for text in texts]
            path.write_text(f"other{mark}text\n" + "".join(f"1{mark}{text}\n" for text in quoted))
        case ".txt":
            path.write_text("\n\n".join(texts))
        case _:
            data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
            path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    assert sample_of(path).texts == ("\n\n".join(texts),)


@pytest.mark.parametrize(
    "value",
    [
        CHAT,
        [{"from": "human", "value": "old bird"}, {"from": "gpt", "value": "sings"}],
        [{"role": "user", "content": [{"type": "text", "text": "old "}, {"type": "text", "text": "bird"}]}, CHAT[1]],
        [{**CHAT[0], "from": None}, {**CHAT[1], "tool_calls": None}],
    ],
)
def test_conversations_of_every_form_are_the_same_messages(value: object) -> None:
    assert list(conversation(value, "a.jsonl:1").messages) == CHAT


@pytest.mark.parametrize(
    ("value", "what"),
    [
        ("text", "no list of messages"),
        (["text"], "is not an object"),
        ([{"from": "narrator", "value": "a"}], "has no role"),
        ([{"content": "a"}], "has no role"),
        ([{"role": 1, "content": "a"}], "the role of a message"),
        ([{"role": "user", "content": None}], "the content of a message"),
        ([{"role": "user", "content": [{"type": "image"}]}], "the content of a message"),
        ([{"from": "gpt", "value": 3}], "the value of a message"),
    ],
)
def test_a_row_that_is_no_conversation_of_text_is_refused(value: object, what: str) -> None:
    with pytest.raises(CalibrationError, match=what) as caught:
        conversation(value, "a.jsonl:1")
    assert caught.value.where.startswith("a.jsonl:1")


@pytest.mark.parametrize("bos", [True, False])
def test_conversations_are_rendered_and_each_row_begins_with_one(
    tmp_path: Path, process: ModelProcess, bos: bool
) -> None:
    tokenizer = tokenizer_of(tmp_path, process, bos=bos)
    chats = [[{**CHAT[0], "content": line}, CHAT[1]] for line in sentences(120, seed=1).splitlines()]
    path = jsonl(tmp_path / "chats.jsonl", [{"messages": chat} for chat in [[], *chats]])
    (drawn,) = rows_of(tokenizer, process, wanted(path, rows=6, seq_len=32, messages_field="messages"))
    texts = [tokenizer.decode(row) for row in drawn.rows]
    assert drawn.sample.left_out == 1
    assert all(text.startswith("<s>[INST]") and not text.startswith("<s><s>") for text in texts)
    assert all(len(row) == 32 for row in drawn.rows)
    if bos:
        assert all(text.count("<s>") == 1 for text in texts)
    record = token_rows([drawn]).record
    assert (record.conversations, record.left_out, record.row_prefix) == (True, 1, ("<s>",) if bos else ())


def test_a_bos_that_only_the_template_writes_is_kept(tmp_path: Path) -> None:
    """ChatML models have <|im_start|> as their BOS, and their tokenizers add none to a text."""
    path = jsonl(tmp_path / "chats.jsonl", [{"messages": CHAT}])
    need = wanted(path, seq_len=8, messages_field="messages")
    chats = [[BOS, 5, 6, 7, 8], [BOS, 9, 10, 11, 12, 13]]
    assert cut_rows(chats, [], need) == [[BOS, 5, 6, 7, 8, BOS, 9, 10]]
    assert cut_rows(chats, [BOS], need) == [[BOS, 5, 6, 7, 8, 9, 10, 11]]


@pytest.mark.parametrize(
    ("weights", "rows", "expected"),
    [
        ([0.7, 0.3], 128, (90, 38)),
        ([1.0, 1.0, 1.0], 128, (43, 43, 42)),
        ([0.1, 0.2], 3, (1, 2)),
        ([1e-6, 1.0], 4, (0, 4)),
        ([5.0], 7, (7,)),
    ],
)
def test_rows_are_shared_by_weight(weights: list[float], rows: int, expected: tuple[int, ...]) -> None:
    assert rows_by_weight(weights, rows) == expected


def test_the_record_names_every_text_of_a_mix(tmp_path: Path, process: ModelProcess) -> None:
    tokenizer = tokenizer_of(tmp_path, process, bos=False)
    plain = tmp_path / "plain.txt"
    plain.write_text(sentences(60, seed=5))
    chats = jsonl(tmp_path / "chats.jsonl", [{"messages": CHAT}] * 40)
    drawn = rows_of(
        tokenizer, process, wanted(plain, rows=5), wanted(chats, rows=2, messages_field="messages")
    )  # fmt: skip
    rows = token_rows(drawn)
    assert rows.ids.shape == (7, 16)
    assert rows.record.source == "plain.txt + chats.jsonl"
    assert [(text.source, text.num_samples, text.conversations) for text in rows.record.mixed] == [
        ("plain.txt", 5, False), ("chats.jsonl", 2, True)
    ]  # fmt: skip


def test_separate_documents_begin_as_the_tokenizer_begins_a_text(tmp_path: Path) -> None:
    text = wanted(tmp_path / "a.jsonl", rows=2, seq_len=4, documents="separate")
    assert cut_rows([[10, 11], [20, 21], [30], [40]], [1], text) == [[1, 10, 11, 1], [1, 30, 1, 40]]
    assert cut_rows([[10, 11, 12], [20]], [1], text) == [[1, 10, 11, 12]]
    assert cut_rows([[10, 11], [20, 21, 22]], [], text) == [[10, 11, 20, 21]]


def test_a_long_document_gives_rows_that_each_begin_with_the_prefix(tmp_path: Path) -> None:
    text = wanted(tmp_path / "a.jsonl", rows=2, seq_len=4, documents="separate")
    rows = cut_rows([list(range(10, 19)), [30, 31, 32]], [1], text)
    assert rows == [[1, 10, 11, 12], [1, 13, 14, 15], [1, 16, 17, 18], [1, 30, 31, 32]]
    assert cut_rows([list(range(10, 18)), [30, 31, 32]], [1], text)[2:] == [[1, 30, 31, 32]]


def test_separate_documents_are_drawn_whole(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": f"document {number} " + "word " * 40} for number in range(200)] + [
        {"text": ""},
        {"text": None},
    ]
    path = jsonl(tmp_path / "a.jsonl", rows)
    sample = sample_of(path, documents="separate", rows=3, seq_len=16)
    whole = {row["text"] for row in rows}
    assert 1 < len(sample.texts) < 20
    assert set(sample.texts) <= whole
    assert sample.left_out == 1
    assert not sample.everything
    again = sample_of(path, documents="separate", rows=3, seq_len=16, seed=1)
    assert again.texts != sample.texts
    assert again.text_sha256 == sample.text_sha256


def test_only_text_that_is_measured_counts_as_an_overlap(tmp_path: Path) -> None:
    rows = [{"text": " ".join(f"word{number}x{index}" for index in range(60))} for number in range(200)]
    sample = sample_of(jsonl(tmp_path / "a.jsonl", rows), documents="separate", rows=3, seq_len=16)
    not_drawn = next(row["text"] for row in rows if row["text"] not in sample.texts)
    check_overlap([not_drawn], sample.texts)
    with pytest.raises(CalibrationError, match="overlaps"):
        check_overlap([sample.texts[0]], sample.texts)


@pytest.mark.parametrize(("num_tokens", "rows"), [(64, 1), (99, 1), (100, 1), (199, 1), (200, 2), (299, 2)])
def test_tokens_of_the_evaluation_are_rounded_down_to_rows(num_tokens: int, rows: int) -> None:
    assert Evaluation(path="a.txt", num_tokens=num_tokens, seq_len=100).num_rows == rows


def test_documents_belongs_to_plain_text() -> None:
    with pytest.raises(ValueError, match="conversations are always separate"):
        TextSource(path="a.jsonl", messages_field="messages", documents="separate")
