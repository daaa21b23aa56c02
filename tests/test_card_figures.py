"""Every figure of a card, computed again from the receipts' JSON by code that shares nothing with `packager.card`."""

import json
import re
from collections.abc import Iterable, Mapping
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

import pytest

from packager.card import CardTexts, render_card
from packager.card.choice import CachedContext
from packager.card.facts import autogptq_pins
from packager.errors import CardError
from packager.model.compatibility import Verdict
from packager.receipt import (
    AUTOGPTQ_PINS,
    ExpertLinearRecord,
    LinearRecord,
    LoaderRecord,
    MixedText,
    Provenance,
    TextRecord,
)
from packager.recipe import Recipe
from tests import card_fixtures as fixtures
from tests.card_page import tables

# Of every figure another value per branch and per field, so that no figure can stand in for another.
FIGURES: tuple[dict[str, Any], ...] = (
    {"bytes": 7_255_101_440, "ppl": 5.12347, "base": 4.98123, "kl": 0.023416, "top1": 0.93123, "right": 171, "of": 201},
    {"bytes": 7_998_012_416, "ppl": 5.03872, "base": 4.98132, "kl": 0.013023, "top1": 0.95614, "right": 178, "of": 202},
    {"bytes": 7_503_401_984, "ppl": 4.95214, "base": 4.98143, "kl": 0.015174, "top1": 0.94985, "right": 177, "of": 203},
    {"bytes": 7_244_093_111, "ppl": 5.06893, "base": 4.98154, "kl": 0.024339, "top1": 0.94376, "right": 175, "of": 204},
)


# No two parameters have the same values, so that no column can stand in for another.
PARAMETERS: dict[str, tuple[Any, ...]] = {
    "bits": (4, 8, 3, 2),
    "damp_percent": (0.01, 0.011, 0.012, 0.013),
    "sym": (True, False, False, False),
    "true_sequential": (False, True, True, False),
    "act_order": ("none", "full", "static", "group"),
    "desc_act": (False, True, False, False),
    "scale_search": (False, False, False, True),
    "refine": (False, False, True, False),
}
REFINED = 3  # linears of a variant that refines


def changed_text(record: TextRecord, name: str, num_samples: int, seq_len: int) -> TextRecord:
    """Return the record of a text with a name, a size and digests of its own."""
    return record.model_copy(
        update={
            "source": f"fixture/{name.replace(' ', '-')}",
            "config": f"config of {name}",
            "revision": fixtures.fixture_sha256(f"revision of {name}")[:40],
            "digest": fixtures.fixture_sha256(f"ids of {name}"),
            "num_samples": num_samples,
            "seq_len": seq_len,
        }
    )


def changed_receipt(receipt: Provenance, index: int, figures: Mapping[str, Any]) -> Provenance:
    """Return a receipt in which every figure that a card prints has a value of its own."""
    records = [
        record.model_copy(
            update={
                "relative_error": 0.00123 * (index + 1) + 0.0001 * position,
                "top1_agreement": 0.991 - 0.001 * index - 0.0001 * position,
                "tokens_generated": 64 + index,
                "tokens_equal": 60 - index - position,
            }
        )
        for position, record in enumerate(receipt.loaders[:2])
    ]
    parameters = receipt.parameters | {name: values[index] for name, values in PARAMETERS.items()}
    damp = PARAMETERS["damp_percent"][index]
    damps = [damp, 0.02, 0.04, 0.08][: index + 1] + [damp] * (100 + index)
    return receipt.model_copy(
        update={
            "weights_bytes": figures["bytes"],
            "made_with": f"quantizer {index} 0.{index}",
            "recipe_digest": f"{index:064x}",
            "device": f"GPU {index}",
            "versions": {"torch": f"2.{index}", "triton": f"3.{index}"},
            "parameters": parameters,
            "effective": parameters | ({"damp_percent": 0.08, "sym": True} if index == 2 else {}),
            "quality": fixtures.fixture_quality(
                index,
                perplexity=figures["ppl"],
                base_perplexity=figures["base"],
                kl_divergence=figures["kl"],
                top1_agreement=figures["top1"],
                answered=figures["right"],
                questions=figures["of"],
                base_answered=190 + index,
            ),
            "loaders": (*records, *receipt.loaders[2:]),
            "linears": tuple(
                LinearRecord(
                    name=f"model.layers.{number}.mlp.down_proj",
                    loss=0.5,
                    damp_percent=damp,
                    unrefined_loss=0.6 if parameters["refine"] and number < REFINED else None,
                )
                for number, damp in enumerate(damps)
            ),
            "calibration": changed_text(receipt.calibration, f"calibration {index}", 130 + index, 2050 + index),
            # The same ids under other names: otherwise the branches could not be compared.
            "evaluation": changed_text(receipt.evaluation, f"evaluation {index}", 70 + index, 1030 + index).model_copy(
                update={"digest": receipt.evaluation.digest}
            ),
            "base_model": receipt.base_model.model_copy(update={"num_parameters": 13_015_864_320 + index}),
        }
    )


def recipe_of_four() -> Recipe:
    recipe = fixtures.llama_recipe()
    plain = tuple(variant.model_copy(update={"description": None}) for variant in recipe.variants)
    return recipe.model_copy(update={"variants": plain})


