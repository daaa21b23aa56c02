"""How much the refinement lowers the loss of linears on the text that calibrated them, and on other text.

    python benchmarks/real_models.py smollm2-135m-instruct FOLDER
    python benchmarks/held_out_losses.py FOLDER --rows 4,16,64 --blocks 11,24

Some linears of a model, with the inputs that the base model gives them, are quantized with and without the refinement,
by the engine's own functions, on few and on many rows. The loss of a solution is tr(R^T H R), R its difference to the
weights: with the damped H of the calibration rows it must fall; with the H of other rows it need not. Every nth output
feature is taken, so that each linear has about `--features` of them.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from packager.quantize.gptq.grid import GridRules
from packager.quantize.gptq.hessian import Hessian, factorize
from packager.quantize.gptq.order import ColumnOrder
from packager.quantize.gptq.solve import Solution, solve

LINEARS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
ORDERS = (
    ColumnOrder(act_order="none", group_size=64),
    ColumnOrder(act_order="group", group_size=64),
    ColumnOrder(act_order="full", group_size=32),
)
RULES = GridRules(bits=4, sym=True, scale_search="signed")
DAMP = 0.01
HELD_OUT_ROWS, ROWS_AT_ONCE = 32, 4


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what real_models.py wrote")
    parser.add_argument("--rows", default="4,16,64", help="of calibration, several numbers")
    parser.add_argument("--blocks", default="11,24")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--features", type=int, default=96, help="output features of each linear, about")
    given = parser.parse_args()
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(given.folder / "model", dtype=torch.float32)
    names = [f"model.layers.{block}.{linear}" for block in given.blocks.split(",") for linear in LINEARS]
    counts = sorted(int(count) for count in given.rows.split(","))
    others = hessians(model, names, rows_of_text(given, "evaluation.jsonl", HELD_OUT_ROWS))
    found: dict[tuple[str, float], list[tuple[float, float]]] = defaultdict(list)
    for count in counts:
        seen = hessians(model, names, rows_of_text(given, "calibration.jsonl", count))
        for name in names:
            weight = model.get_submodule(name).weight.detach()
            weight = weight[:: max(1, weight.shape[0] // given.features)]
            key = name.split(".", 3)[3], count * given.seq_len / weight.shape[1]
            found[key].extend(ratios(weight, seen[name], others[name]))
    Console(width=120).print(table(found))
    return 0


def rows_of_text(given: argparse.Namespace, name: str, count: int) -> Tensor:
    """Return rows of a text at even distances, [count, seq_len]."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(given.folder / "model")
    lines = (given.folder / name).read_text(encoding="utf-8").splitlines()
    ids = torch.tensor(tokenizer("\n\n".join(json.loads(line)["text"] for line in lines))["input_ids"])
    rows = ids[: len(ids) // given.seq_len * given.seq_len].reshape(-1, given.seq_len)
    return rows[torch.linspace(0, len(rows) - 1, count).long()]


def hessians(model: Any, names: list[str], rows: Tensor) -> dict[str, Tensor]:
    """Return the H of each linear's inputs."""
    found = {name: Hessian(model.get_submodule(name).in_features, rows.device) for name in names}

    def add_to(hessian: Hessian) -> Any:
        return lambda _, inputs: hessian.add(inputs[0])

    hooks = [model.get_submodule(name).register_forward_pre_hook(add_to(found[name])) for name in names]
    with torch.no_grad():
        for first in range(0, len(rows), ROWS_AT_ONCE):
            model(rows[first : first + ROWS_AT_ONCE])
    for hook in hooks:
        hook.remove()
    return {name: hessian.matrix() for name, hessian in found.items()}


def ratios(weight: Tensor, H: Tensor, other: Tensor) -> Iterator[tuple[float, float]]:
    """Yield for each order the refined loss over the plain one, on the calibration text and on the other."""
    damped = H + torch.eye(len(H)) * DAMP * H.diagonal().mean()

    def losses(solution: Solution) -> list[float]:
        R = (weight - solution.dequantized()).double()
        return [float(((R @ each.double()) * R).sum()) for each in (damped, other)]

    for order in ORDERS:
        factor = factorize(H, order, damp_percent=DAMP)
        plain, refined = (losses(solve([weight], factor, RULES, refined=chosen)) for chosen in ((), (True,)))
        yield refined[0] / plain[0], refined[1] / plain[1]


def table(found: dict[tuple[str, float], list[tuple[float, float]]]) -> Table:
    """Return the geometric means over blocks and orders."""
    shown = Table(title="Loss with the refinement over the loss without it")
    for heading in ("linear", "tokens per column", "calibration text", "other text", "worst on other text"):
        shown.add_column(heading)
    for (linear, tokens), pairs in sorted(found.items()):
        means = [math.exp(sum(math.log(pair[which]) for pair in pairs) / len(pairs)) for which in (0, 1)]
        worst = max(pair[1] for pair in pairs)
        shown.add_row(linear, f"{tokens:.1f}", *(f"{mean:.3f}" for mean in means), f"{worst:.3f}")
    return shown


if __name__ == "__main__":
    sys.exit(main())
