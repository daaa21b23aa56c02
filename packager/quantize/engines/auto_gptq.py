"""AutoGPTQ 0.7.1 as an engine: a process of its own per variant, in the environment that the loader has too.

The script says each finished block on its standard output; what it says is read while it runs, and the block goes into
the variant's store. AutoGPTQ cannot go on in the middle of a model: a variant that was interrupted starts again at its
first block, unless all of its blocks are finished. One variant follows the other, each a pass over the whole model.
"""

import json
import platform
import shutil
import signal
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager import __version__
from packager.errors import LoaderUnavailableError, MachineError, PackError, QuantizeError
from packager.inputs.base_model import SourceModel
from packager.prove.environments import LoaderSpec, ensure_environment, installed_versions, probe_environ
from packager.prove.loaders import LOADERS
from packager.quantize.block_store import BlockStore
from packager.quantize.engines import AUTO_GPTQ_LOCK, AUTO_GPTQ_SCRIPT, Made, Site
from packager.quantize.engines.legacy_config import legacy_config
from packager.receipt import CONFIG, INDEX_SUFFIX, LinearRecord
from packager.system.files import TEMPORARY_PREFIX, disk_errors
from packager.system.processes import run, tail
from packager.variant import Variant

if TYPE_CHECKING:
    from packager.quantize.sweep import QuantizeJob, Report

# For Python 3.13 the lock has another transformers, under which nobody has quantized yet.
SPEC = replace(
    LOADERS["autogptq"], script=AUTO_GPTQ_SCRIPT, requirements=AUTO_GPTQ_LOCK, requires_python=">=3.11,<3.13"
)
PACKAGES = ("auto-gptq", "transformers", "accelerate", "safetensors", "numpy", "torch")
# Longest time without a word: reading a 13B model from a cold disk, or solving its widest linear on a slow GPU.
SILENCE_S = 3600.0
_TAIL_LINES = 20
_USE_NATIVE = "use engine: native"


class AutoGptq:
    """AutoGPTQ as the reference engine.

    Args:
        site: where its environment and its scratch files are.
        spec: the environment and the script; tests put others here.
        silence_s: how long the script may say nothing before it is killed.
    """

    def __init__(self, site: Site, spec: LoaderSpec = SPEC, silence_s: float = SILENCE_S) -> None:
        self._site = site
        self._spec = spec
        self._silence_s = silence_s

    def quantize(self, job: "QuantizeJob", report: "Report") -> Made:
        """See `Engine`."""
        try:
            python = ensure_environment(self._spec, self._site.cache, self._site.environ, self._site.log)
        except LoaderUnavailableError as error:
            raise MachineError(error.what, where=error.where, why=error.why, hint=error.hint or _USE_NATIVE) from error
        records = {}
        for variant, store in job.stores.items():
            run_ = _Run(job=job, variant=variant, store=store, report=report)
            if not run_.resumed():
                self._make(run_, python)
            records[variant.branch] = run_.records()
        versions = installed_versions(python, PACKAGES)
        return Made(
            records=records,
            made_with=f"AutoGPTQ {versions['auto-gptq']}",
            versions={"python": platform.python_version(), "gptq-packager": __version__, **versions},
        )

    def _make(self, run_: "_Run", python: Path) -> None:
        """Let the script make one variant."""
        import torch

        job, folder = run_.job, self._site.scratch / f"{TEMPORARY_PREFIX}auto-gptq"
        torch.cuda.empty_cache()  # what an earlier sweep of ours keeps for itself, the other process cannot use
        with disk_errors(folder):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            _stage_model(job.source, folder / "model")
            request = _request(run_.variant, folder, job)
        try:
            with (folder / "stdout.txt").open("wb") as out, (folder / "stderr.txt").open("wb") as err:
                reader = _Reader(folder / "stdout.txt", lambda event: run_.take(event, folder))
                status = run(
                    [str(python), "-I", str(self._spec.script.absolute()), str(request)],
                    folder=folder,
                    environ=probe_environ(python, self._site.environ),
                    out=out,
                    err=err,
                    timeout_s=self._silence_s,
                    progress=reader.read,
                )
                reader.read()
            if status != 0 or not run_.done:
                raise _ended(run_, status, tail(folder / "stderr.txt", _TAIL_LINES), self._silence_s)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def _stage_model(source: SourceModel, folder: Path) -> None:
    """Make a folder that transformers 4.40 reads: its own config.json, links to the weights, and an index."""
    folder.mkdir()
    config = json.dumps(legacy_config(source.config), indent=2)
    (folder / CONFIG).write_text(config, encoding="utf-8")
    names = {path: path.name for path in sorted({stored.path for stored in source.tensors.values()})}
    if len(names) == 1:
        names = dict.fromkeys(names, "model.safetensors")
    else:
        weight_map = {name: names[stored.path] for name, stored in source.tensors.items()}
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (folder / f"model{INDEX_SUFFIX}").write_text(index, encoding="utf-8")
    for path, name in names.items():
        (folder / name).symlink_to(path.resolve())


