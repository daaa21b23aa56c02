"""The results of a run over recipes: a line or a table for people, JSON for machines."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from packager.cli.tables import add_row, new_table, print_line

if TYPE_CHECKING:
    from packager.pipeline.many_recipes import RecipeResult

_STYLES = {
    "done": "green",
    "built": "green",
    "published": "green",
    "failed": "bold red",
    "interrupted": "bold red",
    "not built": "yellow",
    "not reached": "yellow",
}


def print_results(results: Sequence["RecipeResult"], console: Console) -> None:
    """Print what became of each recipe; of a single one only why it was not built, as the rest is printed before."""
    if len(results) == 1:
        (result,) = results
        if result.outcome == "not built":
            print_line(console, f"{result.path}: not built: {result.why}")
        return
    table = new_table(["Recipe", "Repository", "Result", "Seconds", "Why"], numbers=["Seconds"], folding=["Why"])
    for result in results:
        seconds = f"{result.seconds:.1f}" if result.seconds else ""
        outcome = Text(result.outcome, style=_STYLES[result.outcome])
        add_row(table, str(result.path), result.repository, outcome, seconds, result.why)
    console.print(table)


def results_json(
    results: Sequence["RecipeResult"], answers: Mapping[Path, Mapping[str, Any]] | None = None
) -> list[dict[str, Any]]:
    """Return the results for machines, each with what the command answers for a single recipe."""
    return [
        {
            "recipe": str(result.path),
            "repository": result.repository,
            "result": result.outcome,
            "why": result.why,
            "exit_code": result.exit_code,
            "seconds": round(result.seconds, 1),
            **({} if answers is None else {"answer": answers.get(result.path)}),
        }
        for result in results
    ]
