"""How long each of the devices that share the calibration rows copies from others, and solves; on a GPU by its events.

`copy` is the time of copies from other devices: sums of Hessians, and weights that another device solved. `reduce` is
the time from the end of a device's own sums until its part in the Hessian is done: the copies, the additions, and the
wait for the slowest device. `targets`, `factor` and `columns` are the times of making corrected targets, of factoring
and of rounding, while the other devices wait. `read` is the time of reading a block's weights for a device, beside its
work: a run cannot be faster.

A function that is measured gets its arguments from the one that measures it, which keeps them until it returns. So none
that frees an argument is measured: the peak of memory would not be that of a build.
"""

from __future__ import annotations

import importlib
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

_WRAPPED = {
    "copy": ("packager.quantize.ranks", "SweepRank", "pull"),
    "reduce": ("packager.quantize.ranks", "SweepRank", "hessian"),
    "targets": ("packager.quantize.block", "_BlockSolver", "_targets"),
    "factor": ("packager.quantize.block", "_BlockSolver", "_factor"),
    "columns": ("packager.quantize.block", "_BlockSolver", "_solution"),
    "read": ("packager.model.decoder", "Decoder", "_block_weights"),
}
_OF_THE_HOST = ("read",)


class RankTimes(ExitStack):
    """Measures while the context lasts; without a GPU by the clock of the thread that works.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self._cuda: Any = importlib.import_module("torch").cuda if device == "cuda" else None
        self._spans: dict[tuple[str, str], list[tuple[Any, Any]]] = defaultdict(list)

    def __enter__(self) -> RankTimes:
        for kind, (module, owner, name) in _WRAPPED.items():
            found = getattr(importlib.import_module(module), owner)
            self.enter_context(patch.object(found, name, self._timed(kind, getattr(found, name))))
        return self

    def seconds(self) -> dict[str, dict[str, float]]:
        """Return the seconds of each kind for each device; the devices must have finished."""
        found: dict[str, dict[str, float]] = {}
        for (device, kind), spans in sorted(self._spans.items()):
            by_clock = self._cuda is None or kind in _OF_THE_HOST
            total = sum(end - begin if by_clock else begin.elapsed_time(end) / 1000 for begin, end in spans)
            found.setdefault(device, {})[kind] = total
        return found

    def _timed(self, kind: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def timed(this: Any, *arguments: Any, **options: Any) -> Any:
            job = getattr(this, "_job", this)
            device = getattr(job, "rank", job).device
            begin = self._now(kind, device)
            try:
                return method(this, *arguments, **options)
            finally:
                self._spans[str(device), kind].append((begin, self._now(kind, device)))

        return timed

    def _now(self, kind: str, device: Any) -> Any:
        if self._cuda is None or kind in _OF_THE_HOST:
            return time.perf_counter()
        event = self._cuda.Event(enable_timing=True)
        event.record(self._cuda.current_stream(device))
        return event