def _request(variant: Variant, folder: Path, job: "QuantizeJob") -> Path:
    """Write the script's job and return its path."""
    import numpy as np

    rows, request = folder / "rows.npy", folder / "job.json"
    np.save(rows, job.rows.ids.numpy())
    parameters = {
        "bits": variant.bits,
        "group_size": variant.group_size,
        "damp_percent": variant.damp_percent,
        "desc_act": variant.desc_act,
        "static_groups": variant.static_groups,
        "sym": variant.sym,
        "true_sequential": variant.true_sequential,
    }
    places = {"model_dir": str(folder / "model"), "rows": str(rows), "output_dir": str(folder)}
    request.write_text(json.dumps({**places, "quantize": parameters}), encoding="utf-8")
    return request


class _Reader:
    """Reads whole lines that another process appends to a file, and hands on what each says."""

    def __init__(self, path: Path, take: Callable[[Mapping[str, Any]], None]) -> None:
        self._path = path
        self._take = take
        self._offset = 0

    def read(self) -> int:
        """Take the lines that have come since the last call; return how far the file was read."""
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
        raise QuantizeError("the engine auto-gptq said something that is no event", why=repr(line[:200])[1:])
    return event


@dataclass(kw_only=True)
class _Run:
    """One variant under way: what the script has said of it.

    Attributes:
        done: the script says that it is finished.
    """

    job: "QuantizeJob"
    variant: Variant
    store: BlockStore
    report: "Report"

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
        """Act on one thing the script said."""
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
        from packager.quantize.sweep import LinearsDone

        if name not in self._blocks:
            raise self._defect(f"{name} is no linear of this model")
        record = LinearRecord(name=name, loss=loss, damp_percent=self.variant.damp_percent)
        self._records[name] = record
        self.report(LinearsDone(branch=self.variant.branch, block=self._blocks[name], linears=(record,)))

    def _take_block(self, block: int, path: Path) -> None:
        from safetensors.torch import load_file

        if block != self._next_block:
            raise self._defect(f"block {block} came where block {self._next_block} was due")
        self._next_block += 1
        linears = [name for name, its_block in self._blocks.items() if its_block == block]
        if missing := [name for name in linears if name not in self._records]:
            raise self._defect(f"block {block} came without the loss of {', '.join(missing)}")
        records = tuple(self._records[name] for name in linears)
        try:
            self.store.write(block, load_file(path), records)
        except PackError as error:
            raise self._defect(f"{error.what}: {error.why}") from error
        path.unlink()
        self._report(block, records, resumed=False)

    def _report(self, block: int, records: tuple[LinearRecord, ...], *, resumed: bool) -> None:
        from packager.quantize.sweep import BlockDone

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
            "engine auto-gptq did not hand over what was asked of it", where=self.variant.branch, why=why,
            hint=f"this is a defect of packager: please report it with the recipe; {_USE_NATIVE}",
        )  # fmt: skip


def _explained(event: Mapping[str, Any], variant: Variant) -> QuantizeError | MachineError:
    """Return what the script's last words mean."""
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
                hint="use fewer or shorter calibration rows, a larger GPU, or engine: native, which needs less",
            )  # fmt: skip
        case "factorization":
            return QuantizeError(
                "the Hessian cannot be factored", where=where, why=message,
                hint="AutoGPTQ raises no damping: raise damp_percent, use more calibration rows, or engine: native",
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


def _ended(run_: _Run, status: int | None, stderr: str, silence_s: float) -> QuantizeError:
    """Return what to say of a script that ended without a last word."""
    if status is None:
        how = f"it said nothing for {silence_s:g} s and was killed"
    elif status < 0:
        how = f"killed by {signal.Signals(-status).name}"
    else:
        how = f"exit status {status}" if status else "it stopped before its last block"
    return QuantizeError(
        "engine auto-gptq did not finish", where=run_.variant.branch, why="\n".join(filter(None, [how, stderr])),
        hint=f"build again: the variant starts at its first block; or {_USE_NATIVE}",
    )  # fmt: skip
