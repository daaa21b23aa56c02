"""Show where the time of a quantized block goes: each part on the GPU, on the host, and the least that it could take.

    python benchmarks/block_profile.py --layers 3 --json profile.json
    python benchmarks/block_profile.py --layers 3 --group-size 32 --desc-act --refine --target-correction 0.5

It builds a random model of the shape as `packager build` does, one variant, first with scale search and then without:
the difference is the search. The floor of a part is its arithmetic, or the bytes that it moves, at the rates that the
device reaches in large products and copies, measured first. Several GPUs share the rows; the floor is that of one.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from make_model import ModelSpec, add_shape_arguments, make, recipe_of, shape_of, write_recipe
from processes import SCRIPTS, device_of
from rich.console import Console
from rich.table import Table

from packager.model.describe import describe
from packager.quantize.gptq.cholesky import SPLIT_WIDTH
from packager.quantize.gptq.column_blocks import BLOCKS_AT_ONCE, COLUMN_BLOCK
from packager.quantize.gptq.grid import SEARCH_STEPS
from packager.quantize.gptq.panels import panels, panels_bytes, shift_rows
from packager.system.files import write_atomic

sys.path.append(str(SCRIPTS))

import ours
from block_times import FORWARD, BlockTimes, PartTime

_LAZY_COLUMNS = BLOCKS_AT_ONCE * COLUMN_BLOCK  # their later columns get the updates of all in one product
_SEARCH_OPERATIONS = 8  # of a weight and a tried scale
_SPLIT_PRODUCTS = 3  # of float16 numbers, for one of float32


@dataclass(frozen=True, kw_only=True)
class Rates:
    """What the device reaches, per second: float16 and float32 products in flop, copies in bytes read and written."""

    half_flops: float
    single_flops: float
    copied_bytes: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    given = _parse(arguments)
    device = device_of(given.device)
    rates = measured_rates(torch.device(device), size=8192 if device == "cuda" else 512)
    spec = ModelSpec(
        shape=shape_of(given), rows=given.rows, seq_len=given.seq_len, seed=0, shard_bytes=5_000_000_000,
        on_gpu=device == "cuda",
    )  # fmt: skip
    make(given.work / "model", spec)
    console = Console(width=None if sys.stdout.isatty() else 160)
    report: dict[str, Any] = {"rates": asdict(rates), "runs": []}
    for search in (True, False):
        times, shapes = _profiled(given, spec, device, search=search)
        tokens, corrected = given.rows * given.seq_len, given.target_correction > 0
        floors = floors_of(
            shapes, tokens, spec.shape.hidden, given.seq_len, rates, search=search, corrected=corrected
        )  # fmt: skip
        for name, parts in sorted(times.items()):
            title = f"{name}, {'with' if search else 'without'} scale search, in a block"
            console.print(_table(title, parts, floors))
            parts_json = {part: asdict(found) for part, found in parts.items()}
            report["runs"].append({"device": name, "search": search, "parts": parts_json, "floors": floors})
    if given.json is not None:
        write_atomic(given.json.absolute(), json.dumps(report, indent=2).encode() + b"\n")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_shape_arguments(parser, layers=3)
    add = parser.add_argument
    add("--rows", type=int, default=128, help="calibration rows (default 128)")
    add("--seq-len", type=int, default=2048, help="tokens per row (default 2048)")
    add("--group-size", type=int, default=128)
    add("--desc-act", action="store_true")
    add("--refine", action="store_true")
    add("--target-correction", type=float, default=0.0)
    add("--device", choices=["auto", "cpu", "cuda"], default="auto")
    add("--work", type=Path, default=Path("build/profile"), help="where the model is made (default build/profile)")
    add("--json", type=Path, help="write all measurements here")
    return parser.parse_args(arguments)


def _profiled(
    given: argparse.Namespace, spec: ModelSpec, device: str, *, search: bool
) -> tuple[dict[str, dict[str, PartTime]], list[tuple[int, int]]]:
    """Build one variant; return the times of its parts by device, and the shapes that a block solves."""
    folder = given.work / "model"
    variant = {
        "branch": "main", "group_size": given.group_size, "desc_act": given.desc_act, "refine": given.refine,
        "scale_search": search, "target_correction": given.target_correction,
    }  # fmt: skip
    path = folder / f"profile-{'search' if search else 'plain'}.yaml"
    write_recipe(path, {**recipe_of(spec), "variants": [variant]}, describe(folder / "model", None))
    dist = given.work / f"dist-{path.stem}-{time.time_ns()}"
    job = {"recipe": str(path.absolute()), "dist": str(dist.absolute()), "device": device, "gpu_memory_bytes": None}
    with BlockTimes(device) as times:
        ours.quantize(job)
    return times.seconds(), times.solved


def measured_rates(device: torch.device, *, size: int) -> Rates:
    """Measure large products and copies on a device."""
    half, single = (torch.ones(size, size, dtype=dtype, device=device) for dtype in (torch.float16, torch.float32))
    return Rates(
        half_flops=2 * size**3 / _seconds(lambda: half @ half, device),
        single_flops=2 * size**3 / _seconds(lambda: single @ single, device),
        copied_bytes=2 * single.numel() * single.element_size() / _seconds(single.clone, device),
    )


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the least time of several calls."""
    found = []
    for _ in range(5):
        _wait(device)
        started = time.perf_counter()
        work()
        _wait(device)
        found.append(time.perf_counter() - started)
    return min(found)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def floors_of(
    shapes: Sequence[tuple[int, int]], tokens: int, hidden: int, seq_len: int, rates: Rates, *, search: bool,
    corrected: bool = False,
) -> dict[str, float]:  # fmt: skip
    """Return the least seconds of each part of a block, for groups of linears of these shapes.

    Args:
        shapes: in_features and out_features of each group of linears that see the same input.
        tokens: that a block is calibrated on.
        hidden: the width of attention.
        seq_len: tokens of a row.
        rates: of the device.
        search: whether scales are searched.
        corrected: whether there is a target correction.
    """
    found: dict[str, float] = {}

    def add(part: str, seconds: float) -> None:
        found[part] = found.get(part, 0.0) + seconds

    # Queries times keys, and these times values, of the tokens before each token.
    attention = 2 * tokens * seq_len * hidden / rates.half_flops
    add(FORWARD, attention)
    if corrected:
        add("target: forward of the fp16 model", attention)
    for n, features in shapes:
        weights = n * features
        add(FORWARD, 2 * tokens * weights / rates.half_flops)
        computed = sum((panel.stop - panel.start) * (n - panel.start) for panel in panels(n))
        add("Hessians: products", 2 * tokens * computed / rates.half_flops)
        add("Hessians: sum of the parts", (panels_bytes(n) + 4 * n * n) / rates.copied_bytes)
        per_product = _SPLIT_PRODUCTS / rates.half_flops if n >= SPLIT_WIDTH else 1 / rates.single_flops
        add("factor: Cholesky", n**3 / 3 * per_product)
        if corrected:
            rows = shift_rows(n, features)
            of_outputs = 2 * tokens * weights if rows != n else 0
            add("target: forward of the fp16 model", 2 * tokens * weights / rates.half_flops)
            add("target: products of inputs", (2 * tokens * rows * n + of_outputs) / rates.half_flops)
            add("target: Cholesky", n**3 / 3 * per_product)
            add("target: solves", _SPLIT_PRODUCTS * 2 * n * n * rows / rates.half_flops)
            add("target: products with the weights", 0 if of_outputs else 2 * n * weights / rates.half_flops)
        add("solve: permuted weights", 4 * weights / rates.copied_bytes)
        add("columns: lazy products", _SPLIT_PRODUCTS * 2 * _lazy_products(n) * features / rates.half_flops)
        add("columns: products within 512", 2 * _products_within(n) * features / rates.single_flops)
        # Of a column: the rank-1 update of half of the column block; a multiply-add counts as two.
        operations = COLUMN_BLOCK + (2 * _SEARCH_OPERATIONS * SEARCH_STEPS if search else 0)
        add("columns: rounding, search", operations * weights / rates.single_flops)
        add("columns: split of deltas", 8 * weights / rates.copied_bytes)
        add("packing", 1.5 * weights / rates.copied_bytes)
        add("dequantizing", 3 * weights / rates.copied_bytes)
    return found


