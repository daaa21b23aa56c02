"""The stages of a build where no other test file covers them."""

import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from packager.pipeline import evaluate_stage, pack, quantize_stage, stage_keys
from packager.pipeline.plan import make_plan
from packager.prove import evaluate
from packager.quantize.engines import engine_named
from packager.receipt import EVALUATION_VERSION, QualityRecord
from packager.recipe.file import RecipeFile
from packager.system.host_memory import peak_memory_bytes
from tests import tiny_recipe


@pytest.mark.slow
def test_peak_memory_is_that_of_this_process() -> None:
    peak = peak_memory_bytes()
    block = bytearray(peak + 1_000_000)
    block[::4096] = b"x" * len(block[::4096])
    assert peak_memory_bytes() > peak > 10_000_000


def test_new_figures_are_measured_again_and_nothing_else_is_done_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe_file = RecipeFile.load(tiny_recipe.write_all(tmp_path))
    plan = make_plan(recipe_file).variants[0]
    before = stage_keys.stage_keys(recipe_file, plan)
    monkeypatch.setattr(stage_keys, "EVALUATION_VERSION", EVALUATION_VERSION + 1)
    after = stage_keys.stage_keys(recipe_file, plan)
    assert [stage for stage in before if before[stage] != after[stage]] == ["evaluate"]


def test_a_record_of_an_earlier_version_has_no_errors() -> None:
    known = {"num_tokens": 8, "perplexity": 2.0, "base_perplexity": 1.5, "kl_divergence": 0.1, "top1_agreement": 0.9}
    record = QualityRecord.model_validate(known)
    assert (record.errors, record.rows, record.kl_median, record.kl_p99) == (None, None, None, None)


class ThreadClock(threading.local):
    """A clock for each thread; it stands still unless a test moves it."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.slow
def test_a_receipt_has_the_seconds_of_its_own_variant_and_its_damping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, spent = ThreadClock(), dict(zip(tiny_recipe.BRANCHES, (10.0, 200.0, 3000.0), strict=True))
    for module in (quantize_stage, evaluate_stage):
        monkeypatch.setattr(module, "time", clock)
    pack_checkpoint, run_checkpoint = pack.pack_checkpoint, evaluate.run_checkpoint

    def slow_pack(job: pack.PackJob) -> object:
        clock.now += spent[job.variant.branch]
        return pack_checkpoint(job)

    def slow_run(folder: Path, *arguments: Any) -> object:
        clock.now += 2 * spent[folder.name]
        return run_checkpoint(folder, *arguments)

    damping = {"main": (0.02, 0.16, 0.04), tiny_recipe.ACT_ORDER: (0.01,), tiny_recipe.THREE_BITS: (0.08,)}

    def engine(*arguments: Any) -> object:
        """Return our engine, which seems to have needed more damping for some linears."""

        def quantize(job: Any, report: Any) -> object:
            made = engine_named(*arguments).quantize(job, report)
            records = {
                branch: tuple(
                    record.model_copy(update={"damp_percent": damping[branch][index]})
                    if index < len(damping[branch])
                    else record
                    for index, record in enumerate(found)
                )
                for branch, found in made.records.items()
            }
            return replace(made, records=records)

        return SimpleNamespace(quantize=quantize)

    monkeypatch.setattr(pack, "pack_checkpoint", slow_pack)
    monkeypatch.setattr(evaluate, "run_checkpoint", slow_run)
    monkeypatch.setattr(quantize_stage, "engine_named", engine)
    result = tiny_recipe.build(tiny_recipe.write_all(tmp_path), tmp_path / "dist")
    found = {receipt.provenance.branch: receipt for receipt in result.receipts}
    for branch, seconds in spent.items():
        assert found[branch].seconds["pack"] == pytest.approx(seconds)
        assert found[branch].seconds["evaluate"] == pytest.approx(2 * seconds)
    assert {branch: receipt.provenance.effective for branch, receipt in found.items()} == {
        "main": {"damp_percent_max": 0.16, "linears_damped_further": 3},
        tiny_recipe.ACT_ORDER: {"damp_percent_max": 0.01, "linears_damped_further": 0},
        tiny_recipe.THREE_BITS: {"damp_percent_max": 0.08, "linears_damped_further": 1},
    }
