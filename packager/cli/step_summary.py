"""The summary of a GitHub job: what became of each recipe, and of each branch that was built."""

import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packager.pipeline.many_recipes import RecipeResult
    from packager.pipeline.status import BranchStatus

_BRANCH_COLUMNS = ("branch", "size", "perplexity", "KL", "loaders", "seconds")
_NUMBERS = frozenset({"size", "perplexity", "KL", "seconds"})


def results_markdown(heading: str, results: Sequence["RecipeResult"]) -> str:
    """Return what became of each recipe as a table."""
    rows = [
        (
            str(result.path),
            result.repository,
            result.outcome,
            f"{result.seconds:.1f}" if result.seconds else "",
            result.why,
        )
        for result in results
    ]
    return _section(heading, ("recipe", "repository", "result", "seconds", "why"), rows)


def branches_markdown(heading: str, statuses: Sequence["BranchStatus"]) -> str:
    """Return what is built of a recipe, as a table of its branches; below it, why loaders failed or did not run."""
    from packager.cli.status_view import branch_cells, loader_reasons

    text = _section(heading, _BRANCH_COLUMNS, [branch_cells(status) for status in statuses])
    notes = "".join(f"- {_inline(line)}\n" for line in loader_reasons(statuses))
    return f"{text}\n{notes}" if notes else text


def add_step_summary(write: Callable[[], str], log: Callable[[str], None]) -> None:
    """Append a text to the summary of a GitHub job, if this is one; a file that cannot be written is reported.

    Args:
        write: returns the text; not called where there is no job.
        log: gets a line if the file cannot be written.
    """
    if not (name := os.environ.get("GITHUB_STEP_SUMMARY")):
        return
    try:
        with Path(name).open("a", encoding="utf-8") as stream:
            stream.write(write())
    except OSError as error:
        log(f"the summary of the job cannot be written: {name}: {error.strerror}")


def _section(heading: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    marks = ("---:" if column in _NUMBERS else "---" for column in columns)
    lines = [f"## {_inline(heading)}", "", f"| {' | '.join(columns)} |", f"| {' | '.join(marks)} |"]
    lines += [f"| {' | '.join(map(_inline, row))} |" for row in rows]
    return "\n".join(lines) + "\n"


def _inline(text: str) -> str:
    from packager.card.markdown import inline  # 20 ms, for a CI job alone
    from packager.system.text import printable

    return inline(printable(text))
