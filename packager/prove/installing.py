"""pip, as it fills the environments of the loaders: from one place, without a setting of the user's, wheels only."""

import importlib.util
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packager.errors import LoaderUnavailableError, MachineError
from packager.receipt import Confinement
from packager.system.confinement import View, child_environ, confined_command, private_folder
from packager.system.files import failed_for_space
from packager.system.processes import Processes, ending, tail

PYPI = "https://pypi.org/simple"
PIP_TIMEOUT_S = 1800.0
# How to reach the index, and where downloads are kept. Not PIP_TARGET, PIP_USER and the like, which install elsewhere.
_CONNECTION = (
    *("PIP_CACHE_DIR", "PIP_CERT", "PIP_CLIENT_CERT", "PIP_DEFAULT_TIMEOUT", "PIP_NO_CACHE_DIR", "PIP_PROXY"),
    *("PIP_RETRIES", "PIP_TIMEOUT"),
    *("NETRC", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE"),
)
_PROXY_VARIABLES = tuple(f"{name}_proxy" for name in ("http", "https", "all", "no"))
_ALLOWED = frozenset((*_CONNECTION, *_PROXY_VARIABLES, *(name.upper() for name in _PROXY_VARIABLES)))
# Variables that would add a second place for packages, or a host whose certificate is not checked.
_LEFT_OUT = (
    *("PIP_CONFIG_FILE", "PIP_CONSTRAINT", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_BINARY", "PIP_REQUIREMENT"),
    *("PIP_PRE", "PIP_TRUSTED_HOST"),
)
_HINT = (
    "PIP_INDEX_URL names the one index, such as a mirror, PIP_CERT and PIP_PROXY the way to it; or PIP_NO_INDEX=1 and "
    "PIP_FIND_LINKS a folder that `pip download` filled. pip's configuration files are not read"
)


@dataclass(frozen=True, kw_only=True)
class Creation:
    """An environment that is being created.

    Attributes:
        loader: whose environment it is; for messages.
        folder: of the environment.
        cache: folder that keeps downloads and built wheels.
        environ: of this process; the processes get what is on a list.
        log: receives one line for each thing worth knowing.
        processes: runs the child processes.
        confinement: of what builds packages.
        lock: descriptor of the lock that this process holds; a child that survives this process keeps it, so no other
            process writes to the folder.
    """

    loader: str
    folder: Path
    cache: Path
    environ: Mapping[str, str]
    log: Callable[[str], None]
    processes: Processes
    confinement: Confinement
    lock: int

    @property
    def output(self) -> Path:
        """The file that receives what the child processes write."""
        return self.folder / "pip.log"

    def run(
        self,
        command: Sequence[str],
        environ: Mapping[str, str],
        *,
        folder: Path | None = None,
        view: View | None = None,
    ) -> str:
        """Run a child process; return how it failed, with its last lines, or "".

        Args:
            command: the program and its arguments.
            environ: its whole environment.
            folder: its working directory, if not the environment.
            view: the files that it sees, if it is to be confined as far as this machine allows.

        Raises:
            MachineError: it failed because the disk is full.
        """
        with self.output.open("ab") as output:
            status = self.processes.run(
                confined_command(command, view, self.confinement) if view else command,
                folder=folder or self.folder,
                environ=environ,
                out=output,
                err=output,
                timeout_s=PIP_TIMEOUT_S,
                inherited=(self.lock,),
            )
        if status == 0:
            return ""
        printed = tail(self.output, 4)
        if failed_for_space(printed, self.folder):
            raise MachineError(
                "the disk is full",
                where=str(self.folder),
                why=printed,
                hint="free some space and run the same command again",
            )
        reason = f"it took over {PIP_TIMEOUT_S:.0f} s" if status is None else ending(status)
        return f"{reason}; {printed}"

    def failure(self, message: str, why: str) -> LoaderUnavailableError:
        """Return an error that names the log, and how to choose an index."""
        return LoaderUnavailableError(
            message, where=str(self.output), why=why, hint=f"an index must be reachable; {_HINT}"
        )


def package_place(environ: Mapping[str, str]) -> dict[str, str]:
    """Return pip's variables for the one place that packages come from: an index, or a folder.

    Raises:
        LoaderUnavailableError: PIP_NO_INDEX is set, and PIP_FIND_LINKS is not one folder.
    """
    if environ.get("PIP_NO_INDEX", "").lower() in ("1", "true", "yes", "on"):
        folder = environ.get("PIP_FIND_LINKS", "").removeprefix("file://")
        if not Path(folder).is_absolute() or not Path(folder).is_dir():
            message = "PIP_NO_INDEX is set, so PIP_FIND_LINKS must name one folder, by its whole path"
            raise LoaderUnavailableError(message, why=f"it is {folder!r}", hint=_HINT)
        return {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": folder}
    return {"PIP_INDEX_URL": environ.get("PIP_INDEX_URL", "").strip() or PYPI}


def left_out(environ: Mapping[str, str]) -> list[str]:
    """Return which of pip's variables are set and have no effect here."""
    used = package_place(environ)
    return [name for name in _LEFT_OUT if environ.get(name) and name not in used]


def index_environ(environ: Mapping[str, str], folder: Path) -> dict[str, str]:
    """Return the environment of pip: one place for packages, how to reach it, an empty home, no configuration file.

    The place is a variable and not an option, because other users can read commands, and it may hold a password.

    Args:
        environ: of this process.
        folder: from `private_folder`.

    Raises:
        LoaderUnavailableError: the place is not valid.
    """
    fixed = {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INPUT": "1",
        "PYTHONNOUSERSITE": "1",
    }
    return {**child_environ(environ, _ALLOWED, folder), **package_place(environ), **fixed}


def pip_commands(python: Path, arguments: Sequence[str]) -> list[list[str]]:
    """Return the commands that run this interpreter's pip for another one, or that one's own pip if there is none."""
    if importlib.util.find_spec("pip"):
        return [[sys.executable, "-I", "-m", "pip", f"--python={python}", *arguments]]
    return [[str(python), "-I", "-m", "ensurepip"], [str(python), "-I", "-m", "pip", *arguments]]


def install(creation: Creation, python: Path, requirements: Path) -> None:
    """Install wheels into an environment, each with a digest that `requirements` lists; run nothing of them.

    Raises:
        LoaderUnavailableError: the index is not reachable, has no such wheel, or has another file under its name.
    """
    # --no-compile: compiled afterwards, by all cores.
    arguments = [
        "install",
        "--require-hashes",
        "--only-binary=:all:",
        "--no-deps",
        "--no-compile",
        "--progress-bar=off",
    ]
    kept = {"PIP_CACHE_DIR": str(creation.cache / "pip")}
    for command in pip_commands(python, [*arguments, "--requirement", str(requirements)]):
        with private_folder() as private:
            why = creation.run(command, {**kept, **index_environ(creation.environ, private)})
        if why:
            raise creation.failure(f"the packages of {creation.loader} could not be installed", f"pip: {why}")
