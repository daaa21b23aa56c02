"""Stage 7, verify: every runtime opens every checkpoint in an environment of its own and must compute what we compute.

"It loaded" proves nothing. A loader passes when its logits agree with our own dequantized float32 forward, when they
agree better with this variant than with any other, when the weights it read have the digests that were packed, and
when each token it generates greedily is one that our forward finds most likely (or within its rounding of most likely).
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from packager.errors import LoaderError, LoaderUnavailableError
from packager.model.decoder import Decoder, forward
from packager.model.packing import checkpoint_reader
from packager.prove.environments import RuntimeContext, ensure_environment
from packager.prove.loaders import LOADERS, LoaderSpec
from packager.prove.probes import ProbeJob, ProbeResult, run_probes
from packager.receipt import LoaderRecord, Provenance
from packager.recipe import Loaders

# Largest ||loader - reference|| / ||reference|| by the dtype in which the loader computes. Right results measured:
# 0.0005 to 0.002 in float32 and float16, 0.007 in bfloat16; a wrong g_idx, zero or group order gives 0.3 and more.
TOLERANCE = {"float32": 0.005, "float16": 0.01, "bfloat16": 0.03}
MIN_TOP1_AGREEMENT = 0.95
# A generated token counts as equal when our logit for it is this close to our largest, in units of the loader's rms
# error.
_TIE_RMS = 8.0
_PATH = re.compile(r"(?:file://)?(?:/[\w.+~@-]+)+/([\w.+~@-]+)/?")
_REASON_LENGTH = 400


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A packed variant to prove."""

    branch: str
    folder: Path
    bits: int
    weights_sha256: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Our own forward of a checkpoint: logits float32 [rows, seq_len, vocab] for the probe's rows."""

    decoder: Decoder
    logits: NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class VerifyJob:
    """What is to be proven, and where.

    Attributes:
        checkpoints: the variants.
        ids: token ids int64 [rows, seq_len] of text; the first `loaders.num_rows` rows are compared.
        prompts: token ids after each of which the loaders generate.
        loaders: which, and how much they are asked.
        device: where our own reference is computed, and the loaders too.
        context: folders, environment and processes of the loaders; `scratch` gets jobs and logits.
    """

    checkpoints: Sequence[Checkpoint]
    ids: Tensor
    prompts: Sequence[Sequence[int]]
    loaders: Loaders
    device: torch.device
    context: RuntimeContext

    @property
    def rows(self) -> Tensor:
        """Token ids int64 [num_rows, seq_len] whose logits are compared."""
        return self.ids[: self.loaders.num_rows, : self.loaders.seq_len]


def checkpoint_of(provenance: Provenance, folder: Path) -> Checkpoint:
    """Return what `verify` needs to know of a packed variant."""
    return Checkpoint(
        branch=provenance.branch,
        folder=folder,
        bits=int(provenance.parameters["bits"]),
        weights_sha256={
            name: record.sha256 for name, record in provenance.files.items() if name.endswith(".safetensors")
        },
    )


def verify(job: VerifyJob, report: Callable[[str], None]) -> dict[str, tuple[LoaderRecord, ...]]:
    """Run every loader of the recipe over every checkpoint.

    Returns:
        For each branch, one record per loader: passed, failed with what differs, or "not run" with why.
    """
    # Before the loaders start, and each of them with its share of the cores: OpenMP threads that wait for a core spin,
    # and three processes with two threads each took 74 s on two cores where they now take a third of that.
    return prove(job, references_of(job), report)


def references_of(job: VerifyJob) -> dict[str, Reference]:
    """Compute our own logits of every checkpoint, by branch."""
    return {checkpoint.branch: reference(checkpoint, job) for checkpoint in job.checkpoints}


