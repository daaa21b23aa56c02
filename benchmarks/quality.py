"""Compare the quality of engines on the demo model: the same rows, parameters and checkpoint format, several seeds.

    python benchmarks/quality.py --json quality.json

Each engine quantizes the model into each permutation, calibrated on other rows for every seed. Our own evaluation
measures each saved checkpoint in float32: KL divergence to the base model in nats per token, perplexity and top-1
agreement on held-out text. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from processes import Engine, EnginePaths, Outcome, add_path_arguments, device_of, engine_paths, peers_of, run_jobs
from quality_table import Measurement, figures_table, kl_table, order_table, peers_table
from rich.console import Console

from packager.model.packing import CheckpointReader
from packager.pipeline.build_state import BuildState, Options
from packager.pipeline.stages import quantize_and_pack
from packager.prove.evaluate import ForwardResult, quality_of, run_texts
from packager.recipe.file import RecipeFile
from packager.recipe.lock_file import lock_path
from packager.system.files import write_atomic
from packager.system.terminal import Terminal
from packager.variant import ActOrder

DEMO = Path(__file__).parent.parent / "recipes" / "demo-llama.yaml"
PERMUTATIONS = "128,128:full,64:full,32:full"
Permutation = tuple[int, ActOrder]
OURS = ("plain:scale_search=false", "search:scale_search=true")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The options of the command line."""

    recipe: Path
    seeds: tuple[int, ...]
    permutations: tuple[Permutation, ...]
    ours: dict[str, dict[str, Any]]
    peers: tuple[Engine, ...]
    paths: EnginePaths
    device: str
    rows: int | None
    seq_len: int | None
    batch_size: int
    timeout_s: float
    work: Path
    json: Path | None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 if an engine failed."""
    settings = parse(arguments)
    terminal = Terminal()
    shutil.rmtree(settings.work, ignore_errors=True)
    # A recipe's paths may not leave its folder.
    shutil.copytree(settings.recipe.parent, settings.work / "recipes")
    builds = {seed: _build(settings, seed, terminal) for seed in settings.seeds}
    first = builds[settings.seeds[0]]
    texts, device = first.texts, first.device
    reader, folder = first.source.read, first.source.folder
    base = run_texts(folder, reader, texts, device=device, dtype=torch.float32)
    measurements = []
    failed = False
    for engine, seed, permutation, outcome, checkpoint in (*_ours(settings, builds), *_peers(settings, builds)):
        quality = None
        if outcome.status == "ok":
            bits = settings.ours.get(engine, {}).get("bits", 4)
            quality = quality_of(base, _measured(checkpoint, bits, first), texts)
            name = f"{permutation[0]}g {permutation[1]}"
            terminal.log(f"{engine} {name} seed {seed}: KL {quality.kl_divergence:.6f}")
        failed |= outcome.status == "failed"
        measurements.append(
            Measurement(
                engine=engine, group_size=permutation[0], act_order=permutation[1], seed=seed, outcome=outcome,
                quality=quality, ours=engine in settings.ours,
            )
        )  # fmt: skip
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(kl_table(measurements))
    console.print(figures_table(measurements))
    console.print(order_table(measurements))
    if settings.peers:
        console.print(peers_table(measurements))
    if settings.json is not None:
        calibration = first.texts.calibration.record
        report = {
            "base_model": first.source.record.id,
            "ours": settings.ours,
            "calibration": {"rows": calibration.num_samples, "seq_len": calibration.seq_len},
            "held_out_tokens": texts.evaluation.ids.numel(),
            "measurements": [measurement.result() for measurement in measurements],
        }
        write_atomic(settings.json.absolute(), json.dumps(report, indent=2).encode() + b"\n")
    return int(failed)


def _build(settings: Settings, seed: int, terminal: Terminal) -> BuildState:
    """Build all of our variants for one seed, and save the calibration rows for the peers."""
    recipe = RecipeFile.load(settings.recipe).recipe.model_dump(mode="json", exclude_none=True)
    recipe["repository"]["id"] = f"benchmark/quality-seed-{seed}"
    recipe["calibration"]["seed"] = seed
    recipe["calibration"] |= {
        key: value
        for key, value in (("num_samples", settings.rows), ("seq_len", settings.seq_len))
        if value is not None
    }
    recipe["defaults"].pop("desc_act", None)
    recipe["defaults"] |= {"bits": 4, "sym": True, "damp_percent": 0.01, "true_sequential": True}
    recipe["loaders"] |= {"required": [], "if_available": []}
    recipe["variants"] = [
        {
            "branch": _branch(settings, name, permutation),
            "group_size": permutation[0],
            "act_order": permutation[1],
            **own,
        }
        for name, own in settings.ours.items()
        for permutation in settings.permutations
    ]
    path = settings.work / "recipes" / f"seed-{seed}.yaml"
    path.write_text(json.dumps(recipe, indent=2), encoding="utf-8")
    shutil.copyfile(lock_path(settings.recipe), lock_path(path))
    dist = settings.work / "dist"
    options = Options(dist=dist, cache=dist / "cache", device=settings.device, environ=dict(os.environ))  # type: ignore[arg-type]
    build = BuildState(RecipeFile.load(path), options, terminal)
    with build.workspace.locked():
        build.read_receipts()
        quantize_and_pack(build)
    np.save(settings.work / f"rows-{seed}.npy", build.texts.calibration.ids.numpy())
    return build


def _branch(settings: Settings, name: str, permutation: Permutation) -> str:
    if name == next(iter(settings.ours)) and permutation == settings.permutations[0]:
        return "main"  # a recipe has one variant of this name
    return f"{name}-{permutation[0]}g-{permutation[1]}"


Job = tuple[str, int, Permutation, Outcome, Path]


def _ours(settings: Settings, builds: dict[int, BuildState]) -> Iterator[Job]:
    """Yield our checkpoints with their engine's name, seed and permutation."""
    for seed, build in builds.items():
        for name in settings.ours:
            for permutation in settings.permutations:
                branch = _branch(settings, name, permutation)
                result = {"seconds": build.receipts[branch].seconds["quantize"], "timed": "a share of the common sweep"}
                yield name, seed, permutation, Outcome(status="ok", result=result), build.workspace.folder(branch)


