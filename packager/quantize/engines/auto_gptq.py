"""AutoGPTQ 0.7.1 as an engine: one process per variant, in the environment of the loader autogptq.

The script writes an event per finished linear and block to its standard output. The events are read while it runs, and
each block goes into the variant's store. AutoGPTQ cannot resume inside a model: an interrupted variant starts again at
its first block, unless all of its blocks are finished. Variants are quantized one after the other, each in a pass over
the whole model.
"""

import json
import platform
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from packager import __version__
from packager.errors import LoaderUnavailableError, MachineError, PackError, QuantizeError
from packager.inputs.base_model import SourceModel
from packager.inputs.linked_weights import link_weights
from packager.prove.environments import RuntimeContext, ensure_environment, environment_in_use, installed_versions
from packager.prove.loaders import LOADERS, LoaderSpec
from packager.prove.probes import probe_environ, runtime_view
from packager.quantize.block_store import BlockStore
from packager.quantize.engines.auto_gptq_files import AUTO_GPTQ_LOCK, AUTO_GPTQ_SCRIPT
from packager.quantize.engines.legacy_config import legacy_config
from packager.quantize.engines.protocol import EngineResult
from packager.quantize.job import BlockDone, LinearsDone, QuantizeJob, Report
from packager.receipt import CONFIG, LinearRecord
from packager.system.confinement import confined_command, private_folder
from packager.system.files import TEMPORARY_PREFIX, disk_errors, open_regular
from packager.system.processes import ending, tail
from packager.variant import AUTO_GPTQ_KNOWS, Variant

# For Python 3.13 the lock has another transformers, with which quantizing is untested.
SPEC = replace(
    LOADERS["autogptq"], script=AUTO_GPTQ_SCRIPT, requirements=AUTO_GPTQ_LOCK, requires_python=">=3.11,<3.13"
)
PACKAGES = ("auto-gptq", "transformers", "accelerate", "safetensors", "numpy", "torch")
# Longest time without an event: reading a 13B model from a cold disk, or solving its widest linear on a slow GPU.
SILENCE_S = 3600.0
_TAIL_LINES = 20
_USE_NATIVE = "use engine: native"


