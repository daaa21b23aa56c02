"""The table of the queue."""

import time
from collections.abc import Callable, Sequence
from itertools import chain

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from packager.cli.tables import add_row, new_table, print_line, width_of
from packager.fleet.queue import QueueEntry
from packager.system.text import printable, rough_time

STATE_STYLES = {"published": "green", "built": "green", "building": "cyan", "parked": "bold red", "requested": ""}
_WATCH_S = 2.0
_LEAST_WHY = 24  # columns; with fewer a reason is read more easily below the table


def print_queue(entries: Sequence[QueueEntry], now: float, console: Console) -> None:
    """Print the recipes, what runs first, and how many are in each state; reasons below where they have no room."""
    order = ("building", "parked", "requested", "built", "published")
    ordered = sorted(entries, key=lambda entry: order.index(entry.state))
    whole = ("Repository", "State", "Stage", "Machine", "Seen")
    for columns in (whole, whole[:3], whole[:2]):
        if width_of(_table(ordered, columns, now), console) <= console.width:
            break
    beside = width_of(_table(ordered, columns, now), console) + _LEAST_WHY <= console.width
    console.print(_table(ordered, (*columns, *(["Why"] if beside else [])), now))
    for entry in ordered:
        if entry.why and not beside:
            print_line(console, printable(f"{entry.repository or entry.name}: {entry.why}"))
    counts = {state: sum(entry.state == state for entry in entries) for state in order}
    shown = ", ".join(f"{count:,} {state}" for state, count in counts.items() if count)
    print_line(console, f"{len(entries):,} recipe{'s' * (len(entries) != 1)}: {shown}")


def watch_queue(entries: Sequence[QueueEntry], read: Callable[[], Sequence[QueueEntry]], console: Console) -> None:
    """Follow the queue while a recipe is building, and print it at the end.

    On a terminal what is building is a table that changes; elsewhere each change is a line.

    Args:
        entries: as they were printed.
        read: gives them as they are.
        console: of the output.
    """
    if not _building(entries):
        return
    seen = {entry.name: _line(entry) for entry in entries}
    with Live(console=console, auto_refresh=False, transient=True) as live:
        while building := _building(entries):
            if console.is_terminal:
                live.update(
                    _table(building, ("Repository", "State", "Stage", "Machine", "Seen"), time.time()), refresh=True
                )
            time.sleep(_WATCH_S)
            entries = read()
            now = {entry.name: _line(entry) for entry in entries}
            if not console.is_terminal:
                for line in (line for name, line in now.items() if seen.get(name) != line):
                    print_line(console, line)
            seen = now
    print_queue(entries, time.time(), console)


def _building(entries: Sequence[QueueEntry]) -> list[QueueEntry]:
    return [entry for entry in entries if entry.state == "building"]


def _line(entry: QueueEntry) -> str:
    words = filter(None, (entry.stage, entry.machine, entry.why))
    return printable(f"{entry.repository or entry.name}: {', '.join(chain([entry.state], words))}")


def _table(entries: Sequence[QueueEntry], columns: Sequence[str], now: float) -> Table:
    table = new_table(columns, folding=["Repository", "Why"])
    for entry in entries:
        seen = "" if entry.updated_at is None else f"{rough_time(max(0.0, now - entry.updated_at))} ago"
        cells: dict[str, str | Text] = {
            "Repository": entry.repository or printable(entry.name),
            "State": Text(entry.state, style=STATE_STYLES[entry.state]),
            "Stage": printable(entry.stage),
            "Machine": printable(entry.machine),
            "Seen": seen,
            "Why": printable(entry.why),
        }
        add_row(table, *(cells[column] for column in columns))
    return table
