"""Variants with `mix`: what recipes may say, what the plan knows before the bits are chosen, and the build."""

import json
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch

from packager.card.mixed_bits import bits_in_words, bits_of_parameters, chosen_bits
from packager.errors import PlanError, RecipeError
from packager.inputs.base_model import SourceModel
from packager.model.checkpoint import bits_patterns, block_keys
from packager.model.compatibility import verdicts
from packager.model.lock import LockedExperts
from packager.model.packing import CheckpointReader
from packager.model.runtime_architectures import FUSED_LINEARS
from packager.pipeline import flow, quantize_stage
from packager.pipeline.plan import make_plan
from packager.pipeline.variant_plan import VariantPlan, mix_problems, with_chosen_bits
from packager.prove.audit import audit
from packager.prove.declared import declared_checkpoint
from packager.quantize.block import QuantizedBlock, quantize_block
from packager.quantize.choose_bits import mixed_groups, most_size
from packager.quantize.gptq.solve import Solution
from packager.quantize.gptq.tuned_linear import TunedLinear
from packager.quantize.job import QuantizeJob
from packager.quantize.sweep import quantize
from packager.quantize.tuning_schedule import TuningSchedule
from packager.receipt import LinearRecord, Provenance
from packager.recipe.file import RecipeFile
from packager.system.terminal import Terminal
from packager.variant import Bits, BitsMix, Variant
from tests import card_fixtures, tiny_recipe
from tests.earlier_recipes import earlier_digest
from tests.locks import write_lock
from tests.recipe_fixtures import CONFIG, edited, problems_of, write_files
from tests.sources import open_folder
from tests.test_card_figures import render
from tests.tiny_models import open_store, save_model, token_rows, variant
from tests.tiny_recipe import REPOSITORY, Builds, built_files

DEMO = Path(__file__).resolve().parent.parent / "recipes" / "demo-llama.yaml"
CPU = torch.device("cpu")
MIXED = "mixed"
MIX: dict[str, Any] = {"bits": [8, 4], "mean": 5}
# main has the linears with 4 bits; those with 8 are quantized for their losses alone.
TINY: dict[str, Any] = {"variants": [{"branch": "main"}, {"branch": MIXED, "mix": MIX}]}


def demo(*variants: Mapping[str, Any], **changes: Any) -> RecipeFile:
    """Return the demo's recipe with other variants and no loader."""
    content = RecipeFile.load(DEMO).recipe.model_dump(mode="json", exclude_none=True)
    content |= {"variants": [{"branch": "main", "group_size": 128}, *variants]}
    content["loaders"] |= {"required": [], "if_available": [], **changes.pop("loaders", {})}
    return RecipeFile.of(json.dumps({**content, **changes}).encode(), DEMO)


def mixed_plan(recipe_file: RecipeFile) -> VariantPlan:
    return next(each for each in make_plan(recipe_file).variants if each.variant.mix is not None)


def some_bits(recipe_file: RecipeFile, *, step: int) -> tuple[tuple[str, Bits], ...]:
    """Return bits of the mix for each group of linears, as large as it allows or smaller."""
    mix = mixed_plan(recipe_file).variant.mix
    assert mix is not None
    groups = mixed_groups(recipe_file.architecture, 128)
    most, taken, found = most_size(groups, mix), 0, []
    left = sum(group.size for group in groups)
    for number, group in enumerate(groups):
        left -= group.size
        wanted = mix.bits[(number * step) % len(mix.bits)]
        bits = wanted if taken + wanted * group.size + mix.bits[0] * left <= most else mix.bits[0]
        taken += bits * group.size
        found += [(name, bits) for name in group.linears]
    return tuple(found)


# What recipes may say


def test_the_recipe_says_which_bits_and_how_many_on_average() -> None:
    recipe = demo({"mix": {"bits": [8, 4], "mean": 4.5}, "group_size": 128}).recipe
    made = recipe.expanded_variants()[1]
    assert made.mix is not None
    assert (made.branch, made.bits, made.all_bits) == ("gptq-4bit-128g-actorder_static", 4, (4, 8))
    assert (made.mix.bits, made.mix.mean) == ((4, 8), 4.5)
    assert {"bits": 4, "mix_bits": "4, 8", "mix_mean": 4.5}.items() <= made.parameters().items()