class AutoGptq:
    """AutoGPTQ as the reference engine.

    Args:
        context: where its environment and its scratch files are.
        spec: the environment and the script; tests replace it.
        silence_s: seconds without an event after which the script is killed.
    """

    def __init__(self, context: RuntimeContext, spec: LoaderSpec = SPEC, silence_s: float = SILENCE_S) -> None:
        self._context = context
        self._spec = spec
        self._silence_s = silence_s

    def quantize(self, job: QuantizeJob, report: Report) -> EngineResult:
        """Quantize with AutoGPTQ; arguments, result and errors are those of `Engine.quantize`."""
        for variant in job.stores:
            _require_known(variant)
        try:
            python = ensure_environment(self._spec, self._context)
        except LoaderUnavailableError as error:
            raise MachineError(error.what, where=error.where, why=error.why, hint=error.hint or _USE_NATIVE) from error
        records = {}
        for variant, store in job.stores.items():
            progress = _VariantProgress(job=job, variant=variant, store=store, report=report)
            if not progress.resumed():
                with environment_in_use(python):
                    self._run_script(progress, python)
            records[variant.branch] = progress.records()
        versions = installed_versions(python, PACKAGES)
        return EngineResult(
            records=records,
            made_with=f"AutoGPTQ {versions['auto-gptq']}",
            versions={"python": platform.python_version(), "gptq-packager": __version__, **versions},
        )

    def _run_script(self, progress: "_VariantProgress", python: Path) -> None:
        """Run the script for one variant."""
        import torch

        job, folder = progress.job, self._context.scratch / f"{TEMPORARY_PREFIX}auto-gptq"
        torch.cuda.empty_cache()  # memory that torch caches in this process is not free for the other one
        with disk_errors(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            _stage_model(job.source, folder / "model")
            request = _request(progress.variant, folder, job)
        try:
            with private_folder() as private:
                log, events = private / "stderr.txt", private / "stdout.txt"
                view = runtime_view(
                    self._spec, python, private, self._context, device="cuda",
                    readable=[path.resolve() for path in (folder / "model").iterdir()], writable=[folder],
                )  # fmt: skip
                command = [str(python), "-I", str(self._spec.script.absolute()), str(request.absolute())]
                with events.open("wb") as out, log.open("wb") as err:
                    reader = _Reader(events, lambda event: progress.take(event, folder))
                    status = self._context.processes.run(
                        confined_command(command, view, self._context.confinement),
                        folder=folder,
                        environ=probe_environ(python, self._context.environ, "cuda", private),
                        out=out,
                        err=err,
                        timeout_s=self._silence_s,
                        progress=reader.read,
                    )
                    reader.read()
                if status != 0 or not progress.done:
                    raise _ended(progress.variant, status, tail(log, _TAIL_LINES), self._silence_s)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _require_known(variant: Variant) -> None:
    """Refuse a parameter that AutoGPTQ does not have; recipes with one are refused before."""
    for name, known in AUTO_GPTQ_KNOWS.items():
        if getattr(variant, name) not in known:
            what = f"engine auto-gptq cannot do {name} {getattr(variant, name)}"
            raise QuantizeError(what, where=variant.branch, hint=_USE_NATIVE)


def _stage_model(source: SourceModel, folder: Path) -> None:
    """Write a folder that transformers 4.40 reads: a config.json of its own, links to the weights, and an index."""
    folder.mkdir()
    config = json.dumps(legacy_config(source.config), indent=2)
    (folder / CONFIG).write_text(config, encoding="utf-8")
    link_weights(source, folder)


def _request(variant: Variant, folder: Path, job: QuantizeJob) -> Path:
    """Write the script's job file and return its path."""
    import numpy as np

    rows, request = folder / "rows.npy", folder / "job.json"
    np.save(rows, job.rows.ids.numpy())
    parameters = {
        "bits": variant.bits,
        "group_size": variant.group_size,
        "damp_percent": variant.damp_percent,
        # AutoGPTQ's words for the order; the branch's configs say it in those of today's runtimes.
        "desc_act": variant.act_order in ("static", "full"),
        "static_groups": variant.act_order == "static",
        "sym": variant.sym,
        "true_sequential": variant.true_sequential,
    }
    paths = {"model_dir": str(folder / "model"), "rows": str(rows), "output_dir": str(folder)}
    content = {**paths, "gpu_memory_bytes": job.device_limit, "quantize": parameters}
    request.write_text(json.dumps(content), encoding="utf-8")
    return request


class _Reader:
    """Reads the whole lines that another process appends to a file, and passes each on as an event."""

    def __init__(self, path: Path, take: Callable[[Mapping[str, Any]], None]) -> None:
        self._path = path
        self._take = take
        self._offset = 0

    def read(self) -> int:
        """Pass on the lines written since the last call; return the offset up to which the file was read."""
        with self._path.open("rb") as stream:
            stream.seek(self._offset)
            lines = stream.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        self._offset += len(whole)
        for line in whole.splitlines():
            self._take(_event(line))
        return self._offset


def _event(line: bytes) -> Mapping[str, Any]:
    try:
        event = json.loads(line)
    except ValueError:
        event = None
    if not isinstance(event, dict) or "event" not in event:
        raise QuantizeError("engine auto-gptq wrote a line that is not an event", why=repr(line[:200])[1:])
    return event


@dataclass(kw_only=True)
class _VariantProgress:
    """The events of one variant's script, and what they have filled of its store.

    Attributes:
        done: the script has reported its end, and every block was stored.
    """

    job: QuantizeJob
    variant: Variant
    store: BlockStore
    report: Report

    def __post_init__(self) -> None:
        self.done = False
        self._num_blocks = self.job.source.architecture.num_blocks
        self._blocks = {linear.name: linear.block for linear in self.job.source.architecture.linears}
        self._records: dict[str, LinearRecord] = {}
        self._block_started = time.monotonic()
        self._next_block = 0

    def resumed(self) -> bool:
        """Return whether an earlier run finished the whole variant, and report its blocks if so."""
        if any(self.store.read(block) is None for block in range(self._num_blocks)):
            return False
        for block in range(self._num_blocks):
            self._report(block, self.store.records(block) or (), resumed=True)
        return True

    def records(self) -> tuple[LinearRecord, ...]:
        """Return the records of all linears in model order."""
        return tuple(record for block in range(self._num_blocks) for record in self.store.records(block) or ())

    def take(self, event: Mapping[str, Any], folder: Path) -> None:
        """Act on one event of the script.

        Raises:
            QuantizeError: the script reports an error, or an event that was not expected.
            MachineError: the script reports that this machine lacks something.
        """
        match event["event"]:
            case "linear":
                self._take_linear(str(event["name"]), float(event["loss"]))
            case "block":
                self._take_block(int(event["block"]), folder / Path(event["file"]).name)
            case "done":
                self.done = self._next_block == self._num_blocks
            case "error":
                raise _explained(event, self.variant)

    def _take_linear(self, name: str, loss: float) -> None:
        if name not in self._blocks:
            raise self._defect(f"{name} is not a linear of this model")
        record = LinearRecord(name=name, loss=loss, damp_percent=self.variant.damp_percent)
        self._records[name] = record
        self.report(LinearsDone(branch=self.variant.branch, block=self._blocks[name], linears=(record,)))

    def _take_block(self, block: int, path: Path) -> None:
        from safetensors.torch import load_file

        if block != self._next_block:
            raise self._defect(f"block {block} came instead of block {self._next_block}")
        self._next_block += 1
        linears = [name for name, its_block in self._blocks.items() if its_block == block]
        if missing := [name for name in linears if name not in self._records]:
            raise self._defect(f"block {block} came without the loss of {', '.join(missing)}")
        records = tuple(self._records[name] for name in linears)
        try:
            open_regular(path).close()
            self.store.write(block, load_file(path), records)
        except OSError as error:
            raise self._defect(f"block {block} cannot be read: {error}") from error
        except PackError as error:
            raise self._defect(error.brief) from error
        path.unlink()
        self._report(block, records, resumed=False)

    def _report(self, block: int, records: tuple[LinearRecord, ...], *, resumed: bool) -> None:
        now = time.monotonic()
        self.report(
            BlockDone(
                branch=self.variant.branch, block=block, num_blocks=self._num_blocks, resumed=resumed,
                loss=sum(record.loss for record in records), seconds=now - self._block_started,
            )
        )  # fmt: skip
        self._block_started = now

    def _defect(self, why: str) -> QuantizeError:
        return QuantizeError(
            "engine auto-gptq returned an unexpected result", where=self.variant.branch, why=why,
            hint=f"this is a defect of packager: please report it with the recipe; {_USE_NATIVE}",
        )  # fmt: skip


def _explained(event: Mapping[str, Any], variant: Variant) -> QuantizeError | MachineError:
    """Return the error for an error event of the script."""
    where = ", ".join(filter(None, [variant.branch, event["linear"]]))
    message = str(event["message"])
    match event["kind"]:
        case "unavailable":
            return MachineError(
                "engine auto-gptq cannot run on this machine", where=where, why=message, hint=_USE_NATIVE
            )  # fmt: skip
        case "memory":
            return MachineError(
                "engine auto-gptq ran out of memory", where=where, why=message.partition("\n")[0],
                hint="use fewer or shorter calibration rows, a larger GPU or --gpu-memory, or engine: native",
            )  # fmt: skip
        case "factorization":
            return QuantizeError(
                "the Hessian cannot be factored", where=where, why=message,
                hint="AutoGPTQ does not raise damping: raise damp_percent, add calibration rows, or use engine: native",
            )  # fmt: skip
        case "activations":
            return QuantizeError(
                message, where=where,
                why="AutoGPTQ computes in float16, whatever the base model's dtype",
                hint="use engine: native, which computes in the base model's dtype, or shorter calibration rows",
            )  # fmt: skip
        case "scales":
            return QuantizeError(message, where=where, hint="the base model's weights are too large or too small")
    lines = str(event.get("traceback", "")).rstrip().splitlines()[-_TAIL_LINES:]
    return QuantizeError("engine auto-gptq failed", where=where, why="\n".join([message, *lines]), hint=_USE_NATIVE)


def _ended(variant: Variant, status: int | None, stderr: str, silence_s: float) -> QuantizeError:
    """Return the error for a script that ended without reporting one."""
    if status is None:
        how = f"it wrote no event for {silence_s:g} s and was killed"
    else:
        how = ending(status) if status else "it stopped before its last block"
    return QuantizeError(
        "engine auto-gptq did not finish", where=variant.branch, why="\n".join(filter(None, [how, stderr])),
        hint=f"build again: the variant starts at its first block; or {_USE_NATIVE}",
    )  # fmt: skip
