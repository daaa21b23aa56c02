"""Mixtures of experts from the recipe to the branch: lock, plan, skipping, receipt, card, config.json, audit."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from packager.cli.main import app
from packager.errors import PackagerError, RecipeError
from packager.model.describe import describe
from packager.model.safetensors_file import stored_tensors
from packager.pipeline.plan import make_plan
from packager.prove.audit import audit
from packager.recipe.file import RecipeFile
from packager.recipe.lock_file import lock_path, lock_text
from tests.locks import read_lock_of
from tests.tiny_recipe import build, workspace, write_all, write_inputs, write_recipe

pytestmark = pytest.mark.usefixtures("in_process")

EXPERTS, TOP_K, CALIBRATED = 6, 2, 12 * 32  # of tests/tiny_models.py and tests/tiny_recipe.py
ONE = {"variants": [{"branch": "main"}]}


def merge_experts(model: Path) -> None:
    """Store the experts of each layer as one tensor, as Qwen3.5 and Gemma 4 are published."""
    tensors = load_file(model / "model.safetensors")
    for block in (1, 2):
        name = f"model.layers.{block}.mlp.experts"
        for merged, parts in (("gate_up_proj", ("gate_proj", "up_proj")), ("down_proj", ("down_proj",))):
            of_experts = [
                torch.cat([tensors.pop(f"{name}.{expert}.{part}.weight") for part in parts])
                for expert in range(EXPERTS)
            ]
            tensors[f"{name}.{merged}"] = torch.stack(of_experts)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("merged"), name="qwen3-moe")
    merge_experts(folder / "model")
    write_merged(folder, ONE)
    return folder


def write_merged(folder: Path, changes: Mapping[str, Any], name: str = "recipe.yaml") -> Path:
    """Write a recipe with the lock of the files, which are not those that transformers would store."""
    path = write_recipe(folder, changes, name=name)
    stored = stored_tensors(folder / "model" / "model.safetensors")
    model = describe(folder / "model", {name: tensor.info for name, tensor in stored.items()})
    lock_path(path).write_text(lock_text(read_lock_of(path).model_copy(update={"model": model})))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_all(tmp_path_factory.mktemp("recipe"), ONE, name="qwen3-moe").parent


def names_of(architecture_modules: list[str]) -> list[str]:
    return [f"mlp.experts.{expert}.{name}" for expert in range(EXPERTS) for name in architecture_modules]


def test_the_lock_and_the_plan_name_every_expert(folder: Path) -> None:
    architecture = RecipeFile.load(folder / "recipe.yaml").architecture
    dense, mixed = architecture.kinds
    assert (dense.blocks, mixed.blocks) == ((0,), (1, 2))
    assert [group.modules for group in dense.groups][-1] == ("mlp.down_proj",)
    first, down = mixed.groups[-2:]
    assert list(first.modules) == names_of(["gate_proj", "up_proj"])
    assert list(down.modules) == names_of(["down_proj"])
    assert first.experts is not None
    assert (first.experts.parameter, first.experts.count, first.experts.top_k) == ("mlp.experts.gate_up_proj", 6, 2)
    assert mixed.left == {"mlp.gate": "it routes tokens to experts"}
    names = [linear.name for linear in architecture.linears]
    assert names.count("model.layers.2.mlp.experts.5.down_proj") == 1
    assert not any(name.startswith("model.layers.0.mlp.experts") for name in names)


@pytest.mark.slow
def test_packager_lock_counts_experts(folder: Path) -> None:
    recipe = str(folder / "recipe.yaml")
    assert CliRunner().invoke(app, ["lock", recipe]).exit_code == 0
    done = CliRunner().invoke(app, ["lock", recipe, "--check"])
    assert done.exit_code == 0, done.output
    assert "gate_proj, up_proj of 6 experts" in done.output
    assert "down_proj of 6 experts" in done.output


@pytest.mark.parametrize("pattern", ["mlp.experts", "*.experts.*", "*.experts"])
def test_experts_are_skipped_together(folder: Path, pattern: str) -> None:
    path = write_recipe(folder, {**ONE, "quantize.skip": [pattern]}, name="skip.yaml")
    architecture = RecipeFile.load(path).architecture
    assert architecture.left["mlp.experts"] == f"the recipe skips {pattern}"
    assert not any(".experts." in linear.name for linear in architecture.linears)
    planned = {tensor.name for shard in make_plan(RecipeFile.load(path)).variants[0].shards for tensor in shard.tensors}
    assert "model.layers.1.mlp.experts.3.up_proj.weight" in planned
    assert "model.layers.1.self_attn.q_proj.qweight" in planned


@pytest.mark.parametrize("pattern", ["*.experts.3.*", "*.gate_proj", "mlp.experts.*.down_proj"])
def test_some_of_the_experts_cannot_be_skipped(folder: Path, pattern: str) -> None:
    path = write_recipe(folder, {**ONE, "quantize.skip": [pattern]}, name="some.yaml")
    with pytest.raises(RecipeError) as caught:
        RecipeFile.load(path)
    (problem,) = caught.value.problems
    assert "of the 18 linears of mlp.experts" in problem.message
    assert "write mlp.experts" in problem.hint


def test_experts_stored_as_one_tensor_get_the_names_of_a_branch(folder: Path, merged: Path) -> None:
    """The names of linears, and the bytes, are those of the same model with a tensor for each linear."""
    alone, together = (RecipeFile.load(each / "recipe.yaml").architecture for each in (folder, merged))
    assert together.linears == alone.linears
    assert together.tensors == alone.tensors
    assert len(together.base_tree) == len(alone.base_tree) - 2 * 3 * EXPERTS + 2 * 2
    assert "model.layers.1.mlp.experts.gate_up_proj" in together.base_tree
    plans = [make_plan(RecipeFile.load(each / "recipe.yaml")).variants[0] for each in (folder, merged)]
    assert plans[0].shards == plans[1].shards


@pytest.mark.slow
def test_a_branch_does_not_depend_on_how_the_base_model_stores_its_experts(
    folder: Path, merged: Path, tmp_path: Path
) -> None:
    weights, qualities = [], []
    for number, recipe in enumerate((folder, merged)):
        (receipt,) = build(RecipeFile.load(recipe / "recipe.yaml"), tmp_path / str(number)).receipts
        branch = workspace(tmp_path / str(number)).folder("main")
        weights.append((branch / "model.safetensors").read_bytes())
        qualities.append(receipt.provenance.quality)
        report = audit(branch)
        assert not report.errors, report.errors
    assert weights[0] == weights[1]
    assert qualities[0] == qualities[1]


def test_experts_that_are_skipped_stay_one_tensor(merged: Path) -> None:
    path = write_merged(merged, {**ONE, "quantize.skip": ["mlp.experts"]}, name="skip.yaml")
    architecture = RecipeFile.load(path).architecture
    assert architecture.tensors == tuple(architecture.base_tree)
    planned = {tensor.name for shard in make_plan(RecipeFile.load(path)).variants[0].shards for tensor in shard.tensors}
    assert "model.layers.1.mlp.experts.down_proj" in planned
    assert "model.layers.1.self_attn.q_proj.qweight" in planned


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stored": "model.layers.{block}.mlp.experts.none"}, "model.layers.1.mlp.experts.none is no tensor of three"),
        ({"count": 5}, "does not hold 5 experts of mlp.experts.{expert}.gate_proj and no more"),
    ],
    ids=["another name", "fewer experts"],
)
def test_a_lock_whose_experts_contradict_its_tensors_is_refused(
    merged: Path, change: dict[str, object], message: str
) -> None:
    path = write_merged(merged, ONE, name="wrong.yaml")
    lock_file = lock_path(path)
    lock = json.loads(lock_file.read_text())
    first = next(group for kind in lock["model"]["kinds"] for group in kind["groups"] if group.get("experts"))
    first["experts"] |= change
    lock_file.write_text(json.dumps(lock))
    with pytest.raises(PackagerError) as caught:
        RecipeFile.load(path)
    assert message in str(caught.value)


@pytest.mark.slow
def test_a_branch_with_experts_says_so_wherever_it_is_read(folder: Path, tmp_path: Path) -> None:
    recipe = RecipeFile.load(folder / "recipe.yaml")
    (receipt,) = build(recipe, tmp_path / "dist").receipts
    branch = workspace(tmp_path / "dist").folder("main")
    linears = json.loads((branch / "provenance.json").read_text())["linears"]
    assert [linear["name"] for linear in linears] == [linear.name for linear in recipe.architecture.linears]
    of_experts = [linear for linear in linears if ".experts." in linear["name"]]
    assert len(of_experts) == 2 * 3 * EXPERTS
    assert all("tokens" not in linear for linear in linears if linear not in of_experts)
    for linear in of_experts:
        columns = 32 if linear["name"].endswith("down_proj") else 64
        assert linear["rho"] == pytest.approx(columns / (columns + linear["tokens"]))
    for block in (1, 2):
        for name in ("gate_proj", "up_proj", "down_proj"):
            seen = [
                linear["tokens"]
                for linear in of_experts
                if linear["name"].startswith(f"model.layers.{block}.") and linear["name"].endswith(name)
            ]
            assert sum(seen) == CALIBRATED * TOP_K
    card = (branch / "README.md").read_text()
    assert "* Experts: each of the 36 linears of experts saw " in card
    section = json.loads((branch / "config.json").read_text())["quantization_config"]
    assert list(section["dynamic"]) == [r"-:^model\.layers\.(?:1|2)\.mlp\.gate$"]
    planned = {tensor.name: tensor for shard in make_plan(recipe).variants[0].shards for tensor in shard.tensors}
    stored = stored_tensors(branch / "model.safetensors")
    assert {name: tensor.info for name, tensor in stored.items()} == planned
    report = audit(branch)
    assert not report.errors, report.errors
    assert receipt.provenance.quality is not None
    assert receipt.provenance.quality.kl_divergence < 0.5