def test_a_recipe_without_a_mix_keeps_its_digests() -> None:
    plain = demo({"bits": 3, "branch": "three"})
    assert plain.recipe.digest() == earlier_digest(plain.recipe)
    assert plain.recipe.digest() != demo({"mix": {"bits": [3, 4], "mean": 3.5}, "branch": "three"}).recipe.digest()
    three = variant(bits=3)
    assert three.parameters() == replace(three, mix=None).parameters()
    assert not three.parameters().keys() & {"mix", "mix_bits", "linear_bits", "other_bits", "own_patterns"}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"mix": {"bits": [4], "mean": 4}}, "variants[1]: mix.bits names two numbers of bits or more, each once"),
        ({"mix": {"bits": [4, 8, 4], "mean": 5}}, "variants[1]: mix.bits names two numbers of bits or more, each once"),
        ({"mix": {"bits": [4, 8], "mean": 4}}, "variants[1]: mix.mean is between 4 and 8, of mix.bits"),
        ({"mix": {"bits": [4, 8], "mean": 8}}, "variants[1]: mix.mean is between 4 and 8, of mix.bits"),
        ({"mix": {"bits": [4, 7], "mean": 5}}, "variants[1].mix.bits[1] must be 2, 3, 4 or 8, got the number 7"),
        ({"mix": {"bits": [4, 8]}}, "variants[1].mix.mean is missing"),
        ({"mix": [4, 8]}, "variants[1].mix must be a mapping"),
        ({"mix": MIX, "bits": 4}, "variants[1]: a variant has bits or mix, not both (leave bits out"),
        ({"mix": MIX, "engine": "auto-gptq", "act_order": "none"}, "engine auto-gptq cannot do mix (write engine: nat"),
        ({"mix": {"bits": [3, 8], "mean": 5}, "branch": "main"}, "two variants have the branch 'main'"),
        ({"mix": MIX, "group_size": 128, "branch": None}, None),
    ],
)
def test_mistakes_are_named(entry: dict[str, Any], message: str | None) -> None:
    entry = {key: value for key, value in {"branch": MIXED, **entry}.items() if value is not None}
    if message is None:
        assert demo(entry).recipe.expanded_variants()[1].branch == "gptq-4bit-128g-actorder_static"
        return
    with pytest.raises(RecipeError, match=re.escape(message)):
        demo(entry)


def test_every_number_of_bits_must_fit_the_model(tmp_path: Path) -> None:
    """Rows of 644 values: whole 32-bit words of 8 bits, not of 3 and 4."""
    write_files(tmp_path)
    write_lock(tmp_path / "recipe.yaml", {**CONFIG, "intermediate_size": 644}, "demo/demo")
    mix = edited(("{group_size: 32, desc_act: true}", "{mix: {bits: [3, 8], mean: 7}, branch: m, group_size: -1}"))
    found = [line for line in problems_of(tmp_path, mix) if "32-bit words" in line]
    assert "16:18: 3-bit values of gate_proj, up_proj, down_proj do not fill 32-bit words" in found
    assert not [line for line in found if "8-bit values" in line]


# What the plan knows


def test_the_sizes_lie_between_the_bounds_whatever_is_chosen() -> None:
    """Files in one piece and in several, whose number may depend on the choice."""
    for bits, mean, shard in (([4, 8], 4.5, 48_000_000_000), ([2, 3, 4, 8], 5.75, 1_000_000)):
        entry = {"branch": MIXED, "mix": {"bits": bits, "mean": mean}, "group_size": 128}
        recipe_file = demo(entry, checkpoint={"max_shard_bytes": shard})
        planned = mixed_plan(recipe_file)
        for step in (0, 1, 2, 3):
            chosen = with_chosen_bits(
                planned, some_bits(recipe_file, step=step), recipe_file.recipe, recipe_file.architecture
            )
            assert planned.description.startswith(f"{bits_in_words(planned.variant.parameters())}, group size 128")
            assert planned.least_bytes <= chosen.weights_bytes <= planned.weights_bytes
            assert chosen.tensor_bytes <= planned.tensor_bytes
            assert (len(chosen.shards) > 1) == (shard == 1_000_000)  # of 1.4 to 2.4 MB
    whole = make_plan(demo({"branch": "three", "bits": 3}, {"branch": MIXED, "mix": {"bits": [2, 3, 4], "mean": 3}}))
    three, mixed = (each.tensor_bytes for each in whole.variants[1:])
    assert mixed == three  # a whole number of bits: not larger than with that number for all linears


