"""Compare a recipe's variants and row lengths with the shapes of its base model, which its lock gives."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from packager.errors import PlanError, RecipeError
from packager.model.architecture import Architecture, architecture_of
from packager.model.checkpoint import fit_problems, length_problem
from packager.model.lock import Lock
from packager.recipe.lock_file import read_lock
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


def read_locked_model(parsed: ParsedRecipe, path: Path) -> LockedBaseModel | LocatedProblem:
    """Read a recipe's lock, which must be of the base model that the recipe names.

    Returns:
        The lock, or why it cannot be used.
    """
    try:
        lock = read_lock(path)
        architecture = architecture_of(lock.model, path.name)
    except RecipeError as error:
        return LocatedProblem(parsed.key_at("base_model"), str(error.what), error.hint)
    except PlanError as error:
        return LocatedProblem(parsed.key_at("base_model"), f"{path.name}: {error.what}: {error.why}", error.hint)
    base_id, revision = parsed.text("base_model", "id"), parsed.text("base_model", "revision")
    locked = lock.base_model
    for loc, wanted, found in (("id", base_id, locked.id), ("revision", revision, locked.revision)):
        # A recipe may name a branch; the lock then holds the commit that it meant.
        if wanted is not None and wanted != found and (loc == "id" or found is None or is_commit(wanted)):
            message = (
                f"base_model.{loc} is {quoted(wanted)}, the lock {path.name} is of {quoted(found or 'a local folder')}"
            )
            return LocatedProblem(parsed.at("base_model", loc), message, "make the lock anew: packager lock")
    if parsed.text("base_model", "path") is not None and locked.revision is not None:
        message = f"base_model.path is a local folder, the lock {path.name} is of the commit {locked.revision}"
        return LocatedProblem(parsed.at("base_model", "path"), message, "make the lock anew: packager lock")
    return LockedBaseModel(lock=lock, architecture=architecture)


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