def receipts_of_four(recipe: Recipe) -> list[Provenance]:
    receipts = fixtures.llama_receipts(recipe)
    return [changed_receipt(*entry) for entry in zip(receipts, range(4), FIGURES, strict=True)]


def render(recipe: Recipe, receipts: Iterable[Provenance], branch: str = "main", **given: Any) -> str:
    return render_card(recipe, CardTexts(), tuple(receipts), "llama", branch, **given)


@pytest.fixture(scope="module")
def page() -> str:
    recipe = recipe_of_four()
    return render(recipe, receipts_of_four(recipe))


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    """The receipts as they are published: provenance.json, parsed."""
    return [json.loads(receipt.model_dump_json()) for receipt in receipts_of_four(recipe_of_four())]


def table(text: str, heading: str) -> list[dict[str, str]]:
    (found,) = [rows for rows in tables(text) if heading in rows[0]]
    return [dict(zip(found[0], row, strict=True)) for row in found[1:]]


def rounded(value: float | Decimal, places: int) -> str:
    number = value if isinstance(value, Decimal) else Decimal(repr(value))
    return str(number.quantize(Decimal(1).scaleb(-places), ROUND_HALF_EVEN))


def significant(value: float) -> str:
    """Round to three significant digits, zeros at the end included."""
    number = Decimal(repr(value))
    return f"{number.quantize(Decimal(1).scaleb(number.adjusted() - 2), ROUND_HALF_EVEN):f}"


def percent(value: float) -> str:
    return f"{rounded(Decimal(repr(value)) * 100, 2)}%"


def gigabytes(size_bytes: int) -> str:
    return f"{rounded(Decimal(size_bytes) / 10**9, 2)} GB"


def interval(value: float, error: float, scale: int = 1) -> str:
    """Round twice an error to two digits, and the value to the same place, or to two digits of its own."""
    number, twice = Decimal(repr(value)) * scale, 2 * Decimal(repr(error)) * scale
    place = Decimal(1).scaleb(min(number.adjusted(), twice.adjusted()) - 1)
    return " ±\u00a0".join(f"{each.quantize(place, ROUND_HALF_EVEN):f}" for each in (number, twice))


def three_digits(size_bytes: int) -> str:
    return f"{significant(size_bytes / 10**9)}\u00a0GB"


CONTEXTS = (CachedContext(tokens=4096, cache_bytes=3_355_443_200), CachedContext(tokens=20_000, cache_bytes=16 * 10**9))


def test_the_table_to_choose_by(records: list[dict[str, Any]]) -> None:
    recipe = recipe_of_four()
    rows = table(render(recipe, receipts_of_four(recipe), contexts=CONTEXTS), "Proven in")
    for row, record in zip(rows, records, strict=True):
        used, quality = record["parameters"], record["quality"]
        act_order = {"none": "no", "full": "yes"}.get(used["act_order"], used["act_order"])
        assert list(row.items())[1:] == [
            ("Bits", str(used["bits"])),
            ("Group", str(used["group_size"])),
            ("Act order", act_order),
            ("Size, GB", significant(record["weights_bytes"] / 10**9)),
            (
                "VRAM at 4k / 20000, GB",
                significant((record["weights_bytes"] + 3_355_443_200) / 10**9)
                + " / "
                + significant((record["weights_bytes"] + 16 * 10**9) / 10**9),
            ),
            ("KL", interval(quality["kl_divergence"], quality["errors"]["kl_divergence"])),
            ("Top-1, %", interval(quality["top1_agreement"], quality["errors"]["top1_agreement"], 100)),
            ("Proven in", "AutoGPTQ, Transformers, ONNX Runtime"),
        ]
        assert f"[`{record['branch']}`](https://huggingface.co/" in row["Branch"]


def test_the_table_of_files(page: str, records: list[dict[str, Any]]) -> None:
    for row, record in zip(table(page, "File Size"), records, strict=True):
        used = record["parameters"]
        assert row["Branch"] == f"`{record['branch']}`"
        assert (row["Bits"], row["Group Size"]) == (str(used["bits"]), str(used["group_size"]))
        assert row["Damp %"] == str(used["damp_percent"])
        act_order = {"none": "False", "full": "True", "static": "False (static)", "group": "False (group)"}
        assert row["Act Order (desc_act)"] == act_order[used["act_order"]]
        assert row["Seq Len"] == str(record["calibration"]["seq_len"])
        assert row["File Size"] == gigabytes(record["weights_bytes"])
        assert row["Made With"] == record["made_with"]
        text = record["calibration"]
        assert row["GPTQ Dataset"] == f"[{text['config']}](https://huggingface.co/datasets/{text['source']})"


def descriptions(text: str) -> list[str]:
    """Return what a page says about each branch, in its list below the table."""
    section = text.partition("\n## Provided files\n")[2].partition("\n<details>")[0]
    return re.findall(r"(?m)^\* `[^`]+`: (.+)$", section)


