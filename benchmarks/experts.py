"""Measure the solver on the experts of a layer: seconds and peak memory, with random weights and correlated inputs.

    python benchmarks/experts.py [--json FILE] [--device cuda] [--only NAME]

One case has the shape of a layer of Qwen3-30B-A3B, with four permutations; one that of DeepSeek-V3, with one; each is
run in slices of as many experts as fit --slice-gb. It needs torch and, on CUDA, Triton; no transformers. A case that
fails is reported with its error, and the others still run.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from packager.quantize.gptq.cholesky import blocked_cholesky
from packager.quantize.gptq.expert_hessians import expert_hessians, pooled_hessian
from packager.quantize.gptq.grid import GridRules
from packager.quantize.gptq.hessian import factorize
from packager.quantize.gptq.order import ColumnOrder
from packager.quantize.gptq.routing import RoutedInputs, route
from packager.quantize.gptq.solve import solve
from packager.quantize.gptq.torch_ops import TorchOps


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer's experts, and the tokens they are calibrated on."""

    name: str
    hidden: int
    intermediate: int
    experts: int
    top_k: int
    tokens: int
    batch_tokens: int
    permutations: tuple[tuple[int, bool], ...]  # group_size, desc_act


FOUR = ((128, False), (32, True), (64, True), (128, True))
CASES = (
    Case(name="qwen3-30b-a3b", hidden=2048, intermediate=768, experts=128, top_k=8, tokens=128 * 2048,
         batch_tokens=16384, permutations=FOUR),
    Case(name="deepseek-v3", hidden=7168, intermediate=2048, experts=256, top_k=8, tokens=128 * 2048,
         batch_tokens=16384, permutations=FOUR[:1]),
)  # fmt: skip
TINY = Case(name="tiny", hidden=96, intermediate=64, experts=5, top_k=2, tokens=256, batch_tokens=100,
            permutations=FOUR[:2])  # fmt: skip


@dataclass
class Timer:
    """Seconds of each stage; a stage ends when the device has finished it."""

    device: torch.device
    stages: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time inside the context to a stage."""
        wait(self.device)
        begin = time.perf_counter()
        yield
        wait(self.device)
        self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - begin


def wait(device: torch.device) -> None:
    """Wait until the device has finished."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def correlated(count: int, n: int, draw: torch.Generator, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return inputs that share 32 directions, with columns of different sizes."""
    shared = torch.randn(count, 32, generator=draw, device=device) @ torch.randn(32, n, generator=draw, device=device)
    x = torch.randn(count, n, generator=draw, device=device) + 0.3 * shared
    return (x * torch.linspace(0.2, 2, n, device=device)).to(dtype)


