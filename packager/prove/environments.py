"""Virtual environments for the loaders.

An environment is created once per lock and kept in the cache. It shares the torch of the running interpreter, so that
torch is not downloaded again. `probes.py` runs processes in it.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import platform
import shutil
import subprocess
import sys
import sysconfig
import time
import venv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from packager.errors import LoaderUnavailableError
from packager.prove.loaders import LoaderSpec
from packager.prove.shared_torch import find, share_torch
from packager.receipt import Confinement
from packager.system.confinement import child_environ, confinement, private_folder
from packager.system.files import disk_errors, write_atomic
from packager.system.processes import Processes, ending, tail

# Installed into an environment only where the running interpreter has no torch to share.
TORCH_REQUIREMENT = "torch==2.13.0"
PIP_TIMEOUT_S = 1800.0
READY = ".ready"
# Settings of an index, a proxy and certificates. Not PIP_TARGET, PIP_USER and the like, which install elsewhere.
_INDEX_VARIABLES = frozenset(
    f"PIP_{name}"
    for name in (
        *("CACHE_DIR", "CERT", "CLIENT_CERT", "CONFIG_FILE", "DEFAULT_TIMEOUT", "EXTRA_INDEX_URL", "FIND_LINKS"),
        *("INDEX_URL", "KEYRING_PROVIDER", "NO_CACHE_DIR", "NO_INDEX", "PROXY", "RETRIES", "TIMEOUT", "TRUSTED_HOST"),
    )
) | {"NETRC", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"}
_PROXY_VARIABLES = frozenset(f"{name}_proxy" for name in ("http", "https", "all", "no"))
# Increment when environment creation changes: cached environments of an older layout are not used.
_LAYOUT = "1"


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
    others wait. Proxies and pip's settings are taken from `context.environ`.

    Raises:
        LoaderUnavailableError: the environment cannot be created on this machine; the message has the reason.
        MachineError: the disk is full or the cache cannot be written.
    """
    import fcntl  # POSIX only: importing this module works everywhere

    if problem := spec.python_problem():
        raise LoaderUnavailableError(problem)
    folder = context.cache.absolute() / "loaders" / environment_name(spec)
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with Path(f"{folder}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not _is_ready(folder):
                _create(_Creation(spec=spec, folder=folder, context=context, lock=lock.fileno()))
    return _python(folder)


def environment_name(spec: LoaderSpec) -> str:
    """Return `<loader>-<12 hex digits>`; the digits depend on the lock, Python, the platform and torch."""
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
    """Return the versions of those packages that are installed in a loader's environment."""
    folder = python.parent.parent
    packages = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
    found: dict[str, str] = {
        canonicalize_name(distribution.metadata["Name"]): distribution.version
        for distribution in importlib.metadata.distributions(path=[str(_shared(folder)), packages])
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


def index_environ(environ: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Return the environment of pip: how to reach an index, and an empty home.

    pip would read its user's settings in the home folder; variables name their places here. The cache is pip's alone.

    Args:
        environ: of this process.
        folder: from `private_folder`.
    """
    allowed = _INDEX_VARIABLES | _PROXY_VARIABLES | {name.upper() for name in _PROXY_VARIABLES}
    settings = Path(environ.get("XDG_CONFIG_HOME") or Path(environ.get("HOME", "/")) / ".config") / "pip" / "pip.conf"
    own = {"PIP_CONFIG_FILE": str(settings)} if settings.is_file() else {}
    # It may need git or a compiler; neither gets a setting or a secret of the user's.
    path = {"PATH": environ["PATH"]} if "PATH" in environ else {}
    return {**own, **child_environ(environ, allowed, folder), **path}


def _python(folder: Path) -> Path:
    return folder / "bin" / "python"


def _shared(folder: Path) -> Path:
    return folder / "shared"


def _is_ready(folder: Path) -> bool:
    """Return whether the environment was completed in this folder, and its Python and shared packages still exist."""
    try:
        made_here = (folder / READY).read_text(encoding="utf-8") == str(folder)
        return made_here and _python(folder).exists() and all(entry.exists() for entry in _shared(folder).rglob("*"))
    except FileNotFoundError:
        return False


@dataclass(frozen=True, kw_only=True)
class _Creation:
    """An environment that is being created; `lock` is the descriptor of the lock that this process holds."""

    spec: LoaderSpec
    folder: Path
    context: RuntimeContext
    lock: int

    @property
    def log(self) -> Path:
        return self.folder / "pip.log"


def _create(creation: _Creation) -> None:
    spec, folder, log = creation.spec, creation.folder, creation.context.log
    started = time.monotonic()
    shutil.rmtree(folder, ignore_errors=True)
    pins = _pins(spec)
    share = find("torch") is not None
    what = f"{len(pins)} packages" if share else f"{len(pins)} packages and {TORCH_REQUIREMENT}"
    log(f"{spec.name}: creating its environment, {what}, log in {creation.log}")
    try:
        with disk_errors(folder):
            venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    except (OSError, subprocess.CalledProcessError) as error:
        raise LoaderUnavailableError(f"no virtual environment could be made for {spec.name}", why=str(error)) from error
    install = ["--no-deps", "--requirement", str(spec.requirements.absolute())]
    if "setuptools" in pins:
        # Source packages are built with this one instead of one downloaded for each package: saves 5 s of 24.
        _pip(creation, ["--no-deps", str(pins["setuptools"])])
        install.insert(0, "--no-build-isolation")
    if pins:
        _pip(creation, install)
    if share:
        # After pip, which would uninstall a shared package of another version through the links.
        packages = sysconfig.get_path("purelib", "venv", {"base": str(folder), "platbase": str(folder)})
        share_torch(_shared(folder), Path(packages), exclude=pins)
    else:
        _pip(creation, [TORCH_REQUIREMENT])
    if pins:
        _compile(creation)
    write_atomic(folder / READY, str(folder).encode())
    log(f"{spec.name}: environment ready in {time.monotonic() - started:.0f} s")


def _compile(creation: _Creation) -> None:
    """Compile the installed modules: a confined loader cannot, and would lose 5 s at each start.

    A module that does not compile, such as a template or a test for Python 2, is left as it is.
    """
    python = str(_python(creation.folder))
    with creation.log.open("ab") as log, private_folder() as private:
        creation.context.processes.run(
            [python, "-I", "-m", "compileall", "-q", "-j", "0", str(creation.folder / "lib")],
            folder=creation.folder,
            environ=child_environ(creation.context.environ, (), private),
            out=log,
            err=log,
            timeout_s=PIP_TIMEOUT_S,
            inherited=(creation.lock,),
        )


def _pins(spec: LoaderSpec) -> dict[str, Requirement]:
    """Return what the lock installs on this Python, by canonical name."""
    lines = [line.split("#")[0].strip() for line in spec.requirements.read_text(encoding="utf-8").splitlines()]
    requirements = [Requirement(line) for line in lines if line]
    chosen = [each for each in requirements if each.marker is None or each.marker.evaluate()]
    return {canonicalize_name(each.name): each for each in chosen}


def _pip(creation: _Creation, arguments: Sequence[str]) -> None:
    """Install into the environment; pip's output goes to the log.

    Raises:
        LoaderUnavailableError: there is no pip, or it failed.
    """
    python = str(_python(creation.folder))
    settings = {
        # AutoGPTQ's source distribution would compile CUDA kernels, or fail where torch has no CUDA.
        "BUILD_CUDA_EXT": "0",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INPUT": "1",
        "PYTHONNOUSERSITE": "1",
    }
    cache = {"PIP_CACHE_DIR": str(creation.context.cache.absolute() / "pip")}
    # Compiled afterwards, by all cores.
    install = ["install", "--no-compile", "--progress-bar=off", *arguments]
    if importlib.util.find_spec("pip"):
        commands = [[sys.executable, "-m", "pip", f"--python={python}", *install]]
    else:
        commands = [[python, "-m", "ensurepip"], [python, "-m", "pip", *install]]
    for command in commands:
        with creation.log.open("ab") as log, private_folder() as private:
            status = creation.context.processes.run(
                command,
                folder=creation.folder,
                environ={**cache, **index_environ(creation.context.environ, private), **settings},
                out=log,
                err=log,
                timeout_s=PIP_TIMEOUT_S,
                # A pip that survives this process keeps the lock, so no other process writes to the folder.
                inherited=(creation.lock,),
            )
        if status != 0:
            reason = f"it took over {PIP_TIMEOUT_S:.0f} s" if status is None else ending(status)
            raise LoaderUnavailableError(
                f"the packages of {creation.spec.name} could not be installed",
                where=str(creation.log),
                why=f"pip: {reason}; {tail(creation.log, 4)}",
                hint="a package index must be reachable; PIP_INDEX_URL or PIP_FIND_LINKS may name another",
            )
