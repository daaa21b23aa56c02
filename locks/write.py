"""Write the locks: exact versions, and the sha256 of every file of each. `nox -s locks` runs this; it needs PyPI.

Versions are chosen in the inputs, by a person or by dependabot: constraints.txt, tests/giftless.txt, and the loaders'
packager/prove/loaders/requirements/*.in. A lock adds the digests, and the versions of what the inputs do not name;
it keeps those from one run to the next (`-- --upgrade` chooses new ones).

torch has two builds of one version for Linux: PyPI's, with CUDA, and PyTorch's own for CPUs. locks/constraints.txt
has the files of both, because the machine decides which of them it takes. Where PyTorch's index is not reachable, the
digests of before are kept, and a line says so.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
_UV = ("uv", "pip", "compile", "--quiet", "--no-config", "--universal", "--python-version", "3.11", "--generate-hashes")
_FORM = ("--only-binary", ":all:", "--no-annotate", "--emit-build-options", "--custom-compile-command", "nox -s locks")
_HASH = re.compile(r"--hash=(sha256:[0-9a-f]{64})")


@dataclass(frozen=True, kw_only=True)
class Lock:
    """A lock to write.

    Attributes:
        path: of the lock, from the root of the checkout.
        files: the files that name the packages.
        names: more packages.
        options: of uv.
    """

    path: str
    files: tuple[str, ...] = ()
    names: tuple[str, ...] = ()
    options: tuple[str, ...] = ()


_LOADERS = "packager/prove/loaders/requirements"
_PINNED = ("--constraint", "constraints.txt")
_BUILDER = ("hatchling",)
_BUILD_EXTRAS = ("--extra", "build", "--extra", "sign")
LOCKS = (
    # For sessions of nox: pip takes of it what a session names.
    Lock(path="locks/constraints.txt", files=("constraints.txt",)),
    # For `pip install -r`, whole: to start nox, to publish, to build with CUDA.
    Lock(path="locks/nox.txt", names=("nox",), options=_PINNED),
    Lock(path="locks/base.txt", files=("pyproject.toml",), names=_BUILDER, options=(*_PINNED, "--extra", "sign")),
    Lock(path="locks/build.txt", files=("pyproject.toml",), names=_BUILDER, options=(*_PINNED, *_BUILD_EXTRAS)),
    # For nodes of a Ray cluster, beside build.txt: 240 MB that no single machine needs.
    Lock(path="locks/ray.txt", names=("ray==2.60.0",), options=_PINNED),
    # For a store on S3, after build.txt: not with its versions, as botocore wants an older python-dateutil.
    Lock(path="locks/s3.txt", names=("s3fs==2026.9.0",)),
    # For the documentation as a site.
    Lock(path="locks/site.txt", names=("mkdocs-material==9.8.2", "pymdown-extensions==12.3"), options=_PINNED),
    # What benchmarks/real_models.py needs to read a GGUF file; the rest of it has nothing to do with that.
    Lock(
        path="locks/real-models.txt",
        names=("accelerate", "gguf", "protobuf", "psutil", "pyyaml", "sentencepiece"),
        options=(*_PINNED, "--no-deps"),
    ),
    # Servers for tests.
    Lock(path="locks/olah.txt", names=("olah==0.5.4",), options=_PINNED),
    Lock(path="locks/moto.txt", names=("moto[server]==5.2.5",)),
    Lock(path="locks/giftless.txt", files=("tests/giftless.txt",), options=("--no-deps",)),
    # The loaders declare dependencies that they work without, and another torch: the inputs name all that is needed.
    *(
        Lock(path=f"{_LOADERS}/{path.stem}.txt", files=(f"{_LOADERS}/{path.name}",), options=("--no-deps",))
        for path in sorted((ROOT / _LOADERS).glob("*.in"))
    ),
)


def write(lock: Lock, more: Sequence[str]) -> None:
    """Write a lock again.

    Args:
        lock: what to write.
        more: options of uv, such as --upgrade.

    Raises:
        CalledProcessError: uv found no such versions; it says why on standard error.
    """
    before = (ROOT / lock.path).read_text(encoding="utf-8") if (ROOT / lock.path).exists() else ""
    sources = [*lock.files, *(["-"] if lock.names else [])]
    command = [*_UV, *_FORM, *lock.options, *more, *sources, "--output-file", lock.path]
    subprocess.run(command, cwd=ROOT, input="\n".join(lock.names), text=True, check=True)
    text = (ROOT / lock.path).read_text(encoding="utf-8")
    if (version := torch_version(text)) and lock.path == LOCKS[0].path:
        digests = cpu_digests(version)
        if not digests:
            print(f"{CPU_INDEX} is not reachable: the digests of torch's builds for CPUs are those of before")
            digests = torch_digests(before) if torch_version(before) == version else []
        (ROOT / lock.path).write_text(with_torch_digests(text, digests), encoding="utf-8")


def cpu_digests(version: str) -> list[str]:
    """Return the digests of torch's builds for CPUs, or nothing if PyTorch's index is not reachable."""
    command = [*_UV, "--no-deps", "--default-index", CPU_INDEX, "-"]
    given = f"torch=={version}+cpu\n"
    done = subprocess.run(command, cwd=ROOT, input=given, capture_output=True, text=True, check=False)
    return _HASH.findall(done.stdout) if done.returncode == 0 else []


def torch_version(text: str) -> str:
    """Return the version of torch in a lock, or ""."""
    found = re.search(r"^torch==([0-9.]+)", text, re.MULTILINE)
    return found[1] if found else ""


def torch_digests(text: str) -> list[str]:
    """Return the digests of torch in a lock."""
    found = re.search(r"^torch==.*\n(?: +--hash=.*\n)+", text, re.MULTILINE)
    return _HASH.findall(found[0]) if found else []


def with_torch_digests(text: str, digests: Sequence[str]) -> str:
    """Return a lock in which torch has more digests."""
    lines = " \\\n".join(f"    --hash={each}" for each in sorted({*torch_digests(text), *digests}))
    return re.sub(r"^(torch==.*\n)(?: +--hash=.*\n)+", lambda found: f"{found[1]}{lines}\n", text, flags=re.MULTILINE)


def main() -> None:
    """Write the locks that the command line names, or all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lock", nargs="*", help="paths of locks; all by default")
    options, more = parser.parse_known_args()
    wanted = [lock for lock in LOCKS if not options.lock or lock.path in options.lock]
    if unknown := set(options.lock) - {lock.path for lock in LOCKS}:
        sys.exit(f"no such lock: {', '.join(sorted(unknown))}; there are {', '.join(lock.path for lock in LOCKS)}")
    for lock in wanted:
        print(lock.path, flush=True)
        write(lock, more)


if __name__ == "__main__":
    main()
