"""The build from recipe to branches: what it makes, what it makes again, and that it makes the same bytes twice."""

import gc
import getpass
import hashlib
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from packager.errors import MachineError
from packager.model.packing import CheckpointReader
from packager.pipeline import evaluate_stage, flow
from packager.pipeline.build_state import BuildState
from packager.pipeline.flow import BuildResult
from packager.pipeline.plan import make_plan
from packager.prove import evaluate
from packager.prove.audit import audit
from packager.quantize import block as block_module
from packager.quantize.gptq.solve import Solution
from packager.recipe.file import RecipeFile
from packager.system.terminal import Terminal
from tests.publish_fixtures import trees
from tests.tiny_models import save_model
from tests.tiny_recipe import (
    BRANCHES,
    MAIN,
    RECIPE,
    THREE_BITS,
    Builds,
    build,
    built_files,
    hub_folder,
    leftovers,
    options,
    publish,
    sentences,
    workspace,
    write_all,
    write_inputs,
    write_recipe,
)

# Runs a command of packager in this process, and reports whether torch was imported.
WITHOUT_TORCH = """
import sys
from packager.cli.main import main
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {"torch", "transformers", "tokenizers", "matplotlib"} & sys.modules.keys()
assert not heavy, heavy
"""


@dataclass(frozen=True, kw_only=True)
class Scene:
    """A recipe folder and its output folder."""

    recipe: Path
    dist: Path

    @property
    def folder(self) -> Path:
        return self.recipe.parent

    def build(self, changes: Mapping[str, Any] | None = None) -> BuildResult:
        return build(write_recipe(self.folder, changes), self.dist)

    def files(self, branch: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(workspace(self.dist).folder(branch).iterdir())}


@pytest.fixture(scope="module")
def made(builds: Builds) -> Scene:
    """A recipe that was built and published; tests only read it."""
    folder = builds.built(published=True)
    return Scene(recipe=folder / "recipe.yaml", dist=folder / "dist")


@pytest.fixture
def scene(builds: Builds, tmp_path: Path) -> Scene:
    """A copy to change."""
    recipe = builds.copy(tmp_path / "recipe", published=True)
    return Scene(recipe=recipe, dist=recipe.parent / "dist")


def test_every_folder_passes_the_whole_audit(made: Scene) -> None:
    for branch in BRANCHES:
        report = audit(workspace(made.dist).folder(branch), complete=True)
        assert report.findings == ()
        assert report.facts.num_linears == 21


def test_predicted_sizes_are_the_real_ones(made: Scene) -> None:
    for plan in make_plan(RecipeFile.load(made.recipe)).variants:
        folder = workspace(made.dist).folder(plan.variant.branch)
        (shard,) = plan.shards
        assert (folder / shard.file_name).stat().st_size == shard.size_bytes == plan.weights_bytes


def test_a_build_leaves_no_work_files(made: Scene) -> None:
    assert leftovers(made.dist) == []
    assert not workspace(made.dist).work.exists()
    assert not list(made.dist.rglob("unfinished/*"))


@pytest.mark.parametrize("branch", BRANCHES)
def test_receipts_record_the_inputs_the_stages_and_the_figures(made: Scene, branch: str) -> None:
    receipt = workspace(made.dist).read_receipt(branch)
    assert receipt is not None
    provenance, files = receipt.provenance, made.files(branch)
    assert set(receipt.stages) == {"quantize", "weights", "evaluate", "verify", "picture"}
    assert set(receipt.seconds) == {"quantize", "pack", "evaluate", "verify"}
    assert {name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in files.items()} == {
        name: (record.size_bytes, record.sha256) for name, record in provenance.files.items()
    }
    base = made.folder / "model"
    assert {name: record.sha256 for name, record in provenance.base_model.files.items()} == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in base.iterdir()
    }
    assert len(provenance.linears) == 21
    assert all(record.loss > 0 and record.damp_percent == 0.01 for record in provenance.linears)
    assert provenance.versions["torch"] == importlib.metadata.version("torch")
    assert provenance.calibration.num_samples == 12
    quality = provenance.quality
    assert quality is not None
    assert quality.num_tokens == 8 * 31
    assert quality.questions == 2
    assert quality.kl_divergence > 0


