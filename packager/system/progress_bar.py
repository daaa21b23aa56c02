"""The bar of a stage on a terminal: the numbers stay whole at every width, the bar and the text give way."""

from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

_LEAST_BAR, _WIDEST_BAR = 8, 40


class _Line:
    """A text that is cut where the line ends; rich would give a long one the room of the numbers, or more lines."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __rich_console__(self, _: Console, __: ConsoleOptions) -> RenderResult:
        yield Text(self._text, no_wrap=True, overflow="ellipsis", end="")


class _TextColumn(ProgressColumn):
    def render(self, task: Task) -> _Line:
        return _Line(task.description)


def new_spinner(console: Console, text: str) -> Progress:
    """Return a display of something without steps: it moves and counts the time until it ends, and leaves nothing."""
    columns = (SpinnerColumn(), TimeElapsedColumn(table_column=Column(no_wrap=True)), _TextColumn())
    spinner = Progress(*columns, console=console, transient=True)
    spinner.add_task(text, total=None)
    return spinner


def new_progress(console: Console) -> Progress:
    """Return a progress display that begins when it is entered and leaves nothing."""
    return Progress(
        BarColumn(bar_width=max(_LEAST_BAR, min(_WIDEST_BAR, console.width // 4))),
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        _TextColumn(table_column=Column(ratio=1)),
        console=console,
        transient=True,
        expand=True,
    )
