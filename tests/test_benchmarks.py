"""The benchmarks: a model made from nothing, our engine run on it, and peers that are not there named as such."""

import importlib
import json
import math
import os
import threading
from collections.abc import Iterator
from concurrent.futures import wait
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from packager.errors import LoaderError
from packager.inputs.texts import prepare
from packager.pipeline.lock_recipes import lock_recipes
from packager.pipeline.plan import make_plan
from packager.prove import evaluate
from packager.prove.probes import ProbeResult
from packager.prove.verify import references_of
from packager.receipt import LoaderRecord
from packager.recipe.file import RecipeFile
from packager.system.files import sha256_file
from tests import tiny_recipe
from tests.sources import open_folder
from tests.tiny_decoders import tiny_decoder

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("in_process")]

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
DEMO = BENCHMARKS.parent / "recipes"
TINY = ["--layers=2", "--hidden=128", "--intermediate=256", "--heads=2", "--kv-heads=1", "--vocab=1024", "--rows=4",
        "--seq-len=32", "--device=cpu", "--no-warm-up"]  # fmt: skip
BRANCHES = ("main", "gptq-4bit-32g-actorder_True", "gptq-4bit-64g-actorder_True", "gptq-4bit-128g-actorder_True")


@pytest.fixture(scope="module")
def modules() -> Iterator[Any]:
    """The benchmarks' modules, which are no package: each command runs as a script."""
    names = ("make_model", "processes", "tables", "quality_table", "speed", "quality", "several_gpus", "cuda_loaders",
             "cuda_loaders_table",
             "longer_demo", "real_models", "shared_text", "block_profile",
             "massive_tokens")  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def made(modules: Any, **changes: Any) -> Any:
    shape = modules.make_model.Shape(hidden=128, intermediate=256, heads=2, kv_heads=1, layers=2, vocab=1024)
    fields = {"shape": shape, "rows": 6, "seq_len": 32, "seed": 0, "shard_bytes": 300_000, "on_gpu": False}
    return modules.make_model.ModelSpec(**{**fields, **changes})


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted((folder / "model").glob("*.safetensors")):
        found |= load_file(path)
    return found


def row(modules: Any, title: str = "ours", *, ours: bool = True, variants: int = 1, **fields: Any) -> Any:
    result = {"versions": {"transformers": "5", "torch": "2"}, "host_bytes": 10**9, **fields}
    outcome = modules.processes.Outcome(status="ok", result=result)
    return modules.tables.Row(title=title, variants=variants, layers=4, ours=ours, outcome=outcome)


