"""The command `queue`: the recipes that are requested, and how far each is."""

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from packager.cli.options import (
    DIST,
    Device,
    DistOption,
    Format,
    FormatOption,
    GlobOption,
    options_of,
    terminal_of,
)
from packager.errors import UsageError

_StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        metavar="URL",
        help="The store of the fleet that releases them; see release --store.",
        show_default="none: what is in --dist counts",
    ),
]


def queue_command(
    recipes: Annotated[
        list[Path] | None,
        typer.Argument(metavar="RECIPE|FOLDER...", help="Recipes, and folders of recipes.", show_default=False),
    ] = None,
    glob: GlobOption = None,
    store: _StoreOption = None,
    dist: DistOption = DIST,
    page: Annotated[
        Path | None, typer.Option("--page", metavar="FILE", help="Also write the queue as an HTML page.")
    ] = None,
    open_page: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the recipes that are building to their end.")] = False,
    format: FormatOption = Format.text,  # noqa: A002
) -> None:
    """Show how far each recipe of a folder is.

    Requested, building, built, published or parked, and why. Every recipe of a folder is a request: add one to it, by a
    pull request if the folder is a git repository. The store of a fleet knows who builds it and why it is parked;
    without one the output folder of this machine counts. Changes nothing. A state of another recipe or of another
    version is a request again. A recipe that cannot be read is parked, with the reason. The page is one file
    that makes no request; it shows neither machines nor paths of recipes outside the folders, but reasons as they are.
    Exits with 0, whatever the states are.
    """
    from packager.card.report import html_page
    from packager.cli.queue_view import print_queue, watch_queue
    from packager.fleet.open_store import open_store
    from packager.fleet.queue import queue_values, queued_recipes, read_queue
    from packager.system.files import write_atomic

    if not recipes and not glob:
        raise UsageError("RECIPE or FOLDER is missing", hint="name a folder of recipes, such as recipes")
    if open_page and page is None:
        raise UsageError("a page is written by --page alone", hint="give --page FILE with --open")
    if watch and (page is not None or format is Format.json):
        raise UsageError("--watch shows text alone", hint="leave out --page and --format json")
    terminal = terminal_of()
    queued = queued_recipes(recipes or (), glob or (), terminal.log, dist=dist)
    opened = None if store is None else open_store(store, terminal.log)
    options = options_of(dist, Device.cpu, None)
    if terminal.err.is_terminal:
        with terminal.bar(len(queued)) as bar:
            entries = read_queue(queued, options, opened, bar.step)
    else:
        entries = read_queue(queued, options, opened)
    if opened is not None and all(entry.updated_at is None for entry in entries):
        terminal.log(f"the store {opened.url} knows none of these recipes: no release with it has begun one")
    if page is not None:
        made_at = f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC"
        write_atomic(page, html_page("queue.html.j2", {**queue_values(entries), "made_at": made_at}).encode())
    if format is Format.json:
        terminal.result(queue_values(entries))
    else:
        print_queue(entries, time.time(), terminal.out)
        if watch:
            watch_queue(entries, lambda: read_queue(queued, options, opened), terminal.out)
        if page is not None:
            terminal.write(f"{page}\n")
    if open_page and page is not None:
        typer.launch(page.absolute().as_uri())
