"""Shared by the engines' scripts: read jobs, time one call each, and write the result.

Run as `python SCRIPT JOB.json ...` in an environment that has the engine. A job is an object:

    model_dir     a folder with a fp16 Llama in safetensors
    rows          a .npy file of token ids [num_samples, seq_len]
    bits, group_size, desc_act, sym, damp_percent
    fastest       whether to set what makes the engine faster on a large GPU; false: its defaults
    best          whether to set what gives the best weights, as its documentation has it
    batch_size    rows per batch in its fastest settings
    device        "cpu" or "cuda"
    save_dir      where to save the checkpoint (null: nowhere); never part of the time
    result        the file to write: status "ok", "not installed", "unavailable" or "failed"

Only the standard library is imported before the engine, so the engine may need any versions.
"""

from __future__ import annotations

import gc
import importlib
import importlib.metadata
import json
import platform
import resource
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

Job = dict[str, Any]


class NotInstalledError(Exception):
    """The engine cannot be imported here."""


class UnavailableError(Exception):
    """The engine is installed but cannot run this job on this machine."""


def need(name: str) -> Any:
    """Import a module of the engine.

    Raises:
        NotInstalledError: it, or something that it needs, cannot be imported.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise NotInstalledError(f"{name}: {error}") from error


class Stopwatch:
    """Time and peak GPU memory of a `with` block.

    Attributes:
        started: when it was entered, on time.perf_counter.
        seconds: wall time, the GPU's work finished.
        marks: seconds from the start at which the engine reached the same point of each layer.
        packing_s: the seconds of packing weights into words, where the engine packs separately.
        held: what torch held of each GPU when it was entered, allocated and reserved bytes.
    """

    def __init__(self, device: str) -> None:
        self._torch: Any = importlib.import_module("torch")
        self._cuda = device == "cuda"
        self.started = 0.0
        self.seconds = 0.0
        self.marks: list[float] = []
        self.packing_s: float | None = None
        self.held: list[tuple[int, int]] = []

    def __enter__(self) -> Stopwatch:
        gc.collect()
        if self._cuda:
            self._torch.cuda.empty_cache()
            for device in range(self._torch.cuda.device_count()):
                self._torch.cuda.synchronize(device)
                self._torch.cuda.reset_peak_memory_stats(device)
                memory = self._torch.cuda
                self.held.append((memory.memory_allocated(device), memory.memory_reserved(device)))
        self.started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._cuda:
            for device in range(self._torch.cuda.device_count()):
                self._torch.cuda.synchronize(device)
        self.seconds = time.perf_counter() - self.started

    def mark(self) -> None:
        """Record that the next layer is reached."""
        self.marks.append(time.perf_counter() - self.started)

    def packing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the engine's packing so that its time is measured separately."""

        def timed(*arguments: Any, **options: Any) -> Any:
            started = time.perf_counter()
            try:
                return call(*arguments, **options)
            finally:
                self.packing_s = (self.packing_s or 0.0) + time.perf_counter() - started

        return timed

    def outcome(self) -> dict[str, Any]:
        """Return the result's fields of time and memory; a peak is that of the fullest GPU, and each GPU's is given."""
        cuda = self._torch.cuda
        devices = range(cuda.device_count()) if self._cuda else ()
        return {
            "seconds": self.seconds,
            "packing_s": self.packing_s,
            "marks": self.marks,
            "gpu_allocated_bytes": max((cuda.max_memory_allocated(device) for device in devices), default=None),
            "gpu_reserved_bytes": max((cuda.max_memory_reserved(device) for device in devices), default=None),
            "each_gpu_allocated_bytes": [cuda.max_memory_allocated(device) for device in devices],
            "gpus": len(devices),
            "device_name": cuda.get_device_name() if self._cuda else "cpu",
        }

    def beyond(self) -> dict[str, int | None]:
        """Return the peaks of the fullest GPU beyond what torch held of it before."""
        cuda, held = self._torch.cuda, list(enumerate(self.held))
        allocated = [cuda.max_memory_allocated(device) - before for device, (before, _) in held]
        reserved = [cuda.max_memory_reserved(device) - before for device, (_, before) in held]
        return {
            "gpu_allocated_beyond_bytes": max(allocated, default=None),
            "gpu_reserved_beyond_bytes": max(reserved, default=None),
        }


def rows_of(job: Job) -> Any:
    """Return the calibration rows, an int64 tensor [num_samples, seq_len]."""
    numpy: Any = importlib.import_module("numpy")
    torch: Any = importlib.import_module("torch")
    return torch.from_numpy(numpy.load(job["rows"]))


def versions(*names: str) -> dict[str, str]:
    """Return the versions of Python and of the installed packages."""
    found = {"python": platform.python_version()}
    for name in ("torch", "transformers", *names):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def run(files: Sequence[str], quantize: Callable[[Job], dict[str, Any]]) -> int:
    """Run the jobs one after the other; a failed one does not stop the next. Returns the exit status."""
    status = 0
    for name in files:
        job = json.loads(Path(name).read_text(encoding="utf-8"))
        started = time.perf_counter()
        try:
            result = {"status": "ok", **quantize(job)}
        except NotInstalledError as error:
            result = {"status": "not installed", "reason": str(error)}
        except UnavailableError as error:
            result = {"status": "unavailable", "reason": str(error)}
        except (Exception, SystemExit) as error:  # noqa: BLE001 - an engine may raise anything; the table shows it
            traceback.print_exc()
            result = {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
            status = 1
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        result["host_bytes"] = peak if sys.platform == "darwin" else peak * 1024
        result["whole_s"] = time.perf_counter() - started
        _write(Path(job["result"]), result)
    return status


def _write(path: Path, result: dict[str, Any]) -> None:
    """Write the result atomically."""
    temporary = path.with_name(f".tmp-{path.name}")
    temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)
