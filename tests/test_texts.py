"""Texts of a build: rows, questions, and evaluation text that is also calibration text."""

import json
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from packager.errors import CalibrationError
from packager.inputs.chat import prompt_ids
from packager.inputs.limits import ModelProcess
from packager.inputs.overlap import check_overlap
from packager.inputs.texts import load_tokenizer, prepare
from packager.recipe.file import RecipeFile
from packager.system.processes import Processes
from tests.sources import open_folder
from tests.tiny_recipe import sentences, write_all

WORDS = [f"word{number}" for number in range(5000)]
DEMO = Path(__file__).parents[1] / "recipes" / "assets" / "demo-llama" / "text"
BOILERPLATE = (
    "This page was last edited on 5 May 2020. Text is available under the Creative Commons Attribution-ShareAlike"
    " License; additional terms may apply. By using this site, you agree to the Terms of Use."
)


def prose(count: int, seed: int, *, line: int = 9) -> str:
    """Return that many random words, in lines."""
    words = random.Random(seed).choices(WORDS, k=count)
    return "\n".join(" ".join(words[begin : begin + line]) for begin in range(0, count, line))


def overlap(calibration: Sequence[str], evaluation: Sequence[str]) -> str:
    """Return the refusal's cause, or "" if both texts may be used."""
    try:
        check_overlap(calibration, evaluation)
    except CalibrationError as error:
        return error.why
    return ""


DOCUMENTS = [prose(80, seed) for seed in range(10)]
OTHERS = [prose(80, seed) for seed in range(100, 110)]


def test_texts_of_other_words_may_be_used() -> None:
    for calibration in (DOCUMENTS, ["\n".join(DOCUMENTS)]):
        for evaluation in (OTHERS, ["\n".join(OTHERS)], ["", "short"], []):
            assert overlap(calibration, evaluation) == ""


def test_documents_pasted_into_a_single_text_are_found() -> None:
    pasted = "\n".join([*DOCUMENTS[:5], OTHERS[3], *DOCUMENTS[5:]])
    assert overlap([pasted], OTHERS).startswith("80 of its words are in both, for example 'word")
    assert overlap(OTHERS, [pasted]).startswith("80 of its words")
    assert overlap([pasted], [*DOCUMENTS[:1], *OTHERS[4:]]).startswith("80 of its words")
    assert overlap([pasted], OTHERS[4:]) == ""


@pytest.mark.parametrize(
    "changed",
    [
        OTHERS[2].upper(),
        OTHERS[2].replace("\n", " "),
        OTHERS[2].replace(" ", ",  "),
        f"Before it. {OTHERS[2]} After it.",
        " ".join(OTHERS[2].split()[5:60]),
    ],
)
def test_case_and_punctuation_do_not_hide_a_copy(changed: str) -> None:
    assert overlap([*DOCUMENTS, changed], OTHERS)
    assert overlap(["\n\n".join([*DOCUMENTS, changed])], OTHERS)


def test_web_pages_that_share_a_line_are_no_leak() -> None:
    pages, others = ([f"{text}\n{BOILERPLATE}\n" for text in texts] for texts in (DOCUMENTS, OTHERS))
    for calibration in (pages, ["\n".join(pages)]):
        for evaluation in (others, others[:1], ["\n".join(others)]):
            assert overlap(calibration, evaluation) == ""


def test_short_documents_count_together() -> None:
    short = [prose(20, seed) for seed in range(200, 210)]
    assert overlap([*DOCUMENTS, *short[:2]], short) == ""
    assert overlap([*DOCUMENTS, short[0], short[0], short[0]], [*short, short[0], short[0]]) == ""
    assert overlap([*DOCUMENTS, *short[:3]], short).startswith("60 of its words")
    assert overlap(["\n".join([*DOCUMENTS, *short[:3]])], short).startswith("60 of its words")


def test_lines_of_two_single_texts_count_together() -> None:
    lines = [prose(14, seed, line=14) for seed in range(300, 310)]
    text = "\n".join(DOCUMENTS)
    for number, found in ((3, False), (4, True)):
        spread = "\n".join(line + "\n" + prose(20, 400 + index) for index, line in enumerate(lines[:number]))
        assert bool(overlap([text + "\n" + spread], ["\n".join([*OTHERS, *lines])])) is found


def test_pieces_made_of_phrases_of_several_documents_are_no_leak() -> None:
    """Text from templates: every window of 12 words is somewhere in the calibration text, the document is not."""
    words = prose(60, 7).split()
    halves = [" ".join(words[:40]), " ".join(words[20:])]
    assert overlap(halves, [" ".join(words[5:54])]) == ""


def test_scripts_without_spaces_are_compared_by_character() -> None:
    dice = random.Random(1)
    text = "".join(chr(dice.randrange(0x4E00, 0x9000)) for _ in range(200))
    assert overlap([f"{text[:120]}。"], [f"你好 {text[60:]}", "你好"]).startswith("60 of its words")
    assert overlap([text[:100]], [text[100:]]) == ""


