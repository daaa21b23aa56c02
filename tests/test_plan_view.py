"""Every figure of `packager plan`, computed again from the plan and the model's config.json."""

import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import ROUND_HALF_EVEN, Decimal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from packager.cli.plan_view import build_plan_json, print_build_plan
from packager.model.compatibility import Verdict
from packager.model.lock import LockedCache, LockedWindow
from packager.model.runtimes import RUNTIMES
from packager.pipeline.plan import BuildPlan, DiskPlan, EvaluationPlan, MemoryPlan, make_plan
from packager.prove.evaluation_memory import EvaluationMemory
from packager.quantize.memory import SweepPlan
from packager.recipe.fields import DRAWING_VERSION
from packager.recipe.file import RecipeFile
from tests.test_house_rules import ROOT
from tests.tiny_recipe import write_all

LARGE = ROOT / "recipes" / "llama-2-13b-chat.yaml"
CONFIG = json.loads(LARGE.with_suffix(".lock.json").read_bytes())["model"]["config"]


def three_digits(size_bytes: int) -> str:
    """Return how many gigabytes a size is, with three digits."""
    return f"{float(f'{size_bytes / 1e9:.3g}'):.{2 if size_bytes < 9_995_000_000 else 1}f}"


def gb(size_bytes: int) -> str:
    return str((Decimal(size_bytes) / 10**9).quantize(Decimal("0.01"), ROUND_HALF_EVEN))


@pytest.fixture(scope="module")
def plan() -> BuildPlan:
    """The plan of a large recipe, with another value for every figure of memory and disk."""
    plan = make_plan(RecipeFile.load(LARGE))
    assert plan.memory is not None
    sweeps = [
        replace(sweep, device_bytes=10_110_000_000 * (index + 1), host_bytes=3_330_000_000 * (index + 1))
        for index, sweep in enumerate((plan.memory.fastest, plan.memory.full_speed, plan.memory.least, plan.memory.cpu))
    ]
    memory = MemoryPlan(fastest=sweeps[0], full_speed=sweeps[1], least=sweeps[2], cpu=sweeps[3])
    disk = DiskPlan(source_bytes=26_110_000_000, builds_bytes=31_220_000_000, publish_bytes=1_330_000_000)
    evaluation = EvaluationPlan(
        gpu=EvaluationMemory(device_bytes=5_550_000_000, host_bytes=7_770_000_000),
        cpu=EvaluationMemory(device_bytes=8_880_000_000, host_bytes=0),
    )
    variants = tuple(
        replace(planned, weights_bytes=planned.weights_bytes + 1_110_000_000 * (index + 1))
        for index, planned in enumerate(plan.variants)
    )
    return replace(plan, variants=variants, memory=memory, disk=disk, evaluation=evaluation)


@pytest.fixture(scope="module")
def lines(plan: BuildPlan) -> list[str]:
    return printed(plan)


def printed(plan: BuildPlan, *, width: int = 200) -> list[str]:
    stream = io.StringIO()
    print_build_plan(plan, Console(file=stream, width=width))
    return [" ".join(line.split()) for line in stream.getvalue().splitlines()]


def with_verdicts(plan: BuildPlan, answers: Mapping[str, Sequence[tuple[bool, str]]]) -> BuildPlan:
    """Return a plan with other verdicts: per runtime the answer and its reason for each variant."""
    variants = [
        replace(
            planned,
            verdicts=tuple(
                Verdict(loader=name, can_load=given[index][0], reason=given[index][1])
                for name, given in answers.items()
            ),
        )
        for index, planned in enumerate(plan.variants)
    ]
    return replace(plan, variants=tuple(variants))


