"""Virtual environments for the loaders, and the processes that run in them.

An environment is made once per lock and kept in the cache. It shares the torch of the running interpreter, so that
nobody downloads torch again. Probes run there as processes of their own, without secrets, and with a time limit.
"""

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

from packager.errors import LoaderError, LoaderUnavailableError
from packager.prove.shared_torch import find, share_torch
from packager.system.files import disk_errors, write_atomic
from packager.system.processes import clean_environ, run, tail

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Installed into an environment only where the running interpreter has no torch to share.
TORCH_REQUIREMENT = "torch==2.13.0"
PIP_TIMEOUT_S = 1800.0
READY = ".ready"
TAIL_LINES = 20
# Raised when environments are made in another way, so that those of before are not used.
_LAYOUT = "1"


@dataclass(frozen=True, kw_only=True)
class LoaderSpec:
    """A runtime that must open what is published.

    Attributes:
        name: the name that recipes and receipts use.
        script: the stand-alone probe.
        requirements: the lock, installed without looking at dependencies; torch is not in it.
        devices: of "cpu" and "cuda", where it can compute.
        requires_python: the Python versions for which all of the lock can be installed, as a version specifier.
        description: what it is, in a few words.
    """

    name: str
    script: Path
    requirements: Path
    devices: frozenset[str]
    requires_python: str
    description: str


@dataclass(frozen=True, kw_only=True)
class ProbeJob:
    """What a probe shall do with one checkpoint.

    Attributes:
        model_dir: the checkpoint folder.
        device: "cpu" or "cuda".
        input_ids: rows of token ids, all of the same length, whose logits are wanted.
        prompts: token ids after which to generate greedily.
        max_new_tokens: the most tokens generated after a prompt.
        output_dir: where the probe writes; what an earlier probe left there is removed.
    """

    model_dir: Path
    device: str
    input_ids: Sequence[Sequence[int]]
    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    output_dir: Path


@dataclass(frozen=True, kw_only=True)
class ProbeResult:
    """What a runtime computed.

    Attributes:
        logits: float32 [rows, seq_len, vocab], memory-mapped from output_dir.
        generated: the new token ids after each prompt; an end-of-sequence token is the last one.
        versions: of Python and of the packages that matter.
        dtype: in which it computed ("float32", "float16").
        kernel: class that computes the quantized linears.
        weights_sha256: by file name, as the runtime's own process saw the files.
        load_s: time to load the checkpoint, imports not counted.
        forward_s: time for all rows.
        peak_memory_bytes: on a GPU what this checkpoint took there, on the CPU the process's peak so far.
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


def ensure_environment(
    spec: LoaderSpec, cache_dir: Path, environ: Mapping[str, str], report: Callable[[str], None]
) -> Path:
    """Return the Python of a loader's environment, made first if it is not in the cache.

    A creation that was killed is redone; of several at once one creates and the others wait. `report` takes one line
    when a creation starts and one when it is done. Of `environ` proxies and pip's settings count; secrets are removed.

    Raises:
        LoaderUnavailableError: it cannot be made here; the message says why.
        MachineError: the disk is full or the cache cannot be written.
    """
    running = ".".join(map(str, sys.version_info[:3]))
    if running not in SpecifierSet(spec.requires_python):
        raise LoaderUnavailableError(
            f"{spec.name} cannot be installed for Python {running}",
            why=f"its pinned packages need Python {spec.requires_python}",
        )
    folder = cache_dir.absolute() / "loaders" / environment_name(spec)
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with Path(f"{folder}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_ready(folder):
                _create(_Site(spec=spec, folder=folder, environ=environ, lock=lock.fileno()), report)
    return _python(folder)


def environment_name(spec: LoaderSpec) -> str:
    """Return `<loader>-<12 hex digits>`; the digits change with the lock, Python, the platform and the shared torch."""
    torch = find("torch")
    parts = [
        _LAYOUT,
        spec.requirements.read_text(encoding="utf-8"),
        platform.python_implementation(),
        platform.python_version(),
        sysconfig.get_platform(),
        torch.version if torch else TORCH_REQUIREMENT,
    ]
    return f"{spec.name}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]}"


def installed_versions(python: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the versions of packages in an environment of ours, of those that it has."""
    folder = python.parent.parent
    packages = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    found: dict[str, str] = {
        canonicalize_name(distribution.metadata["Name"]): distribution.version
        for distribution in importlib.metadata.distributions(path=[str(_shared(folder)), packages])
    }
    return {name: found[name] for name in names if name in found}


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _shared(folder: Path) -> Path:
    return folder / "shared"


def _is_ready(folder: Path) -> bool:
    """Tell whether creation went to its end here, and neither Python nor a shared package went away since."""
    try:
        made_here = (folder / READY).read_text(encoding="utf-8") == str(folder)
        return made_here and _python(folder).exists() and all(entry.exists() for entry in _shared(folder).rglob("*"))
    except FileNotFoundError:
        return False


@dataclass(frozen=True, kw_only=True)
class _Site:
    """An environment under construction; `lock` is the descriptor of the lock that is held meanwhile."""

    spec: LoaderSpec
    folder: Path
    environ: Mapping[str, str]
    lock: int

    @property
    def log(self) -> Path:
        return self.folder / "pip.log"


