"""What this machine has of what packager uses: a check for each, with what to do where something is missing."""

import os
import platform
import queue
import re
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

from packager import __version__
from packager.errors import LoaderError, MachineError, SourceError
from packager.inputs.hub_account import HubAccount, has_token, hub_account
from packager.inputs.hub_cache import is_offline
from packager.model.devices import choose_device
from packager.pipeline.build_extra import require_build_extra
from packager.prove.environments import READY, environment_name, environments_folder, is_ready
from packager.prove.loaders import LOADERS
from packager.prove.other_loader import installed_loaders, loader_spec
from packager.prove.tasks import TASKS_SPEC
from packager.system.confinement import confinement, refusal
from packager.system.files import disk_errors
from packager.system.host_memory import available_bytes
from packager.system.parallel import AnswerTimeoutError, in_time
from packager.system.posix import require_posix
from packager.system.text import format_bytes, gibibytes, printable

Grade = Literal["ok", "note", "missing"]
_GIT_TIMEOUT_S = 10
_ACCOUNT_TIMEOUT_S = 8
_GIT_END_S = 2  # after its first line
_MOST_LINE = 4096
_ENVIRONMENT = re.compile(r"[A-Za-z0-9_-]+-[0-9a-f]{12}")  # see `environment_name`


@dataclass(frozen=True, kw_only=True)
class MachineCheck:
    """One thing that packager uses.

    Attributes:
        name: what it is.
        grade: note: something works less well or not at all without it; missing: nothing can be published without it.
        found: what is there.
        hint: what to do, "" if nothing.
    """

    name: str
    grade: Grade
    found: str
    hint: str = ""


@dataclass(frozen=True, kw_only=True)
class Environment:
    """A loader's environment in the cache.

    Attributes:
        folder: its own.
        size_bytes: of its files; files shared by links are not counted.
        used: whether a loader of this version and this Python uses it.
    """

    folder: Path
    size_bytes: int
    used: bool


def machine_checks(dist: Path, cache: Path, environ: Mapping[str, str]) -> Iterator[MachineCheck]:
    """Yield the checks; those that take longest come last.

    Args:
        dist: the output folder.
        cache: the folder of the loaders' environments.
        environ: the process environment.
    """
    yield MachineCheck(
        name="packager", grade="ok", found=f"{__version__}, Python {platform.python_version()} ({sys.executable})"
    )
    yield _build_extra()
    yield _git()
    yield _git_lfs()
    yield _confinement()
    yield _memory()
    for name, folder in (("output folder", dist), ("cache", cache)):
        yield _disk(name, folder)
    yield _gpu()
    yield from _loaders(cache)
    yield _hub(environ)


def _build_extra() -> MachineCheck:
    try:
        require_build_extra()
    except MachineError as error:
        return MachineCheck(name="build extra", grade="note", found=error.why, hint=f"to build: {error.hint}")
    names = ("torch", "transformers", "safetensors", "pyarrow")
    found = ", ".join(f"{name} {_version(name)}" for name in names)
    return MachineCheck(name="build extra", grade="ok", found=found)


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "missing"


def _git() -> MachineCheck:
    return _program("git", "missing", "publishing to folders and git remotes needs git: https://git-scm.com")


def _git_lfs() -> MachineCheck:
    return _program("git-lfs", "note", "publishing to git remotes (target: git) needs git-lfs: https://git-lfs.com")


def _program(name: str, lacking: Grade, hint: str) -> MachineCheck:
    path = shutil.which(name)
    if path is None:
        return MachineCheck(name=name, grade=lacking, found="not on the PATH", hint=hint)
    try:
        line = _first_line([path, "--version"])
    except (OSError, subprocess.SubprocessError) as error:
        return MachineCheck(name=name, grade=lacking, found=printable(f"{path} does not run: {error}"), hint=hint)
    return MachineCheck(name=name, grade="ok", found=printable(line or path))


def _first_line(command: Sequence[str]) -> str:
    """Return the first line that a program prints, and end it: it may print without end.

    Raises:
        OSError, subprocess.SubprocessError: it does not run, prints no line in time, or ends with an error.
    """
    lines: queue.Queue[bytes] = queue.Queue()
    # A session of its own, so that what the program started ends with it: else the thread would read on.
    quiet, own = subprocess.DEVNULL, os.name == "posix"
    process = subprocess.Popen(command, stdin=quiet, stdout=subprocess.PIPE, stderr=quiet, start_new_session=own)
    with process:
        output = process.stdout
        try:
            if output is not None:
                threading.Thread(target=lambda: lines.put(output.readline(_MOST_LINE)), daemon=True).start()
            line = lines.get(timeout=_GIT_TIMEOUT_S)
            with suppress(subprocess.TimeoutExpired):  # it has more to say
                process.wait(_GIT_END_S)
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, list(command))
        except queue.Empty as error:
            raise subprocess.TimeoutExpired(list(command), _GIT_TIMEOUT_S) from error
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL) if own else process.kill()
    return line.decode("utf-8", "replace").rstrip()


def _confinement() -> MachineCheck:
    how = confinement()
    if how == "bubblewrap":
        return MachineCheck(name="confinement", grade="ok", found="loaders run in bubblewrap")
    why = refusal("bubblewrap")
    if how == "namespaces":
        return MachineCheck(
            name="confinement", grade="ok", found=f"loaders run in namespaces of their own (bubblewrap: {why})"
        )
    return MachineCheck(
        name="confinement", grade="note", found="loaders can read this user's files and reach the network",
        hint=f"install bubblewrap ({why}) or allow user namespaces ({refusal('namespaces')})",
    )  # fmt: skip


def _memory() -> MachineCheck:
    free = available_bytes()
    found = "not stated by this system" if free is None else f"{format_bytes(free)} available"
    return MachineCheck(name="memory", grade="ok", found=found)