def test_the_first_line_counts_parameters_and_tokens(lines: list[str]) -> None:
    vocab, hidden, inner, blocks = (
        CONFIG[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    )
    parameters = 2 * vocab * hidden + blocks * (4 * hidden**2 + 3 * hidden * inner + 2 * hidden) + hidden
    assert f"{parameters:,} parameters in F16, {blocks} blocks, calibrated on {128 * 2048:,} tokens" in lines[0]


def test_the_sources_of_calibration_and_evaluation_are_listed(plan: BuildPlan, lines: list[str]) -> None:
    wikitext = "Salesforce/wikitext wikitext-2-raw-v1, split"
    rows, joined = "rows of 2048 tokens, seed 0, from", "at b08601e04326 (joined documents)"
    assert f"Calibration: 128 {rows} {wikitext} train, {joined}" in lines
    assert f"Evaluation: 64 {rows} {wikitext} test, {joined}" in lines
    written = build_plan_json(plan)
    texts: Any = written["texts"]
    assert written["drawing_version"] == DRAWING_VERSION
    assert [(text["purpose"], text["num_rows"]) for text in texts] == [("calibration", 128), ("evaluation", 64)]
    assert texts[0] == {
        "purpose": "calibration",
        "dataset": "Salesforce/wikitext",
        "config": "wikitext-2-raw-v1",
        "revision": "b08601e04326c79dfdd32d625aee71d232d685c3",
        "split": "train",
        "column": "text",
        "documents": "joined",
        "num_rows": 128,
        "seq_len": 2048,
        "seed": 0,
    }


def test_several_sources_are_listed_with_weight_and_rows(tmp_path: Path) -> None:
    sources = [
        {"path": "calibration.txt", "weight": 3},
        {"path": "chats.jsonl", "messages_field": "messages"},
        {"path": "pages.jsonl", "documents": "separate", "text_field": "page", "weight": 2},
    ]
    for name in ("chats.jsonl", "pages.jsonl"):
        (tmp_path / name).write_text("{}\n")
    calibration = {"sources": sources, "num_samples": 18, "seq_len": 32, "seed": 5}
    evaluation = {"evaluation.num_tokens": 64, "evaluation.seq_len": 64, "evaluation.seed": 6}
    plan = make_plan(RecipeFile.load(write_all(tmp_path, {"calibration": calibration, **evaluation})))
    assert printed(plan)[1:5] == [
        "Calibration: 9 rows of 32 tokens, seed 5, from calibration.txt (joined documents, weight 3)",
        "Calibration: 3 rows of 32 tokens, seed 5, from chats.jsonl (conversations, column messages, weight 1)",
        "Calibration: 6 rows of 32 tokens, seed 5, from pages.jsonl (separate documents, column page, weight 2)",
        "Evaluation: 1 row of 64 tokens, seed 6, from evaluation.txt (joined documents)",
    ]
    texts: Any = build_plan_json(plan)["texts"]
    assert [(text["path"], text.get("weight"), text["column"], text["num_rows"]) for text in texts] == [
        ("calibration.txt", 3, "text", 9), ("chats.jsonl", 1, "messages", 3), ("pages.jsonl", 2, "page", 6),
        ("evaluation.txt", None, "text", 1),
    ]  # fmt: skip
    assert [(text["documents"], text["seed"]) for text in texts] == [
        ("joined", 5), ("conversations", 5), ("separate", 5), ("joined", 6),
    ]  # fmt: skip


def test_the_table_of_branches(plan: BuildPlan, lines: list[str]) -> None:
    heads = 2 * CONFIG["num_hidden_layers"] * CONFIG["hidden_size"]  # keys and values; every head has its own
    for planned in plan.variants:
        variant = planned.variant
        to_run = planned.tensor_bytes + heads * 4096 * 2
        size = planned.weights_bytes
        row = [variant.branch, variant.bits, variant.group_size, variant.act_order, three_digits(size), f"{size:,}"]
        row.append(three_digits(to_run))
        assert " ".join(map(str, row)) in lines
    assert "Branch Bits size order GB Bytes GB" in lines
    assert "To run: weights and 3.36 GB, what is cached of 4096 tokens; nothing else." in lines


def test_windows_are_counted_and_an_older_lock_is_named(plan: BuildPlan) -> None:
    """Of 40 layers 30 keep the last 1023 tokens only."""
    layer = 2 * 2 * CONFIG["hidden_size"]
    cache = LockedCache(windows=(LockedWindow(tokens=1023, bytes_per_token=30 * layer),), state_bytes=5_000_000)
    windowed = replace(plan, architecture=replace(plan.architecture, kv_cache=cache))
    expected = layer * (10 * 4096 + 30 * 1023) + 5_000_000
    values = build_plan_json(windowed)
    assert (values["context_bytes"], values["context_is_exact"]) == (expected, True)
    assert windowed.run_bytes(plan.variants[0]) == plan.variants[0].tensor_bytes + expected
    assert f"To run: weights and {gb(expected)} GB, what is cached of 4096 tokens; nothing else." in printed(windowed)
    assert "which layers cache" not in " ".join(printed(windowed))
    older = replace(plan, architecture=replace(plan.architecture, kv_cache=None))
    values = build_plan_json(older)
    assert (values["context_bytes"], values["context_is_exact"]) == (layer * 40 * 4096, False)
    assert "note: the lock is of an older release" in " ".join(printed(older))
    assert "make it anew: packager lock RECIPE" in " ".join(printed(older))


def test_what_the_least_memory_costs_is_what_the_plan_does_and_no_factor(plan: BuildPlan) -> None:
    planned = plan.memory
    assert planned is not None
    least, fastest = planned.least, planned.fastest

    def row(fastest: SweepPlan = fastest, **changes: Any) -> str:
        memory = replace(planned, fastest=fastest, least=replace(least, **changes))
        (found,) = [line for line in printed(replace(plan, memory=memory)) if line.startswith("30.33 least")]
        return found.removeprefix("30.33 least").removesuffix(", with 9.99 GB of host memory")

    usual: dict[str, Any] = {"suspended_batches": 16, "weights": "device", "placement": "host"}
    assert row(**usual) == ""
    assert row(**usual | {"suspended_batches": 4}) == ", slower (12 of 16 batches run again for each group of linears)"
    assert row(**usual | {"placement": "disk"}) == ", slower (activations are on disk)"
    none_suspended = replace(fastest, suspended_batches=0)  # as without true_sequential
    assert row(none_suspended, **usual | {"suspended_batches": 0}) == ""


def test_the_table_of_needs(lines: list[str]) -> None:
    rows = lines[lines.index("What a build needs") + 3 :]
    assert rows == [
        "GPU memory 10.11 everything on the GPU (estimated, without the CUDA context)",
        "20.22 as fast, with 6.66 GB of host memory",
        "30.33 least, slower (16 of 16 batches run again for each group of linears, weights wait on the host), "
        "with 9.99 GB of host memory",
        "host memory 40.44 without a GPU",
        "GPU memory 5.55 measuring quality, with 7.77 GB of host memory",
        "host memory 8.88 measuring quality without a GPU",
        "disk 58.66 everything below",
        "26.11 download of the base model",
        "31.22 checkpoint folders, finished blocks included",
        "1.33 a local publishing target",
    ]


def test_json_has_the_same_figures_in_bytes(plan: BuildPlan) -> None:
    values = json.loads(json.dumps(build_plan_json(plan)))
    assert values["memory"]["least"]["host_bytes"] == 9_990_000_000
    assert values["memory"]["cpu"]["device_bytes"] == 40_440_000_000
    assert values["evaluation_memory"] == {
        "gpu": {"device_bytes": 5_550_000_000, "host_bytes": 7_770_000_000},
        "cpu": {"device_bytes": 8_880_000_000, "host_bytes": 0},
    }
    assert values["disk"] == {
        "source_bytes": 26_110_000_000,
        "builds_bytes": 31_220_000_000,
        "publish_bytes": 1_330_000_000,
        "losses_bytes": 0,
        "total_bytes": 58_660_000_000,
    }
    assert values["base_model"] == {
        "id": "meta-llama/Llama-2-13b-chat-hf",
        "revision": "a2cb7a712bb6e5e736ca7f8cd98167f81a0b5bd8",
        "model_type": "llama",
        "dtype": "F16",
        "num_parameters": 13_015_864_320,
        "num_blocks": 40,
        "not_quantized": {},
        "changes": [],
        "size_bytes": 2 * 13_015_864_320,
    }
    assert (values["calibration_tokens"], values["context_tokens"]) == (128 * 2048, 4096)
    assert values["context_is_exact"] is True
    assert (values["recipe_digest"], values["repository"]) == (plan.recipe.digest(), plan.recipe.repository.id)
    for entry, planned in zip(values["variants"], plan.variants, strict=True):
        assert entry["files"] == {shard.file_name: shard.size_bytes for shard in planned.shards}
        assert (entry["branch"], entry["digest"]) == (planned.variant.branch, planned.digest)
        assert (entry["weights_bytes"], entry["tensor_bytes"]) == (planned.weights_bytes, planned.tensor_bytes)
        assert entry["description"] == planned.description
        assert entry["loaders"] == [
            {"loader": verdict.loader, "status": verdict.status, "can_load": verdict.can_load, "reason": verdict.reason}
            for verdict in planned.verdicts
        ]
        assert entry["parameters"] == planned.variant.parameters()
        assert entry["run_bytes"] - entry["tensor_bytes"] == values["context_bytes"] == 40 * 5120 * 2 * 2 * 4096
        assert entry["parameters"]["group_size"] == planned.variant.group_size


def test_json_of_variants_differs(plan: BuildPlan) -> None:
    """The test above can only find the values of another variant where they differ."""
    for key in ("branch", "digest", "weights_bytes", "description", "parameters", "loaders"):
        values = [json.dumps(entry[key]) for entry in json.loads(json.dumps(build_plan_json(plan)))["variants"]]
        assert len(set(values)) == (3 if key == "loaders" else 4), key


def test_a_plan_without_our_engine_has_no_memory_of_it(plan: BuildPlan) -> None:
    without = replace(plan, memory=None)
    assert build_plan_json(without)["memory"] is None
    rows = printed(without)
    assert rows[rows.index("What a build needs") + 3] == (
        "GPU memory 5.55 measuring quality, with 7.77 GB of host memory"
    )


def test_every_answer_of_a_runtime_stands_in_its_row_and_column(plan: BuildPlan) -> None:
    """Each runtime refuses another set of branches: the binary digits of its number."""
    answers = {
        name: [(bool(number >> index & 1), "") for index in range(4)] for number, name in enumerate(RUNTIMES, start=1)
    }
    assert len({tuple(given) for given in answers.values()}) == len(RUNTIMES)
    judged = with_verdicts(plan, answers)
    rows = printed(judged)
    narrow = printed(judged, width=80)
    for index, planned in enumerate(plan.variants):
        words = ["yes" if given[index][0] else "no" for given in answers.values()]
        assert f"{planned.variant.branch} {' '.join(words)}" in rows
        labels = {
            can_load: ", ".join(RUNTIMES[name].label for name, given in answers.items() if given[index][0] is can_load)
            for can_load in (True, False)
        }
        assert f"{planned.variant.branch}: loaded by {labels[True]}; refused by {labels[False]}" in narrow


def test_who_refuses_nothing_and_what_nothing_loads(plan: BuildPlan) -> None:
    every = {name: [(True, ""), (False, ""), (True, ""), (True, "")] for name in RUNTIMES}
    labels = ", ".join(runtime.label for runtime in RUNTIMES.values())
    narrow = printed(with_verdicts(plan, every), width=80)
    names = [planned.variant.branch for planned in plan.variants]
    assert f"{names[0]}: loaded by {labels}" in narrow
    assert f"{names[1]}: loaded by nothing; refused by {labels}" in narrow


def test_a_reason_names_its_branches_unless_it_holds_for_all(plan: BuildPlan) -> None:
    note, refusal = (True, "needs CUDA"), (False, "reads 4 bits only")
    judged = with_verdicts(
        plan, {"tgi": [note] * 4, "vllm": [note, refusal, (True, ""), refusal], "sglang": [refusal] * 4}
    )
    first, second, _, fourth = (planned.variant.branch for planned in plan.variants)
    rows = printed(judged)
    assert [row for row in rows if row.startswith(("no: ", "note: "))] == [
        "no: SGLang 0.5: reads 4 bits only",
        f"no: vLLM 0.32 for {second}, {fourth}: reads 4 bits only",
        "note: TGI: needs CUDA",
        f"note: vLLM 0.32 for {first}: needs CUDA",
    ]


def test_the_line_of_weights_files(plan: BuildPlan, lines: list[str]) -> None:
    assert not [line for line in lines if line.startswith("Weights files")]
    counts = (1, 2, 1, 1)
    variants = tuple(
        replace(planned, shards=planned.shards * count) for planned, count in zip(plan.variants, counts, strict=True)
    )
    expected = ", ".join(f"{planned.variant.branch} {count}" for planned, count in zip(variants, counts, strict=True))
    assert f"Weights files: {expected}." in printed(replace(plan, variants=variants))


def test_what_engine_auto_gptq_makes_and_needs(plan: BuildPlan, lines: list[str]) -> None:
    assert not [line for line in lines if "auto-gptq" in line or "engine native" in line or "Engine" in line]
    variants = tuple(
        replace(planned, variant=replace(planned.variant, engine="auto-gptq")) if index in (1, 3) else planned
        for index, planned in enumerate(plan.variants)
    )
    rows = printed(replace(plan, variants=variants))
    for index, planned in enumerate(variants):
        (row,) = [row for row in rows if f" {planned.weights_bytes:,} " in row]
        assert row.split()[-1] == ("auto-gptq" if index in (1, 3) else "native")
    (note,) = [row for row in rows if row.startswith("note: engine auto-gptq")]
    assert f"makes {variants[1].variant.branch}, {variants[3].variant.branch} one after the other" in note
    assert f"(up to {gb(2 * 2 * 13_015_864_320)} GB while it is read)" in note
    assert sum("engine native, " in row for row in rows) == 4


def test_a_plan_without_loaders_states_that_nothing_is_proven(plan: BuildPlan) -> None:
    for required, if_available, expected in (((), (), 1), (("transformers",), (), 0), ((), ("transformers",), 0)):
        loaders = plan.recipe.loaders.model_copy(update={"required": required, "if_available": if_available})
        changed = replace(plan, recipe=plan.recipe.model_copy(update={"loaders": loaders}))
        assert sum("no variant will be proven" in line for line in printed(changed)) == expected
