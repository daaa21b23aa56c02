"""A build that continues on another machine, under another name, or after a loader could not run."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from packager.errors import LoaderError, MachineError, PublishError
from packager.model import devices
from packager.model.fused_blocks import FusedModules
from packager.pipeline import build_state, flow, quantize_stage
from packager.pipeline.build_state import BuildState
from packager.pipeline.flow import BuildResult
from packager.pipeline.plan import make_plan
from packager.pipeline.release import ReleaseChecks, cannot_build, release
from packager.prove.evaluation_memory import EvaluationMemory
from packager.prove.loaders import LOADERS
from packager.quantize import engines
from packager.quantize.job import ModulesFused
from packager.recipe.file import RecipeFile
from packager.system.terminal import Terminal
from tests import tiny_recipe
from tests.checkpoints import edit_json
from tests.test_published_loaders import StandIn, install
from tests.tiny_recipe import BRANCHES, MAIN, REPOSITORY, Builds

pytestmark = pytest.mark.slow

GB = 10**9
REQUIRED = {"loaders.required": ["transformers"]}
WITH_GPU = {"loaders.required": ["transformers"], "loaders.if_available": ["exllamav2"]}


@pytest.fixture
def loader(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A loader in this process, which opens what autogptq, transformers and exllamav2 would."""
    made = StandIn()
    install(made, monkeypatch)
    return made


def statuses(result: BuildResult) -> dict[str, list[str]]:
    return {
        receipt.provenance.branch: [f"{record.loader} {record.status}" for record in receipt.provenance.loaders]
        for receipt in result.receipts
    }


def build(recipe: Path, dist: Path, capsys: pytest.CaptureFixture[str]) -> tuple[BuildResult, str]:
    """Build and return the result and the messages."""
    capsys.readouterr()
    result = flow.build(RecipeFile.load(recipe), tiny_recipe.options(dist), Terminal())
    return result, capsys.readouterr().err