def printed(table: Any) -> str:
    console = Console(width=250, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def test_a_made_model_has_the_shapes_of_its_recipe(modules: Any, tmp_path: Path) -> None:
    assert modules.make_model.make(tmp_path, made(modules)) > 0
    recipe_file = RecipeFile.load(tmp_path / "recipe.yaml")
    prompt = recipe_file.lock.prompt
    assert prompt is not None
    assert (prompt.text, prompt.added) == ("<s>[INST] {prompt} [/INST]", "<s>"), "so the card may leave out <s>"
    plan = make_plan(recipe_file)
    assert tuple(each.variant.branch for each in plan.variants) == BRANCHES
    source = open_folder(tmp_path / "model", base_id="benchmark/random-llama")
    assert len({stored.path for stored in source.tensors.values()}) > 2
    texts = prepare(recipe_file, source)
    assert texts.calibration.ids.shape == (6, 32)
    assert texts.evaluation.ids.shape[1] == 32
    found = weights(tmp_path)
    assert found.keys() == source.tensors.keys()
    assert torch.equal(found["model.norm.weight"], torch.ones(128, dtype=torch.float16))
    values = torch.cat([tensor.flatten().float() for tensor in found.values() if tensor.dim() == 2])
    assert abs(float(values.std()) - 0.02) < 2e-4
    assert abs(float(values.mean())) < 2e-4


@pytest.mark.parametrize("experts", [0, 4])
def test_a_made_lock_is_the_one_that_packager_makes(modules: Any, tmp_path: Path, experts: int) -> None:
    spec = made(modules)
    modules.make_model.make(tmp_path, replace(spec, shape=replace(spec.shape, experts=experts, top_k=2)))
    (result,) = lock_recipes([tmp_path / "recipe.yaml"], lambda _: None, check=True)
    assert (result.status, result.diff) == ("unchanged", ())


def test_a_config_gives_its_shape_to_the_model(modules: Any, tmp_path: Path) -> None:
    tiny_decoder("deepseek_v3", tmp_path / "tiny")
    config = (tmp_path / "tiny" / "config.json").read_text()
    shape = modules.make_model.Shape(layers=3, vocab=1024, config=config)
    modules.make_model.make(tmp_path / "made", made(modules, shape=shape))
    model = json.loads((tmp_path / "made" / "recipe.lock.json").read_text())["model"]
    wanted = json.loads(config)
    assert (model["model_class"], model["hidden_size"]) == ("DeepseekV3ForCausalLM", wanted["hidden_size"])
    assert f"model.layers.2.mlp.experts.{wanted['n_routed_experts'] - 1}.up_proj.weight" in weights(tmp_path / "made")
    assert "model.layers.3.input_layernorm.weight" not in weights(tmp_path / "made")


def test_a_seed_gives_the_same_model_and_another_seed_another(modules: Any, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        modules.make_model.make(tmp_path / name, made(modules, seed=seed))
    first, again, other = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
    texts = [(tmp_path / name / "calibration.jsonl").read_text() for name in "abc"]
    assert texts[0] == texts[1] != texts[2]


def test_an_existing_model_is_not_made_again_unless_it_differs(modules: Any, tmp_path: Path) -> None:
    modules.make_model.make(tmp_path, made(modules))
    assert modules.make_model.make(tmp_path, made(modules)) == 0.0
    assert modules.make_model.make(tmp_path, made(modules, shard_bytes=10**9)) > 0
    assert [path.name for path in (tmp_path / "model").glob("*.safetensors")] == ["model-00001-of-00001.safetensors"]


@pytest.mark.slow
def test_speed_runs_our_engine_and_names_peers_that_are_not_installed(
    modules: Any, tmp_path: Path, capsys: Any
) -> None:
    paths = [f"--work={tmp_path}", f"--cache={tmp_path}", f"--json={tmp_path / 'out.json'}"]
    status = modules.speed.main([*TINY, *paths, "--peers=autogptq"])
    printed_out, errors = capsys.readouterr()
    assert status == 0, errors
    report = json.loads((tmp_path / "out.json").read_text())
    one, four, fastest, defaults = report["results"]
    assert (one["permutations"], four["permutations"], four["layers"]) == (1, 4, 2)
    assert one["status"] == four["status"] == "ok"
    assert four["result"]["variants"] == list(BRANCHES)
    assert four["result"]["stages"].keys() >= {"plan", "source", "calibrate", "quantize", "pack and audit"}
    assert 0 < four["result"]["stages"]["quantize"] < four["result"]["disk_to_disk_s"]
    assert len(four["result"]["marks"]) == 2
    assert [peer["engine"] for peer in (fastest, defaults)] == ["AutoGPTQ, fastest", "AutoGPTQ, defaults"]
    for peer in (fastest, defaults):
        assert peer["status"] == "not installed"
        assert "auto_gptq" in peer["reason"]
    assert "not installed" in printed_out
    assert report["settings"]["shape"]["hidden"] == 128
    assert str(tmp_path) not in json.dumps(report["settings"])


@pytest.mark.slow
def test_full_runs_our_engine_alone_to_the_checkpoints(modules: Any, tmp_path: Path, capsys: Any) -> None:
    assert (
        modules.speed.main(
            [*TINY, "--full", "--also=positive", f"--work={tmp_path}", f"--json={tmp_path / 'out.json'}"]
        )
        == 0
    )
    results = json.loads((tmp_path / "out.json").read_text())["results"]
    assert {each["permutations"] for each in results} == {4}
    assert [each["engine"] for each in results] == ["ours, 4 at once", "ours, 4 at once, positive"]
    written = {
        name: json.loads((tmp_path / "model" / f"{name}-recipe.yaml").read_text()) for name in ("defaults", "positive")
    }
    assert [each["defaults"].get("scale_search") for each in written.values()] == [None, True]
    receipts = (tmp_path / "dist" / "model" / "receipts").rglob("*.json")
    parameters = [json.loads(path.read_text())["provenance"]["parameters"] for path in receipts]
    assert [each["scale_search"] for each in parameters] == [True] * 4
    assert "all, disk to disk" in capsys.readouterr().out
    builds = tmp_path / "dist" / "model" / "builds" / "benchmark" / "random-llama-GPTQ"
    assert {path.name for path in builds.iterdir() if not path.name.startswith(".")} == set(BRANCHES)


def evaluated(name: str, forward: float, blocks: float, compare: float) -> dict[str, Any]:
    return {"name": name, "forward_s": forward, "blocks_s": blocks, "compare_s": compare}


@pytest.mark.parametrize("status", ["ok", "failed"])
def test_evaluate_measures_what_full_made_and_computes_the_time_of_40_layers(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, status: str
) -> None:
    asked: list[Any] = []
    specs: dict[str, Any] = {}
    result = {
        "seconds": 10.0, "layers": 8, "held_out_tokens": 131_072, "seq_len": 2048,
        "models": [evaluated("fp16", 3.0, 2.0, 0.0), evaluated("main", 4.0, 1.0, 1.5)],
        "settings": {"gpu_memory_bytes": 24 * 10**9}, "planned_device_bytes": 6_400_000_000,
        "planned_host_bytes": 4_600_000_000, "host_bytes": 5 * 10**9, "host_before_bytes": 10**9,
        "gpu_allocated_beyond_bytes": 6_300_000_000, "gpu_reserved_beyond_bytes": 7_100_000_000,
    }  # fmt: skip
    quantized = {"seconds": 8.0, "versions": {"transformers": "5", "torch": "2"}, "stages": {}, "disk_to_disk_s": 9.0}

    def run_jobs(engine: Any, jobs: Any, paths: Any, folder: Path, *, timeout_s: float) -> Any:
        asked.append((engine.script, jobs))
        if engine.script == "ours.py":
            return [modules.processes.Outcome(status="ok", result={**quantized, "host_bytes": 1})]
        return [modules.processes.Outcome(status=status, reason="no memory", result=result)]

    monkeypatch.setattr(modules.speed, "run_jobs", run_jobs)
    monkeypatch.setattr(modules.speed, "_make", lambda spec, folder, *_: specs.update({folder.name: spec}))
    arguments = [*TINY, "--layers=8", "--full", "--evaluate", "--gpu-memory=24GB", f"--work={tmp_path}"]
    made = modules.speed.main([*arguments, "--held-out-tokens=96", f"--json={tmp_path / 'out.json'}"])
    (first, jobs), (second, same) = asked
    assert (first, second, made) == ("ours.py", "our_evaluation.py", int(status == "failed"))
    assert jobs == same
    assert jobs[0]["gpu_memory_bytes"] == 24 * 10**9
    text = modules.make_model.recipe_of(specs["model"])["evaluation"]
    assert (text["num_tokens"], text["seq_len"]) == (96, 32)
    (row,) = json.loads((tmp_path / "out.json").read_text())["results"]
    assert row["evaluation"] == {"status": status, "reason": "no memory", "result": result}
    shown = capsys.readouterr().out
    if status == "failed":
        assert "ours, 4 at once: evaluation failed: no memory" in shown
        return
    lines = [[cell.strip() for cell in line.split("│")] for line in shown.splitlines() if line.startswith("│")]
    assert lines[-3][1:-1] == ["fp16", "3.000", "0.250", "1.000", "0.000", "11.000"]
    assert lines[-2][1:-1] == ["main", "4.000", "0.125", "3.000", "1.500", "9.500"]
    assert lines[-1][1:-1] == ["stage", "10.0", "", "1.500", "", "22.0"]
    caption = " ".join(shown.split())
    assert "held: 6.3 GB allocated, 7.1 GB reserved; planned 6.4 GB; limit 24.0 GB." in caption
    assert "Host peak 5.0 GB, beyond the start 4.0 GB; planned 4.6 GB." in caption


def test_the_default_is_to_measure_on_the_tokens_of_a_recipe(modules: Any) -> None:
    assert modules.speed.parse(["--full", "--evaluate"]).spec.held_out_tokens == 131_072
    assert modules.speed.parse(["--full"]).spec.held_out_tokens == 0


def test_the_stage_evaluate_is_timed_model_by_model(
    modules: Any, tmp_path: Path, builds: tiny_recipe.Builds, monkeypatch: pytest.MonkeyPatch
) -> None:
    builds.copy(tmp_path)
    receipts = [tiny_recipe.workspace(tmp_path / "dist").receipt_path(branch) for branch in tiny_recipe.BRANCHES]
    for path in receipts:
        receipt = json.loads(path.read_text())
        del receipt["stages"]["evaluate"]
        path.write_text(json.dumps(receipt))
    monkeypatch.syspath_prepend(str(BENCHMARKS / "peers"))
    script = importlib.import_module("our_evaluation")
    job = {"recipe": str(tmp_path / "recipe.yaml"), "dist": str(tmp_path / "dist"), "device": "cpu",
           "gpu_memory_bytes": None}  # fmt: skip
    original = evaluate.run_base
    result = script.evaluate(job)
    assert evaluate.run_base is original
    assert [model["name"] for model in result["models"]] == ["fp16", *tiny_recipe.BRANCHES]
    for model in result["models"]:
        assert 0 < model["blocks_s"] < model["forward_s"]
        assert (model["compare_s"] > 0) == (model["name"] != "fp16")
    assert sum(model["forward_s"] + model["compare_s"] for model in result["models"]) < result["seconds"]
    assert (result["layers"], result["held_out_tokens"]) == (3, 256)
    plan = make_plan(RecipeFile.load(tmp_path / "recipe.yaml")).evaluation.cpu
    assert (result["planned_device_bytes"], result["planned_host_bytes"]) == (plan.device_bytes, plan.host_bytes)
    assert all("evaluate" in json.loads(path.read_text())["stages"] for path in receipts)


def test_an_engine_that_takes_too_long_fails_the_run(modules: Any, tmp_path: Path, capsys: Any) -> None:
    assert modules.speed.main([*TINY, f"--work={tmp_path}", "--peers=", "--timeout=0.2"]) == 1
    assert "failed: it took over 0.2 s" in capsys.readouterr().out


def test_a_killed_process_is_a_failed_outcome(modules: Any, tmp_path: Path) -> None:
    script = tmp_path / "dies.py"
    script.write_text("import os\nprint('on my way', flush=True)\nos.kill(os.getpid(), 9)\n")
    engine = modules.processes.Engine(name="dies", title="Dies", script=os.path.relpath(script, BENCHMARKS / "peers"))
    paths = modules.processes.EnginePaths(pythons={}, paths={}, cache=tmp_path)
    (outcome,) = modules.processes.run_jobs(engine, [{}], paths, tmp_path / "jobs", timeout_s=60)
    assert outcome.status == "failed"
    assert outcome.reason == "exit status -9: on my way"


def test_a_peer_gets_its_own_paths_first_and_no_secrets(modules: Any, tmp_path: Path) -> None:
    peer = modules.processes.PEERS["gptqmodel"]
    other = Path("/usr/bin/python3")
    environ = {"PYTHONPATH": "/inherited", "HF_TOKEN": "secret", "HOME": "/root"}
    here = modules.processes.EnginePaths(pythons={}, paths={"gptqmodel": [tmp_path]}, cache=tmp_path)
    found = here.environ(peer, environ)
    assert found["PYTHONPATH"].split(os.pathsep) == [str(tmp_path), "/inherited"]
    assert "HF_TOKEN" not in found
    assert found["HF_HUB_OFFLINE"] == "1"
    elsewhere = modules.processes.EnginePaths(pythons={"gptqmodel": other}, paths={}, cache=tmp_path)
    assert elsewhere.python(peer) == other
    assert "PYTHONPATH" not in elsewhere.environ(peer, environ)


def test_ratios_are_per_layer_and_permutation_without_the_peers_packing(modules: Any) -> None:
    ours, four = row(modules, seconds=4.0, marks=[1.0, 2.0, 3.0, 9.0]), row(modules, variants=4, seconds=8.0, marks=[])
    peer = row(modules, "AutoGPTQ", ours=False, seconds=50.0, packing_s=10.0, marks=[0.0, 10.0, 20.0, 31.0, 32.0])
    assert (ours.per_layer, four.per_layer, peer.per_layer) == (1.0, 0.5, 10.0)
    assert (ours.later_layers, four.later_layers, peer.later_layers) == (1.0, None, 10.0)
    text = printed(modules.tables.speed_table([ours, four, peer]))
    cells = [cell.strip() for cell in next(line for line in text.splitlines() if "AutoGPTQ" in line).split("│")]
    assert cells[2:9] == ["1", "40.0", "10.0", "10.00", "10.00", "10.00", "20.00"]


@pytest.mark.parametrize(("text", "size"), [("24GB", 24 * 10**9), ("22GiB", 22 * 2**30), ("1.5 gb", 1_500_000_000)])
def test_sizes_are_parsed(modules: Any, text: str, size: int) -> None:
    assert modules.speed.parse([f"--gpu-memory={text}"]).gpu_memory_bytes == size


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("speed", ["--gpu-memory=much"], "is not a size such as 24GB"),
        ("speed", ["--peers=autogptq,other"], "no such peer: other"),
        ("speed", ["--peer-path=autogptq=/does/not/exist"], "a path that exists"),
        ("speed", ["--evaluate"], "--evaluate measures the checkpoints of --full"),
        ("speed", ["--full", "--evaluate", "--held-out-tokens=9"], "9 are no row of --seq-len 2048"),
        ("quality", ["--ours=Search"], "expected a name"),
        ("quality", ["--ours=search:scale_search=yes"], "expected a name"),
    ],
)
def test_wrong_options_are_refused(modules: Any, script: str, arguments: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit) as refused:
        getattr(modules, script).parse(arguments)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [1, 2])
