"""The command `doctor`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from packager.cli.options import DIST, CacheOption, Device, DistOption, Format, FormatOption, options_of, terminal_of
from packager.errors import MachineError

if TYPE_CHECKING:
    from rich.console import Console

    from packager.pipeline.machine_checks import Environment, MachineCheck
    from packager.system.terminal import Terminal

_STYLES = {"ok": "green", "note": "yellow", "missing": "bold red"}


def doctor_command(
    dist: DistOption = DIST,
    cache: CacheOption = None,
    clean: Annotated[
        bool, typer.Option("--clean", help="Delete the loaders' environments that no present loader uses.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask before deleting.")] = False,
    format: FormatOption = Format.text,  # noqa: A002 - the option's name
) -> None:
    """Show what this machine has of what packager uses.

    Python and packages, git and git-lfs, the confinement of loaders, memory, disk space, GPUs, the loaders'
    environments with their sizes, and the account and rights of the Hub's token (which asks the Hub). Changes nothing
    without --clean. Exits with 12 if something is missing without which nothing can be published, otherwise with 0.
    """
    from packager.pipeline.machine_checks import environments, machine_checks

    terminal, options = terminal_of(), options_of(dist, Device.auto, cache)
    checks = list(machine_checks(options.dist, options.cache, options.environ))
    unused = [environment for environment in environments(options.cache) if not environment.used]
    if clean:
        unused = _clean(unused, terminal, assume_yes=yes)
    if format is Format.json:
        terminal.result(_checks_json(checks, unused))
    else:
        print_checks(checks, unused, terminal.out)
    if any(check.grade == "missing" for check in checks):
        raise typer.Exit(MachineError.exit_code)


def print_checks(checks: "Sequence[MachineCheck]", unused: "Sequence[Environment]", console: "Console") -> None:
    """Print a row for each check, and how much loaders' environments of other versions take."""
    from rich.text import Text

    from packager.cli.tables import add_row, counted, new_table, print_line
    from packager.system.text import format_bytes

    table = new_table(["What", "State", "Found"], folding=["Found"])
    for check in checks:
        found = f"{check.found}\n{check.hint}" if check.hint else check.found
        add_row(table, check.name, Text(check.grade, style=_STYLES[check.grade]), found)
    console.print(table)
    if unused:
        size = format_bytes(sum(environment.size_bytes for environment in unused))
        what = counted(len(unused), "loader environment")
        print_line(console, f"{what} of other versions, {size}: packager doctor --clean deletes what is not used")


def _checks_json(checks: "Sequence[MachineCheck]", unused: "Sequence[Environment]") -> dict[str, Any]:
    return {
        "checks": [
            {"name": check.name, "state": check.grade, "found": check.found, "hint": check.hint or None}
            for check in checks
        ],
        "unused_environments": [
            {"folder": str(environment.folder), "size_bytes": environment.size_bytes} for environment in unused
        ],
    }


def _clean(unused: "Sequence[Environment]", terminal: "Terminal", *, assume_yes: bool) -> "list[Environment]":
    """Delete environments after a question, and return those that are still there."""
    from packager.pipeline.machine_checks import remove_environment
    from packager.system.text import format_bytes

    left = []
    for environment in unused:
        what = f"{environment.folder} ({format_bytes(environment.size_bytes)})"
        if not (assume_yes or typer.confirm(f"delete {what}?", err=True)):
            left.append(environment)
        elif remove_environment(environment):
            terminal.log(f"deleted {what}")
        else:
            terminal.log(f"not deleted, in use: {what}")
            left.append(environment)
    return left
