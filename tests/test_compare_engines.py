"""benchmarks/compare_engines.py: both engines on the same rows, side by side; a fake engine replaces AutoGPTQ."""

import importlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from packager.quantize.engines import auto_gptq
from packager.recipe.file import RecipeFile
from tests import tiny_recipe
from tests.fake_engine import FAKE_SCRIPT, Bench

pytestmark = pytest.mark.slow

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def module() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield importlib.import_module("compare_engines")


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    changes = {
        "variants": [
            {"branch": "main", "scale_search": True},
            {"group_size": 16, "act_order": "none", "damp_percent_limit": 0.2},
        ]
    }
    return tiny_recipe.write_all(tmp_path / "recipe", changes)


def test_both_engines_get_the_same_parameters_and_rows(module: Any, recipe: Path) -> None:
    both = module.with_both_engines(RecipeFile.load(recipe).recipe, 7)
    assert both.calibration.seed == 7
    variants = both.expanded_variants()
    assert [variant.branch for variant in variants] == [
        "main", "gptq-4bit-16g-actorder_False", "main.auto-gptq", "gptq-4bit-16g-actorder_False.auto-gptq",
    ]  # fmt: skip
    for native, reference in zip(variants[:2], variants[2:], strict=True):
        assert replace(native, branch="", engine="auto-gptq") == replace(reference, branch="")
        assert native.scale_search is False


def test_the_table_has_losses_and_quality_of_both_engines(
    module: Any, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    bench = Bench(tmp_path / "bench", monkeypatch)
    (bench.folder / "fake.py").write_text(FAKE_SCRIPT.format(behaviour="", seen=str(tmp_path / "seen.json")))
    spec = replace(auto_gptq.SPEC, script=bench.folder / "fake.py")
    monkeypatch.setattr(auto_gptq.AutoGptq.__init__, "__defaults__", (spec, 60.0))
    monkeypatch.setattr("packager.quantize.engines.needs_cuda", lambda _: False)
    paths = [f"--work={tmp_path / 'work'}", f"--json={tmp_path / 'out.json'}", f"--cache={tmp_path}"]
    assert module.main([str(recipe), "--seeds=0,3", "--device=cpu", *paths]) == 0
    pairs = json.loads((tmp_path / "out.json").read_text())["pairs"]
    assert [(pair["branch"], pair["seed"]) for pair in pairs] == [
        (branch, seed) for seed in (0, 3) for branch in ("main", "gptq-4bit-16g-actorder_False")
    ]
    for pair in pairs:
        ratio = pair["loss_ratio_auto_gptq_to_native"]
        assert 0 < ratio["min"] <= ratio["median"] <= ratio["max"]
        assert ratio["linears"] == 3 * 7
        assert ratio["max_linear"].startswith("model.layers.")
        assert pair["auto-gptq"]["made_with"] == "AutoGPTQ 0.7.1"
        assert pair["auto-gptq"]["quality"]["kl_divergence"] > pair["native"]["quality"]["kl_divergence"]
    assert pairs[0]["native"]["quality"] != pairs[2]["native"]["quality"]
    output = capsys.readouterr().out
    assert output.count("gptq-4bit-16g-actorder_False ") == 2


def test_without_cuda_the_error_names_the_missing_gpu(module: Any, recipe: Path, tmp_path: Path, capsys: Any) -> None:
    assert module.main([str(recipe), "--device=cpu", f"--work={tmp_path / 'work'}"]) == 12
    assert "engine auto-gptq needs a CUDA GPU" in capsys.readouterr().err