def test_provenance_is_the_receipt_without_itself_and_without_this_machine(made: Scene) -> None:
    for branch in BRANCHES:
        text = made.files(branch)["provenance.json"].decode()
        receipt = workspace(made.dist).read_receipt(branch)
        assert receipt is not None
        recorded = receipt.provenance.model_dump(mode="json")
        del recorded["files"]["provenance.json"]
        assert json.loads(text) == recorded
        for private in (str(made.dist.parent), getpass.getuser(), platform.node()):
            assert private not in text
        assert not re.search(r"\d{4}-\d\d-\d\d|\d\d:\d\d:\d\d", text)


def test_losses_fall_with_more_bits(made: Scene) -> None:
    losses = {}
    for branch in (MAIN, THREE_BITS):
        receipt = workspace(made.dist).read_receipt(branch)
        assert receipt is not None
        losses[branch] = sum(record.loss for record in receipt.provenance.linears)
    assert losses[MAIN] < losses[THREE_BITS]


@pytest.mark.pinned
@pytest.mark.slow
def test_a_second_build_does_nothing_and_needs_no_torch(scene: Scene) -> None:
    before = {path: path.stat().st_mtime_ns for path in sorted(scene.dist.rglob("*")) if path.is_file()}
    command = [sys.executable, "-W", "error", "-c", WITHOUT_TORCH]
    for arguments in (["build"], ["card"], ["publish"], ["status"]):
        result = subprocess.run(
            [*command, *arguments, str(scene.recipe), "--dist", str(scene.dist)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        if arguments == ["build"]:
            assert "nothing to do" in result.stderr
    after = {path: path.stat().st_mtime_ns for path in sorted(scene.dist.rglob("*")) if path.is_file()}
    assert {path for path in before if before[path] != after.get(path) and path.suffix != ".lock"} == set()
    assert after.keys() == before.keys()


EVERY, NONE = BRANCHES, ()
CHANGES: dict[str, tuple[Mapping[str, Any], tuple[tuple[str, ...], ...]]] = {
    "card": ({"card.title": "Another"}, (NONE, NONE, NONE)),
    "description": ({"variants": [RECIPE["variants"][0] | {"description": "x"}, *RECIPE["variants"][1:]]}, (NONE,) * 3),
    "prompts": ({"loaders.prompts": ["seven"]}, (NONE, NONE, EVERY)),
    "evaluation": ({"evaluation.num_tokens": 128}, (NONE, EVERY, EVERY)),
    "one variant": (
        {"variants": [*RECIPE["variants"][:2], RECIPE["variants"][2] | {"damp_percent": 0.02}]},
        ((THREE_BITS,), (THREE_BITS,), EVERY),
    ),
    "order of variants": ({"variants": RECIPE["variants"][::-1]}, (NONE, NONE, NONE)),
    "seed": ({"calibration.seed": 1}, (EVERY, EVERY, EVERY)),
    "weights name": ({"checkpoint.weights_name": "gptq_model"}, (NONE, NONE, EVERY)),
    "size of the weights files": ({"checkpoint.max_shard_bytes": 1_000_000}, (NONE, NONE, EVERY)),
    "license file's name": ({"card.license.files": ["calibration.txt"]}, (NONE, NONE, NONE)),
    "license of the base": ({"card.license.files": [], "card.license.base_files": ["config.json.md"]}, (NONE,) * 3),
}


def assert_remade(scene: Scene, result: BuildResult, expected: tuple[tuple[str, ...], ...], fresh: Path) -> None:
    """Check which branches each stage took, and that the files are those of a build from nothing."""
    assert tuple(map(set, (result.quantized, result.measured, result.verified))) == tuple(map(set, expected))
    build(scene.recipe, fresh)
    assert built_files(scene.dist) == built_files(fresh)
    assert leftovers(scene.dist) == []


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_recipe_repeats_the_affected_stages_only(scene: Scene, tmp_path: Path, change: str) -> None:
    changes, expected = CHANGES[change]
    if change == "license of the base":
        (scene.folder / "model" / "config.json.md").write_text("The base model's licence.\n")
        scene.build()
    result = scene.build(changes)
    assert_remade(scene, result, expected, tmp_path / "fresh")
    if change.startswith("license"):
        assert "LICENSE.txt" not in scene.files(MAIN)


def change_evaluation(folder: Path) -> None:
    (folder / "evaluation.txt").write_text(sentences(40, seed=5))


def change_questions(folder: Path) -> None:
    (folder / "questions.jsonl").write_text('{"prompt": "a", "answer": "river"}\n')


def change_calibration(folder: Path) -> None:
    with (folder / "calibration.txt").open("a") as stream:
        stream.write("One more line.\n")


def change_license(folder: Path) -> None:
    (folder / "LICENSE.txt").write_text("Do what you must.\n")


def change_weights(folder: Path) -> None:
    save_model(folder / "model", "llama", seed=9)


def hide_a_file(folder: Path) -> None:
    (folder / "model" / ".directory").write_text("of a file manager")


FILE_CHANGES = {
    change_evaluation: (NONE, EVERY, EVERY),
    change_questions: (NONE, EVERY, EVERY),
    change_calibration: (EVERY, EVERY, EVERY),
    change_license: (NONE, NONE, NONE),
    change_weights: (EVERY, EVERY, EVERY),
    hide_a_file: (NONE, NONE, NONE),
}


@pytest.mark.slow
@pytest.mark.parametrize("change", FILE_CHANGES, ids=lambda change: change.__name__)
def test_a_changed_file_repeats_the_affected_stages_only(scene: Scene, tmp_path: Path, change: Any) -> None:
    change(scene.folder)
    assert_remade(scene, scene.build(), FILE_CHANGES[change], tmp_path / "fresh")


@pytest.mark.slow
def test_only_a_new_variant_is_built_and_a_removed_one_repeats_nothing(scene: Scene) -> None:
    untouched = scene.files(MAIN)["model.safetensors"]
    result = scene.build({"variants": [*RECIPE["variants"], {"branch": "eight", "bits": 8}]})
    assert result.quantized == result.measured == ("eight",)
    assert scene.files(MAIN)["model.safetensors"] == untouched
    result = scene.build({"variants": RECIPE["variants"][:2]})
    assert result.nothing_to_do
    assert "three-bits" not in scene.files(MAIN)["README.md"].decode()


@pytest.mark.slow
def test_two_builds_publish_the_same_bytes(made: Scene, tmp_path: Path) -> None:
    shutil.copytree(made.folder, tmp_path / "elsewhere")
    again = Scene(recipe=tmp_path / "elsewhere" / "recipe.yaml", dist=tmp_path / "other" / "dist")
    build(again.recipe, again.dist)
    publish(again.recipe, again.dist)
    assert built_files(again.dist) == built_files(made.dist)
    assert trees(hub_folder(again.dist)) == trees(hub_folder(made.dist))
    assert set(trees(hub_folder(made.dist))) == set(BRANCHES)


def sharded(recipe: Path, max_shard_bytes: int) -> RecipeFile:
    """Return a recipe whose shards are smaller than a recipe file may ask for."""
    recipe_file = RecipeFile.load(recipe)
    checkpoint = recipe_file.recipe.checkpoint.model_copy(update={"max_shard_bytes": max_shard_bytes})
    return replace(recipe_file, recipe=recipe_file.recipe.model_copy(update={"checkpoint": checkpoint}))


@pytest.mark.slow
def test_shards_and_their_index_are_read_by_transformers(tmp_path: Path) -> None:
    recipe_file = sharded(write_all(tmp_path / "recipe"), 40_000)
    build(recipe_file, tmp_path / "dist")
    folder = workspace(tmp_path / "dist").folder(MAIN)
    plan = make_plan(recipe_file).variants[0]
    assert len(plan.shards) > 2
    assert {shard.file_name: shard.size_bytes for shard in plan.shards} == {
        path.name: path.stat().st_size for path in folder.glob("*.safetensors")
    }
    assert audit(folder, complete=True).errors == ()
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]  # no GPTQ runtime is needed to see that every shard is found
    (folder / "config.json").write_text(json.dumps(config))
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float16)
    model, seen = loaded
    base = load_file(tmp_path / "recipe" / "model" / "model.safetensors")
    state = model.state_dict()
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.2.input_layernorm.weight"):
        assert torch.equal(state[name], base[name])
    parts = ("qweight", "qzeros", "scales", "g_idx")
    names = {linear.name for linear in make_plan(recipe_file).architecture.linears}
    assert set(seen["unexpected_keys"]) == {f"{name}.{part}" for name in names for part in parts}