def test_the_words_for_the_extremes(page: str, records: list[dict[str, Any]]) -> None:
    sizes = {record["branch"]: record["weights_bytes"] for record in records}
    losses = {record["branch"]: record["quality"]["kl_divergence"] for record in records}
    for words_of, branch in zip(descriptions(page), sizes, strict=True):
        marks = {
            "Smallest.": sorted(sizes, key=sizes.__getitem__)[0],
            "Closest to the fp16 model.": sorted(losses, key=losses.__getitem__)[0],
            "What you get when no branch is named.": "main",
        }
        for words, expected in marks.items():
            assert (words in words_of) == (branch == expected), (branch, words)


def test_a_branch_is_compared_with_the_next_smaller_one(page: str) -> None:
    """By size: 7.244 and 7.255 GB are one size, then 7.503, then 7.998."""
    main, largest, middle, smallest = descriptions(page)
    names = [variant.branch for variant in recipe_of_four().expanded_variants()]
    assert f"As large as `{names[3]}`, with {fewer(0.023416, 0.024339)} % less KL divergence." in main
    assert f"{significant(494_610_432 / 10**6)}\u00a0MB more than `{names[2]}`, with" in largest
    assert f"MB more than `{names[2]}`, with {fewer(0.013023, 0.015174)} % less KL divergence." in largest
    assert f"MB more than `{names[0]}`, with {fewer(0.015174, 0.023416)} % less KL divergence." in middle
    more = 100 * (0.024339 / 0.023416 - 1)
    assert f"As large as `{names[0]}`, with {more:.1f} % more KL divergence." in smallest


def fewer(own: float, other: float) -> str:
    return f"{100 * (1 - own / other):.2g}"


def test_the_branches_to_take(page: str, records: list[dict[str, Any]]) -> None:
    def cost(record: dict[str, Any]) -> str:
        kl = interval(record["quality"]["kl_divergence"], record["quality"]["errors"]["kl_divergence"])
        return f"`{record['branch']}` ({three_digits(record['weights_bytes'])}, KL divergence {kl})."

    smallest = min(records, key=lambda record: record["weights_bytes"])
    closest = min(records, key=lambda record: record["quality"]["kl_divergence"])
    assert f"* Closest to the fp16 model: {cost(closest)}\n" in page
    assert f"* Smallest: {cost(smallest)}\n" in page
    assert f"* What you get when no branch is named: {cost(records[0])}\n" in page


def test_the_table_of_quality(page: str, records: list[dict[str, Any]]) -> None:
    for row, record in zip(table(page, "Right"), records, strict=True):
        quality, errors = record["quality"], record["quality"]["errors"]
        perplexity, base = Decimal(repr(quality["perplexity"])), Decimal(repr(quality["base_perplexity"]))
        change = float((perplexity - base) / base)
        assert row == {
            "Branch": f"`{record['branch']}`",
            "PPL": interval(quality["perplexity"], errors["perplexity"]),
            "Change, %": f"{'+' if change > 0 else ''}{interval(change, errors['perplexity_change'], 100)}",
            "KL, mean": interval(quality["kl_divergence"], errors["kl_divergence"]),
            "KL, median": interval(quality["kl_median"], errors["kl_median"]),
            "KL, 99 %": interval(quality["kl_p99"], errors["kl_p99"]),
            "Top-1, %": interval(quality["top1_agreement"], errors["top1_agreement"], 100),
            "Right": f"{quality['answered']} of {quality['questions']}",
        }
        (line,) = [
            line for line in page.splitlines() if line.startswith("The fp16 model: ") and record["branch"] in line
        ]
        assert f"perplexity {interval(quality['base_perplexity'], errors['base_perplexity'])}, " in line
        assert f"{quality['base_answered']} of {quality['questions']} questions answered" in line


def test_the_texts_and_the_base_model(page: str, records: list[dict[str, Any]]) -> None:
    for record in records:
        (only,) = [line for line in page.splitlines() if line.startswith("Measured on") and record["branch"] in line]
        text = record["evaluation"]
        assert f": {text['num_samples']} rows of {text['seq_len']} tokens (`{record['branch']}`)." in only
        assert f"datasets/{text['source']}/tree/{text['revision']})" in only
        assert f"configuration {text['config']}, split test, revision `{text['revision']}`" in only
        (only,) = [line for line in page.splitlines() if line.startswith("* Calibration") and record["branch"] in line]
        text = record["calibration"]
        assert only.startswith(f"* Calibration: {text['num_samples']} rows of {text['seq_len']} tokens, seed 0, from")
        assert f"datasets/{text['source']}/tree/{text['revision']}), configuration {text['config']}" in only
        assert text["digest"] in only
        (only,) = [line for line in page.splitlines() if line.startswith("* Base model") and record["branch"] in line]
        thousands = re.sub(r"(?<=\d)(?=(?:\d{3})+$)", ",", str(record["base_model"]["num_parameters"]))
        assert f" {thousands} parameters in float16" in only