def test_what_is_quantized_for_its_losses_alone_is_planned_once() -> None:
    """Two mixes and an ordinary variant share their widths; they are in the disk's and the memory's plan."""
    mixes = [{"branch": f"mix-{mean}", "mix": {"bits": [4, 8], "mean": mean}, "group_size": 128} for mean in (5, 6)]
    plan, without = make_plan(demo(*mixes)), make_plan(demo())
    (measured,) = plan.only_measured
    assert (measured.variant.bits, measured.variant.mix) == (8, None)
    assert plan.disk.losses_bytes == measured.weights_bytes > without.disk.losses_bytes == 0
    assert {width.digest for planned in plan.variants for width in planned.widths} == {
        plan.variants[0].digest,
        measured.digest,
    }
    with_eight = make_plan(demo(*mixes, {"branch": "eight", "bits": 8, "group_size": 128}))
    assert not with_eight.only_measured
    assert with_eight.variants[-1].digest == measured.digest


@pytest.mark.parametrize(
    ("bits", "section", "loader", "says"),
    [
        ([4, 8], "required", "transformers", "reads one number of bits, here are 4 and 8"),
        ([4, 8], "if_available", "autogptq", "reads one number of bits, here are 4 and 8"),
        ([4, 8], "if_available", "exllamav2", "reads 4 bits only"),
        ([4, 8], "if_available", "vllm-cpu", "reads 4 bits only"),
        ([3, 4, 8], "required", "onnxruntime", "reads 2, 4, 8 bits only"),
    ],
)
def test_loaders_that_do_not_read_it_are_refused(bits: list[int], section: str, loader: str, says: str) -> None:
    entry = {"branch": MIXED, "mix": {"bits": bits, "mean": 5}, "group_size": 128}
    with pytest.raises(PlanError) as caught:
        make_plan(demo(entry, loaders={section: ["gptqmodel", loader]}))
    assert caught.value.why == (
        f"mixed: mix: the loader {loader} {says}; take it out of loaders.{section}, or put the mix into a recipe of "
        "its own"
    )
    make_plan(demo(entry, loaders={section: ["gptqmodel"]}))


def test_a_loader_that_refuses_one_number_of_bits_too_is_no_reason_against_a_mix() -> None:
    entry = {"branch": MIXED, "mix": {"bits": [3, 4], "mean": 3.5}, "group_size": 128}
    make_plan(demo(entry, loaders={"if_available": ["exllamav2"]}))  # it would not run 3 bits for all either


def test_models_with_experts_are_refused() -> None:
    architecture = RecipeFile.load(DEMO).architecture
    made = demo({"branch": MIXED, "mix": MIX}).recipe.expanded_variants()
    assert not mix_problems(architecture, made)
    kind = architecture.kinds[0]
    experts = LockedExperts(parameter="mlp.experts.down_proj", count=2, top_k=1, per_token=True)
    groups = (*kind.groups[:-1], kind.groups[-1].model_copy(update={"experts": experts}))
    (problem,) = mix_problems(replace(architecture, kinds=(replace(kind, groups=groups),)), made)
    assert problem.startswith("mixed: mix is not for models with experts (mlp.experts): ")


# How it is written


def names_that_runtimes_ask_for(chosen: Mapping[str, Bits]) -> Iterator[tuple[str, Bits]]:
    """Yield the names of linears, of what vLLM and SGLang compute as one, and of tensors, with their bits."""
    for name, bits in chosen.items():
        yield name, bits
        for part in ("qweight", "qzeros", "scales", "g_idx"):
            yield f"{name}.{part}", bits
        parent, _, last = name.rpartition(".")
        for fused, parts in FUSED_LINEARS.items():
            if last in parts:
                yield f"{parent}.{fused}", bits