def inputs_of(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[list[RoutedInputs], list[RoutedInputs]]:
    """Return the inputs of gate and up, and those of down."""
    draw = torch.Generator(device).manual_seed(0)
    popular = torch.linspace(1, 0, case.experts, device=device)
    first, second = [], []
    for begin in range(0, case.tokens, case.batch_tokens):
        count = min(case.batch_tokens, case.tokens - begin)
        scores = popular + torch.randn(count, case.experts, generator=draw, device=device)
        routing = route(scores.topk(case.top_k).indices, case.experts)
        x = correlated(count, case.hidden, draw, device, dtype)
        inner = correlated(routing.num_pairs, case.intermediate, draw, device, dtype)
        first.append(RoutedInputs(rows=x, routing=routing, per_token=True))
        second.append(RoutedInputs(rows=inner, routing=routing, per_token=False))
    return first, second


def solve_all(
    inputs: Sequence[RoutedInputs], shape: tuple[int, int, int], permutation: tuple[int, bool], slice_bytes: int,
    timer: Timer, name: str,
) -> dict[str, Any]:  # fmt: skip
    """Quantize one parameter of every expert, slice by slice."""
    experts, out, n = shape
    order = ColumnOrder(act_order="full" if permutation[1] else "none", group_size=permutation[0])
    device, dtype = inputs[0].rows.device, inputs[0].rows.dtype
    at_once = max(1, min(experts, slice_bytes // (3 * 4 * n * n + 20 * n * out)))
    draw, rules = torch.Generator(device).manual_seed(1), GridRules(bits=4, sym=True, scale_search=True)
    with timer.stage(f"{name}: pooled Hessian"):
        pooled = pooled_hessian(inputs)
    failed, loss, tokens = 0, 0.0, list[int]()
    for begin in range(0, experts, at_once):
        part = range(begin, min(begin + at_once, experts))
        weight = (torch.randn(len(part), out, n, generator=draw, device=device) * 0.02).to(dtype)
        with timer.stage(f"{name}: Hessians"):
            found = expert_hessians(inputs, part, pooled)
        tokens += found.tokens
        with timer.stage(f"{name}: factors"):
            factor = factorize(found.H, order, damp_percent=0.01)
        del found
        with timer.stage(f"{name}: columns"):
            solution = solve([weight], factor, rules)
        with timer.stage(f"{name}: dequantize"):
            solution.dequantize_into(weight)
        failed += int((~factor.succeeded).sum())
        loss += float(solution.losses.sum())
    return {"experts_at_once": at_once, "failed": failed, "loss": loss,
            "tokens": [min(tokens), sorted(tokens)[experts // 2], max(tokens)]}  # fmt: skip


def run_case(case: Case, device: torch.device, slice_bytes: int) -> Iterator[dict[str, Any]]:
    """Quantize a layer's experts once per permutation, after a warm-up that compiles the kernels."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    first, second = inputs_of(case, device, dtype)
    shapes = ((case.experts, 2 * case.intermediate, case.hidden), (case.experts, case.hidden, case.intermediate))
    for permutation in case.permutations:
        try:
            for warm in (True, False):
                if device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                timer, begin = Timer(device), time.perf_counter()
                if warm:  # few experts: compiling depends on shapes of the columns, not on how many experts there are
                    few = [(min(16, shape[0]), *shape[1:]) for shape in shapes]
                    solve_all(first[:1], few[0], permutation, slice_bytes, timer, "gate, up")
                    solve_all(second[:1], few[1], permutation, slice_bytes, timer, "down")
                    continue
                details = {
                    "gate, up": solve_all(first, shapes[0], permutation, slice_bytes, timer, "gate, up"),
                    "down": solve_all(second, shapes[1], permutation, slice_bytes, timer, "down"),
                }
            yield {"case": case.name, "group_size": permutation[0], "desc_act": permutation[1], "status": "ok",
                   "seconds": sum(timer.stages.values()), "wall_s": time.perf_counter() - begin,
                   "peak_bytes": peak(device), "stages": timer.stages, "details": details}  # fmt: skip
        except Exception as error:  # noqa: BLE001 - a measurement that fails is a row of the table
            yield failure(case.name, error) | {"group_size": permutation[0], "desc_act": permutation[1]}


def compare(case: Case, device: torch.device) -> Iterator[dict[str, Any]]:
    """Time what there are two ways for: the Hessians of one batch, and the factors of 32 experts."""
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    first, _ = inputs_of(Case(**{**vars(case), "tokens": min(case.tokens, case.batch_tokens)}), device, dtype)
    some = range(min(32, case.experts))
    pooled = pooled_hessian(first)
    H = expert_hessians(first, some, pooled).H + 0.01 * torch.eye(case.hidden, device=device)
    ways: dict[str, Callable[[], Any]] = {
        "Hessians of one batch": lambda: expert_hessians(first, some, pooled),
        "Hessians of one batch, expert by expert in float32": lambda: expert_hessians(first, some, pooled, TorchOps()),
        "factors, blocked": lambda: blocked_cholesky(H.clone()),
        "factors, the library's batch": lambda: torch.linalg.cholesky_ex(H),
        "factors, the library one by one": lambda: [torch.linalg.cholesky_ex(each) for each in H],
    }
    for name, way in ways.items():
        try:
            way()
            timer = Timer(device)
            with timer.stage(name):
                way()
            yield {"case": case.name, "what": f"{name}, {len(some)} experts", "status": "ok",
                   "seconds": timer.stages[name]}  # fmt: skip
        except Exception as error:  # noqa: BLE001 - likewise
            yield failure(case.name, error) | {"what": name}


def failure(name: str, error: Exception) -> dict[str, Any]:
    """Return the row of a case that failed, and print where."""
    traceback.print_exception(error)
    return {"case": name, "status": f"{type(error).__name__}: {error}"[:300]}


def peak(device: torch.device) -> int | None:
    """Return the most bytes that tensors took on a GPU."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def launches(case: Case, at_once: int) -> dict[str, int]:
    """Return how many kernels and products one permutation launches, estimated: about 6 per column block and slice."""
    batches = -(-case.tokens // case.batch_tokens)
    slices = -(-case.experts // at_once)
    blocks = {"gate, up": -(-case.hidden // 128), "down": -(-case.intermediate // 128)}
    return {
        name: batches * 6 + slices * (batches * 2 + 10 * count + 2 * at_once + 20) for name, count in blocks.items()
    }


def show(row: dict[str, Any]) -> None:
    """Print one line, and the stages below it."""
    what = row.get("what") or f"{row.get('group_size')}g {'desc_act' if row.get('desc_act') else ''}"
    spent = f"{row['seconds']:9.3f} s" if "seconds" in row else " " * 11
    most = f"{row['peak_bytes'] / 1e9:7.1f} GB" if row.get("peak_bytes") else " " * 10
    print(f"{row['case']:15} {what:60} {spent} {most}  {row['status']}", flush=True)
    for name, seconds in row.get("stages", {}).items():
        print(f"{'':18}{name:57} {seconds:9.3f} s", flush=True)
    for name, details in row.get("details", {}).items():
        print(f"{'':18}{name}: {details}", flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the cases; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--slice-gb", type=float, default=12.0, help="GB that a slice of experts may take (default 12)")
    parser.add_argument("--only", choices=[case.name for case in (*CASES, TINY)], help="one case")
    parser.add_argument("--no-compare", action="store_true", help="do not time the other ways")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    device, rows = torch.device(given.device), []
    for case in CASES if given.only is None else [each for each in (*CASES, TINY) if each.name == given.only]:
        for run in (
            partial(run_case, case, device, int(given.slice_gb * 1e9)),
            partial(compare, case, device),
        ):
            try:
                for row in run():
                    rows.append(row)
                    show(row)
            except Exception as error:  # noqa: BLE001 - the other cases still run
                rows.append(failure(case.name, error))
                show(rows[-1])
            if device.type == "cuda":
                torch.cuda.empty_cache()
            if given.no_compare:
                break
        done = [row for row in rows if row["case"] == case.name and "details" in row]
        if done:
            at_once = done[0]["details"]["gate, up"]["experts_at_once"]
            print(f"{case.name}: launches per layer and permutation, estimated: {launches(case, at_once)}", flush=True)
    if given.json:
        machine = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        given.json.write_text(
            json.dumps({"machine": machine, "torch": torch.__version__, "rows": rows}, indent=2) + "\n"
        )
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    sys.exit(main())