def test_the_table_of_loaders(page: str, records: list[dict[str, Any]]) -> None:
    rows = {(row["Loader"], row["Branch"]): row for row in table(page, "Greedy tokens equal")}
    for record in records:
        for title, loader in zip(("AutoGPTQ", "Transformers"), record["loaders"][:2], strict=True):
            row = rows[title, f"`{record['branch']}`"]
            assert row["Result"] == "passed"
            error = Decimal(repr(loader["relative_error"]))
            digits = error.quantize(Decimal(1).scaleb(error.adjusted() - 1), ROUND_HALF_EVEN)
            assert Decimal(row["Relative error"]) == digits
            assert row["Top-1 agreement"] == percent(loader["top1_agreement"])
            assert row["Greedy tokens equal"] == f"{loader['tokens_equal']} of {loader['tokens_generated']}"
    missing = rows["ExLlamaV2", "all"]
    assert [missing[column] for column in ("Relative error", "Top-1 agreement", "Greedy tokens equal")] == ["-"] * 3
    same = rows["ONNX Runtime", "all"]
    assert (same["Result"], same["Relative error"], same["Greedy tokens equal"]) == ("passed", "2e-06", "64 of 64")
    assert len(rows) == 2 * 4 + 1 + 1


def test_the_table_of_engines(page: str, records: list[dict[str, Any]]) -> None:
    for row, record in zip(table(page, "Damping raised"), records, strict=True):
        used = record["parameters"]
        damps = [linear["damp_percent"] for linear in record["linears"]]
        raised = sorted(damp for damp in damps if damp != used["damp_percent"])
        count = f"for {len(raised) or 'none'} of {len(damps)} linears"
        assert row["Damping raised"] == (f"{count}, up to {raised[-1]}" if raised else count)
        refined = sum("unrefined_loss" in linear for linear in record["linears"])
        assert row["Refined"] == (f"{refined} of {len(damps)} linears" if used["refine"] else "False")
        assert refined == (REFINED if used["refine"] else 0)
        for column in ("engine", "sym", "true_sequential", "scale_search"):
            assert row[column.replace("_", " ").capitalize().replace("Sym", "Symmetric")] == str(used[column])


TOKENS = ((0, 90, 1200, 700, 64, 63), (65, 80, 1300, 900, 64, 2000))


@pytest.mark.parametrize("tokens", TOKENS)
def test_the_tokens_of_experts(tokens: tuple[int, ...]) -> None:
    """64 columns: an expert of 64 tokens has as many as columns."""
    recipe, receipts = recipe_of_four(), receipts_of_four(recipe_of_four())
    linears = tuple(
        ExpertLinearRecord(
            name=f"model.layers.0.mlp.experts.{expert}.up_proj", loss=0.5, damp_percent=0.01, tokens=seen,
            rho=64 / (64 + seen),
        )
        for expert, seen in enumerate(tokens)
    )  # fmt: skip
    changed = [receipt.model_copy(update={"linears": (*receipt.linears, *linears)}) for receipt in receipts]
    records = [json.loads(receipt.model_dump_json()) for receipt in changed]
    seen = sorted(linear["tokens"] for linear in records[0]["linears"] if "tokens" in linear)
    assert seen == sorted(tokens)
    (line,) = [line for line in render(recipe, changed).splitlines() if line.startswith("* Experts: ")]
    few, none = sum(count < 64 for count in seen), seen.count(0)
    expected = (
        f"* Experts: each of the {len(seen)} linears of experts saw {seen[0]:,} to {seen[-1]:,} calibration tokens, "
        f"the median is {seen[len(seen) // 2 - 1]:,}. "
    )
    assert line.startswith(expected)
    rest = line.removeprefix(expected)
    assert rest.startswith(f"{few} saw fewer tokens than " if few else "None saw fewer tokens than it has columns.")
    assert (f", {none} of them none" in rest) == bool(none)


def test_the_shares_of_a_mixed_text_and_how_its_rows_begin() -> None:
    recipe, receipts = recipe_of_four(), receipts_of_four(recipe_of_four())
    rows = {"chats.jsonl": 37, "code.jsonl": 91}
    mixed = tuple(
        MixedText(source=name, text_sha256=fixtures.fixture_sha256(name), num_samples=count)
        for name, count in rows.items()
    )
    fields = {"mixed": mixed, "num_samples": 128, "seq_len": 77, "row_prefix": ("<s>",), "left_out": 1234}
    changed = [
        receipt.model_copy(update={"calibration": receipt.calibration.model_copy(update=fields)})
        for receipt in receipts
    ]
    text = " ".join(render(recipe, changed).split())
    for name, count in rows.items():
        percent = Decimal(100 * count) / sum(rows.values())
        assert f"{count} rows ({percent.quantize(Decimal('0.1'), ROUND_HALF_EVEN)} %) of {name}" in text
    assert "; each row begins with `<s>`; 1,234 rows without text were left out" in text
    apart = changed[0].calibration.model_copy(update={"separate": True})
    text = render(recipe, [receipt.model_copy(update={"calibration": apart}) for receipt in receipts])
    assert "; each row and each document begins with `<s>`" in " ".join(text.split())


def test_a_dense_model_has_no_line_about_experts(page: str) -> None:
    assert "* Experts:" not in page


def test_the_columns_of_engines_differ(records: list[dict[str, Any]]) -> None:
    """The test above can only find swapped columns whose values differ."""
    assert len({tuple(record["parameters"][name] for record in records) for name in PARAMETERS}) == len(PARAMETERS)


