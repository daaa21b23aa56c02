"""Compare a recipe's variants and row lengths with the shapes of its base model, which config.json gives."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from packager.errors import PlanError, SourceError
from packager.model.architecture import Architecture, read_architecture
from packager.model.checkpoint import fit_problems, length_problem
from packager.model.config_values import read_config
from packager.receipt import CONFIG
from packager.recipe.parsed_recipe import Loc, ParsedRecipe, Unreadable, name_of
from packager.recipe.paths import locate, path_problem
from packager.recipe.yaml import LocatedProblem, Position, Scalar
from packager.system.text import quoted


class Parameter(NamedTuple):
    """One parameter of a variant: its value, where it comes from, and whether the recipe wrote it."""

    value: Scalar | Unreadable
    at: Position
    written: bool


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The base model's config.json as a recipe's folder holds it, and the shapes it describes."""

    config: Mapping[str, object]
    architecture: Architecture


def read_model_config(parsed: ParsedRecipe, folder: Path) -> ModelConfig | LocatedProblem | None:
    """Read the config.json that base_model.config or base_model.path names.

    Returns:
        The config, or why it cannot be used; None without such a file, which other checks report.
    """
    loc: Loc = ("base_model", "config")
    relative = parsed.text(*loc)
    if relative is None:
        loc = ("base_model", "path")
        base = parsed.text(*loc)
        if base is None or path_problem(folder, base, directory=True)[0]:
            return None
        relative = f"{base}/{CONFIG}"
        if path_problem(folder, relative)[0]:
            return LocatedProblem(parsed.at(*loc), f"{name_of(loc)}: the folder has no {CONFIG}")
    path = locate(folder, relative)
    if path is None or path_problem(folder, relative)[0]:
        return None
    try:
        config = read_config(path)
        return ModelConfig(config=config, architecture=read_architecture(config, relative))
    except (PlanError, SourceError) as error:
        message = f"{name_of(loc)}: {quoted(relative)}: {error.what}: {error.why}"
        return LocatedProblem(parsed.at(*loc), message, error.hint)


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
