"""Quantize one random model with our engine and with others: the same layers, rows and machine, in one run.

    python benchmarks/speed.py --layers 4 --peers autogptq,gptqmodel,llmcompressor --json out.json
    python benchmarks/speed.py --full --json full.json
    python benchmarks/speed.py --full --evaluate --gpu-memory 24GB --json full.json

benchmarks/README.md describes what is timed and how to read the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from make_model import ModelSpec, Shape, add_shape_arguments, make, recipe_of, shape_of, write_recipe
from processes import (
    OUR_EVALUATION,
    OURS,
    Engine,
    EnginePaths,
    Outcome,
    add_path_arguments,
    device_of,
    engine_paths,
    peers_of,
    run_jobs,
)
from rich.console import Console
from tables import Row, evaluation_table, speed_table, stages_table

from packager.inputs.base_model import open_source
from packager.inputs.texts import prepare
from packager.model.describe import describe
from packager.recipe.file import RecipeFile
from packager.recipe.text_models import Evaluation
from packager.system.files import write_atomic

# Every engine quantizes this model first, unmeasured: that compiles kernels and loads libraries.
SMALL = Shape(hidden=512, intermediate=1024, heads=4, kv_heads=4, layers=2, vocab=1024)
FASTEST, DEFAULTS = "fastest", "defaults"
ONE, FOUR = "recipe-one.yaml", "recipe.yaml"
# What our engine runs with beside its defaults: the name in --also and in the table, and the recipe's defaults.
DEFAULTS_OF_OURS = "defaults"
WAYS: dict[str, dict[str, Any]] = {
    DEFAULTS_OF_OURS: {},
    "plain": {"scale_search": False, "refine": False},
    "positive": {"scale_search": True, "refine": False},
    "refine": {"refine": True},
    "corrected": {"target_correction": 0.5},
}
HELD_OUT_TOKENS: int = Evaluation.model_fields["num_tokens"].default
_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of the command line."""

    spec: ModelSpec
    peers: tuple[Engine, ...]
    paths: EnginePaths
    device: str
    batch_size: int
    peer_settings: tuple[str, ...]
    desc_act: bool
    ways: tuple[str, ...]
    full: bool
    evaluate: bool
    one: bool
    gpu_memory_bytes: int | None
    from_page_cache: bool
    warm_up: bool
    timeout_s: float
    work: Path
    dist: Path
    json: Path | None

    def plain(self) -> dict[str, Any]:
        """Return the settings for the JSON file, without paths, which mean nothing elsewhere."""
        return {
            **asdict(self.spec),
            **{
                name: getattr(self, name)
                for name in ("device", "batch_size", "desc_act", "full", "evaluate", "one", "gpu_memory_bytes")
            },
            "ways": list(self.ways),
            "from_page_cache": self.from_page_cache,
            "warm_up": self.warm_up,
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 if an engine failed."""
    settings = parse(arguments)
    progress = Console(stderr=True, highlight=False, soft_wrap=True)
    model = settings.work / "model"
    _make(settings.spec, model, settings, progress)
    small = settings.work / "small" if settings.warm_up else None
    if small is not None:
        shape = replace(SMALL, experts=min(settings.spec.shape.experts, 16), expert_intermediate=256)
        _make(replace(settings.spec, shape=shape, rows=8, seq_len=128, held_out_tokens=0), small, settings, progress)
    rows: list[Row] = []
    for row in _run_all(settings, model, small):
        rows.append(row)
        _write_report(settings, rows)  # after each row: an interrupted run keeps its results
        what = f"{row.seconds:.1f} s" if row.seconds is not None else f"{row.outcome.status}: {row.outcome.reason}"
        progress.print(f"{row.title}: {what}", markup=False)
    # A log has no width: print the table at full width.
    console = Console(width=None if sys.stdout.isatty() else 220)
    console.print(speed_table(rows))
    for row in rows:
        if row.variants == 4 and row.seconds is not None:
            console.print(stages_table(row.outcome.result))
        if row.evaluation is not None and row.evaluation.status == "ok":
            console.print(evaluation_table(row.title, row.evaluation.result))
        elif row.evaluation is not None:
            console.print(f"{row.title}: evaluation {row.evaluation.status}: {row.evaluation.reason}", markup=False)
    outcomes = [row.outcome for row in rows] + [row.evaluation for row in rows if row.evaluation is not None]
    return int(any(outcome.status == "failed" for outcome in outcomes))


def _write_report(settings: Settings, rows: Sequence[Row]) -> None:
    if settings.json is None:
        return
    report = {
        "settings": settings.plain(),
        "machine": _machine(settings, rows),
        "results": [row.result() for row in rows],
    }
    write_atomic(settings.json.absolute(), json.dumps(report, indent=2).encode() + b"\n")


def _run_all(settings: Settings, model: Path, small: Path | None) -> Iterator[Row]:
    layers = settings.spec.shape.layers
    for way, keys in ((way, WAYS[way]) for way in settings.ways):
        for recipe, variants in ((ONE, 1), (FOUR, 4)):
            if settings.full and recipe == (FOUR if settings.one else ONE):
                continue
            yield Row(
                title=f"ours, {variants} at once" + (f", {way}" if keys else ""),
                variants=variants,
                layers=layers,
                ours=True,
                outcome=(outcome := _run_ours(settings, f"{way}-{recipe}", model, small)),
                evaluation=_evaluate(settings, f"{way}-{recipe}", model, small)
                if settings.evaluate and outcome.status == "ok"
                else None,
            )
    for engine in settings.peers:
        outcomes = _run_peer(settings, engine, model, small)
        for kind, outcome in zip(settings.peer_settings, outcomes, strict=True):
            title = f"{engine.title}, {kind}"
            yield Row(title=title, variants=1, layers=layers, ours=False, outcome=outcome)


def _run_ours(settings: Settings, recipe: str, model: Path, small: Path | None) -> Outcome:
    """Run our engine; its files are deleted afterwards, except the checkpoints of a full run."""
    shutil.rmtree(settings.dist, ignore_errors=True)
    jobs = _jobs_of_ours(settings, recipe, model, small)
    if not settings.from_page_cache:
        _drop_page_cache(model / "model")
    outcome = run_jobs(OURS, jobs, settings.paths, settings.work / "jobs", timeout_s=settings.timeout_s)[-1]
    if not settings.full:
        shutil.rmtree(settings.dist, ignore_errors=True)
    return outcome


def _evaluate(settings: Settings, recipe: str, model: Path, small: Path | None) -> Outcome:
    """Measure the quality of the checkpoints that `_run_ours` made, in another process."""
    jobs, folder = _jobs_of_ours(settings, recipe, model, small), settings.work / "evaluation-jobs"
    return run_jobs(OUR_EVALUATION, jobs, settings.paths, folder, timeout_s=settings.timeout_s)[-1]


def _jobs_of_ours(settings: Settings, recipe: str, model: Path, small: Path | None) -> list[dict[str, Any]]:
    return [
        {
            "recipe": str((folder / recipe).absolute()),
            "dist": str((settings.dist / folder.name).absolute()),
            "device": settings.device,
            "gpu_memory_bytes": settings.gpu_memory_bytes,
        }
        for folder in (small, model)
        if folder is not None
    ]


def _run_peer(settings: Settings, engine: Engine, model: Path, small: Path | None) -> list[Outcome]:
    """Run a peer in one process; return one outcome per setting."""
    kinds = settings.peer_settings
    warm_up = [] if small is None else [(small, kinds[0])]
    jobs = [
        {
            "model_dir": str((folder / "model").absolute()),
            "rows": str((folder / "rows.npy").absolute()),
            "bits": 4,
            "group_size": 128,
            "desc_act": settings.desc_act,
            "sym": True,
            "damp_percent": 0.01,
            "fastest": kind == FASTEST,
            "best": engine.best,
            "batch_size": settings.batch_size,
            "device": settings.device,
            "save_dir": None,
        }
        for folder, kind in [*warm_up, *((model, kind) for kind in kinds)]
    ]
    outcomes = run_jobs(engine, jobs, settings.paths, settings.work / "jobs", timeout_s=settings.timeout_s)
    return outcomes[len(warm_up) :]


def _make(spec: ModelSpec, folder: Path, settings: Settings, console: Console) -> None:
    """Make a model and the engines' inputs; on a GPU in a process of its own, so that no GPU memory stays allocated."""
    if spec.on_gpu:
        options = {**asdict(spec.shape), "rows": spec.rows, "seq_len": spec.seq_len, "seed": spec.seed}
        options |= {"shard_bytes": spec.shard_bytes, "held_out_tokens": spec.held_out_tokens, "device": "cuda"}
        if config := options.pop("config"):
            options["config"] = settings.work.absolute() / "shape.json"
            write_atomic(options["config"], config.encode())
        command = [sys.executable, str(Path(__file__).parent / "make_model.py"), str(folder)]
        command += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        environ = settings.paths.environ(OURS, os.environ)
        done = subprocess.run(command, env=environ, stdout=subprocess.PIPE, text=True, check=True)
        console.print(done.stdout.strip(), markup=False)
    else:
        console.print(f"{folder}: made in {make(folder, spec):.1f} s", markup=False)
    four = recipe_of(spec)
    one = {**four, "variants": [{"branch": "main", "group_size": 128, "desc_act": settings.desc_act}]}
    described = describe(folder / "model", None)
    for name, recipe in ((ONE, one), (FOUR, four)):
        for way, keys in WAYS.items():
            write_recipe(folder / f"{way}-{name}", {**recipe, "defaults": {**recipe["defaults"], **keys}}, described)
    if settings.peers:
        recipe_file = RecipeFile.load(folder / f"{DEFAULTS_OF_OURS}-{FOUR}")
        source = open_source(recipe_file, console.print)
        np.save(folder / "rows.npy", prepare(recipe_file, source).calibration.ids.numpy())


def _drop_page_cache(folder: Path) -> None:
    """Drop the weights from the page cache, where the system has such a call, so that they are read from disk again."""
    if not hasattr(os, "posix_fadvise"):
        return
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _machine(settings: Settings, rows: Sequence[Row]) -> dict[str, Any]:
    found = [str(row.outcome.result["device_name"]) for row in rows if "device_name" in row.outcome.result]
    return {
        "device": found[0] if found else "unknown",
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "processor": platform.machine(),
        "system": f"{platform.system()} {platform.release()}",
        "file_systems": {"model": _file_system(settings.work), "checkpoints": _file_system(settings.dist)},
    }


def _file_system(folder: Path) -> str:
    """Return the type of a folder's file system; tmpfs is memory."""
    mounts = Path("/proc/self/mounts")
    if not mounts.exists():
        return "unknown"
    where = folder.absolute()
    lines = [line.split()[1:3] for line in mounts.read_text(encoding="utf-8").splitlines()]
    over = [(len(point), kind) for point, kind in lines if where.is_relative_to(point)]
    return max(over, default=(0, "unknown"))[1]


def parse(arguments: Sequence[str] | None) -> Settings:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add_shape_arguments(parser, layers=None)
    add = parser.add_argument
    add("--rows", type=int, default=128, help="calibration rows (default 128)")
    add("--seq-len", type=int, default=2048, help="tokens per row (default 2048)")
    add("--seed", type=int, default=0)
    add("--full", action="store_true", help="40 layers, four permutations, ours alone, down to audited checkpoints")
    add("--evaluate", action="store_true", help="with --full: then the stage evaluate, fp16 and every variant")
    add(
        "--held-out-tokens",
        type=int,
        default=HELD_OUT_TOKENS,
        help=f"with --evaluate: tokens that are measured on (default {HELD_OUT_TOKENS}, a recipe's default)",
    )
    add("--one", action="store_true", help="with --full: one permutation, 128g")
    add("--desc-act", action="store_true", help="the one permutation that all engines make is with desc_act")
    add(
        "--also",
        type=_ways,
        default=(),
        metavar="LIST",
        help=f"ours once more with each of these: {', '.join(list(WAYS)[1:])} (plain: without scale_search and refine)",
    )
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--batch-size", type=int, default=8, help="rows per batch in the peers (default 8)")
    add(
        "--peer-settings",
        type=_kinds,
        default=_kinds("fastest,defaults"),
        metavar="LIST",
        help="the settings each peer runs with (default fastest,defaults)",
    )
    add(
        "--gpu-memory",
        type=_bytes,
        metavar="SIZE",
        help="the GPU memory that ours may use, to quantize and to measure, such as 24GB",
    )
    add("--from-page-cache", action="store_true", help="do not make our engine read the weights from disk again")
    add("--no-warm-up", action="store_true", help="do not quantize a small model first")
    add("--work", type=Path, default=Path("build/benchmark"), help="where the model is made (default build/benchmark)")
    add("--dist", type=Path, help="where checkpoints are made (default: dist in the work folder)")
    add("--timeout", type=float, default=3600.0, help="seconds an engine may take for one model (default 3600)")
    add("--json", type=Path, help="write all measurements here")
    add_path_arguments(parser, peers="autogptq,gptqmodel,llmcompressor")
    given = parser.parse_args(arguments)
    if given.evaluate and not given.full:
        parser.error("--evaluate measures the checkpoints of --full")
    if given.evaluate and given.held_out_tokens < given.seq_len:
        parser.error(f"--held-out-tokens {given.held_out_tokens} are no row of --seq-len {given.seq_len}")
    given.layers = given.layers if given.layers is not None else (40 if given.full else 4)
    device = device_of(given.device)
    return Settings(
        spec=ModelSpec(
            shape=shape_of(given), rows=given.rows, seq_len=given.seq_len, seed=given.seed,
            shard_bytes=5_000_000_000, on_gpu=device == "cuda",
            held_out_tokens=given.held_out_tokens if given.evaluate else 0,
        ),
        peers=() if given.full else peers_of(parser, given.peers),
        paths=engine_paths(parser, given),
        device=device,
        batch_size=given.batch_size,
        peer_settings=given.peer_settings,
        desc_act=given.desc_act,
        ways=(DEFAULTS_OF_OURS, *given.also),
        full=given.full,
        evaluate=given.evaluate,
        one=given.one,
        gpu_memory_bytes=given.gpu_memory,
        from_page_cache=given.from_page_cache,
        warm_up=not given.no_warm_up,
        timeout_s=given.timeout,
        work=given.work,
        dist=given.dist or given.work / "dist",
        json=given.json,
    )  # fmt: skip


def _ways(text: str) -> tuple[str, ...]:
    ways = tuple(text.split(","))
    if not set(ways) <= set(WAYS) - {DEFAULTS_OF_OURS}:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of {', '.join(list(WAYS)[1:])}")
    return ways


def _kinds(text: str) -> tuple[str, ...]:
    kinds = tuple(text.split(","))
    if not set(kinds) <= {FASTEST, DEFAULTS}:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of {FASTEST} and {DEFAULTS}")
    return kinds


def _bytes(text: str) -> int:
    match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?) ?([KMG]I?B|B)", text.upper())
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 24GB or 22GiB")
    return round(float(match[1]) * _UNITS[match[2]])


if __name__ == "__main__":
    sys.exit(main())
