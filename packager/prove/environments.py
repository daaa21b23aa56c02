"""Virtual environments for the loaders.

An environment is created once per lock and kept in the cache. It shares the torch of the running interpreter, so that
torch is not downloaded again. `probes.py` runs processes in it.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from packaging.utils import canonicalize_name

from packager.errors import LoaderUnavailableError, without_secrets
from packager.prove.installing import Creation, install, left_out, package_place
from packager.prove.loaders import LoaderSpec
from packager.prove.locks import LockedPackage, for_this_python, read_lock, requirement_lines
from packager.prove.shared_torch import find, share_torch
from packager.prove.sources import built_wheels
from packager.receipt import Confinement
from packager.system.confinement import child_environ, confinement, private_folder
from packager.system.files import disk_errors, write_atomic
from packager.system.posix import require_posix
from packager.system.processes import Processes

READY = ".ready"
# Increment when environment creation changes: cached environments of an older layout are not used.
_LAYOUT = "2"


@dataclass(frozen=True, kw_only=True)
class RuntimeContext:
    """The folders, variables and processes that runtimes in their own environments use on this machine.

    Attributes:
        cache: folder of the environments.
        scratch: folder for files that processes exchange; its content may be deleted at any time.
        environ: the process environment to derive the runtime's from, which gets only what is on a list.
        log: receives one line when an environment is created, and one when it is ready.
        processes: runs the child processes; one call stops all of them.
        confinement: of the runtimes' processes.
    """

    cache: Path
    scratch: Path
    environ: Mapping[str, str]
    log: Callable[[str], None]
    processes: Processes = field(default_factory=Processes)
    confinement: Confinement = field(default_factory=confinement)


def ensure_environment(spec: LoaderSpec, context: RuntimeContext) -> Path:
    """Return the Python of a loader's environment; create the environment first if it is not in the cache.

    A creation that was killed is repeated. When several processes need the same environment, one creates it and the
    others wait. The place of the packages and the way to it are variables of `context.environ`.

    Raises:
        LoaderUnavailableError: the environment cannot be created on this machine; the message has the reason.
        MachineError: the disk is full or the cache cannot be written.
    """
    require_posix("a loader's environment")
    import fcntl

    if problem := spec.python_problem():
        raise LoaderUnavailableError(problem)
    folder = environments_folder(context.cache) / environment_name(spec)
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with Path(f"{folder}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH)  # others may run in it for hours
            if not is_ready(folder):
                fcntl.flock(lock, fcntl.LOCK_EX)
            if not is_ready(folder):
                creation = Creation(
                    loader=spec.name,
                    folder=folder,
                    cache=context.cache.resolve(),
                    environ=context.environ,
                    log=context.log,
                    processes=context.processes,
                    confinement=context.confinement,
                    lock=lock.fileno(),
                )
                _create(spec, creation)
    return _python(folder)


def waits_for_request(spec: LoaderSpec, required: Collection[str], cache: Path) -> bool:
    """Return whether a build leaves a loader out until somebody asks for its environment.

    Args:
        spec: the loader.
        required: the loaders that the recipe requires: it asks for these.
        cache: of the environments. One that was made before is used.
    """
    if not spec.on_request or spec.name in required:
        return False
    return not is_ready(environments_folder(cache) / environment_name(spec))


def environments_folder(cache: Path) -> Path:
    """Return the folder of the environments in a cache, by one name.

    Under another name of the same folder an environment would be made again, below a process that uses it.
    """
    return cache.resolve() / "loaders"


def environment_name(spec: LoaderSpec) -> str:
    """Return `<lock's name>-<12 hex digits>`; the digits depend on the lock, Python, the platform and torch."""
    torch = find("torch")
    parts = [
        _LAYOUT,
        spec.requirements.read_text(encoding="utf-8"),
        platform.python_implementation(),
        platform.python_version(),
        sysconfig.get_platform(),
        torch.version if torch else "",
    ]
    return f"{spec.requirements.stem}-{hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]}"


def installed_versions(python: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the versions of those packages that are installed in a loader's environment."""
    folder = python.parent.parent
    found: dict[str, str] = {
        canonicalize_name(distribution.metadata["Name"]): distribution.version
        for distribution in importlib.metadata.distributions(path=[str(_shared(folder)), str(_packages(folder))])
    }
    return {name: found[name] for name in names if name in found}