@pytest.mark.parametrize(("count", "words"), [(400, 8), (400, 10), (400, 11), (1000, 8)])
@pytest.mark.parametrize("stem", ["considerations", "w"])
def test_shared_documents_without_a_window_overlap(count: int, words: int, stem: str) -> None:
    documents = [" ".join(f"{stem}{i * words + j}" for j in range(words)) for i in range(count)]
    assert overlap(documents[::-1], documents)
    assert overlap(["\n".join(documents[::-1])], ["\n".join(documents)])
    mixed = [*documents[:20], *OTHERS]
    assert bool(overlap(documents, mixed)) is (len(documents[0]) >= 64)  # short headings may be shared


@pytest.mark.parametrize(
    ("calibration", "evaluation"),
    [
        pytest.param("".join(map(chr, range(0xE01, 0xE2F))) * 3, "".join(map(chr, range(0xE01, 0xE2F))) * 2, id="Thai"),
        pytest.param(
            " ".join(f"\u00e9{i}" for i in range(60)), " ".join(f"e\u0301{i}" for i in range(60)), id="decomposed"
        ),
    ],
)
def test_scripts_without_spaces_and_decomposed_letters_overlap(calibration: str, evaluation: str) -> None:
    assert overlap([calibration], [evaluation])


def test_the_demo_s_texts_do_not_overlap() -> None:
    texts = [
        [json.loads(line)["text"] for line in (DEMO / f"{name}.jsonl").read_text().splitlines()]
        for name in ("calibration", "evaluation")
    ]
    assert overlap(*texts) == ""
    assert overlap(texts[0], texts[0][:100])


def test_a_build_refuses_documents_that_are_in_its_calibration_text(tmp_path: Path) -> None:
    """One file for calibration, JSONL of documents with several lines for evaluation."""
    text = sentences(60, seed=1)
    recipe = write_all(tmp_path, {"evaluation.path": "evaluation.jsonl"})
    lines = text.splitlines()
    documents = [sentences(30, seed=2), "\n".join(lines[20:26])]
    (tmp_path / "evaluation.jsonl").write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    source = open_folder(tmp_path / "model", base_id="tester/tiny")
    with pytest.raises(CalibrationError, match="the evaluation text overlaps the calibration text"):
        prepare(RecipeFile.load(recipe), source)


@pytest.fixture
def process() -> Iterator[ModelProcess]:
    with ModelProcess() as process:
        yield process


@pytest.fixture
def tokenizer(tmp_path: Path, process: ModelProcess) -> Any:
    write_all(tmp_path)
    return load_tokenizer(open_folder(tmp_path / "model", base_id="tester/tiny"), process).opened


@pytest.mark.parametrize(
    ("changes", "kind"),
    [({"tokenizer_class": "CTRLTokenizer"}, "CTRLTokenizer"), ({"tokenizer_class": "ByT5Tokenizer"}, "ByT5Tokenizer")],
)
def test_a_tokenizer_that_would_encode_in_this_process_is_refused(
    tmp_path: Path, process: ModelProcess, changes: dict[str, str], kind: str
) -> None:
    write_all(tmp_path)
    path = tmp_path / "model" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    for name, text in (("vocab.json", '{"<unk>": 0, "a": 1}'), ("merges.txt", "#version\n\n")):
        (tmp_path / "model" / name).write_text(text)
    with pytest.raises(CalibrationError, match="is not one of the tokenizers library") as caught:
        load_tokenizer(open_folder(tmp_path / "model", base_id="tester/tiny"), process)
    assert kind in caught.value.why


def test_a_build_asks_one_process_for_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, started = RecipeFile.load(write_all(tmp_path)), list[Sequence[str]]()
    running = Processes.running

    def counted(self: Processes, command: Sequence[str], **options: Any) -> Any:
        started.append(command)
        return running(self, command, **options)

    monkeypatch.setattr(Processes, "running", counted)
    prepare(recipe, open_folder(tmp_path / "model", base_id="tester/tiny"))
    assert len(started) == 1


def test_questions_and_prompts_are_rendered_in_the_chat_template(tmp_path: Path, process: ModelProcess) -> None:
    recipe = RecipeFile.load(write_all(tmp_path))
    source = open_folder(tmp_path / "model", base_id="tester/tiny")
    texts, tokenizer = prepare(recipe, source), load_tokenizer(source, process).opened
    assert texts.prompts == (tuple(prompt_ids(tokenizer, "old bird")),)
    (first, second) = texts.questions
    assert tokenizer.decode(first.prompt_ids) == "<s>[INST] old bird [/INST]"
    assert tokenizer.decode(first.answer_ids) == " sings</s>"
    assert tokenizer.decode(second.answer_ids) == " green boat</s>"
