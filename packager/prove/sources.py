"""Packages that have no wheel: the source archive is downloaded, compared with the lock, and built without a network.

A source archive runs code when it is built, so it gets neither network nor home where the machine has a confinement.
"""

import hashlib
import json
import platform
import shutil
import sys
import sysconfig
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

from packager.errors import LoaderUnavailableError
from packager.prove.installing import Creation, index_environ, install
from packager.prove.locks import LockedPackage, requirement_lines
from packager.system.confinement import View, child_environ, private_folder
from packager.system.files import sha256_file, write_atomic

_FETCH_SCRIPT = Path(__file__).with_name("fetch_script.py")
_BUILD_SCRIPT = Path(__file__).with_name("build_script.py")
# What the archives of the locks are built with; their own pyproject.toml files allow different versions of it.
_TOOLS = ("setuptools",)
_DIGEST_FILE = "wheel.sha256"
# Increment when building changes: wheels that were built another way are not used.
_LAYOUT = "1"
# AutoGPTQ would compile CUDA kernels, or fail where torch has no CUDA.
_SETTINGS = {"BUILD_CUDA_EXT": "0"}


def built_wheels(creation: Creation, packages: Sequence[LockedPackage]) -> dict[str, Path]:
    """Return the wheels of the packages that come from source, by canonical name; build those that are not kept.

    A wheel is kept in the cache with its digest, and built again where it does not fit that digest.

    Raises:
        LoaderUnavailableError: an archive cannot be downloaded, is not the one of the lock, or does not build.
    """
    tools = [each for each in packages if each.name in _TOOLS]
    sources = [each for each in packages if each.from_source]
    kept = {each.name: creation.cache / "wheels" / _key(each, tools) for each in sources}
    wheels = {name: wheel for name, folder in kept.items() if (wheel := _kept_wheel(creation, folder))}
    missing = [each for each in sources if each.name not in wheels]
    if missing:
        python = _build_environment(creation, tools)
        for package in missing:
            wheels[package.name] = _build(creation, python, package, kept[package.name])
        shutil.rmtree(python.parent.parent)
    return wheels


def _key(package: LockedPackage, tools: Sequence[LockedPackage]) -> str:
    """Return the name of the folder that keeps a wheel: everything that the wheel depends on."""
    built_with = requirement_lines(tools, {})
    parts = [_LAYOUT, package.name, package.version, sorted(package.digests), built_with, _SETTINGS]
    here = [platform.python_implementation(), platform.python_version(), sysconfig.get_platform()]
    return f"{package.name}-{package.version}-{hashlib.sha256(json.dumps([parts, here]).encode()).hexdigest()[:12]}"


def _kept_wheel(creation: Creation, folder: Path) -> Path | None:
    try:
        digest, name = (folder / _DIGEST_FILE).read_text(encoding="utf-8").split()
        if sha256_file(folder / name) == digest:
            return folder / name
    except FileNotFoundError:
        return None
    creation.log(f"{creation.loader}: {folder / name} was changed after it was built; it is built again")
    return None


def _build_environment(creation: Creation, tools: Sequence[LockedPackage]) -> Path:
    """Create an environment with the tools that build packages; return its Python."""
    folder = creation.folder / "build"
    venv.EnvBuilder(symlinks=True, with_pip=False).create(folder)
    python = folder / "bin" / "python"
    lines = creation.folder / "build.txt"
    write_atomic(lines, requirement_lines(tools, {}).encode())
    if tools:
        install(creation, python, lines)
    return python


def _build(creation: Creation, python: Path, package: LockedPackage, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(target, ignore_errors=True)
    with tempfile.TemporaryDirectory(dir=creation.folder, prefix="source-") as name:
        folder = Path(name)
        archive = _fetch(creation, package, folder)
        made = folder / "made"
        made.mkdir()
        _build_confined(creation, python, archive, made)
        wheels = list(made.iterdir())
        if [wheel.suffix for wheel in wheels] != [".whl"] or not wheels[0].is_file() or wheels[0].is_symlink():
            raise _build_failure(creation, archive, f"it made {[wheel.name for wheel in wheels][:5]}, not one wheel")
        digest = sha256_file(wheels[0])
        write_atomic(made / _DIGEST_FILE, f"{digest}  {wheels[0].name}\n".encode())
        made.replace(target)
    creation.log(f"{creation.loader}: built {wheels[0].name} from source, confinement {creation.confinement}")
    return target / wheels[0].name


def _fetch(creation: Creation, package: LockedPackage, folder: Path) -> Path:
    """Download the source archive of a package; return it after its digest was found in the lock."""
    command = [sys.executable, "-I", "-S", str(_FETCH_SCRIPT), str(folder), package.name, package.version]
    with private_folder() as private:
        environ = index_environ(creation.environ, private)
        why = creation.run(command, environ)
    files = list(folder.iterdir())
    if why or len(files) != 1:
        message = f"the source archive of {package.name} {package.version} could not be downloaded"
        raise creation.failure(message, why or "nothing was written")
    digest = sha256_file(files[0])
    if digest not in package.digests:
        raise LoaderUnavailableError(
            f"{files[0].name} is not the file that the lock of {creation.loader} names, so it was not built",
            where=environ.get("PIP_INDEX_URL") or environ["PIP_FIND_LINKS"],
            why=f"its sha256 is {digest}, which is not in the lock",
            hint="another file has its name there: ask who keeps that index, and use another one, by PIP_INDEX_URL",
        )
    return files[0]


def _build_confined(creation: Creation, python: Path, archive: Path, made: Path) -> None:
    command = [str(python), "-I", str(_BUILD_SCRIPT), str(archive), str(made)]
    seen = [python.parent.parent, python.resolve().parent.parent, archive, _BUILD_SCRIPT]
    seen += [Path(prefix) for prefix in (sys.base_prefix, sys.base_exec_prefix)]
    with private_folder() as private:
        view = View(folder=private, readable=seen, writable=[made])
        environ = {**child_environ(creation.environ, (), private), **_SETTINGS}
        why = creation.run(command, environ, folder=made, view=view)
    if why:
        raise _build_failure(creation, archive, why)


def _build_failure(creation: Creation, archive: Path, why: str) -> LoaderUnavailableError:
    return LoaderUnavailableError(
        f"{archive.name} could not be built for {creation.loader}",
        where=str(creation.output),
        why=why,
        hint="it is built without a network and without your home, by the setuptools of the lock",
    )