def environment_files(python: Path) -> set[Path]:
    """Return the folders that the Python of an environment reads: its own, the interpreter's, and the shared torch."""
    folder = python.parent.parent
    links = [entry for entry in _shared(folder).rglob("*") if entry.is_symlink()]
    return {
        folder,
        Path(sys.base_prefix),
        Path(sys.base_exec_prefix),
        python.resolve().parent.parent,
        *(each.parent for entry in links for each in (entry.readlink(), entry.resolve())),
    }


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _shared(folder: Path) -> Path:
    return folder / "shared"


def _packages(folder: Path) -> Path:
    return Path(sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)}))


def is_ready(folder: Path) -> bool:
    """Return whether the environment was completed in this folder, and its Python and shared packages still exist."""
    try:
        made_here = (folder / READY).read_text(encoding="utf-8") == str(folder)
        return made_here and _python(folder).exists() and all(entry.exists() for entry in _shared(folder).rglob("*"))
    except FileNotFoundError:
        return False


@contextmanager
def environment_in_use(python: Path) -> Iterator[None]:
    """Keep others from deleting the environment of `python` until the block ends; several processes may use one.

    A Python that is in none of the cache's environments has no lock.

    Raises:
        LoaderUnavailableError: the environment was deleted before its lock was held.
    """
    import fcntl

    folder = python.parent.parent
    try:
        lock = os.open(f"{folder}.lock", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        yield
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_SH)
        if not is_ready(folder):
            raise LoaderUnavailableError(
                "the environment of a loader was deleted just now",
                where=str(folder),
                hint="run again: it is made anew",
            )
        yield
    finally:
        os.close(lock)


def _create(spec: LoaderSpec, creation: Creation) -> None:
    folder, log = creation.folder, creation.log
    started = time.monotonic()
    if find("torch") is None:
        raise LoaderUnavailableError(
            f"{spec.name} needs torch, which is not installed",
            why="the loaders share the torch of the environment that packager runs in",
            hint='install it: pip install "gptq-packager[build]"',
        )
    packages = for_this_python(read_lock(spec.requirements))
    place = without_secrets(next(reversed(package_place(creation.environ).values())))
    shutil.rmtree(folder, ignore_errors=True)
    log(f"{spec.name}: creating its environment, {len(packages)} packages from {place}, log in {creation.output}")
    if ignored := left_out(creation.environ):
        log(f"{spec.name}: not used: {', '.join(ignored)}; all packages come from one place")
    try:
        with disk_errors(folder):
            venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
            _fill(creation, packages)
    except (OSError, subprocess.CalledProcessError) as error:
        raise LoaderUnavailableError(f"no virtual environment could be made for {spec.name}", why=str(error)) from error
    write_atomic(folder / READY, str(folder).encode())
    log(f"{spec.name}: environment ready in {time.monotonic() - started:.0f} s")


def _fill(creation: Creation, packages: Sequence[LockedPackage]) -> None:
    """Install what a lock pins, and share torch."""
    if packages:
        lines = creation.folder / "install.txt"
        write_atomic(lines, requirement_lines(packages, built_wheels(creation, packages)).encode())
        install(creation, _python(creation.folder), lines)
    # After pip, which would uninstall a shared package of another version through the links.
    share_torch(_shared(creation.folder), _packages(creation.folder), exclude={each.name for each in packages})
    if packages:
        _compile(creation)


def _compile(creation: Creation) -> None:
    """Compile the installed modules: a confined loader cannot, and would lose 5 s at each start.

    A module that does not compile, such as a template or a test for Python 2, is left as it is.
    """
    # -S: the packages' .pth files, which may run code, are not read.
    command = [
        str(_python(creation.folder)),
        "-I",
        "-S",
        "-m",
        "compileall",
        "-q",
        "-j",
        "0",
        str(creation.folder / "lib"),
    ]
    with private_folder() as private:
        creation.run(command, child_environ(creation.environ, (), private))
