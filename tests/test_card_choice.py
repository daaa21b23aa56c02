"""Which branch for which card, the context lengths of a model, and how figures are written."""

from pathlib import Path
from typing import Any

import pytest

from packager.card.choice import (
    CachedContext,
    Candidate,
    MachineChoice,
    Opened,
    best_branch,
    cached_contexts,
    machine_choices,
)
from packager.card.numbers import measured, measured_percent, short_size
from packager.errors import CardError
from packager.model.architecture import architecture_of
from packager.receipt import LoaderRecord, Provenance
from tests import card_fixtures as fixtures
from tests.card_page import tables
from tests.locks import read_lock_of
from tests.test_card_figures import render

RECIPES = Path(__file__).resolve().parents[1] / "recipes"


def receipts_of(*figures: tuple[int, float]) -> list[Provenance]:
    """Return branches a, b, ... of these bytes and KL divergences; each row has the divergence itself."""
    (receipt,) = fixtures.minimal_receipts(fixtures.minimal_recipe())
    found = []
    for name, (size_bytes, kl) in zip("abcdef", figures, strict=False):
        quality = fixtures.fixture_quality(0, perplexity=2.0, base_perplexity=1.9, kl_divergence=kl, top1_agreement=0.9)
        assert quality.rows is not None
        rows = quality.rows.model_copy(update={"kl_divergence": (kl,) * 8})
        changed = {"branch": name, "weights_bytes": size_bytes, "quality": quality.model_copy(update={"rows": rows})}
        found.append(receipt.model_copy(update=changed))
    return found


SHORT, LONG = CachedContext(tokens=4096, cache_bytes=2 * 10**9), CachedContext(tokens=32768, cache_bytes=16 * 10**9)


def asked(receipts: list[Provenance], context: CachedContext, allowed: str = "abcdef") -> list[Candidate]:
    """Return the branches, of which a runtime is expected to open the allowed ones."""
    return [
        Candidate(
            receipt=receipt,
            context=context,
            opened=Opened(opening="expected" if receipt.branch in allowed else "refused"),
        )
        for receipt in receipts
    ]


def answers(choices: tuple[MachineChoice, ...]) -> list[tuple[int, int | None, list[str]]]:
    """Return of each kind of machine its memory and for each question the branch, or why there is none."""
    return [(each.least_gb, each.most_gb, [one.branch or one.missing for one in each.chosen]) for each in choices]


def test_a_card_gets_the_closest_branch_that_fits() -> None:
    """5 GB with 2 GB of cache and 1 GB of a runtime fill 8 GB to the last byte; one more byte does not fit."""
    receipts = receipts_of((5 * 10**9, 0.3), (5 * 10**9 + 1, 0.2), (31 * 10**9, 0.1))
    on_gpu = [asked(receipts, SHORT), asked(receipts, LONG), asked(receipts, SHORT, "a")]
    on_cpu = [asked(receipts, SHORT, "ab"), asked(receipts, LONG, "ab"), asked(receipts, SHORT, "")]
    assert answers(machine_choices(on_gpu, on_cpu)) == [
        (8, 8, ["a", "memory", "a"]),
        (12, 16, ["b", "memory", "a"]),
        (24, 24, ["b", "b", "a"]),
        (48, None, ["c", "c", "a"]),
        (0, None, ["b", "b", "runtime"]),
    ]


def test_of_branches_that_the_rows_do_not_tell_apart_the_smallest_is_taken() -> None:
    assert best_branch(receipts_of((7, 0.1), (5, 0.1), (6, 0.1), (4, 0.2))) == "b"
    assert best_branch(receipts_of((7, 0.1))) == "a"
    assert best_branch([]) == ""


def test_branches_that_cannot_be_compared_are_not_chosen_from() -> None:
    receipts = receipts_of((7, 0.1), (5, 0.2))
    receipts[1] = receipts[1].model_copy(update={"quality": None})
    assert machine_choices([asked(receipts, SHORT)], [asked(receipts, SHORT, "")]) == ()
    assert best_branch(receipts) == ""


def test_a_question_with_one_branch_has_an_answer_without_a_measurement() -> None:
    receipts = [
        receipt.model_copy(update={"quality": None}) for receipt in receipts_of((7 * 10**9, 0.1), (6 * 10**9, 0.2))
    ]
    on_gpu, on_cpu = [asked(receipts, SHORT), asked(receipts, SHORT, "b")], [asked(receipts, SHORT, "")] * 2
    assert answers(machine_choices(on_gpu[:1], [asked(receipts, SHORT, "a")])) == [
        (8, 8, ["memory"]),
        (12, None, ["quality"]),
        (0, None, ["a"]),
    ]
    assert answers(machine_choices(on_gpu, on_cpu)) == [
        (8, 8, ["memory", "memory"]),
        (12, None, ["quality", "b"]),
        (0, None, ["runtime", "runtime"]),
    ]


