"""Loaders of other packages, by an entry point: what a recipe names `plugin:NAME`.

The package is imported and its rules run in this process: the user installed it, so its code is trusted as packager's
own is. Its probe runs as those of packager do: in an environment made from its lock, confined.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Final

from packaging.specifiers import SpecifierSet

from packager.errors import LoaderError, LoaderUnavailableError, PackagerError
from packager.model.architecture import Architecture
from packager.model.compatibility import Verdict, verdict_of
from packager.model.rules import RulesOf, RuntimeRule
from packager.model.runtimes import OTHER_LOADER
from packager.prove.loaders import LOADERS, LoaderSpec
from packager.system.text import printable
from packager.variant import Variant

GROUP_OF_LOADERS: Final = "gptq_packager.loaders"
# The name of an environment begins with its lock's: `doctor` knows its own folders by it.
_LOCK_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,60}\.txt")
_NO_RULES: Final = "its package has no rules, so only the run tells"


@dataclass(frozen=True, kw_only=True)
class OtherLoader:
    """A runtime that must open every checkpoint, as the function of an entry point describes it.

    Attributes:
        title: the runtime's name for people.
        version: of the runtime, as the lock pins it.
        script: the probe, a stand-alone program in one file. It imports `packager_isolated`, whose docstring has what
            a probe gets and writes, from the folder that the variable PACKAGER_ISOLATED names.
        lock: the packages of the probe's environment, each with one version and the sha256 of its files, as
            `uv pip compile --generate-hashes` writes them; without torch, which is that of packager.
        devices: "cpu", "cuda" or both: what it can compute on.
        requires_python: the specifier of the versions of Python that the lock is for.
        rules: what the runtime refuses, by `RulesOf`. Without any its verdict is unknown.
    """

    title: str
    version: str
    script: Path
    lock: Path
    devices: frozenset[str]
    requires_python: str = ">=3.11"
    rules: Sequence[RuntimeRule] = ()


@dataclass(frozen=True, kw_only=True)
class _Installed:
    spec: LoaderSpec
    value: str  # of the entry point: the module and the function
    rules: tuple[RuntimeRule, ...]


def loader_spec(name: str) -> LoaderSpec:
    """Return the loader that a recipe names: one of packager's, or of another package.

    Raises:
        LoaderUnavailableError: no installed package has it.
        LoaderError: the package's is no loader.
    """
    return _installed(name).spec if name.startswith(OTHER_LOADER) else LOADERS[name]


def installed_loaders() -> tuple[str, ...]:
    """Return the loaders of all installed packages, by the names that recipes give them."""
    return tuple(sorted({f"{OTHER_LOADER}{each.name}" for each in entry_points(group=GROUP_OF_LOADERS)}))


def other_verdicts(names: Iterable[str], variant: Variant, architecture: Architecture) -> tuple[Verdict, ...]:
    """Return a verdict for each loader of another package, by the package's own rules.

    Args:
        names: of the recipe's loaders; those of packager are passed over.
        variant: the parameters.
        architecture: the shapes.

    Raises:
        LoaderError: see `loader_spec`; or a rule of the package fails.
    """
    others = [name for name in names if name.startswith(OTHER_LOADER)]
    return tuple(_verdict(name, variant, architecture) for name in others)


def _verdict(name: str, variant: Variant, architecture: Architecture) -> Verdict:
    installed = _installed(name)
    try:
        found = verdict_of(name, installed.rules, variant, architecture)
        _check_lines(**{finding.source.place: finding.says for finding in found.findings})
    except (Exception, SystemExit) as error:  # the code of another package raises anything
        raise _broken(name, installed.value, "a rule fails", error) from error
    return found


@cache
def _installed(name: str) -> _Installed:
    """Return the loader of another package, which is imported once in a process."""
    short = name.removeprefix(OTHER_LOADER)
    entry = next(iter(entry_points(group=GROUP_OF_LOADERS, name=short)), None)
    if entry is None:
        others = ", ".join(each.removeprefix(OTHER_LOADER) for each in installed_loaders())
        raise LoaderUnavailableError(
            f"no installed package has the loader {short}",
            where=name,
            why=f"there are: {others or 'none'}",
            hint=f"install the package that has {short} in its entry points {GROUP_OF_LOADERS}",
        )
    try:
        made = entry.load()()
        _check(made)
    except (Exception, SystemExit) as error:  # the code of another package raises anything
        raise _broken(name, entry.value, "it cannot be used", error) from error
    spec = LoaderSpec(
        name=name,
        script=made.script.resolve(),
        requirements=made.lock.resolve(),
        devices=made.devices,
        requires_python=made.requires_python,
        description=f"{made.title} {made.version}",
    )
    rules = RulesOf(project=made.title, version=made.version, read="")
    unknown = rules.unknown(lambda _variant, _architecture: _NO_RULES, "no rules", "run it")
    return _Installed(spec=spec, value=entry.value, rules=tuple(made.rules) or (unknown,))


def _check(made: object) -> None:
    """Check what a package gave: nothing has compared it with its types.

    Raises:
        TypeError, ValueError, LoaderError: it is no loader, and why.
    """
    if not isinstance(made, OtherLoader):
        raise TypeError(f"a {type(made).__name__} was returned, no packager.prove.other_loader.OtherLoader")
    _check_lines(title=made.title, version=made.version)
    for key, path in (("script", made.script), ("lock", made.lock)):
        if not path.is_file():
            raise ValueError(f"{key}: there is no file {path}")
    if not _LOCK_NAME.fullmatch(made.lock.name):
        raise ValueError(f"lock: {made.lock.name} is no name of letters, digits, '_' and '-' with .txt")
    if not made.devices or frozenset(made.devices) - {"cpu", "cuda"}:
        raise ValueError("devices: cpu, cuda or both")
    if not all(isinstance(rule, RuntimeRule) for rule in made.rules):
        raise TypeError("rules: only those of packager.model.rules")
    from packager.prove.locks import read_lock  # most recipes name no such loader, and `status` starts faster

    SpecifierSet(made.requires_python)
    read_lock(made.lock)


def _check_lines(**texts: object) -> None:
    for key, text in texts.items():
        if not isinstance(text, str) or not text.strip() or printable(text) != text:
            raise TypeError(f"{key}: no line of text")


def _broken(name: str, value: str, what: str, error: BaseException) -> LoaderError:
    said = error.what + (f": {error.why}" if error.why else "") if isinstance(error, PackagerError) else str(error)
    return LoaderError(
        f"the loader {name.removeprefix(OTHER_LOADER)} of another package is broken: {what}",
        where=value,
        why=printable(f"{type(error).__name__}: {said}"),
        hint="ask the author of the package",
    )