def test_a_build_without_loaders_is_not_called_proven(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none: dict[str, Any] = {"loaders.required": [], "loaders.if_available": []}
    recipe, dist = tiny_recipe.write_all(tmp_path, none), tmp_path / "dist"
    build(recipe, dist, capsys)
    _, messages = build(recipe, dist, capsys)
    assert "nothing to do, every variant is built and measured" in messages
    assert "proven" not in messages


def test_a_loader_that_could_not_be_installed_is_run_by_the_next_build(
    tmp_path: Path, loader: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, dist = tiny_recipe.write_all(tmp_path, REQUIRED), tmp_path / "dist"
    loader.missing = "no network"
    first, messages = build(recipe, dist, capsys)
    assert statuses(first) == {branch: ["transformers not run"] for branch in BRANCHES}
    assert "not proven, required loaders did not run: transformers: " in messages
    with pytest.raises(PublishError, match="a required loader has not passed"):
        tiny_recipe.publish(recipe, dist)

    again, messages = build(recipe, dist, capsys)
    assert again.verified == BRANCHES, "the package index may be reached again"
    assert "proven" not in messages.replace("not proven", "")

    loader.missing = ""
    third, messages = build(recipe, dist, capsys)
    assert statuses(third) == {branch: ["transformers passed"] for branch in BRANCHES}
    assert (third.quantized, third.measured) == ((), ())
    assert build(recipe, dist, capsys)[0].nothing_to_do
    tiny_recipe.publish(recipe, dist)


def test_a_loader_that_needs_a_gpu_is_run_where_there_is_one(
    tmp_path: Path, loader: StandIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, dist = tiny_recipe.write_all(tmp_path, WITH_GPU), tmp_path / "dist"
    first, _ = build(recipe, dist, capsys)
    assert statuses(first)[MAIN] == ["transformers passed", "exllamav2 not run"]
    again, messages = build(recipe, dist, capsys)
    assert again.nothing_to_do, "this machine cannot run exllamav2"
    assert "built, measured and proven" in messages

    # The same folder on a machine with a GPU: only the loader without a result is run.
    monkeypatch.setattr("packager.pipeline.build_state.device_type", lambda _: "cuda")
    monkeypatch.setattr("packager.prove.loaders.LoaderSpec.machine_problem", lambda *_: "")
    monkeypatch.setattr("packager.prove.loaders.LoaderSpec.device_on", lambda _, device: device)
    loader.opened.clear()
    there, _ = build(recipe, dist, capsys)
    assert statuses(there) == {
        branch: ["transformers passed", "exllamav2 refused" if branch == "three-bits" else "exllamav2 passed"]
        for branch in BRANCHES
    }  # ExLlamaV2 reads 4 bits only
    assert len(loader.opened) == len(BRANCHES) - 1
    assert build(recipe, dist, capsys)[0].nothing_to_do

    # Back on the first machine: results of the GPU machine stay, also when the loaders run again here.
    monkeypatch.undo()
    install(loader, monkeypatch)
    back = flow.reverify(RecipeFile.load(recipe), tiny_recipe.options(dist), Terminal(quiet=True))
    assert {record.status for receipt in back for record in receipt.provenance.loaders} == {"passed", "refused"}


def test_a_loader_on_request_is_run_by_verify_and_by_the_builds_after_it(
    tmp_path: Path, loader: StandIn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LOADERS, "transformers", replace(LOADERS["transformers"], on_request=True))
    recipe = tiny_recipe.write_all(tmp_path, {"loaders.if_available": ["transformers"]})
    dist, never = tmp_path / "dist", {branch: ["transformers not run"] for branch in BRANCHES}
    assert statuses(build(recipe, dist, capsys)[0]) == never
    again, _ = build(recipe, dist, capsys)
    assert (again.nothing_to_do, loader.opened) == (True, [])

    flow.reverify(RecipeFile.load(recipe), tiny_recipe.options(dist), Terminal(quiet=True))
    assert len(loader.opened) == len(BRANCHES)
    assert build(recipe, dist, capsys)[0].nothing_to_do

    # Another build of a machine that has the environment.
    assert statuses(build(recipe, tmp_path / "other", capsys)[0]) == never
    monkeypatch.setattr("packager.prove.environments.is_ready", lambda _: True)
    there, _ = build(recipe, tmp_path / "other", capsys)
    assert statuses(there) == {branch: ["transformers passed"] for branch in BRANCHES}


def test_torch_is_imported_for_a_gpu_only_if_a_driver_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def choose(choice: str) -> object:
        asked.append(choice)
        return type("Device", (), {"type": "cuda"})

    monkeypatch.setattr(devices, "choose_device", choose)
    monkeypatch.setattr(devices, "_GPU_DRIVERS", (tmp_path / "absent",))
    assert (devices.device_type("auto"), devices.device_type("cpu"), asked) == ("cpu", "cpu", [])
    monkeypatch.setattr(devices, "_GPU_DRIVERS", (tmp_path,))
    assert (devices.device_type("auto"), devices.device_type("cpu")) == ("cuda", "cpu")
    assert (devices.device_type("cuda"), asked) == ("cuda", ["auto", "cuda"])


def test_a_renamed_repository_is_packed_again_and_not_quantized_again(tmp_path: Path) -> None:
    recipe, dist = tiny_recipe.write_all(tmp_path), tmp_path / "dist"
    before = tiny_recipe.build(recipe, dist)
    renamed = tiny_recipe.write_recipe(tmp_path, {"repository.id": "tester/another-name"})
    after = tiny_recipe.build(renamed, dist)
    assert (after.quantized, after.packed, after.measured) == ((), BRANCHES, ())
    fresh = tmp_path / "fresh"
    tiny_recipe.build(renamed, fresh)
    for branch in BRANCHES:
        folder = Path("builds") / "tester" / "another-name" / branch
        files = {path.name: path.read_bytes() for path in (dist / folder).iterdir()}
        assert files.keys() == {path.name for path in (fresh / folder).iterdir()}
        for name in files.keys() - {"README.md", "provenance.json"}:
            assert files[name] == (fresh / folder / name).read_bytes(), name
        assert json.loads(files["quantize_config.json"])["model_name_or_path"] == "tester/another-name"
    for one, other in zip(before.receipts, after.receipts, strict=True):
        assert one.provenance.linears == other.provenance.linears
        assert one.provenance.quality == other.provenance.quality
        assert one.seconds["quantize"] == other.seconds["quantize"]


def test_changed_weights_are_not_reused(tmp_path: Path) -> None:
    recipe, dist = tiny_recipe.write_all(tmp_path), tmp_path / "dist"
    tiny_recipe.build(recipe, dist)
    weights = tiny_recipe.workspace(dist).folder(MAIN) / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    renamed = tiny_recipe.write_recipe(tmp_path, {"repository.id": "tester/another-name"})
    assert tiny_recipe.build(renamed, dist).quantized == (MAIN,)


class Clock:
    """The terminal's clock: it stands still unless a test moves it."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def slow_loader(loader: StandIn, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """A loader whose first run takes 300 s of the terminal's clock, and its second run 30 s."""
    clock, spent = Clock(), iter((300.0, 30.0))
    open_all = loader.probe

    def probe(*arguments: Any) -> object:
        clock.now += next(spent)
        return open_all(*arguments)

    monkeypatch.setattr("packager.prove.verify.run_probes", probe)
    monkeypatch.setattr("packager.system.terminal.time", clock)
    return loader


@pytest.mark.usefixtures("slow_loader")
def test_the_seconds_of_a_stage_are_those_of_one_recipe(tmp_path: Path) -> None:
    names = ("one", "two")
    recipes = [
        tiny_recipe.write_all(tmp_path / name, {"repository.id": f"tester/{name}", **REQUIRED}) for name in names
    ]
    options = tiny_recipe.options(tmp_path / "dist")
    terminal = Terminal(quiet=True)
    release(recipes, options, terminal, ReleaseChecks(strict=True))
    for recipe, seconds in zip(recipes, (100.0, 10.0), strict=True):
        run = BuildState(RecipeFile.load(recipe), options, terminal)
        run.read_receipts()
        assert [receipt.seconds["verify"] for receipt in run.ordered_receipts()] == [seconds] * len(BRANCHES)


def test_a_receipt_has_the_largest_memory_of_all_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, dist = tiny_recipe.write_all(tmp_path), tmp_path / "dist"
    peaks = iter([100] * len(BRANCHES) + [500] * len(BRANCHES) + [300] * len(BRANCHES))
    for module in (quantize_stage, build_state):
        monkeypatch.setattr(module, "peak_memory_bytes", lambda: next(peaks))
    result = tiny_recipe.build(recipe, dist)
    assert [receipt.peak_memory_bytes for receipt in result.receipts] == [500] * len(BRANCHES)


def test_a_receipt_records_which_modules_ran_fused_kernels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from packager.model.fused_blocks import FusedModules
    from packager.quantize.job import ModulesFused, QuantizeJob, Report
    from packager.quantize.sweep import quantize

    names = tuple(f"model.layers.{block}.mlp" for block in range(5))
    modules = FusedModules(fused=names[:1], candidates=names, triton_installed=True)

    def on_a_gpu(job: QuantizeJob, report: Report) -> object:
        report(ModulesFused(device=job.devices[0], modules=modules))
        return quantize(job, report)

    monkeypatch.setattr("packager.quantize.engines.native.quantize", on_a_gpu)
    result, messages = build(tiny_recipe.write_all(tmp_path), tmp_path / "dist", capsys)
    assert "fused 1 of 5 norms, MLPs and attentions; transformers' own code: " + ", ".join(names[1:4]) in messages
    assert f"{names[3]} and 1 more\n" in messages
    for receipt in result.receipts:
        assert receipt.fused_modules is not None
        assert (receipt.fused_modules.fused, receipt.fused_modules.candidates) == (1, 5)
        assert receipt.fused_modules.missed == names[1:]


@pytest.mark.parametrize(
    ("total_gb", "limit_gb", "reason"),
    [
        (40, None, ""),
        (40, 9, "needs 10.00 GB of a CUDA GPU, of this one 8.10 GB can be used"),
        (20, None, "measuring needs 30.00 GB of a CUDA GPU, of this one 18.00 GB can be used"),
        (40, 12, "measuring needs 30.00 GB of a CUDA GPU, of this one 10.80 GB can be used"),
    ],
)
def test_a_gpu_must_have_the_memory_to_quantize_and_to_measure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, total_gb: int, limit_gb: int | None, reason: str
) -> None:
    plan = make_plan(RecipeFile.load(tiny_recipe.write_all(tmp_path)))
    assert plan.memory is not None
    memory = replace(plan.memory, least=replace(plan.memory.least, device_bytes=10 * GB))
    measuring = replace(plan.evaluation, gpu=EvaluationMemory(device_bytes=30 * GB, host_bytes=0))
    monkeypatch.setattr("packager.pipeline.release.choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=total_gb * GB))
    options = replace(tiny_recipe.options(tmp_path), gpu_memory_bytes=limit_gb * GB if limit_gb else None)
    assert cannot_build(replace(plan, memory=memory, evaluation=measuring), options) == reason


def edited_receipt(dist: Path, branch: str, change: Callable[[dict[str, Any]], object]) -> Path:
    path = tiny_recipe.workspace(dist).receipt_path(branch)
    edit_json(path.parent, path.name, change)
    return path


def test_weights_that_no_receipt_lists_are_not_taken_over(tmp_path: Path, builds: Builds) -> None:
    builds.copy(tmp_path)
    dist = tmp_path / "dist"
    folder = tiny_recipe.workspace(dist).folder(MAIN)
    weights = load_file(folder / "model.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in weights.items()}, folder / "zz.safetensors")
    after = tiny_recipe.build(tiny_recipe.write_recipe(tmp_path, {"repository.id": "tester/other"}), dist)
    assert after.quantized == (MAIN,), "only the folder with the foreign file is made again"
    made = load_file(dist / "builds" / "tester/other" / MAIN / "model.safetensors")
    assert {name for name in weights if not torch.equal(made[name], weights[name])} == set()


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda receipt: receipt["seconds"].pop("quantize"), "has no seconds for quantize"),
        (lambda receipt: receipt["seconds"].pop("evaluate"), "has no seconds for evaluate"),
        (lambda receipt: receipt["provenance"].update(linears=[]), "its results are not there"),
        (lambda receipt: receipt["provenance"].update(files={}), "its results are not there"),
        (lambda receipt: receipt["provenance"].update(quality=None), "its results are not there"),
        (lambda receipt: receipt["provenance"]["linears"][0].update(name="x"), "does not have the model's linears"),
        (lambda receipt: receipt["provenance"]["linears"].pop(), "does not have the model's linears"),
    ],
)
def test_an_edited_receipt_is_not_taken_over(
    tmp_path: Path,
    builds: Builds,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Any]], object],
    reason: str,
) -> None:
    builds.copy(tmp_path)
    edited_receipt(tmp_path / "dist", MAIN, change)
    renamed = tiny_recipe.write_recipe(tmp_path, {"repository.id": "tester/other"})
    after, messages = build(renamed, tmp_path / "dist", capsys)
    assert after.quantized == (MAIN,)
    assert "is not used: " in messages
    assert reason in messages