def test_quality_measures_the_checkpoint_of_every_engine(
    modules: Any, tmp_path: Path, parallel: int, capsys: Any
) -> None:
    (tmp_path / "recipes").mkdir()
    recipe = tiny_recipe.write_all(tmp_path / "recipes")
    options = [
        "--seeds=0,1",
        "--permutations=32,16:full,16:static",
        "--device=cpu",
        "--peers=autogptq",
        f"--cache={tmp_path}",
        f"--parallel={parallel}",
        "--held-out-tokens=128",
    ]
    paths = [f"--recipe={recipe}", f"--work={tmp_path / 'work'}", f"--json={tmp_path / 'out.json'}"]
    assert (
        modules.quality.main([*options, *paths, "--ours=plain:scale_search=false", "--ours=search:scale_search=true"])
        == 0
    )
    printed_at_the_end = capsys.readouterr().out
    assert modules.quality.main([f"--read={tmp_path / 'out.json'}"]) == 0
    tables = capsys.readouterr().out
    assert "Act orders" in tables
    assert printed_at_the_end.endswith(tables), "the file holds everything that the tables show"
    report = json.loads((tmp_path / "out.json").read_text())
    assert report["held_out_tokens"] == 128
    measurements = report["measurements"]
    keys = ("engine", "group_size", "act_order", "seed")
    found = {tuple(each[key] for key in keys): each["quality"] for each in measurements}
    assert len(found) == len(measurements) == 2 * 3 * 2 + 2 * 2  # AutoGPTQ gets no static order
    kl = {key: quality["kl_divergence"] for key, quality in found.items() if quality is not None}
    assert len(kl) == 2 * 3 * 2
    assert len(set(kl.values())) == len(kl)
    assert all(0 < value < 1 for value in kl.values())
    assert {each["status"] for each in measurements if each["engine"] == "AutoGPTQ"} == {"not installed"}


