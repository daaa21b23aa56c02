"""Compare mixes of bits with one number of bits for all linears, at about the same size, by held-out KL.

    python benchmarks/mixed_bits.py --recipe recipes/demo-llama.yaml --work WORK --seeds 3

Each seed draws other calibration rows and is a whole build without loaders. The ratio is that of the KL to the KL of
the variant that the mix is compared with, of the same seed: the mean over the seeds, and its standard error. See
benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from packager.pipeline import flow
from packager.pipeline.build_options import Options
from packager.receipt import Receipt, standard_error
from packager.recipe.file import RecipeFile
from packager.system.terminal import Terminal

# Each variant, and what it is compared with: the same bytes, or for 4 and 8 bits, which vLLM reads, smaller groups.
VARIANTS: dict[str, tuple[dict[str, Any], str]] = {
    "main": ({"bits": 4, "group_size": 128}, ""),
    "three": ({"bits": 3, "group_size": 128}, ""),
    "mix-3": ({"mix": {"bits": [2, 3, 4], "mean": 3}, "group_size": 128}, "three"),
    "mix-4": ({"mix": {"bits": [2, 3, 4, 8], "mean": 4}, "group_size": 128}, "main"),
    "four-32g": ({"bits": 4, "group_size": 32}, ""),
    "mix-4.5": ({"mix": {"bits": [4, 8], "mean": 4.5}, "group_size": 128}, "four-32g"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", type=Path, required=True, help="the base model and the texts")
    parser.add_argument("--work", type=Path, required=True, help="a folder, kept for the next run")
    parser.add_argument("--seeds", type=int, default=3, help="of the calibration rows, from 0 on (default 3)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="parameters of all variants")
    given = parser.parse_args(arguments)
    changes = dict(text.split("=", 1) for text in given.set)
    built = [build(given.recipe, given.work, seed, changes) for seed in range(given.seeds)]
    Console(width=None if sys.stdout.isatty() else 180).print(_table(built))
    return 0


def build(recipe: Path, work: Path, seed: int, changes: dict[str, str]) -> dict[str, Receipt]:
    """Build and measure the variants with one seed; return their receipts by branch."""
    content = RecipeFile.load(recipe).recipe.model_dump(mode="json", exclude_none=True)
    content["repository"] = {"id": f"benchmark/mixed-bits-seed-{seed}"}
    content["calibration"]["seed"] = seed
    content["defaults"] = {key: json.loads(value) for key, value in changes.items()}
    content["loaders"] |= {"required": [], "if_available": []}
    content["variants"] = [{"branch": branch, **own} for branch, (own, _) in VARIANTS.items()]
    recipe_file = RecipeFile.of(json.dumps(content).encode(), recipe)
    options = Options(dist=work / "dist", cache=work / "cache", device="auto", environ=dict(os.environ))
    result = flow.build(recipe_file, options, Terminal())
    return {receipt.provenance.branch: receipt for receipt in result.receipts}


def _table(built: Sequence[dict[str, Receipt]]) -> Table:
    table = Table("variant", "bytes", "KL by seed", "compared with", "ratio", "bits, seed 0")
    for branch, (_, other) in VARIANTS.items():
        ratios = [_kl(receipts[branch]) / _kl(receipts[other]) for receipts in built] if other else []
        error = f" ± {standard_error(ratios):.3f}" if len(ratios) > 1 else ""
        made = built[0][branch].provenance
        bits = [record.bits for record in made.linears if record.bits is not None]
        table.add_row(
            branch,
            f"{made.weights_bytes:,}",
            ", ".join(f"{_kl(receipts[branch]):.6f}" for receipts in built),
            other,
            f"{statistics.mean(ratios):.3f}{error}" if ratios else "",
            ", ".join(f"{bits.count(each)} linears of {each}" for each in sorted(set(bits))),
        )
    return table


def _kl(receipt: Receipt) -> float:
    quality = receipt.provenance.quality
    assert quality is not None, "it was measured"  # noqa: S101
    return quality.kl_divergence


if __name__ == "__main__":
    sys.exit(main())
