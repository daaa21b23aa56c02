"""The results of a run over recipes: a line or a table for people, JSON for machines."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from packager.cli.tables import add_row, new_table, print_line, width_of

if TYPE_CHECKING:
    from packager.pipeline.many_recipes import RecipeResult

_LEAST_WHY = 24  # columns; with fewer a reason is read more easily below the table
_STYLES = {
    "done": "green",
    "built": "green",
    "published": "green",
    "failed": "bold red",
    "interrupted": "bold red",
    "elsewhere": "yellow",
    "not built": "yellow",
    "not reached": "yellow",
}


def print_results(results: Sequence["RecipeResult"], console: Console) -> None:
    """Print what became of each recipe; of a single one only why it was not built, as the rest is printed before."""
    if len(results) == 1:
        (result,) = results
        if result.outcome in ("not built", "elsewhere"):
            print_line(console, f"{result.path}: {result.outcome}: {result.why}")
        return
    whole = ("Recipe", "Repository", "Result", "Seconds")
    if width_of(_results_table(results, whole), console) + _LEAST_WHY <= console.width:
        console.print(_results_table(results, (*whole, "Why")))
        return
    console.print(_results_table(results, ("Recipe", "Result", "Seconds")))
    for result in results:
        if result.why:
            print_line(console, f"{result.path}: {result.why}")


def _results_table(results: Sequence["RecipeResult"], columns: Sequence[str]) -> Table:
    table = new_table(columns, numbers=["Seconds"], folding=["Recipe", "Why"])
    for result in results:
        cells: dict[str, str | Text] = {
            "Recipe": str(result.path),
            "Repository": result.repository,
            "Result": Text(result.outcome, style=_STYLES[result.outcome]),
            "Seconds": f"{result.seconds:.1f}" if result.seconds else "",
            "Why": result.why,
        }
        add_row(table, *(cells[column] for column in columns))
    return table


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