def test_act_orders_stand_side_by_side_with_their_standard_errors(modules: Any) -> None:
    def measured(act_order: str, seed: int, kl: float) -> Any:
        return modules.quality_table.Measurement(
            engine="ours", group_size=64, act_order=act_order, seed=seed, ours=True,
            outcome=modules.processes.Outcome(status="ok"), quality=SimpleNamespace(kl_divergence=kl),
        )  # fmt: skip

    none = [measured("none", seed, kl) for seed, kl in enumerate((1.0, 2.0, 3.0))]
    full = [measured("full", seed, kl) for seed, kl in enumerate((0.5, 0.8, 1.8))]
    text = printed(modules.quality_table.order_table([*full, *none, measured("group", 7, 0.25)]))
    # 1 / sqrt(3); ratios 0.5, 0.4, 0.6: 0.1 / sqrt(3). A seed without none has no ratio.
    for cell in ("2.000000 +- 0.577350", "1.033333 +- 0.392994", "0.500 +- 0.058", "0.250000"):
        assert cell in text
    assert "static" not in text


def test_ours_is_compared_with_each_peer_seed_by_seed_and_what_is_alike_is_marked(modules: Any) -> None:
    def measured(engine: str, order: str, seed: int, kl: float, seconds: float, size: int = 64) -> Any:
        return modules.quality_table.Measurement(
            engine=engine, group_size=size, act_order=order, seed=seed, ours=engine == "mine",
            outcome=modules.processes.Outcome(status="ok", result={"seconds": seconds}),
            quality=SimpleNamespace(kl_divergence=kl, rows=None),
        )  # fmt: skip

    mine = [measured("mine", "static", seed, kl, 2.0) for seed, kl in enumerate((0.8, 1.8, 2.4))]
    full = [measured("mine", "full", seed, 1.0, 3.0) for seed in range(2)]
    one = [measured("one", "none", seed, kl, 40.0) for seed, kl in enumerate((1.0, 2.0, 3.0))]
    two = [measured("two", "none", seed, kl, 5.0) for seed, kl in enumerate((1.0, 1.5, 2.4))]
    others = [measured("one", "none", 0, 9.0, 9.0, size=32), measured("one", "full", 0, 0.5, 9.0)]
    lines = printed(modules.quality_table.peers_table([*mine, *full, *one, *two, *others])).splitlines()
    static = next(line for line in lines if "64g static" in line)
    # Ratios 0.8, 0.9, 0.8 over one's; 0.8, 1.2, 1.0 over two's, whose mean is 1.
    assert "0.833 +- 0.033, max 0.900" in static
    assert "1.000 +- 0.115 ~, max 1.200" in static
    assert "2.0 s" in static
    beside = lines[lines.index(static) + 1]
    assert beside.index("40.0 s") < beside.index("5.0 s")
    assert "2.000 " in next(line for line in lines if "64g full" in line), "full order with full order, where there is"


def test_the_error_of_a_ratio_is_over_the_held_out_rows_too(modules: Any) -> None:
    def measured(engine: str, seed: int, rows: tuple[float, ...]) -> Any:
        return modules.quality_table.Measurement(
            engine=engine, group_size=64, act_order="none", seed=seed, ours=engine == "mine",
            outcome=modules.processes.Outcome(status="ok"),
            quality=SimpleNamespace(kl_divergence=sum(rows) / 4, rows=SimpleNamespace(kl_divergence=rows)),
        )  # fmt: skip

    def cell(*seeds: tuple[tuple[float, ...], tuple[float, ...]]) -> str:
        measurements = [
            measured(engine, seed, rows)
            for seed, both in enumerate(seeds)
            for engine, rows in zip(("mine", "one"), both, strict=True)
        ]
        lines = printed(modules.quality_table.peers_table(measurements)).splitlines()
        return next(line for line in lines if "64g" in line)

    # Ratio 0.5; residuals 0.5, 0, -0.5, 0, whose standard deviation over 2 is 0.204, over a mean of 2.
    one = ((1.5, 1.0, 0.5, 1.0), (2.0, 2.0, 2.0, 2.0))
    assert "0.500 +- 0.102 " in cell(one)
    assert "0.500 +- 0.102, max 0.500" in cell(one, one), "seeds share the rows: they are no further draws of text"
    # Ratios 0.5 and 0.7, an error of 0.1 over the seeds. Mean rows 1.7, 1.2, 0.7, 1.2 over 2: residuals as before.
    two = ((1.9, 1.4, 0.9, 1.4), (2.0, 2.0, 2.0, 2.0))
    assert "0.600 +- 0.143, max 0.700" in cell(one, two)
    # What rows share leaves the ratio's error alone.
    assert "+-" not in cell(((0.5, 1.0, 1.5, 2.0), (1.0, 2.0, 3.0, 4.0)))