def _create(site: _Site, report: Callable[[str], None]) -> None:
    spec, folder = site.spec, site.folder
    started = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    pins = _pins(spec)
    share = find("torch") is not None
    what = f"{len(pins)} packages" if share else f"{len(pins)} packages and {TORCH_REQUIREMENT}"
    report(f"{spec.name}: creating its environment, {what}, log in {site.log}")
    try:
        with disk_errors(folder):
            venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        raise LoaderUnavailableError(f"no virtual environment could be made for {spec.name}", why=str(error)) from error
    install = ["--no-deps", "--requirement", str(spec.requirements.absolute())]
    if "setuptools" in pins:
        # What comes as source is built with it, and not with one downloaded anew for each package: 5 s less of 24.
        _pip(site, ["--no-deps", str(pins["setuptools"])])
        install.insert(0, "--no-build-isolation")
    if pins:
        _pip(site, install)
    if share:
        # Only now: pip would uninstall a shared package of another version, through the links.
        packages = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
        share_torch(_shared(folder), Path(packages), exclude=pins)
    else:
        _pip(site, [TORCH_REQUIREMENT])
    write_atomic(folder / READY, str(folder).encode())
    report(f"{spec.name}: environment ready in {time.monotonic() - started:.0f} s")


def _pins(spec: LoaderSpec) -> dict[str, Requirement]:
    """Return what the lock installs on this Python, by canonical name."""
    lines = [line.split("#")[0].strip() for line in spec.requirements.read_text(encoding="utf-8").splitlines()]
    requirements = [Requirement(line) for line in lines if line]
    chosen = [each for each in requirements if each.marker is None or each.marker.evaluate()]
    return {canonicalize_name(each.name): each for each in chosen}


def _pip(site: _Site, arguments: Sequence[str]) -> None:
    """Install into the environment; pip's output goes to the log.

    Raises:
        LoaderUnavailableError: there is no pip, or it failed.
    """
    python = str(_python(site.folder))
    settings = {
        # AutoGPTQ's source distribution would compile CUDA kernels, or give up where torch has no CUDA.
        "BUILD_CUDA_EXT": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INPUT": "1",
        "PYTHONNOUSERSITE": "1",
    }
    # Bytecode is compiled when it is first imported: most of what is installed here never is.
    install = ["install", "--no-compile", "--progress-bar=off", *arguments]
    if importlib.util.find_spec("pip"):
        commands = [[sys.executable, "-m", "pip", f"--python={python}", *install]]
    else:
        commands = [[python, "-m", "ensurepip"], [python, "-m", "pip", *install]]
    for command in commands:
        with site.log.open("ab") as log:
            status = run(
                command,
                folder=site.folder,
                environ={**clean_environ(site.environ), **settings},
                out=log,
                err=log,
                timeout_s=PIP_TIMEOUT_S,
                # A pip that survives us holds the lock: nobody starts over in the folder that it still writes to.
                inherited=(site.lock,),
            )
        if status != 0:
            reason = f"it took over {PIP_TIMEOUT_S:.0f} s" if status is None else f"exit status {status}"
            raise LoaderUnavailableError(
                f"the packages of {site.spec.name} could not be installed",
                where=str(site.log),
                why=f"pip: {reason}; {tail(site.log, 4)}",
                hint="a package index must be reachable; PIP_INDEX_URL or PIP_FIND_LINKS may name another",
            )


def probe_environ(python: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a probe: it needs no index and no proxy, whose addresses may hold passwords."""
    kept = {
        name: value
        for name, value in clean_environ(environ).items()
        if not name.startswith(("PIP_", "UV_")) and not name.upper().endswith("_PROXY")
    }
    # Kernels are compiled with the environment's own ninja.
    path = os.pathsep.join(filter(None, [str(python.parent), kept.get("PATH", os.defpath)]))
    return {**kept, "PATH": path, "VIRTUAL_ENV": str(python.parent.parent)}


def run_probe(
    spec: LoaderSpec, python: Path, job: ProbeJob, timeout_s: float, environ: Mapping[str, str]
) -> ProbeResult:
    """Let a loader open one checkpoint.

    Raises:
        LoaderError: it failed, was killed, or took longer than `timeout_s`; with the last lines it wrote.
        LoaderUnavailableError: the runtime found that it cannot run on this machine.
    """
    (outcome,) = run_probes(spec, python, [job], timeout_s, environ)
    if isinstance(outcome, LoaderError):
        raise outcome
    return outcome


def run_probes(
    spec: LoaderSpec, python: Path, jobs: Sequence[ProbeJob], timeout_s: float, environ: Mapping[str, str]
) -> list[ProbeResult | LoaderError]:
    """Let a loader open checkpoints one after the other, in one process as long as that lives.

    `timeout_s` is for each checkpoint; importing the runtime counts for the first.

    Returns:
        One outcome per job, in order. A job that ends the process costs the others nothing but a new start.
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
        failure = _run_script(spec, python, rest, timeout_s, environ)
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
    spec: LoaderSpec, python: Path, jobs: Sequence[ProbeJob], timeout_s: float, environ: Mapping[str, str]
) -> str:
    """Run the probe over `jobs` until it ends or one job takes too long; return in words how it ended."""
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
        status = run(
            command,
            folder=folder,
            environ=probe_environ(python, environ),
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
