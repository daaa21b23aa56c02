"""Tables, lines, findings and counts as every view prints them; a text is never read as markup."""

from collections.abc import Collection, Sequence

from rich import box
from rich.console import Console, JustifyMethod
from rich.table import Table
from rich.text import Text

_SEVERITIES = {"error": "bold red", "warning": "yellow"}
_WIDEST = 1000


def new_table(
    columns: Sequence[str], *, title: str = "", numbers: Collection[str] = (), folding: Collection[str] = ()
) -> Table:
    """Return a table without rows.

    Args:
        columns: the headings.
        title: is printed above the table.
        numbers: the columns that are aligned to the right.
        folding: the columns whose cells take several lines if the terminal is too narrow.
    """
    table = Table(
        title=Text(title) if title else None,
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for column in columns:
        justify: JustifyMethod = "right" if column in numbers else "left"
        table.add_column(column, justify=justify, no_wrap=column not in folding, overflow="fold")
    return table


def add_row(table: Table, *cells: str | Text) -> None:
    """Add a row of literal texts."""
    table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))


def fits(table: Table, console: Console) -> bool:
    """Return whether the terminal is wide enough to print the table without folding a cell."""
    return width_of(table, console) <= console.width


def width_of(table: Table, console: Console) -> int:
    """Return the characters that a table takes without folding a cell."""
    return console.measure(table, options=console.options.update(width=_WIDEST)).maximum


def print_line(console: Console, text: str | Text, style: str = "") -> None:
    """Print one line literally; only the terminal itself breaks it."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


def finding_line(severity: str, code: str, where: str, message: str, hint: str) -> Text:
    """Return the line of one finding of an audit or of a check of a published repository."""
    return Text.assemble(
        (f"{severity:<7}", _SEVERITIES[severity]), f"  {code}  {where}: {message}", (f"  hint: {hint}", "dim")
    )


def verdict_line(*, errors: int, warnings: int, facts: str) -> Text:
    """Return the last line of a check: it has passed if there are no errors."""
    verdict = ("failed", "bold red") if errors else ("passed", "bold green")
    return Text.assemble(verdict, f"  {counted(errors, 'error')}, {counted(warnings, 'warning')}; {facts}")


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, e.g. `1 file` or `1,024 files`."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
