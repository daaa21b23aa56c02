"""Build a recipe's variants with both of our engines and compare the results, linear by linear.

    python benchmarks/compare_engines.py recipes/demo-llama.yaml --json engines.json

For each calibration seed every variant is built twice from the same rows with the same parameters, once by
`engine: native` and once by `engine: auto-gptq`, and measured on the recipe's held-out text. Parameters that only our
own engine has (scale_search) are off in both. AutoGPTQ needs a CUDA GPU. No loader runs, nothing is published.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from packager.errors import PackagerError
from packager.pipeline.build_options import Options
from packager.pipeline.build_state import BuildState
from packager.pipeline.evaluate_stage import evaluate
from packager.pipeline.quantize_stage import quantize_and_pack
from packager.receipt import QualityRecord, Receipt
from packager.recipe import Loaders, Recipe, VariantEntry
from packager.recipe.file import RecipeFile
from packager.system.files import write_atomic
from packager.system.terminal import Terminal
from packager.variant import EngineName

DEMO = Path(__file__).parent.parent / "recipes" / "demo-llama.yaml"
_REFERENCE_SUFFIX = ".auto-gptq"
_ENGINES: tuple[tuple[EngineName, str], ...] = (("native", ""), ("auto-gptq", _REFERENCE_SUFFIX))


@dataclass(frozen=True, kw_only=True)
class EngineFigures:
    """One variant by one engine: the loss of each linear, held-out quality, and the seconds of quantizing."""

    losses: dict[str, float]
    quality: QualityRecord
    made_with: str
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One variant and seed by both engines."""

    branch: str
    seed: int
    native: EngineFigures
    reference: EngineFigures

    @property
    def loss_ratios(self) -> dict[str, float]:
        """AutoGPTQ's loss over ours for every linear whose loss is not 0: above 1, ours is smaller."""
        ours = self.native.losses
        return {name: loss / ours[name] for name, loss in self.reference.losses.items() if ours[name] > 0}

    def result(self) -> dict[str, Any]:
        """Return the pair's entry in the JSON file."""
        ratios = self.loss_ratios
        return {
            "branch": self.branch,
            "seed": self.seed,
            "loss_ratio_auto_gptq_to_native": {
                "median": median(ratios.values()),
                "min": min(ratios.values()),
                "max": max(ratios.values()),
                "max_linear": max(ratios, key=lambda name: ratios[name]),
                "linears": len(ratios),
            },
            **{
                name: {"made_with": one.made_with, "seconds": one.seconds, "quality": one.quality.model_dump()}
                for name, one in (("native", self.native), ("auto-gptq", self.reference))
            },
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status, an error's own if a build failed."""
    given = _parser().parse_args(arguments)
    terminal = Terminal()
    shutil.rmtree(given.work, ignore_errors=True)
    options = Options(dist=given.work, cache=given.cache, device=given.device, environ=dict(os.environ))
    try:
        recipe_file = RecipeFile.load(given.recipe)
        pairs = [pair for seed in _numbers(given.seeds) for pair in compare(recipe_file, seed, options, terminal)]
    except PackagerError as error:
        sys.stderr.write(f"{error}\n")
        return error.exit_code
    Console(width=None if sys.stdout.isatty() else 180).print(table(pairs))
    if given.json is not None:
        recipe = recipe_file.recipe
        report = {
            "recipe": recipe.repository.id,
            "base_model": recipe.base_model.id,
            "calibration": {"rows": recipe.calibration.num_samples, "seq_len": recipe.calibration.seq_len},
            "pairs": [pair.result() for pair in pairs],
        }
        write_atomic(given.json.absolute(), json.dumps(report, indent=2).encode() + b"\n")
    return 0


def compare(recipe_file: RecipeFile, seed: int, options: Options, terminal: Terminal) -> Iterator[Pair]:
    """Build and measure every variant with both engines for one calibration seed.

    Raises:
        PackagerError: no CUDA GPU, or a build failed.
    """
    both = replace(recipe_file, recipe=with_both_engines(recipe_file.recipe, seed))
    run = BuildState(both, options, terminal)
    with run.workspace.locked():
        run.read_receipts()
        quantize_and_pack(run)
        evaluate(run)
    for variant in recipe_file.recipe.expanded_variants():
        native, reference = (run.receipts[variant.branch + suffix] for _, suffix in _ENGINES)
        yield Pair(branch=variant.branch, seed=seed, native=_figures(native), reference=_figures(reference))


def with_both_engines(recipe: Recipe, seed: int) -> Recipe:
    """Return a recipe with each variant twice, once by each engine, calibrated on the rows of a seed; no loaders."""

    def entry(index: int, suffix: str, engine: EngineName) -> VariantEntry:
        variant = recipe.expanded_variants()[index]
        # An act order that is left out is another one for each engine.
        order = {"act_order": variant.act_order, "desc_act": None}
        changes = {"scale_search": False, "branch": variant.branch + suffix, "engine": engine, **order}
        return recipe.variants[index].model_copy(update=changes)

    variants = [entry(index, suffix, engine) for engine, suffix in _ENGINES for index in range(len(recipe.variants))]
    repository = recipe.repository.model_copy(update={"id": f"benchmark/engines-seed-{seed}"})
    calibration = recipe.calibration.model_copy(update={"seed": seed})
    changes = {"repository": repository, "calibration": calibration, "variants": tuple(variants), "loaders": Loaders()}
    return recipe.model_copy(update=changes)


def _figures(receipt: Receipt) -> EngineFigures:
    provenance = receipt.provenance
    assert provenance.quality is not None  # noqa: S101 - evaluate has just measured it
    return EngineFigures(
        losses={record.name: record.loss for record in provenance.linears},
        quality=provenance.quality,
        made_with=provenance.made_with,
        seconds=receipt.seconds["quantize"],
    )


def table(pairs: Sequence[Pair]) -> Table:
    """Return one line per variant and seed, both engines side by side."""
    shown = Table(title="engine: native beside engine: auto-gptq")
    shown.add_column("branch")
    heads = (
        *("seed", "loss ratio,\nmedian", "max", "KL,\nnative", "KL,\nauto-gptq", "ratio"),
        *("perplexity,\nnative", "perplexity,\nauto-gptq", "base", "seconds,\nnative", "seconds,\nauto-gptq"),
    )
    for head in heads:
        shown.add_column(head, justify="right")
    for pair in pairs:
        ratios = list(pair.loss_ratios.values())
        ours, theirs = pair.native.quality, pair.reference.quality
        shown.add_row(
            pair.branch, str(pair.seed), f"{median(ratios):.4f}", f"{max(ratios):.4f}",
            f"{ours.kl_divergence:.5f}", f"{theirs.kl_divergence:.5f}",
            f"{theirs.kl_divergence / ours.kl_divergence:.3f}" if ours.kl_divergence else "-",
            f"{ours.perplexity:.4f}", f"{theirs.perplexity:.4f}", f"{ours.base_perplexity:.4f}",
            f"{pair.native.seconds:.1f}", f"{pair.reference.seconds:.1f}",
        )  # fmt: skip
    shown.caption = "ratios are auto-gptq over native: above 1, native is closer to the base model"
    return shown


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    caches = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    add = parser.add_argument
    add("recipe", type=Path, nargs="?", default=DEMO, help="whose variants are built (default: the demo's)")
    add("--seeds", default="0,1,2", help="calibration seeds (default 0,1,2)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--work", type=Path, default=Path("build/engines"), help="emptied first (default build/engines)")
    add(
        "--cache", type=Path, default=Path(caches).expanduser() / "gptq-packager",
        help="where the loaders' environments are (default ~/.cache/gptq-packager)",
    )  # fmt: skip
    add("--json", type=Path, help="write all measurements here")
    return parser


if __name__ == "__main__":
    sys.exit(main())
