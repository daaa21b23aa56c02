"""One command over several recipes: a recipe that fails does not stop the others, and each has a result at the end."""

import glob
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from packager.errors import PATH_REFUSALS, PackagerError, PlanError, RecipeError, path_refusal
from packager.recipe.file import RecipeFile, extended_files
from packager.system.terminal import Terminal

Outcome = Literal["done", "built", "published", "elsewhere", "failed", "interrupted", "not built", "not reached"]


@dataclass(frozen=True, kw_only=True)
class RecipeResult:
    """What a command did with one recipe.

    Attributes:
        path: of the recipe.
        repository: its id; "" if the recipe cannot be read.
        outcome: elsewhere: another run has it; not built: this machine cannot; interrupted: the run ended in it; not
            reached: the run ended before.
        why: of what failed, or was not built, or is elsewhere: one line.
        exit_code: of what failed, otherwise 0.
        seconds: it took.
    """

    path: Path
    repository: str = ""
    outcome: Outcome = "not reached"
    why: str = ""
    exit_code: int = 0
    seconds: float = 0.0


@dataclass
class Results:
    """The results of a run, by recipe, in the order of the recipes.

    Args:
        terminal: gets the errors.
        stop: end with the first recipe that fails.
    """

    terminal: Terminal
    stop: bool = False
    by_path: dict[Path, RecipeResult] = field(default_factory=dict)

    def update(self, path: Path, **changes: object) -> None:
        """Change the result of a recipe."""
        self.by_path[path] = replace(self.by_path[path], **changes)  # type: ignore[arg-type]

    @property
    def ordered(self) -> tuple[RecipeResult, ...]:
        """All results."""
        return tuple(self.by_path.values())

    @contextmanager
    def recorded(self, path: Path, outcome: Outcome | None = None) -> Iterator[None]:
        """Record a recipe's failure in the work inside, or `outcome`; an error is printed unless it ends the run."""
        started = time.monotonic()

        def record(outcome: Outcome, *, why: str = "", exit_code: int = 0) -> None:
            seconds = time.monotonic() - started
            self.update(path, outcome=outcome, why=why, exit_code=exit_code, seconds=seconds)

        try:
            try:
                yield
            except PATH_REFUSALS as error:
                if refusal := path_refusal(error):
                    raise refusal from error
                raise
        except PackagerError as error:
            record("failed", why=str(error).splitlines()[0], exit_code=error.exit_code)
            if self.stop:
                raise
            self.terminal.error(error)
        except Exception as error:  # a mistake of ours, which is shown where it was made
            record("failed", why=f"{type(error).__name__}: {error}".splitlines()[0], exit_code=PackagerError.exit_code)
            raise
        except BaseException:
            record("interrupted")
            raise
        else:
            if outcome is not None:
                record(outcome)


def for_each(
    paths: Sequence[Path],
    work: Callable[[RecipeFile], None],
    terminal: Terminal,
    *,
    outcome: Outcome,
    trial: Sequence[str],
) -> tuple[RecipeResult, ...]:
    """Do something with each recipe, one after the other, and return a result for each, in their order.

    Args:
        paths: the recipes.
        work: gets each recipe that can be read.
        terminal: gets the errors.
        outcome: of a recipe whose work ended without an error.
        trial: settings that change each recipe.
    """
    results = Results(terminal, by_path={path: RecipeResult(path=path) for path in paths})
    built: dict[str, Path] = {}
    for path in paths:
        with results.recorded(path, outcome):
            recipe_file = RecipeFile.load(path, trial=trial)
            repository = recipe_file.recipe.repository.id
            results.update(path, repository=repository)
            if outcome == "built" and (other := built.setdefault(repository.lower(), path)) != path:
                _refuse_same_folder(path, other, repository)
            work(recipe_file)
    return results.ordered


def _refuse_same_folder(path: Path, other: Path, repository: str) -> None:
    raise PlanError(
        f"{other} builds {repository}, too",
        where=str(path),
        why="each would replace the branches of the other",
        hint="give each a repository.id of its own, or put all variants into one recipe",
    )


def recipes_among(paths: Sequence[Path], patterns: Sequence[str], log: Callable[[str], None]) -> list[Path]:
    """Return the recipes that are named or fit a pattern, each once; a file that one of them extends is none.

    Args:
        paths: files that are named.
        patterns: of files, as in a shell; `**` is any number of folders.
        log: gets a line for each file that is left out.

    Raises:
        RecipeError: no file fits a pattern.
    """
    found = list(paths)
    for pattern in patterns:
        fitting = sorted(Path(name) for name in glob.glob(pattern, recursive=True))  # noqa: PTH207, may be absolute
        files = [path for path in fitting if path.is_file()]
        if not files:
            raise RecipeError(
                f"no file fits {pattern}", hint="put the pattern in quotes: the shell leaves it alone then"
            )
        found += files
    found = list(dict.fromkeys(found))
    others = extended_files(found) if len(found) > 1 else {}
    for path, recipe in others.items():
        log(f"{path} is no recipe: {recipe} extends it")
    return [path for path in found if path not in others]
