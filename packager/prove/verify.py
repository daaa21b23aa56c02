"""Stage 8, verify: each runtime opens each checkpoint in its own environment and must compute the same as we do.

Loading alone shows nothing. A loader passes if four conditions hold: its logits agree with our own dequantized float32
forward; they agree better with this variant than with any other; the weights it read have the digests that were packed;
and each token it generates greedily is the one that our forward finds most likely, or ties with it.
"""

import gc
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import takewhile
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from packager.errors import LoaderError, LoaderUnavailableError
from packager.model.batches import rows_per_batch
from packager.model.decoder import Decoder, forward
from packager.model.devices import gpu_memory_errors
from packager.model.packing import CheckpointReader
from packager.prove.environments import RuntimeContext, ensure_environment, waits_for_request
from packager.prove.evaluation_memory import tokens_per_piece
from packager.prove.loader_runs import result_line, run_record
from packager.prove.loaders import LoaderSpec
from packager.prove.other_loader import loader_spec
from packager.prove.probes import ProbeJob, ProbeResult, published_reason, run_probes
from packager.prove.tolerances import LARGEST_TOLERANCE, equal_tokens, relative_error, tolerance_of, tolerance_of_model
from packager.receipt import LoaderRecord, LoaderRunRecord, Provenance
from packager.recipe import Loaders