def _lazy_products(n: int) -> int:
    """Return the multiply-adds for an output feature: each 512 columns get the updates of all columns before them."""
    return sum(begin * min(_LAZY_COLUMNS, n - begin) for begin in range(0, n, _LAZY_COLUMNS))


def _products_within(n: int) -> int:
    """Return the multiply-adds for an output feature: of a column block with itself, and with those after it."""
    after = [
        min(begin // _LAZY_COLUMNS * _LAZY_COLUMNS + _LAZY_COLUMNS, n) - begin for begin in range(0, n, COLUMN_BLOCK)
    ]
    return sum(COLUMN_BLOCK * columns for columns in after)


def _table(title: str, parts: dict[str, PartTime], floors: dict[str, float]) -> Table:
    """Return one line for each part, and a line of sums."""
    table = Table("part", "calls", "GPU, ms", "host, ms", "floor, ms", "times the floor", box=None, title=title)
    for part, found in sorted(parts.items(), key=lambda item: item[0]):
        table.add_row(part, f"{found.calls:.0f}", *_cells(found.device_s, found.host_s, floors.get(part)))
    on_device = [found.device_s for found in parts.values() if found.device_s is not None]
    host_s = sum(found.host_s for found in parts.values())
    table.add_row("everything", "", *_cells(sum(on_device) if on_device else None, host_s, sum(floors.values())))
    return table


def _cells(device_s: float | None, host_s: float, floor_s: float | None) -> tuple[str, str, str, str]:
    taken = host_s if device_s is None else device_s
    return (
        "-" if device_s is None else f"{device_s * 1000:.2f}",
        f"{host_s * 1000:.2f}",
        "-" if floor_s is None else f"{floor_s * 1000:.3f}",
        "-" if not floor_s else f"{taken / floor_s:.1f}",
    )


if __name__ == "__main__":
    sys.exit(main())