@pytest.mark.parametrize("step", [0, 1, 2, 3, 5])
def test_every_runtime_finds_the_bits_by_the_names_that_it_asks_for(step: int) -> None:
    """As `dynamic_get` and `get_overrides` do: the first pattern that fits from the name's beginning."""
    recipe_file = demo({"branch": MIXED, "mix": {"bits": [2, 3, 4, 8], "mean": 6}})
    architecture = recipe_file.architecture
    chosen = some_bits(recipe_file, step=step)
    made = replace(mixed_plan(recipe_file).variant, linear_bits=chosen)
    dynamic = bits_patterns(architecture, made)
    assert block_keys(architecture, made).get("dynamic", {}) == dynamic
    for name, bits in names_that_runtimes_ask_for(dict(chosen)):
        fits = [value for key, value in dynamic.items() if re.match(key.removeprefix("+:"), name)]
        assert fits == ([] if bits == made.bits else [{"bits": bits}]), name
    others = ["lm_head", "model.layers.0.mlp.down_projector", "xmodel.layers.0.mlp.down_proj", "model.layers.00.mlp"]
    assert not [key for key, name in product(dynamic, others) if re.match(key.removeprefix("+:"), name)]


def test_patterns_stand_beside_those_of_linears_that_are_left() -> None:
    recipe_file = demo({"branch": MIXED, "mix": MIX}, quantize={"skip": ["*.o_proj"]})
    chosen: list[tuple[str, Bits]] = [
        (linear.name, 8 if linear.module == "mlp.down_proj" else 4) for linear in recipe_file.architecture.linears
    ]
    made = replace(mixed_plan(recipe_file).variant, linear_bits=tuple(chosen))
    assert block_keys(recipe_file.architecture, made)["dynamic"] == {
        r"-:^model\.layers\.\d+\.self_attn\.o_proj$": {},
        r"+:^model\.layers\.\d+\.mlp\.down_proj(?:\.|$)": {"bits": 8},
    }


def test_runtimes_that_look_for_other_names_are_known_to_find_ours() -> None:
    recipe_file = demo({"branch": MIXED, "mix": MIX, "group_size": 128})
    ours = mixed_plan(recipe_file).variant
    answers = {each.loader: each.status for each in verdicts(ours, recipe_file.architecture)}
    assert {answers[name] for name in ("gptqmodel", "vllm", "onnxruntime")} <= {"loads", "limited"}
    foreign = replace(ours, own_patterns=False)
    answers = {each.loader: each.status for each in verdicts(foreign, recipe_file.architecture)}
    assert {answers[name] for name in ("vllm", "onnxruntime")} == {"unknown"}
    other = replace(recipe_file.architecture, config={**recipe_file.architecture.config, "model_type": "phi"})
    answers = {each.loader: each.status for each in verdicts(ours, replace(other, model_type="phi"))}
    assert answers["vllm"] == "unknown"


# The build


def build(recipe: Path, capsys: pytest.CaptureFixture[str]) -> tuple[flow.BuildResult, str]:
    """Build beside the recipe; return the result and the messages."""
    capsys.readouterr()
    result = flow.build(RecipeFile.load(recipe), tiny_recipe.options(recipe.parent / "dist"), Terminal())
    return result, capsys.readouterr().err


def losses_of_widths(dist: Path) -> dict[Bits, dict[str, float]]:
    """Return the losses of both widths: of main's record, and of the kept file."""
    receipt = tiny_recipe.workspace(dist).read_receipt("main")
    (kept,) = (dist / "losses" / REPOSITORY).glob("*.json")
    assert receipt is not None
    return {
        4: {linear.name: linear.loss for linear in receipt.provenance.linears},
        8: json.loads(kept.read_text())["losses"],
    }


