"""Two engines behind one protocol: the parameters of each, the refusals, and the names on the card."""

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from packager.cli.plan_view import build_plan_json as plan_json
from packager.cli.plan_view import print_build_plan as print_plan
from packager.errors import MachineError, PlanError, RecipeError
from packager.pipeline.plan import make_plan
from packager.pipeline.release import cannot_build
from packager.pipeline.stage_keys import stage_keys
from packager.quantize.engines import auto_gptq, engine_problems, legacy_config
from packager.recipe.file import RecipeFile
from tests import tiny_recipe
from tests.fake_engine import FAKE_SCRIPT, Bench
from tests.known_models import known_architecture
from tests.sources import open_folder
from tests.tiny_models import CONFIGS, save_model, variant

FOREIGN = {"branch": "foreign", "engine": "auto-gptq"}

# config.json for transformers 4.40


@pytest.mark.parametrize("name", CONFIGS)
def test_the_old_config_means_the_same_or_the_model_is_refused(tmp_path, name):
    source = open_folder(save_model(tmp_path / "model", name))
    found = legacy_config.problems(source.config, source.architecture, 32)
    refused = {
        "llama-bias": "mlp_bias",
        "llama3-rope": "a rotary embedding of type llama3",
        "mistral-head-dim": "head_dim",
        "qwen3": "model_type qwen3",
    }
    if name in refused:
        assert len(found) == 1
        assert found[0].startswith(refused[name])
        return
    assert found == []
    legacy = legacy_config.legacy_config(source.config)
    assert legacy["rope_theta"] == 10000.0
    assert legacy["torch_dtype"] == "float16"
    assert not legacy.keys() & {"dtype", "rope_parameters", "rope_scaling", "auto_map"}
    for key in ("hidden_size", "num_key_value_heads", "rms_norm_eps", "tie_word_embeddings", "vocab_size"):
        assert legacy[key] == source.config[key]


CONFIG: Mapping[str, object] = {
    "model_type": "llama", "torch_dtype": "float16", "num_hidden_layers": 2, "vocab_size": 512, "hidden_size": 256,
    "intermediate_size": 640, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"rope_theta": 10000.0}),
        ({"rope_theta": 5e5}, {"rope_theta": 5e5}),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {"rope_theta": 5e5}),
        ({"rope_scaling": None, "rope_theta": 1e6}, {"rope_theta": 1e6}),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 4, "rope_theta": 5e5}},
            {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 4.0}},
        ),
        (
            {"rope_scaling": {"type": "dynamic", "factor": 2.0}},
            {"rope_theta": 10000.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        ),
    ],
)
def test_the_rotary_embedding_keeps_its_meaning(given, expected):
    config = {**CONFIG, **given}
    assert legacy_config.problems(config, known_architecture(config, "config.json"), 512) == []
    legacy = legacy_config.legacy_config(config)
    assert {key: legacy[key] for key in ("rope_theta", "rope_scaling") if key in legacy} == expected


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "a rotary embedding of type yarn"),
        ({"rope_scaling": {"rope_type": "linear"}}, "a rotary embedding of type linear"),
        (
            {"model_type": "mistral", "rope_scaling": {"type": "linear", "factor": 2.0}},
            "for mistral, transformers 4.40",
        ),
        ({"head_dim": 32}, "head_dim"),
        ({"intermediate_size": 648}, "mlp.gate_proj of 256 x 648: AutoGPTQ packs multiples of 32"),
        ({"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 256}, "sliding window of 256"),
    ],
)
def test_models_that_the_old_transformers_computes_differently_are_refused(given, problem):
    config = {**CONFIG, **given}
    (found,) = legacy_config.problems(config, known_architecture(config, "config.json"), 512)
    assert problem in found


def test_a_sliding_window_that_covers_the_rows_does_not_matter():
    for more in (
        {"use_sliding_window": True, "sliding_window": 512},
        {"use_sliding_window": False, "sliding_window": 8},
    ):
        config = {**CONFIG, "model_type": "qwen2", **more}
        assert legacy_config.problems(config, known_architecture(config, "config.json"), 512) == []


