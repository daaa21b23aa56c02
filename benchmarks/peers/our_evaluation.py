"""Our stage "evaluate" of a build whose weights are there: fp16 and every variant on the recipe's held-out text.

A job has recipe, dist, device, gpu_memory_bytes (null: all) and result. The digests of the base model's files are
computed before the clock starts: a build knows them from quantizing. So most of the files are in the page cache, as
they are in a build.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # as packager.cli.main does

from ours import build_of
from peer import Job, Stopwatch, need, run, versions


class ModelTimes(ExitStack):
    """The seconds of each model, measured while the context lasts; every part ends with the GPU's work done.

    Attributes:
        models: for each model in turn, its `name`, `forward_s` (embedding to the last block's outputs on the host),
            `blocks_s` of it (from the moment at which the first block was read), and `compare_s` for a variant.
    """

    def __init__(self) -> None:
        super().__init__()
        self.models: list[dict[str, Any]] = []
        self._first = self._last = 0.0

    def __enter__(self) -> ModelTimes:
        module, decoder = need("packager.prove.evaluate"), need("packager.model.decoder").Decoder
        self._replace(module, "run_base", self._model)
        self._replace(module, "run_checkpoint", self._model)
        self._replace(module, "run_blocks", self._blocks)
        self._replace(module, "quality_of", self._comparison)
        self._replace(decoder, "load_block", self._load)
        return self

    def _replace(self, owner: Any, name: str, timed: Callable[..., Any]) -> None:
        function = getattr(owner, name)

        def replaced(*arguments: Any, **options: Any) -> Any:
            return timed(function, *arguments, **options)

        self.enter_context(patch.object(owner, name, replaced))

    def _model(self, function: Callable[..., Any], first: Any, *rest: Any) -> Any:
        started = time.perf_counter()
        made = function(first, *rest)
        name = first.name if isinstance(first, Path) else "fp16"
        seconds = {"forward_s": time.perf_counter() - started, "blocks_s": self._last - self._first}
        self.models.append({"name": name, **seconds, "compare_s": 0.0})
        return made

    def _blocks(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self._first = 0.0
        try:
            return function(*arguments)
        finally:
            self._last = time.perf_counter()

    def _load(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self._first = self._first or time.perf_counter()
        return function(*arguments)

    def _comparison(self, function: Callable[..., Any], *arguments: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*arguments)
        finally:
            self.models[-1]["compare_s"] = time.perf_counter() - started


def evaluate(job: Job) -> dict[str, Any]:
    """Measure the quality of every variant of a recipe whose weights `ours.py` made."""
    terminal = need("packager.system.terminal").Terminal()
    build = build_of(job, terminal)
    with build.workspace.locked():
        build.read_receipts()
        build.source.weights.records()
        num_tokens = build.texts.evaluation.ids.numel()
        watch = Stopwatch(job["device"])
        host_before = _resident_bytes()
        with watch, ModelTimes() as times:
            measured = need("packager.pipeline.evaluate_stage").evaluate(build)
    planned = getattr(build.plan.evaluation, "gpu" if job["device"] == "cuda" else "cpu")
    return {
        **watch.outcome(),
        **watch.beyond(),
        "seconds": terminal.seconds["evaluate"],
        "models": times.models,
        "variants": list(measured),
        "held_out_tokens": num_tokens,
        "seq_len": build.recipe.evaluation.seq_len,
        "layers": build.plan.architecture.num_blocks,
        "host_before_bytes": host_before,
        "planned_device_bytes": planned.device_bytes,
        "planned_host_bytes": planned.host_bytes,
        "timed": "the stage evaluate: reading, forward passes, comparison, receipts",
        "settings": {"gpu_memory_bytes": job["gpu_memory_bytes"]},
        "versions": versions("triton", "numpy", "safetensors"),
    }


def _resident_bytes() -> int | None:
    """Return this process's resident size, where the system has such a file."""
    path = Path("/proc/self/statm")
    return int(path.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if path.exists() else None


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:], evaluate))
