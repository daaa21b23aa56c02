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
import platform
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from importlib import metadata
from itertools import cycle
from pathlib import Path
from queue import SimpleQueue
from typing import Any, get_args

import numpy as np
import torch
from processes import Engine, EnginePaths, Outcome, add_path_arguments, device_of, engine_paths, peers_of, run_jobs
from quality_table import Measurement, figures_table, kl_table, measurements_of, order_table, peers_table
from rich.console import Console

from packager.model.packing import CheckpointReader
from packager.pipeline.build_options import Options
from packager.pipeline.build_state import BuildState
from packager.pipeline.quantize_stage import quantize_and_pack
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
    num_tokens: int | None
    batch_size: int
    parallel: int
    gpus: tuple[str, ...]
    timeout_s: float
    work: Path
    json: Path | None
    read: tuple[Path, ...]


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint that an engine made of the rows of a seed, or why there is none."""

    engine: str
    seed: int
    permutation: Permutation
    outcome: Outcome
    folder: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 if an engine failed."""
    settings = parse(arguments)
    if settings.read:
        print_tables([each for path in settings.read for each in measurements_of(json.loads(path.read_bytes()))])
        return 0
    terminal = Terminal()
    shutil.rmtree(settings.work, ignore_errors=True)
    # A recipe's paths may not leave its folder.
    shutil.copytree(settings.recipe.parent, settings.work / "recipes")
    builds = {seed: _open_build(settings, seed, terminal) for seed in settings.seeds}
    first = builds[settings.seeds[0]]
    base = run_texts(first.source.folder, first.source.read, first.texts, device=first.device, dtype=torch.float32)
    measurements = []
    for checkpoint in _checkpoints(settings, builds):
        quality = None
        if checkpoint.outcome.status == "ok":
            bits = settings.ours.get(checkpoint.engine, {}).get("bits", 4)
            quality = quality_of(base, _measured(checkpoint.folder, bits, first), first.texts)
            name = f"{checkpoint.permutation[0]}g {checkpoint.permutation[1]}"
            terminal.log(f"{checkpoint.engine} {name} seed {checkpoint.seed}: KL {quality.kl_divergence:.6f}")
        measurements.append(
            Measurement(
                engine=checkpoint.engine,
                group_size=checkpoint.permutation[0],
                act_order=checkpoint.permutation[1],
                seed=checkpoint.seed,
                outcome=checkpoint.outcome,
                quality=quality,
                ours=checkpoint.engine in settings.ours,
            )
        )
        if settings.json is not None:  # after each: a run that is cut short keeps what it measured
            _write_report(settings.json, settings, first, measurements)
    print_tables(measurements)
    return int(any(each.outcome.status == "failed" for each in measurements))


def print_tables(measurements: Sequence[Measurement]) -> None:
    """Print the tables; that of the peers only where there are some."""
    console = Console(width=None if sys.stdout.isatty() else 180)
    console.print(kl_table(measurements))
    console.print(figures_table(measurements))
    console.print(order_table(measurements))
    if not all(each.ours for each in measurements):
        console.print(peers_table(measurements))


def _write_report(path: Path, settings: Settings, build: BuildState, measurements: Sequence[Measurement]) -> None:
    calibration = build.texts.calibration.record
    report = {
        "base_model": build.source.record.id,
        "ours": settings.ours,
        "calibration": {"rows": calibration.num_samples, "seq_len": calibration.seq_len},
        "held_out_tokens": build.texts.evaluation.ids.numel(),
        "side_by_side": settings.parallel,
        "machine": {
            "device": torch.cuda.get_device_name() if build.device.type == "cuda" else "cpu",
            "cores": os.cpu_count(),
            "versions": {name: metadata.version(name) for name in ("torch", "transformers", "numpy")},
            "python": platform.python_version(),
        },
        "measurements": [measurement.result() for measurement in measurements],
    }
    write_atomic(path.absolute(), json.dumps(report, indent=2).encode() + b"\n")


def _open_build(settings: Settings, seed: int, terminal: Terminal) -> BuildState:
    """Open the build of all of our variants for one seed, and save its calibration rows for the peers."""
    recipe = RecipeFile.load(settings.recipe).recipe.model_dump(mode="json", exclude_none=True)
    recipe["repository"]["id"] = f"benchmark/quality-seed-{seed}"
    recipe["calibration"]["seed"] = seed
    recipe["calibration"] |= {
        key: value
        for key, value in (("num_samples", settings.rows), ("seq_len", settings.seq_len))
        if value is not None
    }
    if settings.num_tokens is not None:
        recipe["evaluation"]["num_tokens"] = settings.num_tokens
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
    ] or [{"branch": "main", "group_size": settings.permutations[0][0]}]  # a recipe has one; it is not built
    path = settings.work / "recipes" / f"seed-{seed}.yaml"
    path.write_text(json.dumps(recipe, indent=2), encoding="utf-8")
    shutil.copyfile(lock_path(settings.recipe), lock_path(path))
    dist = settings.work / "dist"
    options = Options(dist=dist, cache=dist / "cache", device=settings.device, environ=dict(os.environ))  # type: ignore[arg-type]
    build = BuildState(RecipeFile.load(path), options, terminal)
    np.save(settings.work / f"rows-{seed}.npy", build.texts.calibration.ids.numpy())
    return build


def _branch(settings: Settings, name: str, permutation: Permutation) -> str:
    if name == next(iter(settings.ours)) and permutation == settings.permutations[0]:
        return "main"  # a recipe has one variant of this name
    return f"{name}-{permutation[0]}g-{permutation[1]}"


