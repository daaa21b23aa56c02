"""The locks of the loaders: exact versions, and the sha256 of every file of each.

`nox -s locks` writes a lock (.txt, in pip's format) from its input (.in), which has the reasons beside the versions.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from packager.errors import LoaderUnavailableError
from packager.system.files import sha256_file

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})")
_PIN = re.compile(r"==[0-9][0-9A-Za-z.+!]*")
_WRITE_AGAIN = "write the lock with `nox -s locks`"


@dataclass(frozen=True, kw_only=True)
class LockedPackage:
    """A package of a lock.

    Attributes:
        requirement: its name, its exact version, and where it is installed.
        digests: sha256 of each file of that version; an empty set is refused before anything is installed.
        from_source: whether it is built here from its source archive; all others are installed as wheels.
    """

    requirement: Requirement
    digests: tuple[str, ...]
    from_source: bool

    @property
    def name(self) -> str:
        """The canonical name."""
        return canonicalize_name(self.requirement.name)

    @property
    def version(self) -> str:
        """The exact version."""
        return str(self.requirement.specifier).removeprefix("==")


def read_lock(path: Path) -> list[LockedPackage]:
    """Return every package of a lock, those for other Pythons too.

    A lock names packages, digests, and which packages are built from source: an option that names an index, another
    file or a host is refused.

    Raises:
        LoaderUnavailableError: a line is not understood, or a package lacks an exact version or a digest.
    """
    lines = list(_logical_lines(path.read_text(encoding="utf-8")))
    options = [line.replace("=", " ").split() for line in lines if line.startswith("-")]
    for option in options:
        if len(option) != 2 or option[0] not in ("--no-binary", "--only-binary"):
            raise _invalid(path, " ".join(option), "a lock has no such option")
    sources: set[str] = {canonicalize_name(name) for option, name in options if option == "--no-binary"}
    return [_package(path, line, sources) for line in lines if not line.startswith("-")]


def for_this_python(packages: Iterable[LockedPackage]) -> list[LockedPackage]:
    """Return those that are installed in the running Python."""
    return [each for each in packages if each.requirement.marker is None or each.requirement.marker.evaluate()]


def requirement_lines(packages: Iterable[LockedPackage], built: Mapping[str, Path]) -> str:
    """Return a requirements file of pip's with a digest of each file that it may install.

    Args:
        packages: of the lock.
        built: the wheels that were built from source, by canonical name.
    """
    lines = []
    for package in packages:
        if wheel := built.get(package.name):
            lines.append(f"{package.name} @ {wheel.absolute().as_uri()} --hash=sha256:{sha256_file(wheel)}")
        else:
            digests = " ".join(f"--hash=sha256:{digest}" for digest in package.digests)
            lines.append(f"{package.name}=={package.version} {digests}")
    return "".join(f"{line}\n" for line in lines)


def _logical_lines(text: str) -> Iterator[str]:
    """Yield the lines, joined where they end in a backslash, without comments."""
    for line in text.replace("\\\n", " ").splitlines():
        if kept := re.sub(r"(^|\s)#.*", "", line).strip():
            yield kept


def _package(path: Path, line: str, sources: set[str]) -> LockedPackage:
    text, *hashes = re.split(r"\s+--hash=", line)
    try:
        requirement = Requirement(text)
    except InvalidRequirement as error:
        raise _invalid(path, text, str(error).partition("\n")[0]) from error
    if requirement.url or not _PIN.fullmatch(str(requirement.specifier)):
        raise _invalid(path, text, "a lock pins each package to one version, by ==")
    digests = [_DIGEST.fullmatch(each.strip()) for each in hashes]
    if not digests:
        raise _invalid(path, text, "it has no digest (--hash=sha256:...), so any file of that version would do")
    if not all(digests):
        raise _invalid(path, text, "a digest is not 64 hexadecimal digits of sha256")
    return LockedPackage(
        requirement=requirement,
        digests=tuple(found[1] for found in digests if found),
        from_source=canonicalize_name(requirement.name) in sources,
    )


def _invalid(path: Path, line: str, why: str) -> LoaderUnavailableError:
    message = "a lock of packages is not valid, so nothing is installed"
    return LoaderUnavailableError(message, where=str(path), why=f"{line[:200]}: {why}", hint=_WRITE_AGAIN)
