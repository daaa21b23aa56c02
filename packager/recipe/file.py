"""Stage 1, recipe: read a recipe file, and report every problem in it at once with its line and column."""

import difflib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from packager.errors import Problem, RecipeError
from packager.model.architecture import Architecture
from packager.model.lock import Lock
from packager.recipe import Recipe
from packager.recipe.checks import check
from packager.recipe.inherit import complete, extended_name, with_settings
from packager.recipe.model_fit import LockedBaseModel, read_locked_model, with_locked_commits
from packager.recipe.parsed_recipe import ParsedRecipe, read
from packager.recipe.paths import locate, locate_base, path_problem
from packager.recipe.yaml import MAX_BYTES, LocatedProblem, Position, decode, parse

_FIRST_BYTES = 8192


@dataclass(frozen=True, kw_only=True)
class RecipeFile:
    """A recipe, the file it was read from, and the lock beside it.

    Attributes:
        path: the recipe's file.
        recipe: the recipe with what it inherits; each branch or tag in it is replaced by the commit that the lock
            holds.
        lock: what the base model said of itself.
        architecture: the shapes that the lock describes.
        trial: the settings, `KEY=VALUE`, that changed it on the command line: what is built is never published.
    """

    path: Path
    recipe: Recipe
    lock: Lock
    architecture: Architecture
    trial: tuple[str, ...] = ()

    @classmethod
    def load(cls, path: Path, *, trial: Sequence[str] = ()) -> Self:
        """Read and validate a recipe file, with the file that it extends and the settings of a trial.

        Raises:
            RecipeError: the file cannot be read, or something in it is wrong; holds every problem, in the file's
                order.
        """
        return cls.of(_read(path), path, trial=trial)

    @classmethod
    def of(cls, data: bytes, path: Path, lock: Lock | None = None, *, trial: Sequence[str] = ()) -> Self:
        """Validate the content of a recipe file; see `load`.

        Args:
            data: the content.
            path: of the file, which need not be there.
            lock: what its lock will be; None reads the lock's file.
            trial: settings that change the recipe.
        """
        recipe, model, located = _judge(data, path, lambda parsed: read_locked_model(parsed, path, lock), trial)
        if recipe is not None and isinstance(model, LockedBaseModel) and not located:
            return cls(
                path=path,
                recipe=with_locked_commits(recipe, model.lock),
                lock=model.lock,
                architecture=model.architecture.leaving(recipe.quantize.skip),
                trial=tuple(trial),
            )
        raise _error(path, located)

    @property
    def config(self) -> Mapping[str, object]:
        """The base model's config.json."""
        return self.lock.model.config

    @property
    def folder(self) -> Path:
        """The folder that the recipe's paths are relative to."""
        return self.path.parent

    def resolve(self, relative: str) -> Path:
        """Return the real path of a file or folder named in the recipe.

        Raises:
            RecipeError: nothing is there any more, or the path leaves the recipe's folder, be it through a link.
        """
        path = locate(self.folder, relative)
        if path is None or not path.exists():
            raise self._unusable(relative, directory=False)
        return path

    def base_folder(self, path: str) -> Path:
        """Return the real path of the base model's folder.

        Raises:
            RecipeError: it is not there any more, or a relative path leaves the recipe's folder through a link.
        """
        folder = locate_base(self.folder, path)
        if folder is None or not folder.exists():
            raise self._unusable(path, directory=True)
        return folder

    def _unusable(self, path: str, *, directory: bool) -> RecipeError:
        message, hint = path_problem(self.folder, path, directory=directory)
        kind = "folder" if directory else "file"
        return RecipeError(f"{self.path}: a {kind} cannot be used", [Problem(where=path, message=message, hint=hint)])


def load_recipe(path: Path) -> Recipe:
    """Read and validate a recipe file without its lock, which need not be there yet; see `RecipeFile.load`."""
    return recipe_from(_read(path), path)


def recipe_from(data: bytes, path: Path) -> Recipe:
    """Validate the content of a recipe file without its lock; see `RecipeFile.load`.

    Args:
        data: the content.
        path: of the file, which need not be there.
    """
    recipe, _, located = _judge(data, path, lambda _: None)
    if recipe is None or located:
        raise _error(path, located)
    return recipe


def extended_files(paths: Sequence[Path]) -> dict[Path, Path]:
    """Return which of these files others of them extend, each with the recipe that does: these are no recipes.

    What cannot be read is no error here: reading it as a recipe reports it.
    """
    named: dict[Path, Path] = {}
    for path in paths:
        try:
            text, _ = decode(_read(path))
        except RecipeError:
            continue
        root, _ = parse(text)
        if root is not None and (name := extended_name(root)):
            named.setdefault((path.parent / name).absolute(), path)
    return {path: named[path.absolute()] for path in paths if path.absolute() in named}


def _error(path: Path, located: Iterable[LocatedProblem]) -> RecipeError:
    problems = [
        Problem(where=_where(path, problem.at), message=problem.message, hint=problem.hint)
        for problem in sorted(dict.fromkeys(located), key=lambda problem: (problem.at.source, problem))
    ]
    count = "one problem" if len(problems) == 1 else f"{len(problems)} problems"
    return RecipeError(f"the recipe {path} has {count}", problems)


def _where(path: Path, at: Position) -> str:
    """Return a position for a person: of the recipe, of the file that it extends, or a setting as it was written."""
    return f"{at.source or path}:{at.line}:{at.column}" if at.line else at.source


def _judge(
    data: bytes,
    path: Path,
    read_model: Callable[[ParsedRecipe], LockedBaseModel | LocatedProblem | None],
    trial: Sequence[str] = (),
) -> tuple[Recipe | None, LockedBaseModel | LocatedProblem | None, list[LocatedProblem]]:
    """Return the recipe, its lock, and everything that is wrong with them."""
    text, problems = decode(data)
    if problems:
        return None, None, problems
    root, problems = parse(text)
    if root is None:
        return None, None, problems
    # Settings first: one that names another text, say, replaces the whole text that the recipe would inherit.
    root, found = with_settings(root, trial)
    problems += found
    root, found = complete(root, path.parent) if root is not None else (None, [])
    problems += found
    if root is None:
        return None, None, problems
    parsed = read(root)
    model = read_model(parsed)
    return parsed.recipe, model, [*problems, *parsed.problems, *check(parsed, path.parent, model)]


def _read(path: Path) -> bytes:
    """Return the file's bytes, at most one more than MAX_BYTES."""
    try:
        if path.exists() and not path.is_file():
            raise RecipeError(f"{path} is not a file", hint="name the recipe's .yaml file")
        with path.open("rb") as stream:
            return stream.read(MAX_BYTES + 1)
    except FileNotFoundError as error:
        raise RecipeError(f"there is no recipe {path}", hint=_nearby(path)) from error
    except (OSError, ValueError) as error:
        raise RecipeError(f"the recipe {path} cannot be read: {error}") from error


def _nearby(path: Path) -> str:
    """Return a hint with the recipes next to a missing one, the most similar first."""
    names = sorted(entry.name for entry in path.parent.glob("*.y*ml") if _looks_like_a_recipe(entry))
    close = difflib.get_close_matches(path.name, names, n=3) or names[:10]
    return f"in {path.parent} there is {', '.join(close)}" if close else ""


def _looks_like_a_recipe(path: Path) -> bool:
    """Return whether a file begins like a recipe: other programs' YAML files have no `schema_version`."""
    try:
        if not path.is_file():
            return False
        with path.open("rb") as stream:
            return b"schema_version" in stream.read(_FIRST_BYTES)
    except OSError:
        return False
