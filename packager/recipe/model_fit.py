"""Compare a recipe's variants, row lengths and patterns of modules with its base model, which its lock gives."""

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple, TypeVar

from packager.errors import PlanError, RecipeError
from packager.model.architecture import Architecture, architecture_of
from packager.model.checkpoint import fit_problems, length_problem
from packager.model.lock import Lock, dataset_key
from packager.recipe import Recipe
from packager.recipe.lock_file import lock_path, read_recipe_lock
from packager.recipe.parsed_recipe import ParsedRecipe, Unreadable, name_of, task_data_places, text_places
from packager.recipe.task_models import EvaluationTask, TaskData
from packager.recipe.text_models import TextSource
from packager.recipe.yaml import LocatedProblem, Position, Scalar
from packager.system.text import quoted

Pinned = TypeVar("Pinned", TextSource, TaskData)


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


def read_locked_model(parsed: ParsedRecipe, recipe: Path, lock: Lock | None = None) -> LockedBaseModel | LocatedProblem:
    """Read a recipe's lock, which must be of the base model that the recipe names.

    Args:
        parsed: the recipe.
        recipe: its file.
        lock: the lock where it is not in its file yet.

    Returns:
        The lock, or why it cannot be used.
    """
    path = lock_path(recipe)
    try:
        lock = lock or read_recipe_lock(path, recipe)
        architecture = architecture_of(lock.model, path.name)
    except RecipeError as error:
        return LocatedProblem(parsed.key_at("base_model"), str(error.what), error.hint)
    except PlanError as error:
        return LocatedProblem(parsed.key_at("base_model"), f"{path.name}: {error.brief}", error.hint)
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
    for loc in (*text_places(parsed), *task_data_places(parsed)):
        dataset, wanted = parsed.text(*loc, "dataset"), parsed.text(*loc, "revision")
        if dataset and wanted and not is_commit(wanted) and dataset_key(dataset, wanted) not in lock.datasets:
            message = f"{name_of(loc)}.revision is {quoted(wanted)}, the lock {name} has no commit of it"
            return parsed.at(*loc, "revision"), message
    return None


def with_locked_commits(recipe: Recipe, lock: Lock) -> Recipe:
    """Return a recipe with the lock's commits in the place of branches and tags."""
    base = recipe.base_model
    changes: dict[str, object] = {}
    if base.revision is not None:
        changes["base_model"] = base.model_copy(update={"revision": lock.base_model.revision})
    calibration = _pinned_text(recipe.calibration, lock)
    if recipe.calibration.sources is not None:
        pinned = tuple(_pinned_text(text, lock) for text in recipe.calibration.sources)
        calibration = recipe.calibration.model_copy(update={"sources": pinned})
    evaluation = _pinned_text(recipe.evaluation, lock)
    if recipe.evaluation.tasks:
        evaluation = evaluation.model_copy(
            update={"tasks": tuple(_pinned_task(each, lock) for each in recipe.evaluation.tasks)}
        )
    changes |= {"calibration": calibration, "evaluation": evaluation}
    return recipe.model_copy(update=changes)


def _pinned_task(task: EvaluationTask, lock: Lock) -> EvaluationTask:
    examples = task.fewshot if task.fewshot is None else _pinned_text(task.fewshot, lock)
    return task.model_copy(update={"data": _pinned_text(task.data, lock), "fewshot": examples})


def _pinned_text(text: Pinned, lock: Lock) -> Pinned:
    if text.dataset is None or text.revision is None or is_commit(text.revision):
        return text
    return text.model_copy(update={"revision": lock.datasets[dataset_key(text.dataset, text.revision)]})


def is_commit(revision: str) -> bool:
    """Return whether a revision is a full commit id, not a branch or a tag."""
    return re.fullmatch(r"[0-9a-f]{40}", revision) is not None


def misfits(
    parsed: ParsedRecipe, architecture: Architecture, variants: Sequence[Mapping[str, Parameter]]
) -> Iterator[LocatedProblem]:
    """Yield which group sizes, bits, row lengths and patterns of modules do not fit the base model.

    Args:
        parsed: the recipe.
        architecture: of the base model.
        variants: for each variant its parameters by name.
    """
    patterns = [parsed.text("quantize", "skip", index) for index in range(parsed.count("quantize", "skip"))]
    yield from _skip_problems(parsed, architecture, patterns)
    architecture = architecture.leaving([pattern for pattern in patterns if pattern is not None])
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
            hint = "give shorter rows; the model's positions are max_position_embeddings of its config.json"
            yield LocatedProblem(parsed.at(section, "seq_len"), message, hint)


def _skip_problems(
    parsed: ParsedRecipe, architecture: Architecture, patterns: Sequence[str | None]
) -> Iterator[LocatedProblem]:
    """Yield the patterns of quantize.skip that fit no module, and that all of them together leave nothing."""
    experts = _experts(architecture)
    kinds = sorted(architecture.kinds, key=lambda kind: kind.blocks[0])
    groups = (group for kind in kinds for group in kind.groups)
    quantized = list(dict.fromkeys(module for group in groups for module in group.modules))
    modules = [*quantized, *experts, *(module for kind in architecture.kinds for module in kind.left)]
    for index, pattern in enumerate(patterns):
        if pattern is not None and not any(fnmatchcase(module, pattern) for module in modules):
            message = f"quantize.skip: {quoted(pattern)} fits no module of the base model's blocks"
            yield LocatedProblem(parsed.at("quantize", "skip", index), message, _near(pattern, modules))
    used = [pattern for pattern in patterns if pattern is not None]
    for unit, linears in experts.items():
        fitting = sum(any(fnmatchcase(module, pattern) for pattern in used) for module in linears)
        if fitting < len(linears) and fitting and not any(fnmatchcase(unit, pattern) for pattern in used):
            message = f"quantize.skip fits {fitting} of the {len(linears)} linears of {unit}"
            hint = f"experts are quantized together: write {unit}, or no pattern that fits one of them"
            yield LocatedProblem(parsed.key_at("quantize", "skip"), message, hint)
    if used and not architecture.leaving(used).example_linears:
        yield LocatedProblem(parsed.key_at("quantize", "skip"), "quantize.skip leaves no linear to quantize")


def _experts(architecture: Architecture) -> dict[str, list[str]]:
    """Return by the module of each layer's experts the names of their linears, of one block of each kind."""
    found: dict[str, list[str]] = {}
    for kind in architecture.kinds:
        for group in kind.groups:
            if group.unit and group.modules[0] not in found.get(group.unit, []):
                found.setdefault(group.unit, []).extend(group.modules)
    return found


def _near(pattern: str, modules: Sequence[str]) -> str:
    """Return a hint with the modules whose name, or the last part of it, is like a pattern's."""
    last = {module.rpartition(".")[2]: module for module in reversed(modules)}
    plain = pattern.replace("*", "").strip(".")
    names = difflib.get_close_matches(plain, modules, n=3)
    names += [last[name] for name in difflib.get_close_matches(plain.rpartition(".")[2], list(last), n=3)]
    shown = list(dict.fromkeys(names))[:3] or list(dict.fromkeys(modules))[:8]
    return f"there is {', '.join(shown)}" if shown else ""