@pytest.mark.slow
def test_a_mix_is_built_and_says_its_bits(builds: Builds, in_process: None) -> None:
    """Oracles: every choice tried; the shapes of the tensors; main's own tensors where the inputs are the same."""
    dist = builds.built(TINY) / "dist"
    folder, workspace = dist / "builds" / REPOSITORY / MIXED, tiny_recipe.workspace(dist)
    receipt = workspace.read_receipt(MIXED)
    assert receipt is not None
    made = receipt.provenance
    chosen = {linear.name: linear.bits for linear in made.linears if linear.bits is not None}
    assert set(chosen.values()) == {4, 8}
    architecture = RecipeFile.load(dist.parent / "recipe.yaml").architecture
    losses, groups = losses_of_widths(dist), mixed_groups(architecture, 32)
    limit = 5 * sum(group.size for group in groups)
    of_groups = [[(sum(losses[b][n] for n in group.linears), b * group.size) for b in (4, 8)] for group in groups]
    fitting = (each for each in product(*of_groups) if sum(size for _, size in each) <= limit)
    least = min(sum(loss for loss, _ in each) for each in fitting)
    assert sum(losses[bits][name] for name, bits in chosen.items()) == pytest.approx(least, rel=1e-12)
    read, main = CheckpointReader(folder, None), CheckpointReader(folder.with_name("main"), 4)
    for name, bits in chosen.items():
        assert torch.equal(read(f"{name}.weight"), CheckpointReader(folder, bits)(f"{name}.weight")), name
    first = f"{groups[0].linears[0]}.weight"  # its inputs are the embeddings in every variant
    assert torch.equal(read(first), main(first)) == (chosen[groups[0].linears[0]] == 4)
    planned = mixed_plan(RecipeFile.load(dist.parent / "recipe.yaml"))
    assert planned.least_bytes <= made.weights_bytes <= planned.weights_bytes
    report = audit(folder, complete=True, architecture=architecture)
    assert report.passed
    assert [finding.code for finding in report.findings] == ["mixed-bits"]
    declared = declared_checkpoint(folder, MIXED, None)
    assert (declared.variant.all_bits, declared.variant.own_patterns) == ((4, 8), True)
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "4 and 8 bits, 5 on average at most, with static Act Order, 32g." in card
    assert "| 4 (4, 8; mean at most 5) |" in card
    assert "- 4-bit\n- 8-bit\n" in card, "the Hub filters by tags"
    assert "`mixed` mixes bits: " in card


@pytest.mark.slow
def test_a_record_with_other_bits_than_the_tensors_is_found(tmp_path: Path, builds: Builds) -> None:
    folder = tmp_path / MIXED
    shutil.copytree(builds.built(TINY) / "dist" / "builds" / REPOSITORY / MIXED, folder)
    content = json.loads((folder / "provenance.json").read_text())
    first = content["linears"][0]
    first["bits"] = 12 - first["bits"]  # 4 instead of 8, or 8 instead of 4
    (folder / "provenance.json").write_text(json.dumps(content))
    found = [each for each in audit(folder, complete=True).findings if each.code == "provenance-disagrees"]
    assert [each.where for each in found] == [f"provenance.json: linears: {first['name']}"]
    # GPTQModel reads quantize_config.json, and must find the same bits there.
    portable = json.loads((folder / "quantize_config.json").read_text())
    del portable["dynamic"]
    (folder / "quantize_config.json").write_text(json.dumps(portable))
    assert "quantize-config-disagrees" in [each.code for each in audit(folder, complete=True).findings]