def test_what_made_a_branch(page: str, records: list[dict[str, Any]]) -> None:
    lines = page.splitlines()
    for index, record in enumerate(records):
        branch = f"(`{record['branch']}`)."
        assert f"* Made with {record['made_with']} {branch}" in lines
        assert f"* Recipe: sha256 `{record['recipe_digest']}` {branch}" in lines
        assert f"* Hardware: {record['device']} {branch}" in lines
        assert f"* Software: torch 2.{index}, triton 3.{index} {branch}" in lines


def test_a_loader_is_named_as_proven_only_where_it_passed() -> None:
    """One loader per status and branch, in another order on each branch; the expectations change nothing."""
    recipe = recipe_of_four()
    titles = {"autogptq": "AutoGPTQ", "transformers": "Transformers", "exllamav2": "ExLlamaV2"}
    statuses: list[dict[str, Any]] = [
        {"autogptq": "passed", "transformers": "failed", "exllamav2": "not run"},
        {"autogptq": "failed", "transformers": "not run", "exllamav2": "passed"},
        {"autogptq": "not run", "transformers": "passed"},
        {"autogptq": "failed", "transformers": "failed", "exllamav2": "not run"},
    ]
    receipts = []
    for receipt, chosen in zip(receipts_of_four(recipe), statuses, strict=True):
        loaders = [
            LoaderRecord(loader=name, required=True, status=status, reason="" if status == "passed" else "why")
            for name, status in chosen.items()
        ]
        receipts.append(receipt.model_copy(update={"loaders": tuple(loaders)}))
    hopeful = tuple(Verdict(loader=name, can_load=True, reason="") for name in titles)
    expectations = {receipt.branch: hopeful for receipt in receipts}
    for receipt, chosen in zip(receipts, statuses, strict=True):
        text = render(recipe, receipts, receipt.branch, expectations=expectations)
        assert [row["Proven in"] for row in table(text, "Proven in")] == [
            "AutoGPTQ", "ExLlamaV2", "Transformers", "none",
        ]  # fmt: skip
        results = table(text, "Greedy tokens equal")
        for name, title in titles.items():
            ran = [index for index, each in enumerate(statuses) if each.get(name) == "passed"]
            passed = [row["Branch"] for row in results if row["Loader"] == title and row["Result"] == "passed"]
            assert passed == [f"`{receipts[index].branch}`" for index in ran]
        assert text.count("Proven on this branch") == sum(status == "passed" for status in chosen.values())
        assert text.count("**It failed on this branch:** why.") == sum(
            chosen.get(name) == "failed" for name in ("autogptq", "transformers")
        )
        assert ("from auto_gptq import" in text) == (chosen["autogptq"] == "passed")
        assert ("from exllamav2 import" in text) == (chosen.get("exllamav2") == "passed")


def test_the_page_shows_no_example_of_a_loader_that_refuses_the_branch() -> None:
    recipe = recipe_of_four()
    receipts = [receipt.model_copy(update={"loaders": ()}) for receipt in receipts_of_four(recipe)]
    branch = receipts[0].branch
    refusal = Verdict(loader="transformers", can_load=False, reason="computes with random experts")
    accepted = Verdict(loader="gptqmodel", can_load=True, reason="")
    text = render(recipe, receipts, branch, expectations={branch: (refusal, accepted)})
    assert "AutoModelForCausalLM" not in text
    assert "Transformers 5 refuses it, as far as its own checks tell: computes with random experts." in text
    assert "model = GPTQModel.load(folder, device=device)" in text
    assert "It does not open this branch; [the reason](#transformers) is below." in text
    assert "\nlibrary_name: gptqmodel\n" in text
    text = render(recipe, receipts, branch, expectations={branch: (accepted,)})
    assert "AutoModelForCausalLM" in text
    assert "from gptqmodel import" not in text
    assert "\nlibrary_name: transformers\n" in text


def test_the_digests_of_the_weights(page: str, records: list[dict[str, Any]]) -> None:
    for record in records:
        (name,) = [name for name in record["files"] if name.endswith("safetensors")]
        assert f"\n{record['files'][name]['sha256']}  {record['branch']}/{name}\n" in page
    assert len(re.findall(r"(?m)^[0-9a-f]{64}  ", page)) == len(records)


@pytest.mark.parametrize(
    ("size_bytes", "expected"),
    [(2_310_144, "2.31 MB"), (1_000_000, "1.00 MB"), (1_048_576, "1.05 MB"), (1_000_000_000, "1.00 GB")],
)
def test_sizes_are_decimal(size_bytes: int, expected: str) -> None:
    recipe = fixtures.minimal_recipe()
    receipts = [
        receipt.model_copy(update={"weights_bytes": size_bytes}) for receipt in fixtures.minimal_receipts(recipe)
    ]
    text = render(recipe, receipts)
    (row,) = table(text, "File Size")
    assert row["File Size"] == expected
    assert row["Group Size"] == "-1 (whole row)"
    (row,) = table(text, "Proven in")
    number, unit = expected.split()
    assert row[f"Size, {unit}"] == number


