"""Make the locks of recipes, or compare them with what would be written today."""

import difflib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packager.errors import RecipeError
from packager.inputs.make_lock import make_lock
from packager.model.architecture import architecture_of
from packager.model.lock import Lock, LockedModel
from packager.pipeline.branch_files import check_small_files
from packager.pipeline.build_extra import require_build_extra
from packager.recipe import Recipe
from packager.recipe.file import load_recipe
from packager.recipe.lock_file import lock_path, lock_text
from packager.system.files import write_atomic

LockStatus = Literal["written", "unchanged", "differs", "missing"]
_MOST_BYTES = 64_000_000
_MOST_DIFF_LINES = 200


@dataclass(frozen=True, kw_only=True)
class LockResult:
    """The lock of one recipe.

    Attributes:
        recipe: its file.
        path: the lock's file.
        lock: as it is today.
        changes: a sentence for each value that a branch gets otherwise than the base model has it.
        status: "written"; "unchanged" if the file held these bytes; when only compared, "differs" or "missing".
        diff: lines of a unified diff from the file to `lock`; empty unless it differs.
    """

    recipe: Path
    path: Path
    lock: Lock
    changes: tuple[str, ...]
    status: LockStatus
    diff: tuple[str, ...] = ()

    @property
    def is_current(self) -> bool:
        """Whether the file now holds `lock`."""
        return self.status in ("written", "unchanged")


def lock_recipes(
    recipes: Sequence[Path], log: Callable[[str], None], *, copy: Path | None = None, check: bool = False
) -> Iterator[LockResult]:
    """Make or renew the locks of recipes, which are all read before the first; a recipe itself is never changed.

    Args:
        recipes: their files.
        log: receives a line before what takes long.
        copy: see `make_lock`.
        check: compare and write nothing.

    Raises:
        CalibrationError: see `make_lock`.
        MachineError: the packages of the build extra are not installed.
        RecipeError: a recipe is wrong, or `copy` is given for several.
        SourceError: see `make_lock` and `check_small_files`.
    """
    require_build_extra("making a lock")
    if copy is not None and len(recipes) != 1:
        raise RecipeError("--from describes the base model of one recipe", hint="run the command once per recipe")
    read = [(path, load_recipe(path)) for path in recipes]
    for path, recipe in read:
        changes: list[str] = []
        lock = make_lock(path, recipe, log, copy=copy, check=_audit(recipe, changes), changed=changes.append)
        yield _compared(path, lock, tuple(changes)) if check else _written(path, lock, tuple(changes))


def _audit(recipe: Recipe, changes: list[str]) -> Callable[[Path, LockedModel], None]:
    """Return a check of a base model's small files that adds to `changes` what a branch gets otherwise."""

    def check(folder: Path, model: LockedModel) -> None:
        changes.extend(check_small_files(folder, recipe, architecture_of(model, str(folder))))

    return check


def _written(recipe: Path, lock: Lock, changes: tuple[str, ...]) -> LockResult:
    path, text = lock_path(recipe), lock_text(lock)
    status: LockStatus = "unchanged" if _present(path) == text else "written"
    if status == "written":
        write_atomic(path, text.encode())
    return LockResult(recipe=recipe, path=path, lock=lock, changes=changes, status=status)


def _compared(recipe: Path, lock: Lock, changes: tuple[str, ...]) -> LockResult:
    path, text = lock_path(recipe), lock_text(lock)
    present = _present(path)
    if present == text:
        return LockResult(recipe=recipe, path=path, lock=lock, changes=changes, status="unchanged")
    if present is None:
        return LockResult(recipe=recipe, path=path, lock=lock, changes=changes, status="missing")
    diff = list(
        difflib.unified_diff(present.splitlines(), text.splitlines(), str(path), "as it would be written", lineterm="")
    )
    if len(diff) > _MOST_DIFF_LINES:
        diff = [*diff[:_MOST_DIFF_LINES], f"... and {len(diff) - _MOST_DIFF_LINES} more lines"]
    return LockResult(recipe=recipe, path=path, lock=lock, changes=changes, status="differs", diff=tuple(diff))


def _present(path: Path) -> str | None:
    """Return the content of a lock's file, damaged or not; None if there is none."""
    try:
        with path.open("rb") as stream:
            return stream.read(_MOST_BYTES).decode("utf-8", "replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise RecipeError(f"the lock {path} cannot be read: {error.strerror}") from error
