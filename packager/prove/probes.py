"""Probes: a runtime opens a checkpoint in a process of its own, without secrets and with a time limit."""

import json
import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packager.errors import LoaderError, LoaderUnavailableError
from packager.prove.environments import RuntimeContext
from packager.prove.loaders import LoaderSpec
from packager.system.files import write_atomic
from packager.system.processes import clean_environ, tail

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

TAIL_LINES = 20


@dataclass(frozen=True, kw_only=True)
class ProbeJob:
    """A checkpoint, and the inputs that a probe computes on.

    Attributes:
        model_dir: the checkpoint folder.
        device: "cpu" or "cuda".
        input_ids: rows of token ids, all of the same length, whose logits are wanted.
        prompts: token ids of each prompt, after which the probe generates greedily.
        max_new_tokens: the most tokens generated after a prompt.
        output_dir: folder for the probe's files; those of an earlier probe are removed.
    """

    model_dir: Path
    device: str
    input_ids: Sequence[Sequence[int]]
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    output_dir: Path


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """The logits and tokens that a runtime computed, and how.

    Attributes:
        logits: float32 [rows, seq_len, vocab], memory-mapped from output_dir.
        generated: the new token ids after each prompt; an end-of-sequence token is the last one.
        versions: of Python and of the packages that matter.
        dtype: of the computation ("float32", "float16").
        kernel: class that computes the quantized linears.
        weights_sha256: by file name, as the runtime's own process saw the files.
        load_s: time to load the checkpoint, imports not counted.
        forward_s: time for all rows.
        peak_memory_bytes: on a GPU the peak for this checkpoint, on the CPU the peak of the process so far.
    """

    logits: "NDArray[np.float32]"
    generated: tuple[tuple[int, ...], ...]
    versions: Mapping[str, str]
    device: str
    dtype: str
    kernel: str
    weights_sha256: Mapping[str, str]
    load_s: float
    forward_s: float
    peak_memory_bytes: int


def probe_environ(python: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables for a probe, without indexes and proxies: their addresses may hold passwords."""
    kept = {
        name: value
        for name, value in clean_environ(environ).items()
        if not name.startswith(("PIP_", "UV_")) and not name.upper().endswith("_PROXY")
    }
    # Kernels are compiled with the environment's own ninja.
    path = os.pathsep.join(filter(None, [str(python.parent), kept.get("PATH", os.defpath)]))
    return {**kept, "PATH": path, "VIRTUAL_ENV": str(python.parent.parent)}


def run_probe(spec: LoaderSpec, python: Path, job: ProbeJob, timeout_s: float, context: RuntimeContext) -> ProbeResult:
    """Open one checkpoint with a loader.

    Raises:
        LoaderError: it failed, was killed, or took longer than `timeout_s`; with the last lines it wrote.
        LoaderUnavailableError: the runtime found that it cannot run on this machine.
    """
    (outcome,) = run_probes(spec, python, [job], timeout_s, context)
    if isinstance(outcome, LoaderError):
        raise outcome
    return outcome


def run_probes(
    spec: LoaderSpec, python: Path, jobs: Sequence[ProbeJob], timeout_s: float, context: RuntimeContext
) -> list[ProbeResult | LoaderError]:
    """Open checkpoints with a loader one after the other, in one process unless a job ends it.

    `timeout_s` is for each checkpoint; that of the first includes the import of the runtime.

    Returns:
        One outcome per job, in order. When a job ends the process, a new process runs the jobs after it.
    """
    for job in jobs:
        job.output_dir.mkdir(parents=True, exist_ok=True)
        for name in ("logits.npy", "result.json"):
            (job.output_dir / name).unlink(missing_ok=True)
        request = {
            **vars(job),
            "model_dir": str(job.model_dir.absolute()),
            "output_dir": str(job.output_dir.absolute()),
        }
        write_atomic(job.output_dir / "job.json", json.dumps(request).encode())
    outcomes: list[ProbeResult | LoaderError] = []
    while len(outcomes) < len(jobs):
        rest = jobs[len(outcomes) :]
        failure = _run_script(spec, python, rest, timeout_s, context)
        finished = [job for job in rest if _result_file(job).exists()]
        outcomes += [_outcome(spec, job) for job in finished]
        if len(finished) < len(rest):
            where = str(rest[len(finished)].model_dir)
            why = f"{failure}\n{tail(rest[0].output_dir / 'stderr.txt', TAIL_LINES)}"
            outcomes.append(LoaderError(f"{spec.name} did not finish", where=where, why=why))
    return outcomes


def _result_file(job: ProbeJob) -> Path:
    return job.output_dir / "result.json"


def _run_script(
    spec: LoaderSpec, python: Path, jobs: Sequence[ProbeJob], timeout_s: float, context: RuntimeContext
) -> str:
    """Run the probe on `jobs` until it ends or one job takes too long; return how it ended."""
    folder = jobs[0].output_dir
    # Isolated: neither the script's folder nor the user's packages are on the path.
    requests = [str(job.output_dir.absolute() / "job.json") for job in jobs]
    command = [str(python), "-I", str(spec.script.absolute()), *requests]
    waiting = [_result_file(job) for job in jobs]

    def progress() -> int:
        while waiting and waiting[0].exists():
            waiting.pop(0)
        return len(waiting)

    with (folder / "stdout.txt").open("wb") as out, (folder / "stderr.txt").open("wb") as err:
        status = context.processes.run(
            command,
            folder=folder,
            environ=probe_environ(python, context.environ),
            out=out,
            err=err,
            timeout_s=timeout_s,
            progress=progress,
        )
    if status is None:
        return f"it took over {timeout_s:g} s and was killed"
    return f"killed by {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"


def _outcome(spec: LoaderSpec, job: ProbeJob) -> ProbeResult | LoaderError:
    result: dict[str, Any] = json.loads(_result_file(job).read_text(encoding="utf-8"))
    where = str(job.model_dir)
    if result["status"] != "ok":
        if result["type"] == "UnavailableError":
            return LoaderUnavailableError(f"{spec.name} cannot run on this machine", why=result["message"])
        lines = result.get("traceback", "").rstrip().splitlines()[-TAIL_LINES:]
        why = "\n".join([f"{result['type']}: {result['message']}", *lines])
        return LoaderError(f"{spec.name} could not open the checkpoint", where=where, why=why)
    import numpy as np

    logits = np.load(job.output_dir / "logits.npy", mmap_mode="r")
    if logits.shape[:2] != (len(job.input_ids), len(job.input_ids[0])) or logits.dtype != np.float32:
        return LoaderError(f"{spec.name} wrote logits {logits.dtype} {logits.shape}", where=where)
    result["generated"] = tuple(tuple(tokens) for tokens in result["generated"])
    recorded = [field.name for field in fields(ProbeResult) if field.name != "logits"]
    return ProbeResult(logits=logits, **{name: result[name] for name in recorded})