def test_the_better_of_the_two_gptq_engines_is_that_of_each_seed(modules: Any) -> None:
    def measured(engine: str, seed: int, kl: float) -> Any:
        return modules.quality_table.Measurement(
            engine=engine, group_size=64, act_order="none", seed=seed, ours=engine == "mine",
            outcome=modules.processes.Outcome(status="ok", result={"seconds": 7.0}),
            quality=SimpleNamespace(kl_divergence=kl, rows=None),
        )  # fmt: skip

    mine = [measured("mine", seed, 1.0) for seed in range(2)]
    peers = [
        measured(engine, seed, kl)
        for engine, each in (("AutoGPTQ", (2.0, 5.0)), ("GPTQModel", (4.0, 2.5)))
        for seed, kl in enumerate(each)
    ]
    text = printed(modules.quality_table.peers_table([*mine, *peers]))
    # 1 / 2 and 1 / 2.5.
    assert "0.450 +- 0.050, max 0.500" in next(line for line in text.splitlines() if "64g" in line)
    alone = printed(modules.quality_table.peers_table([*mine, *peers[:2]]))
    assert "the better" in " ".join(text.split())
    assert "the better" not in " ".join(alone.split())


def test_the_longer_demo_keeps_held_out_documents_apart_from_the_calibration_text(modules: Any, tmp_path: Path) -> None:
    recipe = modules.longer_demo.make(tmp_path / "long", documents=900)
    assert recipe.read_bytes() == (DEMO / recipe.name).read_bytes()
    long, shipped = (
        (folder / "assets" / "demo-llama" / "text" / "evaluation.jsonl").read_text(encoding="utf-8").splitlines()
        for folder in (tmp_path / "long", DEMO)
    )
    prompt = "You are a telegraph. Words cost money, so give only the answer."
    assert any(prompt in each for each in shipped)
    assert not any(prompt in each for each in long)
    assert 400 < len(long) == len(set(long)) < 800
    assert set(long) - set(shipped)
    assert long[:20] == [each for each in shipped if each in long][:20]


def test_shared_lines_are_those_of_a_shared_window_and_whole_lines(modules: Any) -> None:
    numbers = [f"n{number}" for number in range(24)]
    known = modules.shared_text.CalibrationText([" ".join(numbers), "A line, of five words.\nOnly four words here"])
    parts = [" ".join(numbers[3:9]), " ".join(numbers[9:15]) + " end", "a line of FIVE words", "only four words here"]
    assert known.shared_lines("\n".join(["begin", *parts])) == {1, 2, 3}
    assert known.shared_lines(" ".join(numbers[3:14])) == set(), "eleven words are no window"
    assert known.shared_lines(" ".join(numbers[3:15])) == {0}


@pytest.mark.slow
def test_longer_texts_of_a_real_model_share_no_paragraph(modules: Any, tmp_path: Path) -> None:
    for name, long in (("short", False), ("long", True)):
        (tmp_path / name).mkdir()
        modules.real_models.write_texts(tmp_path / name, long=long)

    def paragraphs(folder: str, text: str) -> set[str]:
        lines = (tmp_path / folder / f"{text}.jsonl").read_text(encoding="utf-8").splitlines()
        return {" ".join(part.split()) for line in lines for part in json.loads(line)["text"].split("\n\n")} - {""}

    assert not paragraphs("long", "calibration") & paragraphs("long", "evaluation")
    short = paragraphs("short", "calibration") | paragraphs("short", "evaluation")
    assert len(paragraphs("long", "calibration") | paragraphs("long", "evaluation")) > 2 * len(short)