def _disk(name: str, folder: Path) -> MachineCheck:
    there = folder.absolute()
    try:
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
    except OSError as error:
        return MachineCheck(name=name, grade="note", found=f"{folder}: {error.strerror}")
    if not there.is_dir():
        return MachineCheck(name=name, grade="note", found=f"{there} is no folder", hint="name another folder")
    return MachineCheck(name=name, grade="ok", found=f"{format_bytes(free)} free for {folder}")


def _gpu() -> MachineCheck:
    hint = "packager plan RECIPE states the memory that a build needs with a GPU and without one"
    try:
        require_build_extra()
        device = choose_device("auto")
    except MachineError as error:
        return MachineCheck(name="GPU", grade="note", found=error.what, hint=error.hint)
    if device.type == "cpu":
        return MachineCheck(
            name="GPU", grade="note", found="none that torch can use: this machine computes on its CPU", hint=hint
        )
    import torch

    parts = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        capability = f"{properties.major}.{properties.minor}"
        parts.append(f"{properties.name}, {gibibytes(properties.total_memory)} GiB, compute capability {capability}")
    return MachineCheck(name="GPU", grade="ok", found=f"{'; '.join(parts)}; CUDA {torch.version.cuda}")


def _loaders(cache: Path) -> Iterator[MachineCheck]:
    for name in (*LOADERS, *installed_loaders()):
        try:
            spec = loader_spec(name)
        except LoaderError as error:
            yield MachineCheck(name=name, grade="note", found=error.brief, hint=error.hint)
            continue
        if problem := spec.python_problem():
            yield MachineCheck(name=name, grade="note", found=problem)
            continue
        folder = environments_folder(cache) / environment_name(spec)
        size = f", {format_bytes(_size(folder))}" if folder.exists() else ""
        maker = "packager verify" if spec.on_request else "the first build"
        where = " on a machine with a CUDA GPU" if spec.devices == {"cuda"} else ""
        found = f"environment ready{size}" if is_ready(folder) else f"environment not made yet: {maker}{where} makes it"
        yield MachineCheck(name=name, grade="ok", found=f"{spec.description}: {found}")


def environments(cache: Path) -> tuple[Environment, ...]:
    """Return the loaders' environments in a cache, those of other versions and Pythons too.

    A folder whose name is none that `environment_name` gives is somebody else's.
    """
    others = []
    for name in installed_loaders():
        with suppress(LoaderError):  # it has a line of its own
            others.append(loader_spec(name))
    used = {environment_name(spec) for spec in (*LOADERS.values(), *others, TASKS_SPEC)}
    found = environments_folder(cache).glob("*/")
    folders = sorted(
        path for path in found if _ENVIRONMENT.fullmatch(path.name) and path.is_dir() and not path.is_symlink()
    )
    return tuple(Environment(folder=folder, size_bytes=_size(folder), used=folder.name in used) for folder in folders)


def remove_environment(environment: Environment) -> bool:
    """Delete an environment unless a process makes it or runs in it just now, and return whether it is gone.

    The file of its lock stays: a process that waits for the lock would get one that others no longer find.

    Raises:
        MachineError: the cache cannot be written.
    """
    require_posix("deleting a loader's environment")
    import fcntl

    with disk_errors(environment.folder), open(f"{environment.folder}.lock", "w", opener=_open_lock) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        (environment.folder / READY).unlink(missing_ok=True)  # first: what a kill leaves is no environment
        shutil.rmtree(environment.folder)
    return True


def _open_lock(path: str, _: int) -> int:
    """Open the file of a lock; a link is not followed, a FIFO does not block, and the content stays."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)


def _size(folder: Path) -> int:
    """Return the bytes of the files below a folder, without those that are deleted meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with suppress(FileNotFoundError):
                found = os.lstat(os.path.join(parent, name))  # noqa: PTH118 - an environment has 30,000 files
                total += found.st_size if stat.S_ISREG(found.st_mode) else 0
    return total


def _in_time(ask: Callable[[], HubAccount]) -> HubAccount:
    """Return what the Hub answers; a build waits for a busy Hub for a minute, a person who asks for a table does not.

    Raises:
        SourceError: there is no answer in time, or not that of a Hub.
    """
    try:
        return in_time(ask, _ACCOUNT_TIMEOUT_S)
    except AnswerTimeoutError as error:
        raise SourceError(
            "the account is not known", why=str(error), hint="check the network, or HF_ENDPOINT"
        ) from error


def _hub(environ: Mapping[str, str]) -> MachineCheck:
    endpoint = printable(environ.get("HF_ENDPOINT", "https://huggingface.co"))
    login = "`hf auth login`, or set HF_TOKEN; public models need no token"
    if is_offline():
        return MachineCheck(name="Hub", grade="note", found="HF_HUB_OFFLINE is set: only the cache is read")
    if not has_token():
        return MachineCheck(name="Hub", grade="note", found=f"no token for {endpoint}", hint=f"to publish: {login}")
    try:
        account = _in_time(hub_account)
    except SourceError as error:
        return MachineCheck(name="Hub", grade="note", found=error.brief, hint=error.hint)
    found = f"logged in as {account.name} at {endpoint}, the token is for: {printable(account.role)}"
    if account.role == "write":
        return MachineCheck(name="Hub", grade="ok", found=found)
    if account.role == "fineGrained":  # the Hub lists its rights by repository, and the recipe is not known here
        hint = f"to publish, it must have the right to write to the repository: {endpoint}/settings/tokens"
        return MachineCheck(name="Hub", grade="note", found=found, hint=hint)
    return MachineCheck(name="Hub", grade="note", found=found, hint=f"to publish, a token that may write: {login}")
