"""Compare ways to tune blocks (effort: high) by held-out KL: other steps and rates, and no tuning.

    python benchmarks/effort.py --recipe recipes/demo-llama.yaml --recipe FOLDER/recipe.yaml --json effort.json

Each way is a whole build and measurement by quality.py. A way may replace the schedule's values (steps, checks, rate,
scale_rate), and Adam's steps by such of one size (`steps_of=sign`). "off" is `effort: standard`. Other options, and
peers, are those of quality.py.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import quality
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from packager.quantize import block as block_module
from packager.quantize import tune_block as tuning_module
from packager.quantize.gptq.tuned_linear import Moments
from packager.quantize.tune_block import TunedBlock, Tuning
from packager.quantize.tuning_schedule import SCHEDULE

VARIANT = 'scale_search="signed",refine=true'


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to tune, or "off"; `values` replace those of the schedule."""

    name: str
    values: Mapping[str, float]
    signs: bool = False

    @contextmanager
    def applied(self) -> Iterator[list[TunedBlock]]:
        """Tune this way in the body; yields what was tuned."""
        found: list[TunedBlock] = []
        real = tuning_module.tune_block

        def tune(block: Any, solutions: Any, tuning: Tuning) -> TunedBlock:
            found.append(real(block, solutions, tuning))
            return found[-1]

        schedule = replace(SCHEDULE, **self.values)  # type: ignore[arg-type]
        with ExitStack() as stack:
            stack.enter_context(patch.object(tuning_module, "SCHEDULE", schedule))
            stack.enter_context(patch.object(block_module, "tune_block", tune))
            if self.signs:
                stack.enter_context(patch.object(Moments, "direction", _sign))
            yield found


def _sign(_: Moments, gradient: Tensor) -> Tensor:
    """Return the direction of steps of one size."""
    return gradient.sign()


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, 1 if a way failed."""
    given, rest = parse(arguments)
    results: list[dict[str, Any]] = []
    failed = 0
    for recipe in given.recipe:
        for number, way in enumerate(given.way):
            settings = VARIANT if way.name == "off" else f'{VARIANT},effort="high"'
            report = given.work / f"{way.name}.json"
            command = [
                "--recipe", str(recipe), "--ours", f"{way.name}:{settings}", "--work", str(given.work / "quality"),
                "--json", str(report), "--peers", given.peers if number == 0 else "", *rest,
            ]  # fmt: skip
            given.work.mkdir(parents=True, exist_ok=True)
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            started = time.monotonic()
            with way.applied() as tuned:
                failed |= quality.main(command)
            measured = json.loads(report.read_text(encoding="utf-8"))["measurements"]
            results.extend({**each, "recipe": str(recipe)} for each in measured)
            results.append(
                {
                    "recipe": str(recipe), "way": way.name, "values": dict(way.values),
                    "seconds": round(time.monotonic() - started, 1),
                    "block_errors": [each.error / each.untuned_error for each in tuned if each.untuned_error],
                    "peak_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
                }
            )  # fmt: skip
            if given.json:
                given.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    Console(width=None if sys.stdout.isatty() else 180).print(_table(results))
    return failed


def _table(results: Sequence[Mapping[str, Any]]) -> Table:
    """Return the KL of each engine and way, its ratio to the first way's of the same seed, and the block errors."""
    table = Table("recipe", "engine or way", "permutation", "KL by seed", "of the first", "block errors", "s each")
    kept = {(each["recipe"], each["way"]): each for each in results if "way" in each}
    measured = [each for each in results if "engine" in each]
    groups = dict.fromkeys((m["recipe"], m["engine"], m["group_size"], m["act_order"]) for m in measured)
    for recipe, engine, size, order in groups:
        by_seed = _by_seed(measured, recipe, engine, size, order)
        first = _by_seed(measured, recipe, next(m["engine"] for m in measured if m["recipe"] == recipe), size, order)
        ratios = [kl / first[seed] for seed, kl in by_seed.items() if seed in first]
        spread = f" ± {statistics.stdev(ratios) / len(ratios) ** 0.5:.3f}" if len(ratios) > 1 else ""
        errors = kept[recipe, engine]["block_errors"] if (recipe, engine) in kept else []
        seconds = [
            m["result"]["seconds"] for m in _of(measured, recipe, engine, size, order) if "seconds" in m["result"]
        ]
        table.add_row(
            Path(recipe).parent.name, engine, f"{size}g {order}", " ".join(f"{kl:.6f}" for kl in by_seed.values()),
            f"{statistics.mean(ratios):.3f}{spread}" if ratios else "",
            f"{statistics.mean(errors):.3f}" if errors else "",
            f"{statistics.mean(seconds):.1f}" if seconds else "",
        )  # fmt: skip
    return table


def _of(measured: Sequence[Mapping[str, Any]], *key: object) -> list[Mapping[str, Any]]:
    return [m for m in measured if (m["recipe"], m["engine"], m["group_size"], m["act_order"]) == key]


def _by_seed(measured: Sequence[Mapping[str, Any]], *key: object) -> dict[int, float]:
    return {m["seed"]: m["quality"]["kl_divergence"] for m in _of(measured, *key) if m["quality"] is not None}


def parse(arguments: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """Read the command line; what is not for this script is for quality.py."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--recipe", type=Path, action="append", help="whose model and texts are used; may be repeated")
    add("--way", type=_way, action="append", help="NAME:KEY=VALUE,...; off:, and others (default off and high)")
    add("--work", type=Path, default=Path("build/effort"), help="its folders are emptied (default build/effort)")
    add("--json", type=Path, help="write all measurements here, after each way")
    add("--peers", default="", help="of quality.py, measured beside the first way (default none)")
    given, rest = parser.parse_known_args(arguments)
    given.recipe = given.recipe or [quality.DEMO]
    given.way = given.way or [_way("off:"), _way("high:")]
    return given, rest


def _way(text: str) -> Way:
    name, _, values = text.partition(":")
    pairs = dict(pair.split("=") for pair in values.split(",") if pair)
    signs = pairs.pop("steps_of", "") == "sign"
    numbers = {key: int(value) if key in ("steps", "checks") else float(value) for key, value in pairs.items()}
    return Way(name=name, values=numbers, signs=signs)


if __name__ == "__main__":
    sys.exit(main())