@pytest.mark.slow
def test_a_rotary_embedding_is_published_as_old_and_new_runtimes_read_it(tmp_path: Path) -> None:
    folder = write_inputs(tmp_path / "recipe", "llama3-rope")
    rope = json.loads((folder / "model" / "config.json").read_text())["rope_parameters"]
    build(write_recipe(folder, {"variants": [{"branch": MAIN}]}), tmp_path / "dist")
    config = json.loads((workspace(tmp_path / "dist").folder(MAIN) / "config.json").read_text())
    assert config["rope_parameters"] == rope
    assert config["rope_theta"] == rope["rope_theta"] == 500000.0
    assert config["rope_scaling"] == {key: value for key, value in rope.items() if key != "rope_theta"}


GRID: list[dict[str, Any]] = [
    {"branch": MAIN, "bits": 4, "group_size": -1},
    {"bits": 2, "desc_act": True},
    {"bits": 3, "sym": False, "desc_act": True, "group_size": -1},
    {"bits": 8, "sym": False},
    {"bits": 4, "act_order": "static", "refine": True},
    {"bits": 4, "group_size": 16, "act_order": "group", "scale_search": True},
    {"branch": "parallel", "bits": 4, "group_size": 16, "true_sequential": False, "sym": False},
    {"branch": "search", "bits": 3, "scale_search": "signed", "refine": True},
]


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, str], torch.Tensor]:
    """Collect the weights the engine computed with, by branch and linear."""
    found: dict[tuple[str, str], torch.Tensor] = {}
    keep = block_module._BlockSolver._keep

    def collect(solver: Any, name: str, solution: Solution, bias: torch.Tensor | None) -> None:
        found[solver._job.variant.branch, name] = solution.dequantized()
        keep(solver, name, solution, bias)

    monkeypatch.setattr(block_module._BlockSolver, "_keep", collect)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "dtype", "variants"),
    [
        ("llama", torch.float16, GRID),
        ("qwen2", torch.bfloat16, GRID[:2]),
        ("llama-tied", torch.bfloat16, GRID[:1]),
        ("llama-bias", torch.float16, GRID[:2]),
        ("mistral", torch.float32, GRID[:1]),
    ],
    ids=lambda value: str(value) if not isinstance(value, list) else f"{len(value)} variants",
)
def test_every_kind_of_variant_stores_the_engines_result(
    tmp_path: Path, solved: dict[tuple[str, str], torch.Tensor], name: str, dtype: torch.dtype, variants: list[Any]
) -> None:
    recipe = write_all(tmp_path / "recipe", {"variants": variants}, name=name, dtype=dtype)
    build(recipe, tmp_path / "dist")
    plan = make_plan(RecipeFile.load(recipe))
    base = load_file(tmp_path / "recipe" / "model" / "model.safetensors")
    for variant_plan in plan.variants:
        variant = variant_plan.variant
        folder = workspace(tmp_path / "dist").folder(variant.branch)
        assert audit(folder, complete=True).errors == ()
        stored = load_file(folder / "model.safetensors")
        read = CheckpointReader(folder, variant.bits)
        for linear in plan.architecture.linears:
            assert torch.equal(read(f"{linear.name}.weight"), solved[variant.branch, linear.name])
            assert stored[f"{linear.name}.scales"].dtype == torch.float16
            if linear.bias:
                assert torch.equal(stored[f"{linear.name}.bias"], base[f"{linear.name}.bias"].to(torch.float16))
        untouched = {key for key in stored if key in base and not key.endswith(".bias")}
        assert len(untouched) == (1 if "tied" in name else 2) + 1 + 2 * plan.architecture.num_blocks
        for key in untouched:
            assert stored[key].dtype == dtype
            assert torch.equal(stored[key], base[key])