def _peers(settings: Settings, builds: dict[int, BuildState]) -> Iterator[Job]:
    """Run each peer in one process for everything, and yield the checkpoints it saved; they know none and full."""
    known = [permutation for permutation in settings.permutations if permutation[1] in ("none", "full")]
    made = [(seed, permutation) for seed in settings.seeds for permutation in known]
    for engine in settings.peers:
        folders = [
            settings.work / engine.name / f"{seed}-{group_size}g-{act_order}" for seed, (group_size, act_order) in made
        ]
        jobs = [
            {
                "model_dir": str(builds[seed].source.folder.absolute()),
                "rows": str((settings.work / f"rows-{seed}.npy").absolute()),
                "bits": 4,
                "group_size": group_size,
                "desc_act": act_order == "full",
                "sym": True,
                "damp_percent": 0.01,
                "fastest": True,
                "best": engine.best,
                "batch_size": settings.batch_size,
                "device": settings.device,
                "save_dir": str(folder.absolute()),
            }
            for (seed, (group_size, act_order)), folder in zip(made, folders, strict=True)
        ]
        outcomes = run_jobs(engine, jobs, settings.paths, settings.work / "jobs", timeout_s=settings.timeout_s)
        for (seed, permutation), folder, outcome in zip(made, folders, outcomes, strict=True):
            yield engine.title, seed, permutation, outcome, folder


def _measured(checkpoint: Path, bits: int, build: BuildState) -> ForwardResult:
    """Run a checkpoint's tensors in the base model; its own config.json is ignored."""
    read = CheckpointReader(checkpoint, bits)
    return run_texts(build.source.folder, read, build.texts, device=build.device, dtype=torch.float32)


def parse(arguments: Sequence[str] | None) -> Settings:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--recipe", type=Path, default=DEMO, help="whose model and texts are used (default: the demo's)")
    add("--seeds", default="0,1,2", help="calibration seeds (default 0,1,2)")
    add("--permutations", default=PERMUTATIONS, help=f"GROUP_SIZE[:ACT_ORDER],... (default {PERMUTATIONS})")
    add(
        "--ours", action="append", metavar="NAME:KEY=VALUE,...",
        help=f"a setting of ours: keys of a recipe's variant (default: {' and '.join(OURS)})",
    )  # fmt: skip
    add("--rows", type=int, help="calibration rows (default: the recipe's)")
    add("--seq-len", type=int, help="tokens per row (default: the recipe's)")
    add("--batch-size", type=int, default=8, help="rows per batch in the peers (default 8)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--work", type=Path, default=Path("build/quality"), help="emptied first (default build/quality)")
    add("--timeout", type=float, default=3600.0, help="seconds a peer may take for one model (default 3600)")
    add("--json", type=Path, help="write all measurements here")
    add_path_arguments(parser, peers="autogptq,gptqmodel")
    given = parser.parse_args(arguments)
    return Settings(
        recipe=given.recipe,
        seeds=tuple(int(seed) for seed in given.seeds.split(",")),
        permutations=tuple(permutation_of(parser, text) for text in given.permutations.split(",")),
        ours=dict(_own(parser, text) for text in given.ours or OURS),
        peers=peers_of(parser, given.peers),
        paths=engine_paths(parser, given),
        device=device_of(given.device),
        rows=given.rows,
        seq_len=given.seq_len,
        batch_size=given.batch_size,
        timeout_s=given.timeout,
        work=given.work,
        json=given.json,
    )


def permutation_of(parser: argparse.ArgumentParser, text: str) -> Permutation:
    """Return the group size and the act order of a permutation such as "64:static"."""
    size, _, name = text.partition(":")
    act_order: ActOrder | None = next((known for known in get_args(ActOrder) if known == (name or "none")), None)
    if act_order is None or not re.fullmatch(r"-1|\d+", size):
        parser.error(f"{text!r}: expected a group size, and an act order after ':' ({', '.join(get_args(ActOrder))})")
    return int(size), act_order


def _own(parser: argparse.ArgumentParser, text: str) -> tuple[str, dict[str, Any]]:
    """Return the name and the variant's keys of a setting such as "search:scale_search=true"."""
    name, _, rest = text.partition(":")
    pairs = [pair.partition("=") for pair in rest.split(",") if pair]
    try:
        found = {key: json.loads(value) for key, _, value in pairs}
    except ValueError:
        found = {"": None}
    if not re.fullmatch(r"[a-z][a-z0-9-]*", name) or "" in found:
        parser.error(f"{text!r}: expected a name, ':' and settings such as scale_search=true")
    return name, found


if __name__ == "__main__":
    sys.exit(main())
