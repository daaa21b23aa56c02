"""lm-evaluation-harness itself, in its environment, against an independent computation of the same scores.

Run by `nox -s tests-release`. The model is the random one of tests/tiny_recipe.py, so its answers are guesses, which a
wrong reading of the results would not hit.
"""

import json
import os
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from packager.errors import LoaderError
from packager.model.decoder import Decoder, forward
from packager.model.packing import CheckpointReader
from packager.pipeline import flow
from packager.prove.environments import RuntimeContext
from packager.recipe.file import RecipeFile
from packager.records import TaskRecord
from packager.system.terminal import Terminal
from tests.tiny_recipe import MAIN, options, sentences, workspace, write_all, write_recipe

pytestmark = [pytest.mark.release, pytest.mark.slow]

CHOICE = """
task: endings
output_type: multiple_choice
doc_to_text: "{{beginning}}"
doc_to_choice: "{{endings}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
GENERATED = """
task: spoken
output_type: generate_until
doc_to_text: "{{beginning}}"
doc_to_target: "{{endings[answer]}}"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list: [{metric: exact_match}]
"""
ESCAPE = "{{ ''.__class__.__mro__[1].__subclasses__() }}"
TASKS: list[dict[str, Any]] = [
    {"name": "endings", "definition": "endings.yaml", "data": {"path": "endings.jsonl"}},
    {
        "name": "spoken", "definition": "spoken.yaml", "data": {"path": "endings.jsonl"}, "metric": "exact_match",
        "fewshot": {"path": "examples.jsonl"}, "num_fewshot": 2, "limit": 8,
    },
]  # fmt: skip
VARIANTS = [{"branch": MAIN}, {"branch": "two-bits", "bits": 2}]


def documents(seed: int, count: int) -> list[dict[str, Any]]:
    dice = random.Random(seed)
    words = sentences(4 * count, seed=seed).split()
    found = []
    for _ in range(count):
        start = dice.randrange(len(words) - 8)
        endings = [" ".join(dice.sample(words, dice.randint(1, 3))) for _ in range(4)]
        found.append({"beginning": " ".join(words[start : start + 6]), "endings": endings, "answer": dice.randrange(4)})
    return found


def write_documents(folder: Path) -> list[dict[str, Any]]:
    made = documents(5, 60)
    for name, rows in (("endings", made), ("examples", documents(6, 5))):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "endings.yaml").write_text(CHOICE)
    (folder / "spoken.yaml").write_text(GENERATED)
    return made


def share_right(rows: Sequence[dict[str, Any]], tokenizer: Any, logits_of: Any) -> float:
    """Return the share of documents whose right ending is the likeliest: the sum of its tokens' log-probabilities."""
    right = 0
    for row in rows:
        sums = []
        for ending in row["endings"]:
            whole = tokenizer(f"{row['beginning']} {ending}")["input_ids"]
            given = len(tokenizer(row["beginning"])["input_ids"])
            log_p = logits_of(torch.tensor([whole])).double().log_softmax(-1)
            sums.append(sum(float(log_p[position - 1, whole[position]]) for position in range(given, len(whole))))
        right += max(range(4), key=sums.__getitem__) == row["answer"]
    return right / len(rows)


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, context: RuntimeContext) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    write_all(folder)
    write_documents(folder)
    recipe = write_recipe(folder, {"variants": VARIANTS, "evaluation.tasks": TASKS})
    build(recipe, context)
    return folder


def build(recipe: Path, context: RuntimeContext) -> None:
    given = replace(options(recipe.parent / "dist"), cache=context.cache, environ=os.environ)
    flow.build(RecipeFile.load(recipe), given, Terminal(quiet=True))


def records(folder: Path, branch: str) -> tuple[TaskRecord, ...]:
    receipt = workspace(folder / "dist").read_receipt(branch)
    assert receipt is not None
    return receipt.provenance.tasks


def test_the_fp16_model_scores_what_transformers_computes(built: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(built / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(built / "model")
    with torch.no_grad():
        expected = share_right(documents(5, 60), tokenizer, lambda ids: model(ids).logits[0])
    assert 0 < expected < 1
    for branch in (MAIN, "two-bits"):
        endings, _ = records(built, branch)
        assert endings.base_score == expected
        assert endings.num_documents == 60


@pytest.mark.parametrize(("branch", "bits"), [(MAIN, 4), ("two-bits", 2)])
def test_a_checkpoint_scores_what_our_own_forward_computes(built: Path, branch: str, bits: int) -> None:
    folder = workspace(built / "dist").folder(branch)
    read = CheckpointReader(folder, bits)
    decoder = Decoder(
        folder, read, names=read.names, dequantized=read.dequantized, device=torch.device("cpu"), dtype=torch.float32
    )  # fmt: skip
    expected = share_right(
        documents(5, 60),
        AutoTokenizer.from_pretrained(folder),
        lambda ids: decoder.logits(forward(decoder, ids, rows=1)[0])[0],
    )
    endings, _ = records(built, branch)
    assert endings.score == expected
    assert endings.recovery == pytest.approx(expected / endings.base_score)
    assert "TorchLinear" in endings.kernel


def test_generated_answers_have_examples_and_a_limit(built: Path) -> None:
    _, spoken = records(built, MAIN)
    assert (spoken.num_documents, spoken.num_fewshot) == (8, 2)
    assert spoken.examples is not None
    assert spoken.examples.source == "examples.jsonl"
    # A random model repeats no ending word for word: of no score there is no part.
    assert (spoken.base_score, spoken.score, spoken.recovery) == (0, 0, None)


def test_a_template_runs_in_a_sandbox(built: Path, context: RuntimeContext) -> None:
    (built / "endings.yaml").write_text(CHOICE.replace("{{beginning}}", ESCAPE))
    recipe = write_recipe(built, {"variants": VARIANTS, "evaluation.tasks": TASKS[:1]}, name="escape.yaml")
    try:
        with pytest.raises(LoaderError, match="SecurityError") as caught:
            build(recipe, context)
    finally:
        (built / "endings.yaml").write_text(CHOICE)
    assert "access to attribute '__class__'" in str(caught.value)


def test_a_task_of_the_program_s_own_reads_the_recipe_s_file(built: Path, context: RuntimeContext) -> None:
    """SciQ: its definition comes with lm-eval, its documents with the recipe; no dataset is asked for."""
    rows = [
        {
            "support": "", "question": row["beginning"], "correct_answer": row["endings"][0],
            **{f"distractor{number}": row["endings"][number] for number in (1, 2, 3)},
        }
        for row in documents(7, 12)
    ]  # fmt: skip
    (built / "sciq.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {"name": "sciq", "data": {"path": "sciq.jsonl"}}
    recipe = write_recipe(built, {"variants": VARIANTS, "evaluation.tasks": [task]}, name="sciq.yaml")
    build(recipe, context)
    (found,) = records(built, MAIN)
    assert (found.name, found.num_documents, found.definition_sha256) == ("sciq", 12, "")
    unknown = write_recipe(
        built, {"variants": VARIANTS, "evaluation.tasks": [{**task, "name": "no_such_task"}]}, name="unknown.yaml"
    )
    with pytest.raises(LoaderError, match="lm-eval has no single task no_such_task"):
        build(unknown, context)
