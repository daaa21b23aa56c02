"""Measure what other bits for some linears would gain, at the bytes of one width for all of them.

    python benchmarks/quality.py --peers "" --permutations 128 --work WORK --ours two:bits=2 --ours three:bits=3 ...
    python benchmarks/mixed_bits.py WORK 2=main 3=three-128g-none 4=four-128g-none

The unit is a group of linears that see the same input. Its bits are chosen by the losses in the receipts, for the least
sum in at most the bytes that all linears take with --budget bits. Each linear is taken from the checkpoint of its
width and not quantized again, so it was calibrated behind linears of that width. See benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from packager.model.architecture import Architecture, LinearSpec
from packager.model.checkpoint import quantized_tensors
from packager.model.packing import CheckpointReader
from packager.model.safetensors_file import DTYPE_BYTES
from packager.pipeline.build_state import BuildState, Options
from packager.prove.evaluate import quality_of, run_texts
from packager.recipe.file import RecipeFile
from packager.system.terminal import Terminal

# How much the loss of a linear counts; a record's loss is the mean over the linear's output features.
CRITERIA: Mapping[str, Callable[[LinearSpec], float]] = {
    "mean over output features": lambda _: 1,
    "sum over output features": lambda linear: linear.out_features,
}
_PRICES = [10 ** (exponent / 10) for exponent in range(-200, 201)]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """The bits of each group, and the bytes of all linears."""

    bits: tuple[int, ...]
    size_bytes: int


def groups_of(architecture: Architecture) -> list[list[LinearSpec]]:
    """Return the linears of each block that see the same input; experts are not supported."""
    specs = {(linear.block, linear.module): linear for linear in architecture.linears}
    return [
        [specs[block, module] for module in group.modules]
        for kind in architecture.kinds
        for block in kind.blocks
        for group in kind.groups
    ]


def size_bytes(group: Sequence[LinearSpec], bits: int, group_size: int) -> int:
    """Return the bytes of the tensors of linears."""
    tensors = (each for linear in group for each in quantized_tensors(linear, bits=bits, group_size=group_size))
    return sum(math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype] for tensor in tensors)


def choose(costs: Sequence[Mapping[int, float]], sizes: Sequence[Mapping[int, int]], limit: int) -> Choice:
    """Return the bits of each group with the least sum of costs that a price per byte finds within the limit."""
    found: list[tuple[float, Choice]] = []
    for price in _PRICES:
        bits = tuple(
            min(cost, key=lambda width: cost[width] + price * size[width] / 1e6)
            for cost, size in zip(costs, sizes, strict=True)
        )
        total = sum(size[width] for size, width in zip(sizes, bits, strict=True))
        if total <= limit:
            value = sum(cost[width] for cost, width in zip(costs, bits, strict=True))
            found.append((value, Choice(bits=bits, size_bytes=total)))
    return min(found, key=lambda each: each[0])[1]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path, help="the --work of quality.py")
    parser.add_argument("branches", nargs="+", metavar="BITS=BRANCH", help="the variant of each width")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=3, help="bits that all linears would have (default 3)")
    parser.add_argument("--group-size", type=int, default=128)
    given = parser.parse_args(arguments)
    branches = {int(bits): branch for bits, _, branch in (text.partition("=") for text in given.branches)}
    name, dist = f"quality-seed-{given.seed}", given.work / "dist"
    options = Options(dist=dist, cache=dist / "cache", device="cpu", environ=dict(os.environ))
    build = BuildState(RecipeFile.load(given.work / "recipes" / f"seed-{given.seed}.yaml"), options, Terminal())
    source, texts, device = build.source, build.texts, torch.device("cpu")
    readers = {
        bits: CheckpointReader(dist / "builds" / "benchmark" / name / branch, bits) for bits, branch in branches.items()
    }
    losses = {
        bits: _losses(dist / "receipts" / "benchmark" / name / f"{branch}.json") for bits, branch in branches.items()
    }
    groups = groups_of(source.architecture)
    sizes = [{bits: size_bytes(group, bits, given.group_size) for bits in branches} for group in groups]
    base = run_texts(source.folder, source.read, texts, device=device, dtype=torch.float32)
    limit = sum(size[given.budget] for size in sizes)
    choices = {f"all {given.budget} bits": Choice(bits=(given.budget,) * len(groups), size_bytes=limit)}
    for criterion, weight in CRITERIA.items():
        costs = [
            {bits: sum(weight(linear) * losses[bits][linear.name] for linear in group) for bits in branches}
            for group in groups
        ]
        choices[criterion] = choose(costs, sizes, limit)
    for criterion, choice in choices.items():
        own = {each.name: bits for group, bits in zip(groups, choice.bits, strict=True) for each in group}

        def read(tensor: str, own: Mapping[str, int] = own) -> Tensor:
            return readers[own.get(tensor.removesuffix(".weight"), given.budget)](tensor)

        quality = quality_of(base, run_texts(source.folder, read, texts, device=device, dtype=torch.float32), texts)
        sys.stdout.write(
            f"{criterion}: KL {quality.kl_divergence:.6f}, {choice.size_bytes} bytes, bits {choice.bits}\n"
        )
    return 0


def _losses(receipt: Path) -> dict[str, float]:
    """Return the loss of each linear of a variant."""
    content = json.loads(receipt.read_text(encoding="utf-8"))
    return {linear["name"]: linear["loss"] for linear in content["provenance"]["linears"]}


if __name__ == "__main__":
    sys.exit(main())
