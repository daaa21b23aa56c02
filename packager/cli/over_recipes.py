"""Run a command on one recipe, whose errors end it, or on several, each of which has a result at the end."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from packager.cli.options import Format, terminal_of
from packager.errors import PackagerError, UsageError

if TYPE_CHECKING:
    from packager.pipeline.many_recipes import Outcome, RecipeResult
    from packager.recipe.file import RecipeFile
    from packager.system.terminal import Terminal


Answer = TypeVar("Answer")


@dataclass(frozen=True, kw_only=True)
class Chosen:
    """The recipes of a command line, and whether they are several: then the answer is a list, be it of one.

    Attributes:
        paths: each once.
        several: more than one is named, or a pattern is given.
        trial: settings that change each of them.
        format: of the answer.
    """

    paths: Sequence[Path]
    several: bool
    trial: tuple[str, ...] = ()
    format: Format = Format.text


def choose(
    recipes: Sequence[Path] | None,
    patterns: Sequence[str] | None,
    format: Format,  # noqa: A002 - the option's name
    trial: Sequence[str] | None = None,
) -> Chosen:
    """Return the recipes that are named or fit a pattern.

    Raises:
        UsageError: none is named.
        RecipeError: no file fits a pattern.
    """
    from packager.pipeline.many_recipes import recipes_among

    if not recipes and not patterns:
        raise UsageError(
            "RECIPE is missing", hint="name a recipe, e.g. recipes/demo-llama.yaml, or give --recipes GLOB"
        )
    paths = recipes_among(recipes or (), patterns or (), terminal_of().log)
    several = len(paths) > 1 or bool(patterns)
    return Chosen(paths=paths, several=several, trial=tuple(trial or ()), format=format)


def over_recipes(
    chosen: Chosen,
    act: "Callable[[RecipeFile, Terminal], Answer]",
    *,
    show: "Callable[[Answer, Terminal], None]",
    as_json: Callable[[Answer], Mapping[str, Any]],
    outcome: "Outcome" = "done",
    show_results: "Callable[[Sequence[RecipeResult]], None]" = lambda _: None,
) -> None:
    """Act on each recipe and print the answers.

    Args:
        chosen: the recipes. A single one's errors are the command's.
        act: what is done with a recipe.
        show: prints an answer as text.
        as_json: returns an answer for machines.
        outcome: the word for a recipe that was acted on.
        show_results: gets the result of each of several recipes, or that of a single one that failed.

    Raises:
        Exit: several recipes, and some failed: with the highest exit code.
    """
    from packager.cli.release_view import print_results, results_json
    from packager.pipeline.many_recipes import RecipeResult, for_each
    from packager.recipe.file import RecipeFile

    terminal, as_text = terminal_of(), chosen.format is Format.text
    if not chosen.several:
        (path,) = chosen.paths
        try:
            answer = act(RecipeFile.load(path, trial=chosen.trial), terminal)
        except PackagerError as error:
            why = str(error).splitlines()[0]
            show_results([RecipeResult(path=path, outcome="failed", why=why, exit_code=error.exit_code)])
            raise
        if as_text:
            show(answer, terminal)
        else:
            terminal.result(as_json(answer))
        return
    answers: dict[Path, Mapping[str, Any]] = {}

    def work(recipe_file: "RecipeFile") -> None:
        if as_text:
            terminal.log(str(recipe_file.path))
        answer = act(recipe_file, terminal)
        if as_text:
            show(answer, terminal)
        else:
            answers[recipe_file.path] = as_json(answer)

    results = for_each(chosen.paths, work, terminal, outcome=outcome, trial=chosen.trial)
    show_results(results)
    if as_text:
        print_results(results, terminal.out)
    else:
        terminal.result({"recipes": results_json(results, answers)})
    if code := max(result.exit_code for result in results):
        raise typer.Exit(code)
