"""Check a recipe's tasks across fields and files: the documents, the definitions, and that names occur once."""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from packager.recipe.parsed_recipe import Loc, ParsedRecipe, name_of, task_data_places, text_places
from packager.recipe.paths import locate, path_problem
from packager.recipe.task_models import TASK_DATA_FORMATS, read_definition, task_data_problem
from packager.recipe.yaml import LocatedProblem
from packager.system.text import quoted


def task_problems(parsed: ParsedRecipe, folder: Path) -> Iterator[LocatedProblem]:
    """Yield what is wrong with the tasks; a definition is read as far as it can be without running anything.

    Args:
        parsed: the recipe.
        folder: the recipe's own.
    """
    names: set[str] = set()
    for index in range(parsed.count("evaluation", "tasks")):
        loc: Loc = ("evaluation", "tasks", index)
        name = parsed.text(*loc, "name")
        if name in names:
            yield LocatedProblem(parsed.at(*loc, "name"), f"the task {quoted(str(name))} is listed twice")
        if name is not None:
            names.add(name)
            yield from _definition(parsed, folder, loc, name)
        yield from _documents(parsed, folder, loc)
    for place in task_data_places(parsed):
        given = parsed.keys(*place)
        if given is not None and (problem := task_data_problem(given)):
            yield LocatedProblem(parsed.key_at(*place), f"{name_of(place)}: {problem}")


def _definition(parsed: ParsedRecipe, folder: Path, loc: Loc, name: str) -> Iterator[LocatedProblem]:
    relative = parsed.text(*loc, "definition")
    if relative is None:
        return
    message, hint = path_problem(folder, relative)
    if message:
        yield LocatedProblem(parsed.at(*loc, "definition"), f"{name_of((*loc, 'definition'))}: {message}", hint)
        return
    yield from read_definition(folder / relative, name)[1]


def _documents(parsed: ParsedRecipe, folder: Path, loc: Loc) -> Iterator[LocatedProblem]:
    """Report files that are not there or of another format, and documents that answer themselves."""
    calibrated = {place for each in text_places(parsed)[:-1] if (place := _source(parsed, folder, each))}
    sources = {}
    for key in ("data", "fewshot"):
        path = parsed.text(*loc, key, "path")
        message, hint = path_problem(folder, path) if path is not None else ("", "")
        if path is not None and not message and PurePosixPath(path).suffix.lower() not in TASK_DATA_FORMATS:
            message, hint = (
                f"{quoted(path)} is of a format that is not read",
                f"read are {', '.join(TASK_DATA_FORMATS)}",
            )
        if message:
            yield LocatedProblem(parsed.at(*loc, key, "path"), f"{name_of((*loc, key, 'path'))}: {message}", hint)
        sources[key] = _source(parsed, folder, (*loc, key))
    at = parsed.key_at(*loc, "fewshot")
    paths = [parsed.text(*loc, key, "path") for key in ("data", "fewshot")]
    endings = {PurePosixPath(path).suffix.lower().replace(".jsonl", ".json") for path in paths if path is not None}
    if len(endings) > 1:
        yield LocatedProblem(at, f"{name_of(loc)}: the examples are of another format than the documents")
    if sources["data"] is not None and sources["data"] == sources["fewshot"]:
        yield LocatedProblem(at, f"{name_of(loc)}: the examples are the documents that are scored")
    if sources["data"] in calibrated:
        message = f"{name_of(loc)}: the documents that are scored are a calibration text"
        yield LocatedProblem(
            parsed.key_at(*loc, "data"), message, "quality measured on the calibration text proves nothing"
        )


def _source(parsed: ParsedRecipe, folder: Path, loc: Loc) -> tuple[str, ...] | None:
    path = parsed.text(*loc, "path")
    if path is not None:
        real = locate(folder, path)
        return None if real is None else (str(real),)
    dataset, split = parsed.text(*loc, "dataset"), parsed.text(*loc, "split")
    return None if dataset is None or split is None else (dataset.casefold(), parsed.text(*loc, "config") or "", split)
