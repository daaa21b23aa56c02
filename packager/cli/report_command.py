"""The command `report`: a build as one HTML page."""

from pathlib import Path
from typing import Annotated

import typer

from packager.cli.options import DIST, Device, DistOption, Format, FormatOption, open_recipe, options_of, terminal_of
from packager.errors import UsageError


def report_command(
    of: Annotated[
        Path,
        typer.Argument(metavar="RECIPE|RUN", help="A recipe, or a folder of receipts: dist/receipts/NAMESPACE/NAME."),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="The page to write.", show_default="<dist>/reports/NAMESPACE/NAME.html"),
    ] = None,
    published: Annotated[
        bool, typer.Option("--published", help="Also read a repository on the Hub or a git remote, to compare with it.")
    ] = False,
    open_page: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
    dist: DistOption = DIST,
    format: FormatOption = Format.text,  # noqa: A002
) -> None:
    """Write a report on a build as one HTML page.

    Variants, quality with errors, a heat map of the loss of each linear in each block (where the damage is), what each
    loader found, tokens per expert, time and memory of each stage, digests, and what differs from the published
    release. All values are from receipts. The page is one file that makes no request. A folder of receipts needs no
    recipe and no base model; it is not compared with what is published. A local repository is compared always, another
    one with --published. With --format json the values are printed, and no page is written. Exits with 10 if nothing is
    built, with 11 if a receipt cannot be read.
    """
    from packager.card.report import report_page, report_values
    from packager.pipeline.report import folder_receipts, published_changes, recipe_receipts
    from packager.system.files import write_atomic

    if format is Format.json and (output or open_page):
        raise UsageError("--format json writes no page", hint="leave out --output and --open")
    changes = None
    if of.is_dir():
        if published:
            raise UsageError("a folder of receipts names no published repository", hint="give the recipe")
        terminal, receipts = terminal_of(), folder_receipts(of)
    else:
        terminal, recipe_file = open_recipe(of)
        receipts = recipe_receipts(recipe_file, dist)
        if published or recipe_file.recipe.repository.target == "local":
            changes = published_changes(recipe_file, options_of(dist, Device.cpu, None), terminal)
    values = report_values(receipts, changes)
    if format is Format.json:
        terminal.result(values)
        return
    path = output or dist / "reports" / f"{receipts[0].provenance.repository}.html"
    write_atomic(path, report_page(values).encode())
    terminal.write(f"{path}\n")
    if open_page:
        typer.launch(path.absolute().as_uri())