@pytest.mark.parametrize(
    ("perplexity", "base", "expected"),
    [
        (5.0, 5.0, "0"),
        (5.0003, 5.0, "+0.0060"),
        (4.9997, 5.0, "-0.0060"),
        (10.0, 5.0, "+100.000"),
        (4.0, 5.0, "-20.000"),
    ],
)
def test_a_change_keeps_its_digits_and_its_sign(perplexity: float, base: float, expected: str) -> None:
    recipe = recipe_of_four()
    receipts = receipts_of_four(recipe)
    quality = receipts[0].quality
    assert quality is not None
    assert quality.errors is not None
    errors = quality.errors.model_copy(update={"perplexity_change": 0.0000135})
    quality = quality.model_copy(update={"perplexity": perplexity, "base_perplexity": base, "errors": errors})
    text = render(recipe, [receipts[0].model_copy(update={"quality": quality}), *receipts[1:]])
    value, error = table(text, "Right")[0]["Change, %"].split(" ±\u00a0")
    assert float(value) == float(expected)
    assert value.startswith(expected) or (perplexity == base and value == "+0.0000")
    assert error == "0.0027"


@pytest.mark.parametrize(("error", "expected"), [(0.0, "under 0.000001"), (0.000001, "1e-06"), (0.0449, "0.045")])
def test_a_relative_error_has_two_digits(error: float, expected: str) -> None:
    record = LoaderRecord(
        loader="autogptq", required=True, status="passed", relative_error=error, top1_agreement=1.0,
        tokens_generated=0, tokens_equal=0,
    )  # fmt: skip
    recipe = fixtures.minimal_recipe()
    receipts = [receipt.model_copy(update={"loaders": (record,)}) for receipt in fixtures.minimal_receipts(recipe)]
    (row,) = table(render(recipe, receipts), "Greedy tokens equal")
    assert (row["Relative error"], row["Top-1 agreement"], row["Greedy tokens equal"]) == (expected, "100.00%", "-")


def with_figures(**columns: list[Any]) -> list[str]:
    """Return what the page says about each branch when some figures are the given ones."""
    recipe = recipe_of_four()
    receipts = receipts_of_four(recipe)
    for index, size_bytes in enumerate(columns.get("sizes", ())):
        receipts[index] = receipts[index].model_copy(update={"weights_bytes": size_bytes})
    for index, rows in enumerate(columns.get("rows", ())):
        quality = receipts[index].quality
        assert quality is not None
        assert quality.rows is not None
        kept = None if rows is None else quality.rows.model_copy(update={"kl_divergence": tuple(rows)})
        loss = 1 if rows is None else sum(rows) / len(rows)
        changed = quality.model_copy(update={"kl_divergence": loss, "rows": kept})
        receipts[index] = receipts[index].model_copy(update={"quality": changed})
    return descriptions(render(recipe, receipts))


def rows_of(mean: float, pattern: int = 0) -> list[float]:
    """Eight rows of a mean; rows of different patterns differ by 0.1 up and down, with a standard error of 0.038."""
    signs = ((0,) * 8, (1, -1) * 4)[pattern]
    return [mean + 0.05 + 0.1 * sign for sign in signs]


ONLY, AMONG = "Closest to the fp16 model.", "Among the closest to the fp16 model."


@pytest.mark.parametrize(
    ("columns", "words", "expected"),
    [
        ({"sizes": [3, 3, 4, 5]}, "Smallest.", []),
        ({"sizes": [3, 3, 4, 5]}, "Among the smallest.", [0, 1]),
        ({"sizes": [4, 3, 4, 4]}, "Smallest.", [1]),
        ({"rows": [rows_of(0.1), rows_of(0.1), rows_of(0.2), rows_of(0.3)]}, ONLY, []),
        ({"rows": [rows_of(0.1), rows_of(0.1), rows_of(0.2), rows_of(0.3)]}, AMONG, [0, 1]),
        ({"rows": [rows_of(0.2), rows_of(0.2), rows_of(0.2), rows_of(0.19)]}, ONLY, [3]),
        # 0.07 is less than two errors of 0.038, 0.08 is more.
        ({"rows": [rows_of(0.1), rows_of(0.17, 1), rows_of(0.4), rows_of(0.3)]}, AMONG, [0, 1]),
        ({"rows": [rows_of(0.1), rows_of(0.18, 1), rows_of(0.4), rows_of(0.3)]}, ONLY, [0]),
        ({"rows": [rows_of(0.1), None, rows_of(0.2), rows_of(0.3)]}, ONLY, []),
        ({"rows": [rows_of(0.1)[:7], rows_of(0.4)[:7], rows_of(0.2)[:7], rows_of(0.3)[:7]]}, ONLY, []),
    ],
)
def test_an_extreme_is_named_only_as_far_as_the_rows_tell(
    columns: dict[str, list[Any]], words: str, expected: list[int]
) -> None:
    assert [index for index, text in enumerate(with_figures(**columns)) if f" {words}" in text] == expected