def _checkpoints(settings: Settings, builds: dict[int, BuildState]) -> Iterator[Checkpoint]:
    """Yield each checkpoint when it is made; peers that run side by side begin at once, else when ours are made.

    Of the peers' that are made, the first in their order comes first, also before further ones of ours: a run that is
    cut short has measured what came first.
    """
    with ThreadPoolExecutor(settings.parallel) as pool:
        beside = settings.parallel > 1
        waiting = _begin_peers(settings, builds, pool) if beside else []
        for own in _ours(settings, builds):
            yield own
            yield from _made(waiting)
        if not beside:
            waiting = _begin_peers(settings, builds, pool)
        while waiting:
            wait(waiting, return_when=FIRST_COMPLETED)
            yield from _made(waiting)


def _made(waiting: list[Future[Checkpoint]]) -> Iterator[Checkpoint]:
    """Take the checkpoints that are made out of the list, the first one in its order first."""
    while (made := next((each for each in waiting if each.done()), None)) is not None:
        waiting.remove(made)
        yield made.result()


def _ours(settings: Settings, builds: dict[int, BuildState]) -> Iterator[Checkpoint]:
    """Build our checkpoints, all of a seed in one sweep."""
    for seed, build in builds.items():
        if not settings.ours:
            continue
        with build.workspace.locked():
            build.read_receipts()
            quantize_and_pack(build)
        for name in settings.ours:
            for permutation in settings.permutations:
                branch = _branch(settings, name, permutation)
                result = {"seconds": build.receipts[branch].seconds["quantize"], "timed": "a share of the common sweep"}
                yield Checkpoint(
                    engine=name,
                    seed=seed,
                    permutation=permutation,
                    outcome=Outcome(status="ok", result=result),
                    folder=build.workspace.folder(branch),
                )


def _begin_peers(
    settings: Settings, builds: dict[int, BuildState], pool: ThreadPoolExecutor
) -> list[Future[Checkpoint]]:
    """Let the pool run each peer on each seed's rows, a process for each checkpoint; they know none and full."""
    known = [permutation for permutation in settings.permutations if permutation[1] in ("none", "full")]
    gpus: SimpleQueue[str] = SimpleQueue()
    for _, gpu in zip(range(settings.parallel), cycle(settings.gpus or ("",))):
        gpus.put(gpu)

    def run(engine: Engine, seed: int, permutation: Permutation) -> Checkpoint:
        gpu = gpus.get()
        try:
            return _peer(
                settings, builds[seed], engine, seed, permutation, {"CUDA_VISIBLE_DEVICES": gpu} if gpu else {}
            )
        finally:
            gpus.put(gpu)

    return [
        pool.submit(run, engine, seed, permutation)
        for seed in settings.seeds
        for engine in settings.peers
        for permutation in known
    ]


def _peer(
    settings: Settings, build: BuildState, engine: Engine, seed: int, permutation: Permutation, environ: dict[str, str]
) -> Checkpoint:
    """Let a peer make a checkpoint in a process of its own."""
    group_size, act_order = permutation
    folder = (settings.work / engine.name / f"{seed}-{group_size}g-{act_order}").absolute()
    job = {
        "model_dir": str(build.source.folder.absolute()),
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
        "save_dir": str(folder),
    }
    jobs = settings.work / "jobs" / folder.name
    (outcome,) = run_jobs(engine, [job], settings.paths, jobs, timeout_s=settings.timeout_s, environ=environ)
    return Checkpoint(engine=engine.title, seed=seed, permutation=permutation, outcome=outcome, folder=folder)


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
        help=f"a setting of ours: keys of a recipe's variant; none for none (default: {' and '.join(OURS)})",
    )  # fmt: skip
    add("--rows", type=int, help="calibration rows (default: the recipe's)")
    add("--seq-len", type=int, help="tokens per row (default: the recipe's)")
    add("--held-out-tokens", type=int, help="tokens of held-out text (default: the recipe's)")
    add("--batch-size", type=int, default=8, help="rows per batch in the peers (default 8)")
    add(
        "--parallel", type=int, default=1, metavar="N",
        help="how many checkpoints of peers are made at the same time, beside ours (default 1: after ours)",
    )  # fmt: skip
    add(
        "--gpus", default="", help="peers that run side by side are spread over these, such as 0,1 (default: the first)"
    )
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--work", type=Path, default=Path("build/quality"), help="emptied first (default build/quality)")
    add("--timeout", type=float, default=3600.0, help="seconds a peer may take for one model (default 3600)")
    add("--json", type=Path, help="write all measurements here, after each one")
    add(
        "--read",
        type=Path,
        nargs="+",
        default=(),
        metavar="JSON",
        help="only print the tables of these files' measurements",
    )
    add_path_arguments(parser, peers="autogptq,gptqmodel")
    given = parser.parse_args(arguments)
    return Settings(
        recipe=given.recipe,
        seeds=tuple(int(seed) for seed in given.seeds.split(",")),
        permutations=tuple(permutation_of(parser, text) for text in given.permutations.split(",")),
        ours=dict(_own(parser, text) for text in given.ours or OURS if text != "none"),
        peers=peers_of(parser, given.peers),
        paths=engine_paths(parser, given),
        device=device_of(given.device),
        rows=given.rows,
        seq_len=given.seq_len,
        num_tokens=given.held_out_tokens,
        batch_size=given.batch_size,
        parallel=given.parallel,
        gpus=tuple(gpu for gpu in given.gpus.split(",") if gpu),
        timeout_s=given.timeout,
        work=given.work,
        json=given.json,
        read=tuple(given.read),
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
