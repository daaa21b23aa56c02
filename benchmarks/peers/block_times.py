"""How long each part of quantizing a block takes, on a GPU by its events, and how long the host takes to start it.

Parts are nested: the time of a part is without that of the parts inside it. `forward` is what is left of a block: the
suspended forward of all batches, and their activations. Only blocks after the first count, because kernels are compiled
in the first. The events of the parts of a column block lengthen the run a little.
"""

from __future__ import annotations

import importlib
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

FORWARD = "forward"
# The name of each part, and its functions: where a name ends with "!", the functions inside it are not parts.
_PARTS = (
    (FORWARD, "packager.quantize.worker", "_VariantRun.run"),
    ("wait for the GPU", "packager.quantize.block", "_BlockSolver._check"),
    ("Hessians: products!", "packager.quantize.gptq.hessian", "Hessian.add"),
    ("Hessians: sum of the parts!", "packager.quantize.ranks", "SweepRank.hessian"),
    ("target: forward of the fp16 model!", "packager.quantize.suspended_forward", "_ReferenceRuns.__init__"),
    ("target: forward of the fp16 model!", "packager.quantize.suspended_forward", "_ReferenceRuns.next_input"),
    ("target: forward of the fp16 model!", "packager.quantize.suspended_forward", "_ReferenceRuns.finish"),
    ("target: products of inputs!", "packager.quantize.gptq.target_correction", "InputShift.add"),
    ("target: sum of the parts!", "packager.quantize.ranks", "SweepRank.shift"),
    ("target: products with the weights", "packager.quantize.block", "corrected_targets"),
    ("target: Cholesky!", "packager.quantize.gptq.target_correction", "cholesky"),
    ("target: solves!", "packager.quantize.gptq.target_correction", "solve_rows"),
    ("factor: order of columns", "packager.quantize.block", "factorize"),
    ("factor: order of columns", "packager.quantize.block", "factorize_within"),
    ("factor: Cholesky!", "packager.quantize.gptq.hessian", "cholesky"),
    ("solve: rest", "packager.quantize.block", "solve"),
    ("solve: inverse blocks of U!", "packager.quantize.gptq.solve", "inverse_blocks"),
    ("solve: refinement!", "packager.quantize.gptq.solve", "refine"),
    ("columns: rest", "packager.quantize.gptq.solve", "_ColumnSolver.run"),
    ("packing!", "packager.quantize.block", "_BlockSolver._keep"),
    ("dequantizing!", "packager.quantize.gptq.solve", "Solution.dequantize_into"),
    ("copies of weights to other GPUs!", "packager.quantize.ranks", "SweepRank.copy_from_owners"),
)
_OPS_PARTS = (
    ("solve: permuted weights!", "permute_columns"),
    ("solve: split of U!", "lazy_updates"),
    ("columns: products within 512!", "add_product"),
    ("columns: rounding, search!", "round_columns"),
    ("columns: search of long groups!", "find_grids"),
)
_UPDATES_PARTS = (("columns: lazy products!", "pending_update"), ("columns: split of deltas!", "record"))
_OPS = {
    "cuda": (("packager.quantize.gptq.triton_ops", "TritonOps"), "SplitUpdates"),
    "cpu": (("packager.quantize.gptq.torch_ops", "TorchOps"), "Float32Updates"),
}


@dataclass(kw_only=True)
class _Span:
    """A call of a part."""

    part: str
    device: str
    block: int
    leaf: bool
    begin: Any = None
    end: Any = None
    begin_s: float = 0.0
    end_s: float = 0.0
    inside: list[_Span] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class PartTime:
    """The seconds of a part in a block, and the calls: of the GPU's work (null on a CPU), and of the host's."""

    device_s: float | None
    host_s: float
    calls: float


class BlockTimes(ExitStack):
    """Measures while the context lasts.

    Args:
        device: "cpu" or "cuda".

    Attributes:
        solved: in_features and out_features of each group of linears that was solved in a block.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._cuda: Any = importlib.import_module("torch").cuda if device == "cuda" else None
        self._local: Any = importlib.import_module("threading").local()
        self._spans: list[_Span] = []
        self._shapes: dict[tuple[int, str], list[tuple[int, int]]] = defaultdict(list)
        (module, ops), updates = _OPS[device]
        self._parts = [
            *_PARTS,
            *((part, module, f"{ops}.{name}") for part, name in _OPS_PARTS),
            *((part, "packager.quantize.gptq.lazy_updates", f"{updates}.{name}") for part, name in _UPDATES_PARTS),
        ]

    def __enter__(self) -> BlockTimes:
        for part, module, path in self._parts:
            owner: Any = importlib.import_module(module)
            *classes, name = path.split(".")
            for each in classes:
                owner = getattr(owner, each)
            timed = self._timed(part.rstrip("!"), part.endswith("!"), getattr(owner, name))
            self.enter_context(patch.object(owner, name, timed))
        return self

    def seconds(self) -> dict[str, dict[str, PartTime]]:
        """Return the time of each part in a block, for each device; the devices must have finished."""
        sums: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
        blocks: dict[str, set[int]] = defaultdict(set)
        for span in self._spans:
            if span.block == 0:
                continue
            blocks[span.device].add(span.block)
            found = sums[span.device, span.part]
            found[0] += self._device_s(span) - sum(map(self._device_s, span.inside))
            found[1] += span.end_s - span.begin_s - sum(each.end_s - each.begin_s for each in span.inside)
            found[2] += 1
        times: dict[str, dict[str, PartTime]] = defaultdict(dict)
        for (device, part), (device_s, host_s, calls) in sums.items():
            count = len(blocks[device])
            on_device = None if self._cuda is None else device_s / count
            times[device][part] = PartTime(device_s=on_device, host_s=host_s / count, calls=calls / count)
        return dict(times)

    @property
    def solved(self) -> list[tuple[int, int]]:
        """The shapes of the groups that were solved in the last block, on all devices together."""
        last = max((block for block, _ in self._shapes), default=0)
        return [shape for (block, _), shapes in self._shapes.items() if block == last for shape in shapes]

    def _device_s(self, span: _Span) -> float:
        return 0.0 if self._cuda is None else float(span.begin.elapsed_time(span.end)) / 1000

    def _timed(self, part: str, leaf: bool, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            stack: list[_Span] = self._stack()
            if part == FORWARD:
                run, _, context = arguments[:3]
                stack.append(_Span(part=part, device=str(run._rank.device), block=context.index, leaf=leaf))
            elif not stack or stack[-1].leaf:
                return call(*arguments, **options)  # outside a block: kernels are compiled by calls in other threads
            else:
                outer = stack[-1]
                stack.append(_Span(part=part, device=outer.device, block=outer.block, leaf=leaf))
                outer.inside.append(stack[-1])
            span = stack[-1]
            if part == "solve: rest":
                weights = arguments[0]
                shape = weights[0].shape[-1], sum(weight.shape[-2] for weight in weights)
                self._shapes[span.block, span.device].append(shape)
            span.begin, span.begin_s = self._event(), time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                span.end, span.end_s = self._event(), time.perf_counter()
                stack.pop()
                self._spans.append(span)

        return timed

    def _stack(self) -> list[_Span]:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        found: list[_Span] = self._local.stack
        return found

    def _event(self) -> Any:
        if self._cuda is None:
            return None
        event = self._cuda.Event(enable_timing=True)
        event.record()
        return event
