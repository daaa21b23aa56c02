"""What tokens with massive inputs cost: KL of some quantized linears, with H of all tokens, and where these count less.

    python benchmarks/real_models.py smollm2-135m-instruct FOLDER --long
    python benchmarks/massive_tokens.py FOLDER --blocks 11,28

The first tokens of a row reach some linears hundreds of times as large as the others. H adds up squares, so these few
tokens are nearly all of it: does the solver fit them at the expense of the others? Here a token's inputs are scaled
down to at most so many medians of the norms of a batch's tokens before H is computed. Only the down_proj of the blocks
are quantized, by the engine's own functions with its default search of scales; all other weights are the base model's.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path
from typing import Any

import torch
from held_out_losses import DAMP, ROWS_AT_ONCE, rows_of_text
from rich.console import Console
from rich.table import Table
from torch import Tensor

from packager.quantize.gptq.grid import GridRules
from packager.quantize.gptq.hessian import Hessian, factorize
from packager.quantize.gptq.order import ColumnOrder
from packager.quantize.gptq.solve import solve
from packager.receipt import standard_error
from packager.variant import ActOrder

ORDERS: tuple[ActOrder, ...] = ("none", "group", "static", "full")
RULES = GridRules(bits=4, sym=True, scale_search=True)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what real_models.py wrote")
    parser.add_argument("--blocks", default="11,28")
    parser.add_argument("--caps", default="inf,64,16,4,1", help="medians of the tokens' norms, several numbers")
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--rows", type=int, default=8, help="of calibration")
    parser.add_argument("--held-out", type=int, default=8, help="rows")
    parser.add_argument("--seq-len", type=int, default=256)
    given = parser.parse_args()
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(given.folder / "model", dtype=torch.float32)
    names = [f"model.layers.{block}.mlp.down_proj" for block in given.blocks.split(",")]
    caps = [float(cap) for cap in given.caps.split(",")]
    H, largest = hessians(model, names, caps, rows_of_text(given, "calibration.jsonl", given.rows))
    held_out = rows_of_text(given, "evaluation.jsonl", given.held_out)
    weights = {name: model.get_submodule(name).weight.detach().clone() for name in names}
    base = log_probabilities(model, held_out)
    shown = Table(title=f"KL of {', '.join(names)} alone, {given.group_size}g; a token counts at most so many medians")
    for heading in ("act order", *map(str, caps)):
        shown.add_column(heading)
    for act_order in ORDERS:
        order, cells = ColumnOrder(act_order=act_order, group_size=given.group_size), []
        for cap in caps:
            for name, weight in weights.items():
                solution = solve([weight], factorize(H[name, cap], order, damp_percent=DAMP), RULES)
                model.get_submodule(name).weight.data = solution.dequantized()
            rows = kl_of_rows(base, log_probabilities(model, held_out))
            cells.append(f"{sum(rows) / len(rows):.5f} +- {standard_error(rows):.5f}")
        shown.add_row(act_order, *cells)
        print(act_order, *cells, flush=True)
    console = Console(width=140)
    console.print(shown)
    for name in names:
        console.print(f"{name}: the largest token has {largest[name]:.0f} medians")
    return 0


def capped(inputs: Tensor, cap: float) -> Tensor:
    """Return inputs [..., tokens, features], the norm of each token at most `cap` medians of all norms."""
    norms = inputs.norm(dim=-1, keepdim=True)
    return inputs * (cap * norms.median() / norms).clamp(max=1) if math.isfinite(cap) else inputs


def hessians(
    model: Any, names: list[str], caps: list[float], rows: Tensor
) -> tuple[dict[tuple[str, float], Tensor], dict[str, float]]:
    """Return H of each linear's inputs for each cap, and how many medians the largest token has."""
    found = {(name, cap): Hessian(model.get_submodule(name).in_features, rows.device) for name in names for cap in caps}
    largest = dict.fromkeys(names, 0.0)

    def hook(name: str) -> Any:
        def add(_: Any, inputs: tuple[Tensor, ...]) -> None:
            norms = inputs[0].norm(dim=-1)
            largest[name] = max(largest[name], float(norms.max() / norms.median()))
            for cap in caps:
                found[name, cap].add(capped(inputs[0], cap))

        return add

    hooks = [model.get_submodule(name).register_forward_pre_hook(hook(name)) for name in names]
    with torch.no_grad():
        for first in range(0, len(rows), ROWS_AT_ONCE):
            model(rows[first : first + ROWS_AT_ONCE])
    for each in hooks:
        each.remove()
    return {key: hessian.matrix() for key, hessian in found.items()}, largest


@torch.no_grad()
def log_probabilities(model: Any, rows: Tensor) -> list[Tensor]:
    """Return each row's log-probabilities [tokens, vocabulary]."""
    logits: list[Tensor] = [model(row[None]).logits[0].log_softmax(-1) for row in rows]
    return logits


def kl_of_rows(base: list[Tensor], other: list[Tensor]) -> list[float]:
    """Return the mean KL divergence of each row's predictions, nats."""
    return [float((one.exp() * (one - two)).sum(-1).mean()) for one, two in zip(base, other, strict=True)]


if __name__ == "__main__":
    sys.exit(main())