def test_the_page_lists_the_choices_by_card() -> None:
    recipe = fixtures.llama_recipe()
    text = render(
        recipe,
        fixtures.llama_receipts(recipe),
        contexts=(*fixtures.LLAMA_CONTEXTS, CachedContext(tokens=32768, cache_bytes=15_200_000_000)),
        expectations=fixtures.llama_expectations(recipe),
    )
    by_size = "`gptq-4bit-64g-actorder_True`", "`gptq-4bit-32g-actorder_True`"
    assert tables(text)[0] == [
        ["Machine", "Best quality at 4k tokens", "Best quality at 32k tokens", "Best in vLLM 0.32 at 4k tokens"],
        ["GPU, 8 GB", "none fits", "none fits", "none fits"],
        ["GPU, 12 GB", by_size[0], "none fits", "`main`"],
        ["GPU, 16 GB", by_size[1], "none fits", "`main`"],
        ["GPU, 24 GB", by_size[1], by_size[0], "`main`"],
        ["GPU, 48 GB and more", by_size[1], by_size[1], "`main`"],
        ["CPU, no GPU", by_size[1], by_size[1], "none proven"],
    ]
    assert "\n* On a CPU: `gptq-4bit-32g-actorder_True`, proven there in ONNX Runtime.\n" in text
    assert "\n* In vLLM 0.32, as far as its own checks tell: `main`.\n" in text
    assert text.count("The only one for vLLM 0.32.") == 1


@pytest.mark.parametrize(("status", "words"), [("passed", "`main`"), ("failed", "none"), ("refused", "none")])
def test_what_ran_in_a_server_stands_before_what_is_expected(status: Any, words: str) -> None:
    recipe = fixtures.llama_recipe()
    receipts = list(fixtures.llama_receipts(recipe))
    ran = LoaderRecord(loader="vllm", required=False, status=status, device="cuda")
    receipts[0] = receipts[0].model_copy(update={"loaders": (*receipts[0].loaders, ran)})
    text = render(recipe, receipts, contexts=(SHORT,), expectations=fixtures.llama_expectations(recipe))
    assert f"\n* In vLLM 0.32: {words}.\n" in text


def test_a_server_that_opens_each_branch_has_its_column() -> None:
    recipe = fixtures.llama_recipe()
    verdicts = fixtures.llama_expectations(recipe)["main"]
    given = {variant.branch: verdicts for variant in recipe.expanded_variants()}
    text = render(recipe, fixtures.llama_receipts(recipe), contexts=(SHORT,), expectations=given)
    assert tables(text)[0][0] == ["Machine", "Best quality at 4k tokens", "Best in vLLM 0.32 at 4k tokens"]
    assert [row[1] == row[2] for row in tables(text)[0][1:]] == [True, True, False], "all but the CPU"
    assert "\n* In vLLM 0.32, as far as its own checks tell: each branch.\n" in text
    assert "The only one for" not in text


@pytest.mark.parametrize(
    ("most", "titles"),
    [(None, ["4k", "32k"]), (131072, ["4k", "32k"]), (8192, ["4k", "8k"]), (4096, ["4k"]), (500, ["500"])],
)
def test_contexts_end_where_the_models_context_ends(most: int | None, titles: list[str]) -> None:
    lock = read_lock_of(RECIPES / "llama-2-13b-chat.yaml")
    config: dict[str, Any] = {**lock.model.config, "max_position_embeddings": most}
    architecture = architecture_of(lock.model.model_copy(update={"config": config}), "lock")
    contexts = cached_contexts(architecture)
    assert [context.title for context in contexts] == titles
    # Keys and values of 40 layers and 40 heads of 128, in two bytes.
    assert [context.cache_bytes for context in contexts] == [
        2 * 2 * 40 * 40 * 128 * context.tokens for context in contexts
    ]


@pytest.mark.parametrize(
    ("value", "error", "expected"),
    [
        (0.0234, 0.00061, "0.0234 ± 0.0012"),
        (0.02349, 0.0061, "0.023 ± 0.012"),
        (5.1234, 0.0449, "5.123 ± 0.090"),
        (0.5, 3.0, "0.50 ± 6.00"),
        (0.09996, 0.02, "0.100 ± 0.040"),
        (0.00000123, 0.00000006, "1.23e-6 ± 0.12e-6"),
        (0.00000123, 0.0000012, "1.2e-6 ± 2.4e-6"),
        (0.000099, 0.0000499, "9.9e-5 ± 10.0e-5"),
        (-0.00035, 0.00025, "-0.00035 ± 0.00050"),
        (1234.5, 300.0, "1234 ± 600"),
        (0.0, 0.0, "0 ± 0"),
        (0.0, 0.25, "0.00 ± 0.50"),
        (1.25, 0.0, "1.25 ± 0.00"),
        (0.00000123, None, "1.23e-6"),
        (0.5, None, "0.500"),
    ],
)
def test_a_figure_ends_where_its_error_ends(value: float, error: float | None, expected: str) -> None:
    assert measured(value, error).replace("\u00a0", " ") == expected


def test_a_percentage_keeps_its_error() -> None:
    assert measured_percent(0.97181, 0.0014) == "97.18 ±\u00a00.28\u00a0%"
    assert measured_percent(-0.0003, 0.0002, signed=True) == "-0.030 ±\u00a00.040\u00a0%"
    assert measured_percent(0.97181, None) == "97.18\u00a0%"
    with pytest.raises(CardError, match="not a number"):
        measured(0.5, float("nan"))


@pytest.mark.parametrize(
    ("size_bytes", "expected"),
    [
        (7_255_101_440, "7.26 GB"), (39_770_000_000, "39.8 GB"), (110_230_000, "110 MB"), (999_400_000, "999 MB"),
        (999_600_000, "1.00 GB"), (9_996_000, "10.0 MB"), (1_000, "1.00 kB"), (999, "999 B"), (0, "0 B"),
        (234_500_000_000, "234 GB"), (1_234_000_000_000, "1234 GB"),
    ],
)  # fmt: skip
def test_a_size_has_three_digits(size_bytes: int, expected: str) -> None:
    assert short_size(size_bytes) == expected.replace(" ", "\u00a0")
