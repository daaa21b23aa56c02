"""Compare a recipe's variants and row lengths with the shapes of its base model, which its lock gives."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from packager.errors import PlanError, RecipeError
from packager.model.architecture import Architecture, architecture_of
from packager.model.checkpoint import fit_problems, length_problem
from packager.model.lock import Lock, dataset_key
from packager.recipe import Recipe, TextSource
from packager.recipe.lock_file import lock_path, read_recipe_lock
from packager.recipe.parsed_recipe import ParsedRecipe, Unreadable
from packager.recipe.yaml import LocatedProblem, Position, Scalar
from packager.system.text import quoted


class Parameter(NamedTuple):
    """One parameter of a variant: its value, where it comes from, and whether the recipe wrote it."""

    value: Scalar | Unreadable
    at: Position
    written: bool


@dataclass(frozen=True, kw_only=True)
class LockedBaseModel:
    """The lock beside a recipe, and the shapes that it describes."""

    lock: Lock
    architecture: Architecture


def read_locked_model(parsed: ParsedRecipe, recipe: Path) -> LockedBaseModel | LocatedProblem:
    """Read a recipe's lock, which must be of the base model that the recipe names.

    Returns:
        The lock, or why it cannot be used.
    """
    path = lock_path(recipe)
    try:
        lock = read_recipe_lock(path, recipe)
        architecture = architecture_of(lock.model, path.name)
    except RecipeError as error:
        return LocatedProblem(parsed.key_at("base_model"), str(error.what), error.hint)
    except PlanError as error:
        return LocatedProblem(parsed.key_at("base_model"), f"{path.name}: {error.what}: {error.why}", error.hint)
    if (moved := _moved(parsed, lock, path.name)) is not None:
        at, message = moved
        return LocatedProblem(at, message, f"make the lock anew: packager lock {recipe}")
    return LockedBaseModel(lock=lock, architecture=architecture)


def _moved(parsed: ParsedRecipe, lock: Lock, name: str) -> tuple[Position, str] | None:
    """Return what the recipe names and the lock does not hold: its position, and a sentence."""
    locked = lock.base_model
    base_id, path, revision = (parsed.text("base_model", key) for key in ("id", "path", "revision"))
    found = locked.revision or "a local folder"
    wrong: dict[str, tuple[str | None, str]] = {
        "id": (base_id if base_id != locked.id else None, locked.id),
        "path": (path if locked.revision is not None else None, found),
        "revision": (revision if revision not in (locked.requested, locked.revision) else None, found),
    }
    for key, (wanted, held) in wrong.items():
        if wanted is not None:
            message = f"base_model.{key} is {quoted(wanted)}, the lock {name} is of {quoted(held)}"
            return parsed.at("base_model", key), message
    for section in ("calibration", "evaluation"):
        dataset, wanted = parsed.text(section, "dataset"), parsed.text(section, "revision")
        if dataset and wanted and not is_commit(wanted) and dataset_key(dataset, wanted) not in lock.datasets:
            message = f"{section}.revision is {quoted(wanted)}, the lock {name} has no commit of it"
            return parsed.at(section, "revision"), message
    return None


def with_locked_commits(recipe: Recipe, lock: Lock) -> Recipe:
    """Return a recipe with the lock's commits in the place of branches and tags."""
    base = recipe.base_model
    changes: dict[str, object] = {}
    if base.revision is not None:
        changes["base_model"] = base.model_copy(update={"revision": lock.base_model.revision})
    texts: dict[str, TextSource] = {"calibration": recipe.calibration, "evaluation": recipe.evaluation}
    return recipe.model_copy(
        update=changes | {name: _pinned_text(text, lock) for name, text in texts.items()}
    )  # fmt: skip


def _pinned_text(text: TextSource, lock: Lock) -> TextSource:
    if text.dataset is None or text.revision is None or is_commit(text.revision):
        return text
    return text.model_copy(update={"revision": lock.datasets[dataset_key(text.dataset, text.revision)]})


def is_commit(revision: str) -> bool:
    """Return whether a revision is a full commit id, not a branch or a tag."""
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def misfits(
    parsed: ParsedRecipe, architecture: Architecture, variants: Sequence[Mapping[str, Parameter]]
) -> Iterator[LocatedProblem]:
    """Yield which group sizes, bits and row lengths do not fit the base model.

    Args:
        parsed: the recipe.
        architecture: of the base model.
        variants: for each variant its parameters by name.
    """
    for parameters in variants:
        bits, group_size = parameters["bits"].value, parameters["group_size"].value
        for problem in fit_problems(
            architecture,
            bits=bits if isinstance(bits, int) else None,
            group_size=group_size if isinstance(group_size, int) else None,
        ):
            yield LocatedProblem(parameters[problem.parameter].at, problem.message, problem.hint)
    for section in ("calibration", "evaluation", "loaders"):
        seq_len = parsed.number(section, "seq_len")
        if seq_len is not None and (message := length_problem(architecture, f"{section}.seq_len", seq_len)):
            yield LocatedProblem(parsed.at(section, "seq_len"), message)