def test_a_renamed_variant_of_auto_gptq_needs_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where only packing is left, no engine is asked for."""
    recipe, dist = tiny_recipe.write_all(tmp_path), tmp_path / "dist"
    tiny_recipe.build(recipe, dist)
    monkeypatch.setattr("packager.quantize.engines.needs_cuda", lambda _: True)
    monkeypatch.setattr(
        "packager.pipeline.quantize_stage.engine_named", lambda *_: pytest.fail("an engine was started")
    )
    renamed = tiny_recipe.write_recipe(tmp_path, {"repository.id": "tester/other"})
    assert tiny_recipe.build(renamed, dist).quantized == ()
    other = tiny_recipe.write_recipe(tmp_path, {"repository.id": "tester/other", "calibration.seed": 7})
    with pytest.raises(MachineError, match="needs a CUDA GPU"):
        tiny_recipe.build(other, dist)


def test_a_required_loader_without_a_result_stops_a_publish(
    tmp_path: Path, loader: StandIn, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, dist = tiny_recipe.write_all(tmp_path, REQUIRED), tmp_path / "dist"
    result, _ = build(recipe, dist, capsys)
    assert [[run.loader for run in receipt.runs] for receipt in result.receipts] == [["transformers"]] * len(BRANCHES)
    edited_receipt(dist, MAIN, lambda receipt: receipt["provenance"].update(loaders=[]))
    with pytest.raises(PublishError, match=f"{MAIN}: transformers has no result"):
        tiny_recipe.publish(recipe, dist)


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e38])
def test_a_loader_whose_logits_are_not_finite_has_failed(
    tmp_path: Path, loader: StandIn, capsys: pytest.CaptureFixture[str], factor: float
) -> None:
    recipe, dist = tiny_recipe.write_all(tmp_path, REQUIRED), tmp_path / "dist"
    loader.change = lambda logits: logits * factor
    with pytest.raises(LoaderError, match=r"transformers.*its logits are not finite, or too large to compare"):
        build(recipe, dist, capsys)


@pytest.mark.usefixtures("slow_loader")
def test_the_seconds_of_loaders_that_run_later_are_added(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe, dist = tiny_recipe.write_all(tmp_path, WITH_GPU), tmp_path / "dist"
    build(recipe, dist, capsys)
    monkeypatch.setattr("packager.pipeline.build_state.device_type", lambda _: "cuda")
    monkeypatch.setattr("packager.prove.loaders.LoaderSpec.machine_problem", lambda *_: "")
    monkeypatch.setattr("packager.prove.loaders.LoaderSpec.device_on", lambda _, device: device)
    there, _ = build(recipe, dist, capsys)
    assert [receipt.seconds["verify"] for receipt in there.receipts] == [110.0] * len(BRANCHES)


def test_two_recipes_of_one_repository_are_refused_before_anything_is_built(tmp_path: Path) -> None:
    one = tiny_recipe.write_all(tmp_path / "one")
    two = tiny_recipe.write_all(tmp_path / "two", {"repository.id": REPOSITORY.upper(), "calibration.seed": 3})
    options, terminal = tiny_recipe.options(tmp_path / "dist"), Terminal(quiet=True)
    assert [result.outcome for result in release([one, two], options, terminal)] == ["failed", "failed"]
    with pytest.raises(PublishError, match="2 recipes publish to"):
        release([one, two], options, terminal, fail_fast=True)
    assert not (tmp_path / "dist").exists()


def test_only_our_engine_runs_our_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fused = FusedModules(fused=("a",), candidates=("a", "b"), triton_installed=True)

    def engine(*arguments: Any) -> object:
        def quantize(job: Any, report: Any) -> object:
            report(ModulesFused(device=torch.device("cpu"), modules=fused))
            return engines.engine_named("native", *arguments[1:]).quantize(job, report)

        return SimpleNamespace(quantize=quantize)

    monkeypatch.setattr(quantize_stage, "engine_named", engine)
    monkeypatch.setattr(quantize_stage, "require_engines", lambda *_: None)
    recipe = tiny_recipe.write_all(
        tmp_path, {"variants": [{"branch": MAIN}, {"branch": "theirs", "engine": "auto-gptq", "scale_search": False}]}
    )
    first, theirs = tiny_recipe.build(recipe, tmp_path / "dist").receipts
    assert first.fused_modules is not None
    assert (first.fused_modules.fused, first.fused_modules.candidates) == (1, 2)
    assert theirs.fused_modules is None