def test_the_old_window_shows_a_token_the_same_tokens():
    sliding = {"model_type": "mistral", "sliding_window": 16}
    assert legacy_config.legacy_config({**CONFIG, **sliding})["sliding_window"] == 15
    switched_off = {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 16}
    assert legacy_config.legacy_config({**CONFIG, **switched_off})["sliding_window"] is None


def test_only_variants_of_that_engine_are_refused():
    config = {**CONFIG, "mlp_bias": True}
    architecture = known_architecture(config, "config.json")
    found = engine_problems([variant(), variant(**FOREIGN)], config, architecture, 512)
    assert found == [
        "foreign: engine auto-gptq cannot quantize mlp_bias: transformers 4.40 silently drops these biases; "
        "use engine: native"
    ]


# recipe, plan, build


def with_variants(folder: Path, *variants: Mapping[str, Any], **changes: Any) -> Path:
    return tiny_recipe.write_all(folder, {"variants": [{"branch": "main"}, *variants], **changes})


def plan_text(recipe: Path) -> str:
    stream = io.StringIO()
    print_plan(make_plan(RecipeFile.load(recipe)), Console(file=stream, width=200))
    return stream.getvalue()


@pytest.mark.parametrize(
    ("fields", "problem"),
    [
        ({"scale_search": True}, "engine auto-gptq cannot do scale_search"),
        ({"act_order": "group"}, "engine auto-gptq cannot do act_order: group"),
        ({"refine": True}, "engine auto-gptq cannot do refine: true"),
        ({"effort": "high"}, "engine auto-gptq cannot do effort: high"),
        ({"damp_percent_limit": 0.5}, "engine auto-gptq never raises damping: damp_percent_limit has no effect"),
    ],
)
def test_parameters_of_our_engine_are_refused_for_autogptq(tmp_path, fields, problem):
    with pytest.raises(RecipeError) as caught:
        RecipeFile.load(with_variants(tmp_path, {**FOREIGN, **fields}))
    (found,) = caught.value.problems
    assert problem in found.message
    assert "engine: native" in found.hint


def test_a_parameter_from_the_defaults_is_refused_for_autogptq_too(tmp_path):
    path = with_variants(tmp_path, FOREIGN, defaults={"bits": 4, "group_size": 32, "scale_search": True})
    with pytest.raises(RecipeError, match="engine auto-gptq cannot do scale_search"):
        RecipeFile.load(path)
    RecipeFile.load(
        with_variants(tmp_path / "other", {**FOREIGN, "scale_search": False}, **{"defaults.scale_search": True})
    )


@pytest.mark.parametrize("fields", [{"act_order": "static"}, {"act_order": "full"}, {"desc_act": True}, {}], ids=str)
def test_autogptq_takes_the_act_orders_that_it_has(tmp_path, fields):
    RecipeFile.load(with_variants(tmp_path, {**FOREIGN, **fields}, defaults={"bits": 4, "group_size": 32}))


def test_an_unknown_engine_is_refused(tmp_path):
    with pytest.raises(RecipeError, match=r"variants\[1\]\.engine must be 'native' or 'auto-gptq'"):
        RecipeFile.load(with_variants(tmp_path, {"branch": "x", "engine": "autogptq"}))


def test_the_plan_shows_the_engine_only_where_it_is_not_ours(tmp_path):
    assert "Engine" not in plan_text(with_variants(tmp_path / "ours"))
    text = plan_text(with_variants(tmp_path / "both", FOREIGN))
    rows = [line.split() for line in text.splitlines() if line.startswith(("main  ", "foreign  "))]
    assert [row[-1] for row in rows[:2]] == ["native", "auto-gptq"]
    assert "note: engine auto-gptq makes foreign one after the other, on CUDA only" in text
    assert "its GPU memory is not estimated" in text