MIN_TOP1_AGREEMENT = 0.95
_ROUNDED = {"float16": torch.float16, "bfloat16": torch.bfloat16}
_HINT = "end other programs on the GPU, or run again with --device cpu"
Generated = tuple[tuple[int, ...], tuple[int, ...]]  # token ids of a prompt, and of what was generated after it
# Why a build does not run a loader that it could run.
_ON_REQUEST = "its environment is large, and made on request only: by packager verify"


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A packed variant to check; `bits` is None where its linears have several."""

    branch: str
    folder: Path
    bits: int | None
    weights_sha256: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class VerifyJob:
    """The checkpoints, the loaders, and the inputs that both compute on.

    Attributes:
        checkpoints: the variants.
        ids: token ids int64 [rows, seq_len] of text; the first `loaders.num_rows` rows are compared.
        prompts: token ids after each of which the loaders generate.
        loaders: their names, and the sizes of what they compute.
        device: of our own forward and of the loaders.
        context: folders, environment and processes of the loaders; `scratch` gets jobs and logits.
        refused: by branch, the loaders that are not run because a rule says that they cannot load it, with the reason.
        timed: gets the time and memory of each loader that ran, with the branch.
        finished: gets the name of each loader when it has opened all checkpoints, in a thread of its own.
        on_request: whether the environments are made that no build makes unless its recipe requires the loader.
    """

    checkpoints: Sequence[Checkpoint]
    ids: Tensor
    prompts: Sequence[Sequence[int]]
    loaders: Loaders
    device: torch.device
    context: RuntimeContext
    refused: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    timed: Callable[[str, LoaderRunRecord], None] = lambda _branch, _run: None
    finished: Callable[[str], None] = lambda _name: None
    on_request: bool = True

    @property
    def rows(self) -> Tensor:
        """Token ids int64 [num_rows, seq_len] whose logits are compared."""
        return self.ids[: self.loaders.num_rows, : self.loaders.seq_len]


def checkpoint_of(provenance: Provenance, folder: Path) -> Checkpoint:
    """Return the facts about a packed variant that `verify` needs."""
    return Checkpoint(
        branch=provenance.branch,
        folder=folder,
        bits=None if "mix_bits" in provenance.parameters else int(provenance.parameters["bits"]),
        weights_sha256={name: record.sha256 for name, record in provenance.weights_files.items()},
    )


def verify(job: VerifyJob, log: Callable[[str], None]) -> dict[str, tuple[LoaderRecord, ...]]:
    """Run every loader of the recipe over every checkpoint.

    Returns:
        For each branch, one record per loader: passed, failed with what differs, "refused" by rule, or "not run".

    Raises:
        MachineError: the GPU's memory is exhausted by our own forward.
        SourceError: a checkpoint lacks a tensor.
    """
    return check_loaders(job, references_of(job), log)


def references_of(job: VerifyJob) -> dict[str, NDArray[np.float32]]:
    """Compute our own logits of every checkpoint, by branch: float32 [num_rows, seq_len, vocab].

    Raises:
        MachineError: the GPU's memory is exhausted.
        SourceError: a checkpoint lacks a tensor.
    """
    with gpu_memory_errors(_HINT):
        return {checkpoint.branch: reference(checkpoint, job) for checkpoint in job.checkpoints}


def reference(checkpoint: Checkpoint, job: VerifyJob, dtype: torch.dtype = torch.float32) -> NDArray[np.float32]:
    """Compute our own logits of a checkpoint, with its weights dequantized block by block, in a dtype."""
    decoder = _decoder(checkpoint, job, dtype)
    states = forward(decoder, job.rows, rows=rows_per_batch(job.rows.shape[1], job.device.type))
    logits = _logits(decoder, torch.cat(states).flatten(0, 1))
    return logits.reshape(*job.rows.shape, -1).numpy()


def _decoder(checkpoint: Checkpoint, job: VerifyJob, dtype: torch.dtype = torch.float32) -> Decoder:
    read = CheckpointReader(checkpoint.folder, checkpoint.bits, device=job.device)
    return Decoder(
        checkpoint.folder, read, names=read.names, dequantized=read.dequantized, device=job.device, dtype=dtype
    )  # fmt: skip


def _logits(decoder: Decoder, states: Tensor) -> Tensor:
    """Return logits on the CPU, float32 [tokens, vocab], of states [tokens, hidden_size]."""
    pieces = torch.split(states, tokens_per_piece(decoder.vocab_size))
    return torch.cat([decoder.logits(piece[None])[0].cpu() for piece in pieces])


def check_loaders(
    job: VerifyJob, references: Mapping[str, NDArray[np.float32]], log: Callable[[str], None]
) -> dict[str, tuple[LoaderRecord, ...]]:
    """Run every loader over every checkpoint, and compare with our logits.

    Args:
        job: see `VerifyJob`.
        references: from `references_of`. While loaders run, our own model is not kept: they need the GPU's memory.
        log: receives one line for each loader and checkpoint.

    Returns:
        See `verify`.
    """
    outcomes = _run_loaders(job, references)
    records: dict[str, tuple[LoaderRecord, ...]] = {}
    for checkpoint in job.checkpoints:
        refused = job.refused.get(checkpoint.branch, {})
        own = {name: found[checkpoint.branch] for name, found in outcomes.items() if name not in refused}
        ran = {name: result for name, result in own.items() if isinstance(result, ProbeResult)}
        for name, result in ran.items():
            job.timed(checkpoint.branch, run_record(name, result, job.rows, job.device, beside=len(outcomes)))
        results = list(ran.values())
        gaps = token_gaps(checkpoint, [sequence for result in results for sequence in sequences_of(result, job)], job)
        errors = rounding_errors(checkpoint, job, references[checkpoint.branch], log)
        found = [judge_loader(name, checkpoint, result, references, gaps, errors, job) for name, result in own.items()]
        found += [
            LoaderRecord(loader=name, required=name in job.loaders.required, status="refused", reason=refused[name])
            for name in outcomes
            if name in refused
        ]
        records[checkpoint.branch] = tuple(found)
        for record in found:
            log(result_line(checkpoint.branch, record))
    return records


def _run_loaders(
    job: VerifyJob, references: Mapping[str, NDArray[np.float32]]
) -> dict[str, dict[str, ProbeResult | LoaderError]]:
    """Run the loaders side by side; return what each computed, by loader and branch."""
    names = (*job.loaders.required, *job.loaders.if_available)
    if not names:
        return {}
    gc.collect()  # transformers' modules may refer to each other
    torch.cuda.empty_cache()  # what our own forward allocated; without CUDA this does nothing
    # Each loader gets its share of the cores. OpenMP threads that wait for a core spin: three processes with two
    # threads each took 74 s on two cores, and take a third of that now.
    threads = max(1, (os.cpu_count() or 1) // len(names))
    environ = {**job.context.environ, "OMP_NUM_THREADS": str(threads)}
    job = replace(job, context=replace(job.context, environ=environ))
    with ThreadPoolExecutor(max_workers=len(names)) as pool:
        outcomes = {name: pool.submit(_probe_and_tell, loader_spec(name), job, references) for name in names}
        try:
            return {name: outcome.result() for name, outcome in outcomes.items()}
        except BaseException:
            job.context.processes.stop_all()  # Ctrl-C does not reach the threads that wait for the loaders
            raise


def _probe_and_tell(
    spec: LoaderSpec, job: VerifyJob, references: Mapping[str, NDArray[np.float32]]
) -> dict[str, ProbeResult | LoaderError]:
    try:
        return _probe(spec, job, references)
    finally:
        job.finished(spec.name)


def _probe(
    spec: LoaderSpec, job: VerifyJob, references: Mapping[str, NDArray[np.float32]]
) -> dict[str, ProbeResult | LoaderError]:
    """Run one loader over the checkpoints that no rule refuses; return a LoaderError instead of raising it."""
    checkpoints = [each for each in job.checkpoints if spec.name not in job.refused.get(each.branch, {})]
    branches = [checkpoint.branch for checkpoint in checkpoints]
    if not branches:
        return {}
    if problem := spec.machine_problem(job.device.type):
        return dict.fromkeys(branches, LoaderUnavailableError(problem))
    if not job.on_request and waits_for_request(spec, job.loaders.required, job.context.cache):
        return dict.fromkeys(branches, LoaderUnavailableError(_ON_REQUEST))
    try:
        python = ensure_environment(spec, job.context)
    except LoaderError as error:
        return dict.fromkeys(branches, error)
    probes = [
        ProbeJob(
            model_dir=checkpoint.folder,
            device=spec.device_on(job.device.type),
            input_ids=job.rows.tolist(),
            prompts=[list(prompt) for prompt in job.prompts],
            max_new_tokens=job.loaders.max_new_tokens,
            vocab_size=references[checkpoint.branch].shape[-1],
            output_dir=job.context.scratch / spec.name / checkpoint.branch,
        )
        for checkpoint in checkpoints
    ]
    results = run_probes(spec, python, probes, job.loaders.timeout_s, job.context)
    return dict(zip(branches, results, strict=True))


# Logits that a loader leaves unset are whatever was in memory: too large to be squared, or NaN. Neither may pass.
@np.errstate(over="ignore", invalid="ignore")
def judge_loader(
    name: str,
    checkpoint: Checkpoint,
    outcome: ProbeResult | LoaderError,
    references: Mapping[str, NDArray[np.float32]],
    gaps: Mapping[Generated, Tensor],
    errors: Callable[[str], float],
    job: VerifyJob,
) -> LoaderRecord:
    """Return whether a loader passes on a checkpoint, with its figures, or with what differs.

    Args:
        name: of the loader.
        checkpoint: which it opened.
        outcome: what it computed, or why it did not.
        references: our logits of all checkpoints, by branch.
        gaps: from `token_gaps`, of what it generated.
        errors: from `rounding_errors`; asked where it can decide.
        job: see `VerifyJob`.
    """
    required = name in job.loaders.required
    if isinstance(outcome, LoaderUnavailableError):
        return LoaderRecord(loader=name, required=required, status="not run", reason=published_reason(outcome))
    if isinstance(outcome, LoaderError):
        return LoaderRecord(
            loader=name, required=required, status="failed", reason=published_reason(outcome),
            confinement=job.context.confinement,
        )  # fmt: skip
    own = references[checkpoint.branch]
    error = relative_error(outcome.logits, own)
    top1 = float((outcome.logits.argmax(-1) == own.argmax(-1)).mean())
    tokens = sum(len(generated) for generated in outcome.generated)
    found = [gaps[sequence] for sequence in sequences_of(outcome, job)]
    tolerance, rounding = tolerance_of(name, outcome.dtype), None
    differs = error > tolerance or equal_tokens(found, tolerance) < tokens
    if differs and error <= LARGEST_TOLERANCE and outcome.dtype in _ROUNDED:
        rounding = errors(outcome.dtype)
        tolerance = tolerance_of_model(tolerance, outcome.dtype, rounding)
    equal = equal_tokens(found, tolerance)
    problems = _problems(checkpoint, outcome, references, error, tolerance, top1)
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
        confinement=job.context.confinement,
        versions=dict(outcome.versions),
        relative_error=_six_digits(error),
        rounding_error=None if rounding is None else _six_digits(rounding),
        top1_agreement=round(top1, 6),
        tokens_generated=tokens,
        tokens_equal=equal,
    )


def rounding_errors(
    checkpoint: Checkpoint, job: VerifyJob, own: NDArray[np.float32], log: Callable[[str], None]
) -> Callable[[str], float]:
    """Return a function of a dtype: the relative error of our own forward in it, against our float32 logits `own`.

    Each is computed once, and `log` gets a line before: on a CPU that takes as long as `own` took, or longer.
    """

    @cache
    def error_in(dtype: str) -> float:
        log(f"  {checkpoint.branch}: our own forward in {dtype} runs, to measure what rounding costs this model")
        with gpu_memory_errors(_HINT):
            return relative_error(reference(checkpoint, job, _ROUNDED[dtype]), own)

    return error_in


def _six_digits(error: float) -> float | None:
    return round(error, 6) if np.isfinite(error) else None


def _problems(
    checkpoint: Checkpoint,
    outcome: ProbeResult,
    references: Mapping[str, NDArray[np.float32]],
    error: float,
    tolerance: float,
    top1: float,
) -> list[str]:
    problems = []
    if dict(outcome.weights_sha256) != dict(checkpoint.weights_sha256):
        problems.append("it read other weights than were packed (sha256)")
    if not np.isfinite(error):
        problems.append("its logits are not finite, or too large to compare")
    elif error > tolerance:
        problems.append(f"logits differ by {error:.4f} relative, allowed {tolerance:.4g} in {outcome.dtype}")
    if not top1 >= MIN_TOP1_AGREEMENT:
        problems.append(f"top-1 agreement {top1:.3f}, at least {MIN_TOP1_AGREEMENT} wanted")
    closer = [
        branch
        for branch, other in references.items()
        if branch != checkpoint.branch and relative_error(outcome.logits, other) < error
    ]
    if closer:
        problems.append(f"its logits are closer to those of {', '.join(closer)}")
    return problems


def sequences_of(outcome: ProbeResult, job: VerifyJob) -> list[Generated]:
    """Return each prompt with the tokens that a loader generated after it."""
    pairs = zip(job.prompts, outcome.generated, strict=True)
    return [(tuple(prompt), tuple(generated)) for prompt, generated in pairs if generated]


@torch.no_grad()
def token_gaps(checkpoint: Checkpoint, sequences: Collection[Generated], job: VerifyJob) -> dict[Generated, Tensor]:
    """Return for each generated token how far our logit for it is below our largest one.

    Our forward runs over prompt and generated tokens at once: each token is judged after the loader's own tokens before
    it. All sequences go through the blocks together.

    Args:
        checkpoint: which the loaders opened.
        sequences: of all loaders.
        job: see `VerifyJob`.

    Returns:
        For each sequence float32 [generated tokens], in units of the rms of our logits at that position; infinite from
        the first token on that the vocabulary does not have.

    Raises:
        MachineError: the GPU's memory is exhausted.
    """
    unique = list(dict.fromkeys(sequences))
    if not unique:
        return {}
    with gpu_memory_errors(_HINT):
        decoder = _decoder(checkpoint, job)
        known = [list(takewhile(lambda token: 0 <= token < decoder.vocab_size, made)) for _, made in unique]
        ids = torch.zeros(len(unique), max(len(prompt) + len(made) for prompt, made in unique), dtype=torch.int64)
        for row, (prompt, _), made in zip(ids, unique, known, strict=True):
            row[: len(prompt) + len(made)] = torch.tensor([*prompt, *made])
        states = torch.cat(forward(decoder, ids, rows=rows_per_batch(ids.shape[1], job.device.type)))
        found = {}
        for (prompt, generated), made, row in zip(unique, known, states, strict=True):
            gaps = torch.full((len(generated),), torch.inf)
            if made:
                logits = _logits(decoder, row[len(prompt) - 1 : len(prompt) - 1 + len(made)])
                chosen = logits.gather(-1, torch.tensor(made)[:, None])[:, 0]
                gaps[: len(made)] = (logits.amax(-1) - chosen) / logits.square().mean(-1).sqrt()
            found[prompt, generated] = gaps
        return found