def prove(
    job: VerifyJob, references: Mapping[str, Reference], report: Callable[[str], None]
) -> dict[str, tuple[LoaderRecord, ...]]:
    """Run every loader over every checkpoint, and compare with logits that are computed already.

    Returns:
        What `verify` does.
    """
    names = (*job.loaders.required, *job.loaders.if_available)
    records: dict[str, list[LoaderRecord]] = {checkpoint.branch: [] for checkpoint in job.checkpoints}
    threads = max(1, (os.cpu_count() or 1) // max(1, len(names)))
    environ = {**job.context.environ, "OMP_NUM_THREADS": str(threads)}
    job = replace(job, context=replace(job.context, environ=environ))
    with ThreadPoolExecutor(max_workers=max(1, len(names))) as pool:
        outcomes = {name: pool.submit(_probe, LOADERS[name], job) for name in names}
        try:
            for name, outcome in outcomes.items():
                found = outcome.result()
                for checkpoint in job.checkpoints:
                    record = _judge(name, checkpoint, found[checkpoint.branch], references, job)
                    records[checkpoint.branch].append(record)
                    report(_line(checkpoint.branch, record))
        except BaseException:
            job.context.processes.stop_all()  # Ctrl-C does not reach the threads that wait for the loaders
            raise
    return {branch: tuple(found) for branch, found in records.items()}


def reference(checkpoint: Checkpoint, job: VerifyJob) -> Reference:
    """Compute our own float32 logits of a checkpoint, its weights dequantized block by block."""
    decoder = Decoder(
        checkpoint.folder, checkpoint_reader(checkpoint.folder, checkpoint.bits), device=job.device, dtype=torch.float32
    )
    return Reference(decoder=decoder, logits=_logits(decoder, job.rows).numpy())


def _logits(decoder: Decoder, ids: Tensor) -> Tensor:
    (state,) = forward(decoder, ids, rows=ids.shape[0])
    return decoder.logits(ids, state).cpu()


def _probe(spec: LoaderSpec, job: VerifyJob) -> dict[str, ProbeResult | LoaderError]:
    """Run one loader over all checkpoints in one process; never raises a LoaderError, but returns it."""
    branches = [checkpoint.branch for checkpoint in job.checkpoints]
    if problem := spec.machine_problem(job.device.type):
        return dict.fromkeys(branches, LoaderUnavailableError(problem))
    try:
        python = ensure_environment(spec, job.context)
    except LoaderError as error:
        return dict.fromkeys(branches, error)
    probes = [
        ProbeJob(
            model_dir=checkpoint.folder,
            device=job.device.type,
            input_ids=job.rows.tolist(),
            prompts=[list(prompt) for prompt in job.prompts],
            max_new_tokens=job.loaders.max_new_tokens,
            output_dir=job.context.scratch / spec.name / checkpoint.branch,
        )
        for checkpoint in job.checkpoints
    ]
    results = run_probes(spec, python, probes, job.loaders.timeout_s, job.context)
    return dict(zip(branches, results, strict=True))


# What a loader leaves unset is whatever was in memory: too large to be squared, or not a number. Neither may pass.
@np.errstate(over="ignore", invalid="ignore")
def _judge(
    name: str,
    checkpoint: Checkpoint,
    outcome: ProbeResult | LoaderError,
    references: Mapping[str, Reference],
    job: VerifyJob,
) -> LoaderRecord:
    required = name in job.loaders.required
    if isinstance(outcome, LoaderUnavailableError):
        return LoaderRecord(loader=name, required=required, status="not run", reason=_reason(outcome))
    if isinstance(outcome, LoaderError):
        return LoaderRecord(loader=name, required=required, status="failed", reason=_reason(outcome))
    own = references[checkpoint.branch]
    relative_error = _relative_error(outcome.logits, own.logits)
    top1 = float((outcome.logits.argmax(-1) == own.logits.argmax(-1)).mean())
    tokens, equal = _compare_generated(outcome, own, job)
    problems = _problems(checkpoint, outcome, references, relative_error, top1)
    if equal < tokens:
        problems.append(f"{tokens - equal} of {tokens} generated tokens are not what our forward finds most likely")
    return LoaderRecord(
        loader=name,
        required=required,
        status="failed" if problems else "passed",
        reason="; ".join(problems),
        device=outcome.device,
        dtype=outcome.dtype,
        kernel=outcome.kernel,
        versions=dict(outcome.versions),
        relative_error=round(relative_error, 6),
        top1_agreement=round(top1, 6),
        tokens_generated=tokens,
        tokens_equal=equal,
    )


def _problems(
    checkpoint: Checkpoint,
    outcome: ProbeResult,
    references: Mapping[str, Reference],
    relative_error: float,
    top1: float,
) -> list[str]:
    problems = []
    if dict(outcome.weights_sha256) != dict(checkpoint.weights_sha256):
        problems.append("it read other weights than were packed (sha256)")
    tolerance = TOLERANCE.get(outcome.dtype, min(TOLERANCE.values()))
    if not relative_error <= tolerance:
        problems.append(f"logits differ by {relative_error:.4f} relative, allowed {tolerance} in {outcome.dtype}")
    if not top1 >= MIN_TOP1_AGREEMENT:
        problems.append(f"top-1 agreement {top1:.3f}, at least {MIN_TOP1_AGREEMENT} wanted")
    closer = [
        branch
        for branch, other in references.items()
        if branch != checkpoint.branch and _relative_error(outcome.logits, other.logits) < relative_error
    ]
    if closer:
        problems.append(f"its logits are closer to those of {', '.join(closer)}")
    return problems


def _relative_error(logits: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Return ||logits - expected|| / ||expected||; NaN anywhere gives NaN, which passes no comparison."""
    return float(np.linalg.norm(logits - expected) / np.linalg.norm(expected))


def _compare_generated(outcome: ProbeResult, own: Reference, job: VerifyJob) -> tuple[int, int]:
    """Return how many tokens were generated and how many of them our forward agrees with.

    Our forward runs over prompt and generated tokens at once; each generated token must have our largest logit at its
    place, or one so close that the loader's own rounding error cannot tell them apart.
    """
    rms = float(np.sqrt(np.mean((outcome.logits - own.logits) ** 2)))
    tokens = equal = 0
    for prompt, generated in zip(job.prompts, outcome.generated, strict=True):
        if not generated:
            continue
        ids = torch.tensor([[*prompt, *generated]])
        logits = _logits(own.decoder, ids)[0, len(prompt) - 1 : -1]
        chosen = logits.gather(-1, torch.tensor(generated)[:, None])[:, 0]
        tokens += len(generated)
        equal += int((logits.amax(-1) - chosen <= _TIE_RMS * rms).sum())
    return tokens, equal


def _reason(error: LoaderError) -> str:
    """Return an error in one line that can be published: of every path only the last name stays."""
    text = " ".join(part for part in (error.what, error.why) if part).replace("\n", " ")
    return _PATH.sub(lambda path: f".../{path.group(1)}", text)[:_REASON_LENGTH]


def _line(branch: str, record: LoaderRecord) -> str:
    figures = ""
    if record.relative_error is not None:
        figures = f", relative error {record.relative_error:.4f}, top-1 {record.top1_agreement:.3f}"
    reason = f": {record.reason}" if record.reason else ""
    return f"  {branch}: {record.loader} {record.status}{figures}{reason}"
