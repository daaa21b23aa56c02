"""Probes: a runtime opens a checkpoint in a process of its own, confined, without secrets and with a time limit."""

import json
import os
import re
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from packager.errors import LoaderError, LoaderUnavailableError
from packager.prove.environments import RuntimeContext, environment_files, environment_in_use
from packager.prove.loaders import ISOLATED, LoaderSpec
from packager.system.confinement import (
    View,
    child_environ,
    confined_command,
    library_folders,
    private_folder,
    refusal,
)
from packager.system.files import open_regular, write_atomic
from packager.system.processes import ending, tail

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_PATH = re.compile(r"(?:file://)?(?:/[\w.+~@-]+)+/([\w.+~@-]+)/?")
_REASON_LENGTH = 400
TAIL_LINES = 20
# By name, not by prefix: CUDA_INJECTION64_PATH and OMP_TOOL_LIBRARIES load any library, as LD_PRELOAD does.
RUNTIME_VARIABLES = frozenset(
    (
        *("CUDA_DEVICE_ORDER", "CUDA_HOME", "CUDA_LAUNCH_BLOCKING", "CUDA_MODULE_LOADING", "CUDA_PATH"),
        *("CUDA_VISIBLE_DEVICES", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_DRIVER_CAPABILITIES", "NVIDIA_TF32_OVERRIDE"),
        *("NVIDIA_VISIBLE_DEVICES", "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "TORCH_CUDA_ARCH_LIST"),
        *("CC", "CXX", "MAX_JOBS", "GPTQMODEL_CPU_WORKERS", "ATEN_CPU_CAPABILITY"),
        *("KMP_AFFINITY", "KMP_BLOCKTIME", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS", "OMP_DYNAMIC", "OMP_NUM_THREADS"),
        *("OMP_PLACES", "OMP_PROC_BIND", "OMP_WAIT_POLICY", "OPENBLAS_NUM_THREADS"),
    )
)
_COMPILERS = ("nvcc", "c++", "g++", "cc", "gcc")
# Of one file that a probe writes: room for the object files of compiled kernels.
_MAX_FILE_BYTES = 2 * 10**9
_MAX_RESULT_BYTES = 10**7
_MAX_WHY = 4000  # characters

_Text = Annotated[str, Field(max_length=1000)]


class _Written(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)


class _Success(_Written):
    """The content of result.json after a success: the fields of `ProbeResult`."""

    status: Literal["ok"]
    generated: tuple[tuple[int, ...], ...]
    versions: Annotated[dict[_Text, _Text], Field(max_length=100)]
    device: _Text
    dtype: _Text
    kernel: _Text
    weights_sha256: Annotated[dict[_Text, _Text], Field(max_length=10_000)]
    load_s: float
    forward_s: float
    peak_memory_bytes: int
    decode_tokens: Annotated[int, Field(ge=0)] = 0
    decode_s: float | None = None
    prefill_tokens: Annotated[int, Field(ge=0)] = 0
    prefill_s: float | None = None


class _Failure(_Written):
    """The content of result.json after a failure."""

    status: Literal["error"]
    type: str
    message: str
    traceback: str = ""


_WRITTEN: TypeAdapter[_Success | _Failure] = TypeAdapter(Annotated[_Success | _Failure, Field(discriminator="status")])


@dataclass(frozen=True, kw_only=True)
class ProbeJob:
    """A checkpoint, and the inputs that a probe computes on.

    Attributes:
        model_dir: the checkpoint folder.
        device: "cpu" or "cuda".
        input_ids: rows of token ids, all of the same length, whose logits are wanted.
        prompts: token ids of each prompt, after which the probe generates greedily.
        max_new_tokens: the most tokens generated after a prompt.
        vocab_size: length of the logits of one token.
        output_dir: folder for the probe's files; what an earlier probe left there is removed.
        backend: the runtime's own name of the kernel to compute with; None is the probe's choice. GPTQModel,
            transformers and vLLM have such names; for AutoGPTQ they are the last words of its modules qlinear_*.
    """

    model_dir: Path
    device: str
    input_ids: Sequence[Sequence[int]]
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    vocab_size: int
    output_dir: Path
    backend: str | None = None


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """The logits and tokens that a runtime computed, and how; nothing relies on the runtime's own texts.

    Attributes:
        logits: float32 [rows, seq_len, vocab], memory-mapped from output_dir.
        generated: the new token ids after each prompt; an end-of-sequence token is the last one.
        versions: of Python and of the packages that matter.
        dtype: of the computation ("float32", "float16").
        kernel: class that computes the quantized linears.
        weights_sha256: by file name, as the runtime's own process saw the files.
        load_s: time to load the checkpoint, imports not counted.
        forward_s: time for the logits of every token of all rows.
        peak_memory_bytes: on a GPU the peak for this checkpoint, on the CPU the peak of the process so far.
        decode_tokens: generated tokens that were timed, and `decode_s` the time for them; None where none were.
        prefill_tokens: tokens of prompts that were timed until the first generated token, and `prefill_s` likewise.
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
    decode_tokens: int = 0
    decode_s: float | None = None
    prefill_tokens: int = 0
    prefill_s: float | None = None


def probe_environ(python: Path, environ: Mapping[str, str], device: str, folder: Path) -> dict[str, str]:
    """Return the environment of a probe: a locale, settings of the computation, an empty home, and a PATH of ours.

    Args:
        python: of the probe's environment.
        environ: of this process.
        device: "cpu" or "cuda".
        folder: from `private_folder`.
    """
    # Kernels are compiled with the environment's own ninja.
    folders = [str(python.parent), *map(str, _tool_folders(environ)), os.defpath]
    found = {
        **child_environ(environ, RUNTIME_VARIABLES, folder),
        "PATH": os.pathsep.join(dict.fromkeys(os.pathsep.join(folders).split(os.pathsep))),
        "VIRTUAL_ENV": str(python.parent.parent),
        "PACKAGER_ISOLATED": str(ISOLATED.parent),  # for the probes of other packages, which lie elsewhere
    }
    if device != "cuda":
        return found
    kernels = _kernels(python)
    found |= {"CUDA_CACHE_PATH": str(kernels / "cuda"), "TRITON_CACHE_DIR": str(kernels / "triton")}
    if libraries := library_folders(environ):
        # On NixOS, on WSL and on some clusters only these lead to the driver's libcuda.so.
        found["LD_LIBRARY_PATH"] = os.pathsep.join(map(str, libraries))
    return found


def _kernels(python: Path) -> Path:
    """Return the folder of an environment that keeps compiled kernels."""
    return python.parent.parent / "kernels"


def _tool_folders(environ: Mapping[str, str]) -> list[Path]:
    """Return the folders of the compilers that CC and CXX name, and of those on the caller's PATH.

    A compiler that is a link to one in another folder has both.
    """
    # CC may have arguments, such as "ccache gcc".
    named = [word for name in ("CC", "CXX") for word in environ.get(name, "").split()]
    found = [shutil.which(tool, path=environ.get("PATH", os.defpath)) for tool in (*_COMPILERS, *named)]
    tools = [Path(tool) for tool in found if tool]
    return list(dict.fromkeys(folder for tool in tools for folder in (tool.parent, tool.resolve().parent)))


def _cuda_files(environ: Mapping[str, str]) -> list[Path]:
    """Return the folders that compiling and running CUDA kernels reads; none that holds the user's home."""
    toolkits = [Path(environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if environ.get(name)]
    compilers = [folder.parent if folder.name == "bin" else folder for folder in _tool_folders(environ)]
    home = Path(environ.get("HOME") or "/root")
    return [path for path in (*toolkits, *compilers, *library_folders(environ)) if not home.is_relative_to(path)]


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
    if context.confinement == "none":
        reasons = "; ".join(filter(None, [refusal("bubblewrap"), refusal("namespaces")]))
        context.log(f"{spec.name}: runs unconfined, with this machine's network and files ({reasons or 'as asked'})")
    for job in jobs:
        shutil.rmtree(job.output_dir, ignore_errors=True)
        job.output_dir.mkdir(parents=True)
        request = {
            **vars(job),
            "model_dir": str(job.model_dir.absolute()),
            "output_dir": str(job.output_dir.absolute()),
        }
        write_atomic(job.output_dir / "job.json", json.dumps(request).encode())
    outcomes: list[ProbeResult | LoaderError] = []
    while len(outcomes) < len(jobs):
        rest = jobs[len(outcomes) :]
        try:
            with environment_in_use(python):
                failure = _run_script(spec, python, rest, timeout_s, context)
        except LoaderUnavailableError as error:
            return [*outcomes, *(error for _ in rest)]
        finished = [job for job in rest if os.path.lexists(_result_file(job))]
        outcomes += [_outcome(spec, job) for job in finished]
        if len(finished) < len(rest):
            ended = rest[len(finished)]
            _remove_folders(ended.output_dir)
            outcomes.append(LoaderError(f"{spec.name} did not finish", where=str(ended.model_dir), why=failure))
    return outcomes


def _remove_folders(output_dir: Path) -> None:
    """Remove what a probe that was killed made for itself: a converted checkpoint of 13B takes 9 GB."""
    for entry in output_dir.iterdir():
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)


def _result_file(job: ProbeJob) -> Path:
    return job.output_dir / "result.json"


def _run_script(
    spec: LoaderSpec, python: Path, jobs: Sequence[ProbeJob], timeout_s: float, context: RuntimeContext
) -> str:
    """Run the probe on `jobs` until it ends or one job takes too long; return how it ended, and its last lines."""
    # Isolated: neither the script's folder nor the user's packages are on the path.
    requests = [str(job.output_dir.absolute() / "job.json") for job in jobs]
    command = [str(python), "-I", str(spec.script.absolute()), *requests]
    waiting = [_result_file(job) for job in jobs]

    def progress() -> int:
        while waiting and os.path.lexists(waiting[0]):
            waiting.pop(0)
        return len(waiting)

    with private_folder() as folder:
        view = runtime_view(
            spec, python, folder, context, device=jobs[0].device,
            readable=[job.model_dir for job in jobs], writable=[job.output_dir for job in jobs],
        )  # fmt: skip
        # Beside the home, where the probe does not see them.
        log = folder / "stderr.txt"
        with (folder / "stdout.txt").open("wb") as out, log.open("wb") as err:
            status = context.processes.run(
                confined_command(command, view, context.confinement),
                folder=jobs[0].output_dir,
                environ=probe_environ(python, context.environ, jobs[0].device, folder),
                out=out,
                err=err,
                timeout_s=timeout_s,
                progress=progress,
                max_file_bytes=max(_MAX_FILE_BYTES, *map(_largest_file_bytes, jobs)),
            )
        how = f"it took over {timeout_s:g} s and was killed" if status is None else ending(status)
        return f"{how}\n{tail(log, TAIL_LINES)}"


def runtime_view(
    spec: LoaderSpec,
    python: Path,
    folder: Path,
    context: RuntimeContext,
    *,
    device: str,
    readable: Collection[Path],
    writable: Collection[Path],
) -> View:
    """Return the files that a runtime's process sees: its environment, its script, and what it is to read and write.

    On CUDA the environment's `kernels` folder can be written, because kernels are compiled when they are first used.

    Args:
        spec: the script; it finds `packager_isolated.py` by its own path.
        python: of the environment.
        folder: from `private_folder`.
        context: whose environment names the CUDA toolkit.
        device: "cpu" or "cuda".
        readable: more files and folders to read.
        writable: folders to write; the first is the working directory.
    """
    files = [*environment_files(python), spec.script, ISOLATED, *readable]
    if device != "cuda":
        return View(folder=folder, readable=files, writable=writable, working=next(iter(writable)))
    kernels = _kernels(python)
    kernels.mkdir(exist_ok=True)
    return View(
        folder=folder,
        readable=[*files, *_cuda_files(context.environ)],
        writable=[*writable, kernels],
        working=next(iter(writable)),
        gpu=True,
    )


def _largest_file_bytes(job: ProbeJob) -> int:
    """Return what a probe may write to one file: the logits, or the checkpoint converted from float16 to float32."""
    weights_bytes = sum(path.stat().st_size for path in job.model_dir.glob("*.safetensors"))
    return 2 * max(_logits_bytes(job), weights_bytes)


def _logits_bytes(job: ProbeJob) -> int:
    return len(job.input_ids) * len(job.input_ids[0]) * job.vocab_size * 4


def _outcome(spec: LoaderSpec, job: ProbeJob) -> ProbeResult | LoaderError:
    """Read the result of a job; only its facts about the computation are used."""
    where = str(job.model_dir)
    try:
        with open_regular(_result_file(job)) as stream:
            text = stream.read(_MAX_RESULT_BYTES + 1)
        if len(text) > _MAX_RESULT_BYTES:
            raise ValueError(f"result.json has over {_MAX_RESULT_BYTES} bytes")
        written = _WRITTEN.validate_json(text)
        if isinstance(written, _Failure):
            if written.type == "UnavailableError":
                return LoaderUnavailableError(f"{spec.name} cannot run on this machine", why=written.message[:_MAX_WHY])
            lines = written.traceback[-_MAX_WHY:].rstrip().splitlines()[-TAIL_LINES:]
            why = "\n".join([f"{written.type[:100]}: {written.message[:_MAX_WHY]}", *lines])
            return LoaderError(f"{spec.name} could not open the checkpoint", where=where, why=why)
        lengths = [len(tokens) for tokens in written.generated]
        if len(lengths) != len(job.prompts) or max(lengths, default=0) > job.max_new_tokens:
            raise ValueError(f"it generated {lengths} tokens for {len(job.prompts)} prompts")
        return ProbeResult(logits=_read_logits(job), **written.model_dump(exclude={"status"}))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        why = f"result.json: {'.'.join(map(str, first['loc']))}: {first['msg']}"
        return LoaderError(f"{spec.name} wrote a result that cannot be used", where=where, why=why[:_MAX_WHY])
    except (OSError, ValueError) as error:
        return LoaderError(f"{spec.name} wrote a result that cannot be used", where=where, why=str(error))


def _read_logits(job: ProbeJob) -> "NDArray[np.float32]":
    """Return the logits float32 [rows, seq_len, vocab], memory-mapped.

    Raises:
        OSError: the file is not there, or no regular file.
        ValueError: its header or its size is not that of these logits.
    """
    import numpy as np

    shape = (len(job.input_ids), len(job.input_ids[0]), job.vocab_size)
    with open_regular(job.output_dir / "logits.npy") as stream:
        size = os.fstat(stream.fileno()).st_size
        if np.lib.format.read_magic(stream) != (1, 0):
            raise ValueError("logits.npy is of another version of its format than 1.0")
        found, by_columns, dtype = np.lib.format.read_array_header_1_0(stream)
        wanted_size = stream.tell() + _logits_bytes(job)
        if (found, by_columns, dtype, size) != (shape, False, np.dtype(np.float32), wanted_size):
            raise ValueError(f"logits.npy has {dtype} {found} in {size} bytes, float32 {shape} wanted")
        return np.memmap(stream, dtype=np.float32, mode="r", offset=stream.tell(), shape=shape)


def published_reason(error: LoaderError) -> str:
    """Return an error as one line that can be published: of every path only the last name is left."""
    text = " ".join(part for part in (error.what, error.why) if part).replace("\n", " ")
    return _PATH.sub(lambda path: f".../{path.group(1)}", text)[:_REASON_LENGTH]
