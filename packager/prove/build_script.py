"""Build a wheel from a source archive, by its own build backend (PEP 517); a program of its own, which runs confined.

    python build_script.py ARCHIVE FOLDER

pip does the same in four processes, and looks for what the backend asks for; here is what the lock has.
"""

import importlib
import os
import shutil
import sys
import tarfile
import tempfile
import tomllib
from pathlib import Path


def build_archive(archive: Path, folder: Path) -> None:
    """Write the wheel of an archive into a folder.

    Raises:
        ValueError: the archive does not hold one folder.
    """
    unpacked = Path(tempfile.mkdtemp())
    # Python 3.11.4 brought filters of what an archive may write. Its digest was in the lock.
    if hasattr(tarfile, "data_filter") and not archive.name.endswith(".zip"):
        shutil.unpack_archive(archive, unpacked, filter="data")
    else:
        shutil.unpack_archive(archive, unpacked)
    roots = list(unpacked.iterdir())
    if len(roots) != 1:
        raise ValueError(f"{archive.name} has {len(roots)} files and folders at its top, not one")
    os.chdir(roots[0])
    settings = (
        tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8")) if Path("pyproject.toml").exists() else {}
    )
    system = settings.get("build-system", {})
    sys.path[:0] = [str(roots[0] / path) for path in system.get("backend-path", ())]
    # Without a backend it is setuptools, as it was before PEP 517.
    name, _, attribute = system.get("build-backend", "setuptools.build_meta:__legacy__").partition(":")
    backend = importlib.import_module(name)
    for part in filter(None, attribute.split(".")):
        backend = getattr(backend, part)
    backend.build_wheel(str(folder))


if __name__ == "__main__":
    build_archive(Path(sys.argv[1]).absolute(), Path(sys.argv[2]).absolute())