def test_the_planned_memory_is_that_of_our_own_engine_alone(tmp_path):
    ours, both = with_variants(tmp_path / "ours"), with_variants(tmp_path / "both", FOREIGN)
    own, mixed = (make_plan(RecipeFile.load(recipe)).memory for recipe in (ours, both))
    assert own is not None
    assert mixed == own
    assert "engine native" not in plan_text(ours)
    assert plan_text(both).count("engine native, ") == 4
    foreign = tiny_recipe.write_all(tmp_path / "foreign", {"variants": [{"branch": "main", "engine": "auto-gptq"}]})
    plan = make_plan(RecipeFile.load(foreign))
    assert plan.memory is None
    assert plan_json(plan)["memory"] is None
    assert "everything on the GPU" not in plan_text(foreign)


def test_the_plan_refuses_a_model_that_autogptq_cannot_quantize(tmp_path):
    recipe = tiny_recipe.write_all(tmp_path, {"variants": [{"branch": "main"}, FOREIGN]}, name="qwen3")
    with pytest.raises(PlanError, match="foreign: engine auto-gptq cannot quantize model_type qwen3: ") as caught:
        make_plan(RecipeFile.load(recipe))
    assert "main: engine" not in caught.value.why


def test_a_changed_script_repeats_only_autogptqs_variants(tmp_path, monkeypatch):
    recipe_file = RecipeFile.load(with_variants(tmp_path, FOREIGN))

    def keys() -> list[str]:
        return [stage_keys(recipe_file, plan)["weights"] for plan in make_plan(recipe_file).variants]

    before = keys()
    monkeypatch.setattr("packager.quantize.engines.auto_gptq_digest", lambda: "another")
    after = keys()
    assert before[0] == after[0]
    assert before[1] != after[1]


def test_without_cuda_a_build_ends_before_anything_is_read(tmp_path):
    recipe = with_variants(tmp_path, FOREIGN)
    with pytest.raises(MachineError, match="engine auto-gptq needs a CUDA GPU") as caught:
        tiny_recipe.build(recipe, tmp_path / "dist")
    assert "computes on cpu" in caught.value.why
    assert "engine: native" in caught.value.hint
    assert not (tmp_path / "dist" / "builds").exists()
    assert not list((tmp_path / "dist").rglob("*.safetensors"))


def test_a_release_gives_the_reason_for_leaving_such_a_recipe_out(tmp_path):
    plan = make_plan(RecipeFile.load(with_variants(tmp_path, FOREIGN)))
    assert cannot_build(plan, tiny_recipe.options(tmp_path)) == "needs a CUDA GPU for foreign, made by engine auto-gptq"


@pytest.mark.slow
def test_a_build_with_both_engines_names_the_engine_of_each_variant(tmp_path, monkeypatch):
    """The fake engine's zeros are not good weights, but they fill a whole checkpoint with card and receipt."""
    bench = Bench(tmp_path / "bench", monkeypatch)
    (tmp_path / "bench" / "fake.py").write_text(FAKE_SCRIPT.format(behaviour="", seen=str(tmp_path / "seen.json")))
    monkeypatch.setattr(auto_gptq, "SPEC", replace(auto_gptq.SPEC, script=bench.folder / "fake.py"))
    monkeypatch.setattr(auto_gptq.AutoGptq.__init__, "__defaults__", (auto_gptq.SPEC, 60.0))
    monkeypatch.setattr("packager.quantize.engines.needs_cuda", lambda _: False)
    tiny_recipe.build(with_variants(tmp_path / "recipe", FOREIGN), tmp_path / "dist")
    provenances = {
        branch: json.loads((tiny_recipe.workspace(tmp_path / "dist").folder(branch) / "provenance.json").read_text())
        for branch in ("main", "foreign")
    }
    assert provenances["main"]["made_with"].startswith("gptq-packager ")
    assert provenances["foreign"]["made_with"] == "AutoGPTQ 0.7.1"
    assert provenances["foreign"]["parameters"]["engine"] == "auto-gptq"
    assert provenances["foreign"]["versions"]["auto-gptq"] == "0.7.1"
    card = (tiny_recipe.workspace(tmp_path / "dist").folder("main") / "README.md").read_text()
    (row,) = [line for line in card.splitlines() if line.startswith("| `foreign` |") and line.endswith("0.7.1 |")]
    assert "| AutoGPTQ 0.7.1 |" in row
    assert "Made with AutoGPTQ 0.7.1 (`foreign`)." in card
