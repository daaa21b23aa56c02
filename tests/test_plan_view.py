"""Every figure of `packager plan`, computed again from the plan and the model's config.json."""

import io
import json
from dataclasses import replace
from decimal import ROUND_HALF_EVEN, Decimal

import pytest
from rich.console import Console

from packager.cli.plan_view import build_plan_json, print_build_plan
from packager.pipeline.plan import BuildPlan, DiskPlan, EvaluationPlan, MemoryPlan, make_plan
from packager.prove.evaluation_memory import EvaluationMemory
from packager.recipe.file import RecipeFile
from tests.test_house_rules import ROOT

LARGE = ROOT / "recipes" / "llama-2-13b-chat.yaml"
CONFIG = json.loads((ROOT / "recipes" / "assets" / "llama-2-13b-chat" / "config.json").read_bytes())


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
    return replace(plan, memory=memory, disk=disk, evaluation=evaluation)


@pytest.fixture(scope="module")
def lines(plan: BuildPlan) -> list[str]:
    stream = io.StringIO()
    print_build_plan(plan, Console(file=stream, width=200))
    return [" ".join(line.split()) for line in stream.getvalue().splitlines()]


def test_the_first_line_counts_parameters_and_tokens(lines: list[str]) -> None:
    vocab, hidden, inner, blocks = (
        CONFIG[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    )
    parameters = 2 * vocab * hidden + blocks * (4 * hidden**2 + 3 * hidden * inner + 2 * hidden) + hidden
    assert f"{parameters:,} parameters in F16, {blocks} blocks, calibrated on {128 * 2048:,} tokens" in lines[0]


def test_the_table_of_branches(plan: BuildPlan, lines: list[str]) -> None:
    heads = 2 * CONFIG["num_hidden_layers"] * CONFIG["hidden_size"]  # keys and values; every head has its own
    for planned in plan.variants:
        variant = planned.variant
        to_run = planned.tensor_bytes + heads * 4096 * 2
        size = sum(shard.size_bytes for shard in planned.shards)
        row = [variant.branch, variant.bits, variant.group_size, variant.desc_act, gb(size), f"{size:,}", gb(to_run)]
        assert " ".join(map(str, row)) in lines
    assert "To run: weights and the keys and values of 4096 tokens, nothing else." in lines


def test_the_table_of_needs(lines: list[str]) -> None:
    rows = lines[lines.index("What a build needs") + 3 :]
    assert rows == [
        "GPU memory 10.11 everything on the GPU (estimated, without the CUDA context)",
        "20.22 as fast, with 6.66 GB of host memory",
        "30.33 least, up to twice as long, with 9.99 GB of host memory",
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
        "total_bytes": 58_660_000_000,
    }
    for entry, planned in zip(values["variants"], plan.variants, strict=True):
        assert sum(entry["files"].values()) == entry["weights_bytes"]
        assert entry["run_bytes"] - entry["tensor_bytes"] == 40 * 5120 * 2 * 2 * 4096
        assert entry["parameters"]["group_size"] == planned.variant.group_size