@pytest.mark.slow
@pytest.mark.parametrize("template", [True, False])
def test_the_cards_example_uses_a_chat_template_if_there_is_one(tmp_path: Path, template: bool) -> None:
    write_inputs(tmp_path)
    changes: dict[str, Any] = {"variants": RECIPE["variants"][:1]}
    if not template:
        (tmp_path / "model" / "chat_template.jinja").unlink()
        text = {key: value for key, value in RECIPE["evaluation"].items() if key != "questions"}
        changes |= {"evaluation": text, "loaders.prompts": [], "card.example_prompt": "An old bird sings"}
    build(write_recipe(tmp_path, changes), tmp_path / "dist")
    card = (workspace(tmp_path / "dist").folder(MAIN) / "README.md").read_text()
    assert ("apply_chat_template" in card) is template
    assert ('prompt = "<s>[INST] An old bird sings [/INST]"' in card) is not template


@pytest.mark.slow
def test_variants_are_measured_within_the_limit_and_none_is_held_while_the_next_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head is as large as the vocabulary, 0.67 GB of Gemma 3 270M."""
    made: list[weakref.ref[Any]] = []
    limits: list[object] = []
    run_checkpoint = evaluate.run_checkpoint

    @contextmanager
    def limited(*limit: object) -> Iterator[None]:
        limits.append(limit)
        yield
        limits.clear()

    monkeypatch.setattr(evaluate_stage, "limit_gpu_memory", limited)

    def watched(*args: Any) -> Any:
        assert limits == [((torch.device("cpu"),), 5 * 10**9)]
        assert [decoder() for decoder in made] == [None] * len(made)
        found = run_checkpoint(*args)
        made.append(weakref.ref(found.decoder))
        return found

    monkeypatch.setattr(evaluate, "run_checkpoint", watched)
    gc.disable()  # what only the garbage collector frees stays for long
    within = replace(options(tmp_path / "dist"), gpu_memory_bytes=5 * 10**9)
    try:
        flow.build(RecipeFile.load(write_all(tmp_path)), within, Terminal(quiet=True))
    finally:
        gc.enable()
    assert len(made) == len(BRANCHES)


def test_a_limit_that_is_too_small_to_measure_is_refused_before_anything_is_quantized(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(BuildState, "device", SimpleNamespace(type="cuda"))
    monkeypatch.setattr(flow, "quantize_and_pack", lambda _: pytest.fail("quantized"))
    recipe = RecipeFile.load(write_all(tmp_path))
    needed = make_plan(recipe).evaluation.gpu.device_bytes
    small = replace(options(tmp_path / "dist"), gpu_memory_bytes=needed - 1)
    with pytest.raises(MachineError, match="measuring does not fit into --gpu-memory"):
        flow.build(recipe, small, Terminal(quiet=True))
    with pytest.raises(pytest.fail.Exception, match="quantized"):
        flow.build(recipe, replace(small, gpu_memory_bytes=needed), Terminal(quiet=True))