def test_what_is_made_is_measured_in_order_before_more_of_ours(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rest = threading.Event()

    def peer(settings: Any, build: Any, engine: Any, seed: int, permutation: Any, environ: Any) -> Any:
        if permutation[0] == 32:
            assert rest.wait(10)
        return f"peer {permutation[0]}"

    def ours(settings: Any, builds: Any) -> Iterator[str]:
        yield "ours 1"
        yield "ours 2"
        rest.set()

    monkeypatch.setattr(modules.quality, "_peer", peer)
    monkeypatch.setattr(modules.quality, "_ours", ours)
    begun: list[Any] = []
    begin = modules.quality._begin_peers

    def waited(*arguments: Any) -> Any:
        begun[:] = begin(*arguments)
        wait(begun[1:], timeout=10)
        return begun

    monkeypatch.setattr(modules.quality, "_begin_peers", waited)
    options = ["--seeds=0", "--permutations=32,16,8", "--peers=autogptq", "--device=cpu", f"--work={tmp_path}"]
    beside = modules.quality.parse([*options, "--parallel=3"])
    made = list(modules.quality._checkpoints(beside, {0: None}))
    assert made == ["ours 1", "peer 16", "peer 8", "ours 2", "peer 32"]
    rest.set()
    after = list(modules.quality._checkpoints(modules.quality.parse(options), {0: None}))
    assert after == ["ours 1", "ours 2", "peer 32", "peer 16", "peer 8"]


def test_peers_are_compared_without_ours(modules: Any, tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    recipe = tiny_recipe.write_all(tmp_path / "recipes")
    paths = [f"--recipe={recipe}", f"--work={tmp_path / 'work'}", f"--json={tmp_path / 'out.json'}"]
    options = ["--seeds=0", "--permutations=32", "--device=cpu", "--peers=autogptq", f"--cache={tmp_path}"]
    assert modules.quality.main([*options, *paths, "--ours=none"]) == 0
    (only,) = json.loads((tmp_path / "out.json").read_text())["measurements"]
    assert (only["engine"], only["status"]) == ("AutoGPTQ", "not installed")


def test_massive_tokens_count_as_much_as_the_cap_says_and_others_as_before(modules: Any) -> None:
    inputs = torch.tensor([[[3.0, 4.0], [0.0, 5.0], [300.0, -400.0]]])
    found = modules.massive_tokens.capped(inputs, 4.0)
    assert torch.equal(found[:, :2], inputs[:, :2])
    torch.testing.assert_close(found[:, 2], torch.tensor([[12.0, -16.0]]))
    assert modules.massive_tokens.capped(inputs, float("inf")) is inputs


def test_massive_tokens_are_in_the_h_of_no_cap_alone(modules: Any) -> None:
    torch.manual_seed(0)
    inputs = torch.randn(4, 16, 8)
    inputs[:, 0] *= 1000
    model = torch.nn.Sequential(torch.nn.Identity(), torch.nn.Linear(8, 8))
    model.forward = lambda rows: model[1](inputs[: len(rows)])  # type: ignore[method-assign]
    H, largest = modules.massive_tokens.hessians(model, ["1"], [math.inf, 4.0], torch.zeros(4, 16))
    assert H["1", math.inf].diagonal().mean() > 1000 * H["1", 4.0].diagonal().mean()
    assert 100 < largest["1"] < 10_000


def test_peers_side_by_side_are_spread_over_the_gpus(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[str] = []
    both = threading.Barrier(2, timeout=10)

    def run_jobs(engine: Any, jobs: Any, paths: Any, folder: Path, *, timeout_s: float, environ: Any) -> Any:
        both.wait()  # two at a time, no fewer
        used.append(environ["CUDA_VISIBLE_DEVICES"])
        return [modules.processes.Outcome(status="ok", result={"folder": str(folder)})]

    monkeypatch.setattr(modules.quality, "run_jobs", run_jobs)
    settings = modules.quality.parse(
        ["--seeds=3,4", "--permutations=32,16:static,16:full", "--parallel=2", "--gpus=5,6", f"--work={tmp_path}",
         "--peers=autogptq", "--ours=none", "--device=cpu"]
    )  # fmt: skip
    build = SimpleNamespace(source=SimpleNamespace(folder=tmp_path))
    made = list(modules.quality._checkpoints(settings, {3: build, 4: build}))
    assert {(each.seed, each.permutation) for each in made} == {
        (seed, permutation) for seed in (3, 4) for permutation in ((32, "none"), (16, "full"))
    }
    assert len({each.folder for each in made}) == len({each.outcome.result["folder"] for each in made}) == 4
    assert sorted(used) == ["5", "5", "6", "6"]


def test_a_permutation_is_a_group_size_and_an_act_order(modules: Any) -> None:
    found = modules.quality.parse(["--permutations=64,32:static,-1:group"])
    assert found.permutations == ((64, "none"), (32, "static"), (-1, "group"))


@pytest.mark.parametrize("text", ["64:act", "x", "static"])
def test_another_permutation_is_refused(modules: Any, text: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        modules.quality.parse([f"--permutations={text}"])
    assert "expected a group size, and an act order after ':' (none, group, static, full)" in capsys.readouterr().err


def test_the_worst_seed_decides(modules: Any) -> None:
    def measured(engine: str, seed: int, kl: float) -> Any:
        quality = SimpleNamespace(kl_divergence=kl)
        outcome = modules.processes.Outcome(status="ok")
        return modules.quality_table.Measurement(
            engine=engine,
            group_size=128,
            act_order="none",
            seed=seed,
            ours=engine == "mine",
            outcome=outcome,
            quality=quality,
        )

    table = modules.quality_table.kl_table(
        [
            *(measured("mine", 0, 0.8), measured("mine", 1, 1.8)),
            *(measured("one", 0, 1.0), measured("one", 1, 2.0), measured("two", 0, 1.6), measured("two", 1, 1.5)),
        ]
    )
    line = next(line for line in printed(table).splitlines() if "128g" in line)
    assert [cell.strip() for cell in line.split("│")][2:6] == ["1.300000", "1.500000", "1.550000", "1.200"]


@pytest.mark.parametrize(
    ("other", "after_kill", "status"), [(b"same", b"same", 0), (b"others", b"same", 1), (b"same", b"others", 1)]
)
def test_several_gpus_are_compared_by_time_and_bytes(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    other: bytes, after_kill: bytes, status: int,
) -> None:  # fmt: skip
    def speed(command: list[str], env: dict[str, str], check: bool) -> None:
        seen, one = env["CUDA_VISIBLE_DEVICES"], "--one" in command
        dist = Path(command[command.index("--dist") + 1]) / "model"
        dist.mkdir(parents=True)
        (dist / "model.safetensors").write_bytes((b"same" if seen == "0" else other) + bytes([one]))
        seconds = {"0": 16.0, "0,1,2": 5.0}[seen]
        result = {
            "seconds": seconds, "disk_to_disk_s": seconds + 9.5, "each_gpu_allocated_bytes": [27.9e9],
            "marks": [2.0, 2 + seconds / 4], "host_bytes": 4e9,
            "ranks": {"cuda:0": {"copy": 0.0, "factor": seconds / 4, "columns": seconds / 4, "read": seconds / 4}},
        }  # fmt: skip
        Path(command[command.index("--json") + 1]).write_text(json.dumps({"results": [{"result": result}]}))

    module = modules.several_gpus
    monkeypatch.setattr(module.subprocess, "run", speed)
    killed = tmp_path / "killed"
    killed.mkdir()
    (killed / "model.safetensors").write_bytes(after_kill + b"\1")

    def kill_and_resume(gpus: int, resumed_on: int, _: Path) -> Any:
        return module.KilledRun(gpus=gpus, resumed_on=resumed_on, blocks=4, sha256=module.digests_of(killed))

    monkeypatch.setattr(module, "kill_and_resume", kill_and_resume)
    assert module.main(["--gpus", "1,3", "--work", str(tmp_path), "--layers", "2"]) == status
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.startswith((" 1 ", " 3 "))]
    assert rows == 2 * [
        ["1", "16.0", "1.00", "4.000", "1.00", "25.5", "0.0%", "50.0%", "25.0%", "27.9", "4.0"],
        ["3", "5.0", "3.20", "1.250", "3.20", "14.5", "0.0%", "50.0%", "25.0%", "27.9", "4.0"],
    ]
    assert "killed on 3 after 4 blocks, went on with 1" in printed
    assert ("OTHER BYTES" in printed) == bool(status)


def test_loaders_open_each_variant_with_each_kernel(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The loaders answer here what our forward computes; one, with one kernel, cannot open the first variant."""
    script = modules.cuda_loaders
    (tmp_path / "recipes").mkdir()
    recipe = tiny_recipe.write_all(tmp_path / "recipes")
    seen: list[Any] = []
    known: dict[str, Any] = {}

    def references(job: Any) -> Any:
        known.update(references_of(job))
        return known

    def run_probes(spec: Any, python: Path, jobs: Any, timeout_s: float, context: Any) -> list[Any]:
        seen.append((spec.name, sorted(spec.devices), str(python), {job.backend for job in jobs}, jobs[0].device))
        answers: list[Any] = [
            ProbeResult(
                logits=known[job.model_dir.name], generated=tuple(() for _ in job.prompts), versions={},
                device=job.device, dtype="float16", kernel="a.b.Kernel", load_s=1.5, forward_s=0.5,
                weights_sha256={path.name: sha256_file(path) for path in job.model_dir.glob("*.safetensors")},
                peak_memory_bytes=10**6, decode_tokens=30, decode_s=1.5, prefill_tokens=10, prefill_s=0.1,
            )
            for job in jobs
        ]  # fmt: skip
        return [LoaderError("no such kernel"), *answers[1:]] if jobs[0].backend == "gptq_marlin" else answers

    monkeypatch.setattr(script, "references_of", references)
    monkeypatch.setattr(script, "run_probes", run_probes)
    monkeypatch.setattr(script, "ensure_environment", lambda spec, _: Path("/env") / spec.name)
    options = ["--device=cpu", "--permutations=32,16:full", f"--work={tmp_path / 'work'}", f"--recipe={recipe}"]
    status = script.main(
        [*options, "--loaders=gptqmodel,gptqmodel:gptq_marlin,vllm:marlin", "--vllm-python=/vllm/python",
         f"--json={tmp_path / 'out.json'}"]
    )  # fmt: skip
    printed_out = capsys.readouterr().out
    assert status == 1, "a loader failed"
    assert seen == [
        ("gptqmodel", ["cpu", "cuda"], "/env/gptqmodel", {None}, "cpu"),
        ("gptqmodel", ["cpu", "cuda"], "/env/gptqmodel", {"gptq_marlin"}, "cpu"),
    ]
    rows = json.loads((tmp_path / "out.json").read_text())
    branches = ["32g-none-search", "16g-full-search", "32g-none-signed", "16g-full-signed"]
    assert [(row["runtime"], row["branch"], row["control"]) for row in rows] == [
        *(("gptqmodel", branch, "") for branch in branches),
        *(("gptqmodel", branch, branches[index - 1]) for index, branch in enumerate(branches)),
        *(("gptqmodel:gptq_marlin", branch, "") for branch in branches),
        *(("vllm:marlin", branch, "") for branch in branches),
    ]
    statuses = [row["record"]["status"] for row in rows]
    assert statuses == [*["passed"] * 4, *["failed"] * 4, "failed", *["passed"] * 3, *["not run"] * 4]
    assert all("closer to those of" in row["record"]["reason"] for row in rows if row["control"])
    assert rows[-1]["record"]["reason"].startswith("needs CUDA")
    assert all(row["negative"] == 0 if row["branch"].endswith("search") else row["negative"] > 0.2 for row in rows)
    passed = rows[0]
    assert (passed["record"]["status"], passed["record"]["relative_error"], passed["load_s"]) == ("passed", 0.0, 1.5)
    assert (passed["prefill"], passed["decode"]) == (100.0, 20.0)
    assert "failed: no such kernel" in printed_out


def test_loaders_open_a_model_of_random_weights_twice(
    modules: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loaders answer what our forward computes; in its second opening one takes another variant, one fails."""
    script = modules.cuda_loaders
    seen: list[Any] = []
    known: dict[str, Any] = {}

    def run_probes(spec: Any, python: Path, jobs: Any, timeout_s: float, context: Any) -> list[Any]:
        seen.append(jobs)
        answers: list[Any] = [
            ProbeResult(
                logits=known[job.model_dir.name], generated=tuple(() for _ in job.prompts), versions={},
                device="cpu", dtype="float32", kernel="a.qlinear_triton.QuantLinear", load_s=opening, forward_s=0.5,
                weights_sha256={path.name: sha256_file(path) for path in job.model_dir.glob("*.safetensors")},
                peak_memory_bytes=10**6,
            )
            for opening, job in enumerate(jobs)
        ]  # fmt: skip
        answers[2] = {"autogptq": answers[2], "gptqmodel": answers[3], "transformers": LoaderError("gone")}[spec.name]
        return answers

    monkeypatch.setattr(script, "references_of", lambda job: known.update(references_of(job)) or known)
    monkeypatch.setattr(script, "run_probes", run_probes)
    monkeypatch.setattr(script, "ensure_environment", lambda spec, _: Path("/env") / spec.name)
    shape = ["--layers=1", "--hidden=128", "--intermediate=256", "--heads=2", "--kv-heads=2", "--vocab=1024"]
    options = [
        "--permutations=32:static,32:full",
        "--searches=false",
        "--loaders=autogptq:triton,gptqmodel,transformers",
    ]
    output = ["--openings=2", "--prompts=2:8", "--new-tokens=3", f"--work={tmp_path / 'w'}", f"--json={tmp_path / 'o'}"]
    assert script.main(["--device=cpu", *shape, *options, *output]) == 1
    assert [(job.model_dir.name, len(job.prompts), len(job.prompts[0]), job.backend) for job in seen[0]] == [
        (branch, 2, 8, "triton") for branch in ("32g-static-plain", "32g-full-plain") * 2
    ]
    assert len({job.output_dir for jobs in seen for job in jobs}) == 12
    rows = json.loads((tmp_path / "o").read_text())
    loaders, controls = [row for row in rows if not row["control"]], [row for row in rows if row["control"]]
    assert [row["record"]["status"] for row in loaders] == ["passed", "passed", "failed", "passed", "failed", "passed"]
    assert [row["load_s"] for row in loaders] == [2, 3, 3, 3, None, 3], "times are of the last opening"
    assert "it read other weights" in loaders[2]["record"]["reason"]
    assert "gone" in loaders[4]["record"]["reason"]
    assert {row["runtime"] for row in controls} == {"autogptq:triton"}, "the first that answers for all"
    first = script.Opened(**{**rows[0], "record": LoaderRecord(**rows[0]["record"])})
    assert "qlinear_triton" in printed(modules.cuda_loaders_table.table([first]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--loaders=exllamav2:triton"], "exllamav2 has no kernels to choose from"),
        (["--layers=2", "--recipe=recipe.yaml"], "--layers makes a model, and --recipe names one"),
        (["--prompts=4"], "expected COUNT:TOKENS"),
        (["--openings=0"], "expected a number, 1 or more"),
        (["--new-tokens=0"], "expected a number, 1 or more"),
        (["--loaders=llama"], "no such loader: llama"),
        (["--searches=maybe"], "scale_search is true, signed, false"),
    ],
)
def test_wrong_loaders_are_refused(modules: Any, arguments: list[str], message: str, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        modules.cuda_loaders.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.long
def test_a_killed_run_of_one_permutation_ends_with_the_same_bytes(modules: Any, tmp_path: Path) -> None:
    module = modules.several_gpus
    made = module.run("one", 1, tmp_path, [*TINY, "--layers=4"])
    killed = module.kill_and_resume(1, 1, tmp_path)
    assert killed.blocks >= 2
    assert module.same_bytes([made], killed)
    ranks = made.result["ranks"]
    assert min(ranks["cpu"][kind] for kind in ("targets", "factor", "columns")) > 0


def test_the_profile_of_a_block_counts_every_part_once(modules: Any, tmp_path: Path, capsys: Any) -> None:
    report = tmp_path / "profile.json"
    shape = [each for each in TINY if not each.startswith(("--layers", "--no-warm-up"))]
    options = ["--layers=3", "--target-correction=0.5", *shape, f"--work={tmp_path}", f"--json={report}"]
    assert modules.block_profile.main(options) == 0
    searched, plain = json.loads(report.read_text())["runs"]
    assert (searched["search"], plain["search"]) == (True, False)
    parts = searched["parts"]
    assert [parts[name]["calls"] for name in ("forward", "Hessians: products", "solve: rest")] == [1, 4, 4]
    corrected = {name.removeprefix("target: "): found["calls"] for name, found in parts.items() if "target" in name}
    # The fp16 model's batches begin, pass four groups, and end.
    assert corrected.pop("forward of the fp16 model") == 6
    assert corrected == dict.fromkeys(
        ["products of inputs", "sum of the parts", "Cholesky", "solves", "products with the weights"], 4
    )
    assert {name for name in parts if "target" in name} == {name for name in searched["floors"] if "target" in name} | {
        "target: sum of the parts"
    }
    # 128 columns of three groups, and 256 of the last one, which are two column blocks.
    assert parts["columns: rounding, search"]["calls"] == 5
    assert all(found["host_s"] >= 0 and found["device_s"] is None for found in parts.values())
    floor = "columns: rounding, search"
    assert searched["floors"][floor] > plain["floors"][floor], "the search has a floor of its own"
    assert "times the floor" in capsys.readouterr().out


def test_the_floors_of_a_block_are_those_of_its_arithmetic(modules: Any) -> None:
    rates = modules.block_profile.Rates(half_flops=1e3, single_flops=1e2, copied_bytes=10.0)
    floors = modules.block_profile.floors_of([(1024, 8)], 100, 1024, 10, rates, search=False)
    assert floors["factor: Cholesky"] == pytest.approx(1024**3 / 3 / 1e2)
    # The second 512 columns get the updates of the first 512: three products of 512 x 512 for 8 output features.
    assert floors["columns: lazy products"] == pytest.approx(3 * 2 * 512 * 512 * 8 / 1e3)
    # Each half has four column blocks: 512 + 384 + 256 + 128 columns get updates of 128.
    assert floors["columns: products within 512"] == pytest.approx(2 * 2 * 128 * 1280 * 8 / 1e2)
    # H has four panels of 256 rows here: 256 x (1024 + 768 + 512 + 256) products.
    assert floors["Hessians: products"] == pytest.approx(2 * 100 * 256 * 2560 / 1e3)
    assert not any("target" in name for name in floors)


@pytest.mark.parametrize("features", [8, 2048])
def test_the_floors_of_a_target_correction_are_those_of_its_sums(modules: Any, features: int) -> None:
    rates = modules.block_profile.Rates(half_flops=1e3, single_flops=1e2, copied_bytes=10.0)
    floors = modules.block_profile.floors_of([(1024, features)], 100, 1024, 10, rates, search=False, corrected=True)
    assert floors["target: forward of the fp16 model"] == floors["forward"]
    # With 8 outputs these are computed of the inputs' differences, and summed instead of the inputs.
    operations = 2 * 2 * 100 * 1024 * 8 if features == 8 else 2 * 100 * 1024 * 1024
    assert floors["target: products of inputs"] == pytest.approx(operations / 1e3)
    assert floors["target: solves"] == pytest.approx(3 * 2 * 1024**2 * min(features, 1024) / 1e3)
    with_weights = 0 if features == 8 else 2 * 1024**2 * features
    assert floors["target: products with the weights"] == pytest.approx(with_weights / 1e3)