def test_neighbours_are_not_ranked_where_the_rows_do_not_tell() -> None:
    sizes = [100, 200, 300, 400]
    known = with_figures(sizes=sizes, rows=[rows_of(0.35), rows_of(0.25), rows_of(0.1), rows_of(0.01)])
    assert "100\u00a0B more than `main`, with 25 % less KL divergence." in known[1]
    unknown = with_figures(sizes=sizes, rows=[rows_of(0.3), rows_of(0.25, 1), rows_of(0.1), rows_of(0.01)])
    assert "100\u00a0B more than `main`; the text does not tell their quality apart." in unknown[1]
    missing = with_figures(sizes=sizes, rows=[rows_of(0.3), None, rows_of(0.1), rows_of(0.01)])
    assert "100\u00a0B more than `main`; their quality was not compared." in missing[1]
    assert "KL divergence" not in missing[1]
    much = with_figures(sizes=sizes, rows=[rows_of(0.05), rows_of(0.25), rows_of(0.1), rows_of(0.01)])
    assert "100\u00a0B more than `main`, with 3 times its KL divergence." in much[1]


def test_branches_that_were_measured_on_other_rows_are_not_compared() -> None:
    recipe = recipe_of_four()
    receipts = receipts_of_four(recipe)
    other = receipts[1].evaluation.model_copy(update={"digest": fixtures.fixture_sha256("other ids")})
    receipts[1] = receipts[1].model_copy(update={"evaluation": other})
    text = render(recipe, receipts, contexts=CONTEXTS)
    assert ONLY not in text
    # 12 GB hold the three that were measured on the same rows.
    assert [(row["Machine"], row["Best quality at 4k tokens"]) for row in table(text, "Machine")] == [
        ("GPU, 8 GB", "none fits"),
        ("GPU, 12 GB", "`gptq-4bit-64g-actorder_True`"),
        ("GPU, 16 to 24 GB", "not compared"),
        ("GPU, 48 GB and more", "not compared"),
        ("CPU, no GPU", "not compared"),
    ]
    assert "were not measured on the same rows, or on too few of them: by quality, this page recommends none." in text


def test_one_branch_alone_is_no_extreme() -> None:
    recipe = fixtures.minimal_recipe()
    (words,) = descriptions(render(recipe, fixtures.minimal_receipts(recipe)))
    assert words == "4-bit, with static Act Order, one group per row. What you get when no branch is named."


def test_every_smallest_branch_is_named_with_its_cost() -> None:
    recipe = recipe_of_four()
    receipts = receipts_of_four(recipe)
    receipts[1] = receipts[1].model_copy(update={"weights_bytes": receipts[3].weights_bytes})
    (line,) = [line for line in render(recipe, receipts).splitlines() if line.startswith("* Smallest: ")]
    names = [receipts[1].branch, receipts[3].branch]
    assert re.findall(r"`([^`]+)` \(", line) == names
    assert [entry.partition("\u00a0GB")[0] for entry in re.findall(r"\(([^)]+)\)", line)] == ["7.24", "7.24"]
    assert [float(kl) for kl in re.findall(r"divergence ([0-9.]+)", line)] == pytest.approx([0.013, 0.0243], rel=0.01)


def test_branches_of_one_size_are_not_called_the_smallest() -> None:
    recipe = recipe_of_four()
    receipts = [receipt.model_copy(update={"weights_bytes": 3}) for receipt in receipts_of_four(recipe)]
    text = render(recipe, receipts)
    assert "* Closest to the fp16 model: " in text
    assert "* Smallest: " not in text


def test_a_card_of_a_branch_takes_that_branch_s_commands() -> None:
    recipe = recipe_of_four()
    receipts = receipts_of_four(recipe)
    for receipt in receipts:
        text = render(recipe, receipts, receipt.branch)
        expected = receipt.branch if receipt.branch != "main" else receipts[1].branch
        assert f"--revision {expected} --local-dir" in text
        assert f'branch = "{receipt.branch}"' in text


def test_predictions_leave_out_loaders_that_ran() -> None:
    """A loader that passed or failed on a branch is not predicted there."""
    recipe = recipe_of_four()
    receipts = receipts_of_four(recipe)
    ran = [record.loader for record in receipts[0].loaders]
    failed = receipts[1].loaders[0].model_copy(update={"status": "failed", "reason": "relative error 1.1"})
    skipped = receipts[2].loaders[0].model_copy(update={"status": "not run", "reason": "no GPU"})
    receipts[1] = receipts[1].model_copy(update={"loaders": (failed, *receipts[1].loaders[1:])})
    receipts[2] = receipts[2].model_copy(update={"loaders": (skipped, *receipts[2].loaders[1:])})
    assert ran[0] == "autogptq"
    verdicts = (
        Verdict(loader="autogptq", can_load=True, reason="old"),
        Verdict(loader="exllamav2", can_load=False, reason="new"),
    )
    text = render(recipe, receipts, expectations={receipt.branch: verdicts for receipt in receipts})
    old, new = [list(row.values()) for row in table(text, "Should open it")]
    assert old[0].startswith("AutoGPTQ")
    assert new[0].startswith("ExLlamaV2")
    assert (old[1:], new[1:]) == ([f"`{receipts[2].branch}`", "yes", "old"], ["all", "no", "new"])
    settings = [line for line in text.splitlines() if line.startswith("* AutoGPTQ ran on")]
    assert [line.count("gptq-4bit") + line.count("`main`") for line in settings] == [3]