@pytest.mark.slow
def test_another_mean_measures_nothing_again(
    tmp_path: Path, builds: Builds, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = builds.copy(tmp_path, TINY)
    result, messages = build(recipe, capsys)
    assert result.nothing_to_do
    before = built_files(tmp_path / "dist", ["main", MIXED])
    content = json.loads(recipe.read_text())
    content["variants"][1]["mix"]["mean"] = 6
    recipe.write_text(json.dumps(content))
    needed: list[int] = []
    monkeypatch.setattr(quantize_stage, "check_disk", lambda _, needed_bytes: needed.append(needed_bytes))
    result, messages = build(recipe, capsys)
    assert needed == [mixed_plan(RecipeFile.load(recipe)).weights_bytes], "nothing for losses that are kept"
    assert result.quantized == result.packed == (MIXED,)
    assert "at 8 bits" not in messages
    assert "mixed: bits of 12 groups of linears by loss: " in messages
    after = built_files(tmp_path / "dist", ["main", MIXED])
    assert before["main/model.safetensors"] == after["main/model.safetensors"]
    assert len(before[f"{MIXED}/model.safetensors"]) < len(after[f"{MIXED}/model.safetensors"])
    assert not list((tmp_path / "dist" / "work" / REPOSITORY).glob("*"))


@pytest.mark.slow
def test_a_killed_build_goes_on_and_makes_the_same_bytes(
    tmp_path: Path, builds: Builds, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when the losses are measured, and again in the second block of the mix; then losses change."""
    undisturbed = built_files(builds.built(TINY) / "dist", [MIXED])
    recipe = builds.copy(tmp_path, TINY)
    workspace = tiny_recipe.workspace(tmp_path / "dist")
    workspace.receipt_path(MIXED).unlink()
    for path in sorted(workspace.folder(MIXED).rglob("*"), reverse=True):
        path.unlink()
    (kept,) = (tmp_path / "dist" / "losses" / REPOSITORY).glob("*.json")
    measured = kept.read_bytes()
    kept.unlink()

    def killed(*_: object) -> VariantPlan:
        raise KeyboardInterrupt

    monkeypatch.setattr(quantize_stage, "with_bits", killed)
    with pytest.raises(KeyboardInterrupt):
        build(recipe, capsys)
    assert "mixed at 8 bits block 3/3" in capsys.readouterr().err
    assert kept.read_bytes() == measured
    monkeypatch.undo()

    def killed_in_block(load: Any, job: Any, solved: Any) -> QuantizedBlock:
        if job.index == 1:
            raise KeyboardInterrupt
        return quantize_block(load, job, solved)

    monkeypatch.setattr("packager.quantize.worker.quantize_block", killed_in_block)
    with pytest.raises(KeyboardInterrupt):
        build(recipe, capsys)
    assert "at 8 bits" not in capsys.readouterr().err
    monkeypatch.undo()
    # Other losses, as of another torch: other bits, so the finished block is of no use.
    content = json.loads(measured)
    content["losses"] = {name: loss * (1e6 if ".1." in name else 1) for name, loss in content["losses"].items()}
    kept.write_text(json.dumps(content))
    monkeypatch.setattr("packager.quantize.worker.quantize_block", killed_in_block)
    with pytest.raises(KeyboardInterrupt):
        build(recipe, capsys)
    assert "mixed: 1 finished block is not resumed: bits of linears differs" in capsys.readouterr().err
    monkeypatch.undo()
    kept.write_bytes(measured)
    build(recipe, capsys)
    assert built_files(tmp_path / "dist", [MIXED]) == undisturbed


def quantized(source: SourceModel, work: Path, made: Variant, *, ranks: int = 1) -> dict[str, LinearRecord]:
    """Quantize a variant whose bits are chosen; return its records by linear."""
    job = QuantizeJob(
        source=source, rows=token_rows(), stores={made: open_store(source, work, made)}, devices=(CPU,) * ranks
    )
    (records,) = quantize(job, lambda _: None).values()
    return {record.name: record for record in records}


def read_linears(folder: Path) -> dict[str, torch.Tensor]:
    reader = CheckpointReader(folder, None)
    return {name: reader(name) for name in reader.dequantized}


@pytest.mark.slow
@pytest.mark.parametrize("effort", ["standard", "high"])
def test_each_linear_is_solved_on_its_own_grid(effort: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one block, on one device and on two; a tuned linear stays on its grid."""
    grids: list[int] = []

    def tuned_linear(weight: torch.Tensor, solution: Solution, maxq: int) -> TunedLinear:
        grids.append(maxq)
        return TunedLinear(weight, solution, maxq)

    schedule = TuningSchedule(steps=2, checks=1, rate=3.0, scale_rate=0.3)
    monkeypatch.setattr("packager.quantize.tune_block.SCHEDULE", schedule)
    monkeypatch.setattr("packager.quantize.tune_block.TunedLinear", tuned_linear)
    save_model(tmp_path / "base", "llama")
    source = open_folder(tmp_path / "base")
    of_modules: dict[str, Bits] = {"mlp.gate_proj": 2, "mlp.up_proj": 2, "mlp.down_proj": 8}
    bits = tuple((linear.name, of_modules.get(linear.module, 3)) for linear in source.architecture.linears)
    made = variant(bits=3, effort=effort, mix=BitsMix(bits=(2, 3, 8), mean=3.5), linear_bits=bits, other_bits=(2, 8))
    records = quantized(source, tmp_path / "one", made)
    assert {name: record.bits for name, record in records.items()} == dict(bits)
    assert grids == ([] if effort == "standard" else [7, 7, 7, 7, 3, 3, 255] * 3)
    found = read_linears(tmp_path / "one" / "main" / "checkpoint")
    for name, width in bits:
        packed = CheckpointReader(tmp_path / "one" / "main" / "checkpoint", width)
        assert torch.equal(found[f"{name}.weight"], packed(f"{name}.weight"))
        base = source.read(f"{name}.weight").float()
        error = float((found[f"{name}.weight"].float() - base).norm() / base.norm())
        assert {2: 0.2, 3: 0.05, 8: 0.001}[width] < error < {2: 1.0, 3: 0.4, 8: 0.02}[width], (name, error)
    if effort == "standard":
        quantized(source, tmp_path / "two", made, ranks=2)
        assert read_linears(tmp_path / "two" / "main" / "checkpoint").keys() == found.keys()
        for name, weight in read_linears(tmp_path / "two" / "main" / "checkpoint").items():
            assert torch.equal(weight, found[name]), name


def test_the_card_says_which_linears_have_which_bits() -> None:
    """Together those that have them in the same blocks; blocks in a row as a range."""
    bits: dict[tuple[str, int], Bits] = {(f"self_attn.{name}_proj", block): 4 for name in "qkv" for block in range(6)}
    bits |= {("mlp.down_proj", block): 8 if block in (0, 1, 2, 5) else 4 for block in range(6)}
    records = tuple(
        LinearRecord(name=f"model.layers.{block}.{module}", loss=0.1, damp_percent=0.01, bits=each)
        for (module, block), each in bits.items()
    )
    assert chosen_bits(Provenance.model_construct(linears=records)) == (
        "4 bits: self_attn.q_proj, self_attn.k_proj, self_attn.v_proj in all blocks; mlp.down_proj in blocks 3 to 4",
        "8 bits: mlp.down_proj in blocks 0 to 2 and 5",
    )
    assert bits_in_words({"bits": 3}) == "3-bit"
    assert bits_of_parameters({"bits": 3}) == ("3",)
    assert bits_of_parameters({"bits": 2, "mix_bits": "2, 8"}) == ("2", "8")
    assert bits_in_words({"bits": 3, "mix_bits": "2, 3, 4", "mix_mean": 3.25}) == (
        "2, 3 and 4 bits, 3.25 on average at most"
    )


def test_a_mix_in_which_all_linears_have_one_number_of_bits_says_so() -> None:
    recipe = card_fixtures.llama_recipe()
    first, *others = card_fixtures.llama_receipts(recipe)
    cases: list[tuple[tuple[Bits, ...], str]] = [
        ((4, 4), "`main` may mix bits, and does not: "),
        ((3, 4), "`main` mixes bits: "),
    ]
    for widths, says in cases:
        linears = tuple(
            LinearRecord(name=f"model.layers.{block}.mlp.down_proj", loss=0.1, damp_percent=0.01, bits=bits)
            for block, bits in enumerate(widths)
        )
        parameters = {**first.parameters, "mix_bits": "3, 4", "mix_mean": 4}
        made = first.model_copy(update={"linears": linears, "parameters": parameters})
        assert says in render(recipe, [made, *others])


def test_bits_of_a_variant() -> None:
    made: Variant = variant(bits=3)
    assert made.bits_of("anything") == 3
    assert made.of_width(3) == replace(made, branch="main at 3 bits")
