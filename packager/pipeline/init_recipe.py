"""Write the first recipe of a model, its lock, and the schema for editors."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from packager.errors import RecipeError
from packager.inputs.make_lock import make_lock
from packager.inputs.named_model import NamedModel
from packager.model.architecture import architecture_of
from packager.model.lock import Lock, LockedModel
from packager.pipeline.branch_files import check_small_files
from packager.pipeline.build_extra import require_build_extra
from packager.pipeline.draft_recipe import Wishes, draft_recipe, notes_on
from packager.pipeline.draft_texts import documents_note
from packager.pipeline.plan import BuildPlan, make_plan
from packager.recipe import Recipe
from packager.recipe.draft import draft_text
from packager.recipe.file import RecipeFile, recipe_from
from packager.recipe.inherit import without_inherited
from packager.recipe.lock_file import lock_path, lock_text
from packager.recipe.schema import schema_text
from packager.recipe.text_models import Calibration, Evaluation
from packager.system.files import disk_errors, write_atomic
from packager.system.posix import FolderLock

_SCHEMA: Final = "recipe.schema.json"
_SUFFIXES: Final = (".yaml", ".yml", ".json")


@dataclass(frozen=True, kw_only=True)
class InitResult:
    """What was written.

    Attributes:
        recipe: the recipe's file.
        written: every file, the recipe last.
        notes: a sentence for each choice that a person should know of.
        plan: of the recipe.
    """

    recipe: Path
    written: tuple[Path, ...]
    notes: tuple[str, ...]
    plan: BuildPlan


def init_recipe(model: NamedModel, wishes: Wishes, log: Callable[[str], None], *, replace: bool) -> InitResult:
    """Write the recipe of a model with its lock, and the schema if the recipe's folder has none.

    Nothing is written before everything is known.

    Args:
        model: the base model.
        wishes: what it leaves open.
        log: receives a line before what takes long.
        replace: overwrite a recipe that is there.

    Raises:
        CalibrationError: the tokenizer or its chat template cannot be used.
        MachineError: the packages of the build extra are not installed, or the folder cannot be written.
        PlanError: the recipe cannot be built.
        RecipeError: the file is there, or only a person knows something that is missing.
        SourceError: the model cannot be quantized; see `make_lock`.
    """
    require_build_extra("making a recipe")
    path = wishes.path
    _check_path(path, replace=replace)
    schema = next((each for each in (_SCHEMA, f"../{_SCHEMA}") if (path.parent / each).is_file()), "")
    first = recipe_from(draft_text(_shared(draft_recipe(model, wishes), wishes), schema=_SCHEMA).encode(), path)

    def check(folder: Path, described: LockedModel) -> None:
        check_small_files(folder, first, architecture_of(described, str(folder)))

    copy = model.folder if model.commit is not None and model.complete else None
    lock = make_lock(path, first, log, copy=copy, check=check)
    architecture = architecture_of(lock.model, path.name)
    content = _shared(draft_recipe(model, wishes, architecture, lock.prompt), wishes)
    text = draft_text(content, schema=schema or _SCHEMA)
    plan = make_plan(RecipeFile.of(text.encode(), path, lock))
    notes = notes_on(model, plan.recipe, architecture, lock.prompt) + _notes_on_texts(plan.recipe, wishes)
    with _folder_to_itself(path.parent):
        _check_path(path, replace=replace)  # another run may have written it meanwhile
        written = _write(path, text, lock, with_schema=not schema)
    return InitResult(recipe=path, written=written, notes=tuple(notes), plan=plan)


def _notes_on_texts(recipe: Recipe, wishes: Wishes) -> list[str]:
    """Return the notes on the texts that options name; whoever shares defaults has decided on theirs."""
    texts: dict[str, Calibration | Evaluation] = {}
    if wishes.calibration is not None:
        texts["calibration"] = recipe.calibration
    if wishes.evaluation is not None:
        texts["evaluation"] = recipe.evaluation
    note = documents_note(texts, wishes.path.parent)
    return [note] if note else []


def _shared(content: dict[str, Any], wishes: Wishes) -> dict[str, Any]:
    """Return a recipe without what the file gives that it extends; a text that an option names stays the recipe's."""
    if not wishes.extends:
        return content
    named = {"calibration": wishes.calibration, "evaluation": wishes.evaluation, "base_model": wishes.path}
    kept = [section for section, given in named.items() if given is not None]
    # Who shares defaults has decided on them, an engine that corrects no target among others.
    return without_inherited(content, wishes.path.parent, wishes.extends, kept=kept, left_out=("defaults",))


def _check_path(path: Path, *, replace: bool) -> None:
    """Raise RecipeError unless a recipe may be written at `path`, with its lock beside it.

    A lock without a recipe is what a killed run left, and is replaced.
    """
    other = "name another file with --output"
    if path.name == _SCHEMA or path.name.endswith(".lock.json"):
        raise RecipeError(f"{path.name} is the name of a schema or a lock", hint=other)
    try:
        if os.path.lexists(path) and not replace:
            raise RecipeError(f"there is a recipe {path}", hint=f"{other}, or give --force")
        if path.exists() and not path.is_file():
            raise RecipeError(f"{path} is no file", hint=other)
        for suffix in _SUFFIXES:
            twin = path.with_suffix(suffix)
            if twin.name != path.name and lock_path(twin) == lock_path(path) and twin.is_file():
                raise RecipeError(f"the recipe {twin} would have the same lock, {lock_path(path).name}", hint=other)
    except (OSError, ValueError) as error:  # such as a name that is too long
        raise RecipeError(f"the recipe {path} cannot be written: {error}", hint=other) from error


@contextmanager
def _folder_to_itself(folder: Path) -> Iterator[None]:
    """Let one run at a time write a recipe with its lock into a folder, which is made if it is not there."""
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with FolderLock(folder, wait=True):
        yield


def _write(path: Path, text: str, lock: Lock, *, with_schema: bool) -> tuple[Path, ...]:
    """Write the files and return them; the recipe comes last, so that one without its lock is never there."""
    files = {lock_path(path): lock_text(lock)}
    if with_schema:
        files[path.parent / _SCHEMA] = schema_text()
    files[path] = text
    for file, content in files.items():
        write_atomic(file, content.encode())
    return tuple(files)