def test_the_card_says_how_each_loader_was_confined() -> None:
    recipe = recipe_of_four()
    receipts = receipts_of_four(recipe)
    for index, confinement in enumerate(("bubblewrap", "none", "")):
        (loader, *others) = receipts[index].loaders
        changed = loader.model_copy(update={"confinement": confinement})
        receipts[index] = receipts[index].model_copy(update={"loaders": (changed, *others)})
    lines = [line for line in render(recipe, receipts).splitlines() if line.startswith("* AutoGPTQ ran on")]
    assert [("confined by bubblewrap, with" in line, ", not confined, with" in line) for line in lines] == [
        (True, False),
        (False, True),
        (False, False),
    ]


def test_a_fact_that_all_branches_share_names_none() -> None:
    recipe = recipe_of_four()
    lines = render(recipe, fixtures.llama_receipts(recipe)).splitlines()
    for start in ("* Calibration: 128 rows of 2048 tokens", "Measured on", "* Base model", "* Hardware", "* Made with"):
        (line,) = [line for line in lines if line.startswith(start)]
        assert "(`" not in line
        assert line.endswith(".")


def test_loaders_come_in_the_order_of_the_recipe_and_then_of_the_receipts() -> None:
    recipe = recipe_of_four()
    stranger = LoaderRecord(loader="a-stranger", required=False, status="not run", reason="unknown")
    receipts = [
        receipt.model_copy(update={"loaders": (stranger, *receipt.loaders[::-1])})
        for receipt in receipts_of_four(recipe)
    ]
    names = dict.fromkeys(row["Loader"] for row in table(render(recipe, receipts), "Greedy tokens equal"))
    assert list(names) == ["AutoGPTQ", "Transformers", "ExLlamaV2", "ONNX Runtime", "a-stranger"]


def test_act_orders_are_explained_where_a_branch_has_another_than_its_desc_act_says(page: str) -> None:
    explained = "False (static): all columns, in groups of the stored order"
    assert explained in page
    recipe = recipe_of_four()
    orders = ("none", "full", "full", "none")
    receipts = [
        receipt.model_copy(update={"parameters": {**receipt.parameters, "act_order": order}})
        for receipt, order in zip(receipts_of_four(recipe), orders, strict=True)
    ]
    assert explained not in render(recipe, receipts)


def test_a_branch_has_its_own_description() -> None:
    recipe = recipe_of_four()
    words = ["the first", None, None, None]
    variants = [
        variant.model_copy(update={"description": text}) for variant, text in zip(recipe.variants, words, strict=True)
    ]
    recipe = recipe.model_copy(update={"variants": tuple(variants)})
    found = descriptions(render(recipe, receipts_of_four(recipe)))
    begins = [
        "the first 4-bit, without Act Order, 128g. What you get",
        "8-bit, with Act Order, 32g. Closest to the fp16 model. ",
        "3-bit, with static Act Order, 64g. ",
        "2-bit, with group-aware Act Order, 128g. Smallest. ",
    ]
    assert [text[: len(begin)] for text, begin in zip(found, begins, strict=True)] == begins


def test_autogptq_is_installed_in_the_versions_that_ran() -> None:
    recipe = recipe_of_four()
    receipts = receipts_of_four(recipe)
    versions = {"auto-gptq": "0.7.1", "transformers": "4.40.2", "accelerate": "0.30.1"}
    header, *lines = autogptq_pins(receipts[0]).splitlines()
    assert header.startswith("# ")
    assert lines == [f"{name}=={version}" for name, version in versions.items()]
    page = render(recipe, receipts)
    (fetch,) = [line for line in page.splitlines() if line.startswith("hf download") and AUTOGPTQ_PINS in line]
    assert fetch == f"hf download {recipe.repository.id} {AUTOGPTQ_PINS} --revision main --local-dir ."
    assert f"\npip install -r {AUTOGPTQ_PINS}\n" in page
    failed = receipts[0].model_copy(
        update={"loaders": [each.model_copy(update={"status": "failed"}) for each in receipts[0].loaders]}
    )
    assert autogptq_pins(failed) == ""


def test_a_figure_that_is_infinite_is_refused() -> None:
    recipe = recipe_of_four()
    receipts = receipts_of_four(recipe)
    quality = receipts[1].quality
    assert quality is not None
    endless = quality.model_copy(update={"kl_divergence": float("inf")})
    receipts[1] = receipts[1].model_copy(update={"quality": endless})
    with pytest.raises(CardError, match="a figure that is not a number"):
        render(recipe, receipts)


def test_no_equal_token_is_a_figure_too() -> None:
    recipe = recipe_of_four()
    receipts = receipts_of_four(recipe)
    record = receipts[0].loaders[0].model_copy(update={"tokens_equal": 0, "tokens_generated": 5})
    receipts[0] = receipts[0].model_copy(update={"loaders": (record, *receipts[0].loaders[1:])})
    (row,) = [
        row
        for row in table(render(recipe, receipts), "Greedy tokens equal")
        if (row["Loader"], row["Branch"]) == ("AutoGPTQ", "`main`")
    ]
    assert row["Greedy tokens equal"] == "0 of 5"
