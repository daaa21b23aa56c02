"""Tables of the state of every variant and of the loaders' results."""

import time
from collections.abc import Sequence

from rich.console import Console
from rich.control import Control
from rich.segment import ControlType
from rich.table import Table
from rich.text import Text

from packager.card.floor import far_lines, floor_lines
from packager.cli.tables import add_row, fits, new_table, print_line, width_of
from packager.pipeline.build_options import Options
from packager.pipeline.running import RunningBuild
from packager.pipeline.status import BranchStatus, read_status, running_build
from packager.receipt import LoaderRecord, Receipt
from packager.recipe.file import RecipeFile
from packager.system.text import format_bytes, printable, rough_time
from packager.variant import MAIN

_MARKS = {"passed": "ok", "failed": "FAILED", "refused": "refused", "not run": "not run"}
_NUMBERS = {"Size", "Perplexity", "KL", "Seconds", "Relative\nerror", "Top-1", "Tokens\nequal"}
_FOLDING = {"Branch", "Loaders"}
_COLUMNS = (
    ("Branch", "Size", "Perplexity", "KL", "Loaders", "Commit", "Seconds"),
    ("Branch", "Size", "Perplexity", "KL", "Commit", "Seconds"),
    ("Branch", "Size", "Perplexity", "KL"),
)
_LEAST_BRANCH = 16  # columns, below which a folded name cannot be read
_WATCH_S = 1.0


def print_status(recipe_file: RecipeFile, options: Options, console: Console) -> None:
    """Print one row per branch; where the table has no room for the loaders' results, print them below it."""
    statuses = read_status(recipe_file, options)
    repository = recipe_file.recipe.repository
    print_line(console, repository.id)
    if repository.target in ("hub", "git"):
        address = repository.url or f"hub:{repository.id}"  # without hub:, one below --dist comes first
        print_line(console, f"to check what is published: packager verify-published {address}")
    lines = _print_branches(statuses, console)
    for text in lines:
        print_line(console, text)
    if running := running_build(recipe_file, options):
        print_line(console, running_line(running, time.time()))
    made = [status.receipt.provenance for status in statuses if status.receipt]
    for text in (*floor_lines(recipe_file.recipe, made), *far_lines(made, MAIN)):
        print_line(console, text)
    for text in dict.fromkeys([*(status.problem for status in statuses if status.problem), *loader_reasons(statuses)]):
        print_line(console, text)


def _print_branches(statuses: Sequence[BranchStatus], console: Console) -> list[str]:
    """Print the widest table that the terminal has room for, and return as lines what it leaves out."""
    for columns in _COLUMNS:
        table = _status_table(statuses, columns)
        others = width_of(table, console) - max((len(status.branch) for status in statuses), default=0)
        if fits(table, console) or (columns is not _COLUMNS[0] and others + _LEAST_BRANCH <= console.width):
            break
    console.print(table)
    lines = [] if "Loaders" in columns else _loader_lines(statuses)
    if "Commit" not in columns:
        for status in statuses:
            seconds = f", {_seconds(status)} s" if status.receipt else ""
            lines.append(f"{status.branch}: commit {_short(status.commit)}{seconds}")
    return lines


def watch_status(recipe_file: RecipeFile, options: Options, console: Console) -> None:
    """Print the state of every branch, follow the build that runs, and print the state at its end.

    On a terminal the last step is one line that changes; elsewhere each new step is a line.
    """
    print_status(recipe_file, options, console)
    shown, followed = "", False
    while running := running_build(recipe_file, options):
        if (line := running_line(running, running.updated_at)) != shown or console.is_terminal:
            shown = line
            if console.is_terminal:
                console.control(Control.move_to_column(0), Control((ControlType.ERASE_IN_LINE, 2)))
                text = Text(running_line(running, time.time()), no_wrap=True, overflow="ellipsis")
                console.print(text, end="", soft_wrap=False, crop=True)
            elif followed:
                print_line(console, line)
        followed = True
        time.sleep(_WATCH_S)
    if followed:
        console.print()
        print_status(recipe_file, options, console)


def running_line(running: RunningBuild, now: float) -> str:
    """Return what a build does now, with the time since its last sign of life."""
    parts = [running.stage or "starting"]
    if running.total:
        parts.append(f"step {running.done} of {running.total}")
    if running.text:
        parts.append(running.text)
    if running.seconds_left is not None:
        parts.append(f"about {rough_time(running.seconds_left)} left")
    silent_s = max(0.0, now - running.updated_at)
    since = f", last step {rough_time(silent_s)} ago" if silent_s >= 1 else ""
    return printable(f"running since {rough_time(now - running.started_at)}: {', '.join(parts)}{since} "
                     f"(process {running.pid} on {running.host})")  # fmt: skip


def branch_cells(status: BranchStatus) -> tuple[str, ...]:
    """Return a branch, its size, perplexity and KL divergence, its loaders' results and its seconds, as texts."""
    return (status.branch, *_figures(status), _loaders(status), _seconds(status))


def _seconds(status: BranchStatus) -> str:
    return f"{sum(status.receipt.seconds.values()):.1f}" if status.receipt else ""


def _status_table(statuses: Sequence[BranchStatus], columns: Sequence[str]) -> Table:
    table = new_table(columns, numbers=_NUMBERS, folding=_FOLDING)
    for status in statuses:
        size, perplexity, divergence = _figures(status)
        cells = {
            "Branch": status.branch,
            "Size": size,
            "Perplexity": perplexity,
            "KL": divergence,
            "Loaders": _loaders(status),
            "Commit": _short(status.commit),
            "Seconds": _seconds(status),
        }
        add_row(table, *(cells[column] for column in columns))
    return table


def _short(commit: str | None) -> str:
    return "not read" if commit is None else commit[:8] or "none"


def _figures(status: BranchStatus) -> tuple[str, str, str]:
    """Return size, perplexity and KL divergence, or the words shown instead."""
    if status.receipt is None:
        blocks = f"{status.blocks_done} of {status.num_blocks} blocks"
        return blocks if status.state == "unfinished" else status.state, "", ""
    size, quality = format_bytes(status.receipt.provenance.weights_bytes), status.receipt.provenance.quality
    if quality is None:
        return size, "unmeasured", ""
    if "evaluate" in status.stages_missing:
        return size, "outdated", ""
    return size, f"{quality.perplexity:.4f}", f"{quality.kl_divergence:#.3g}"


def _loaders(status: BranchStatus) -> str:
    records = status.receipt.provenance.loaders if status.receipt else ()
    if status.receipt and "verify" in status.stages_missing:
        return "outdated" if records else "unproven"
    return ", ".join(f"{record.loader} {_MARKS[record.status]}" for record in records)


def _loader_lines(statuses: Sequence[BranchStatus]) -> list[str]:
    """Return the loaders' results of each branch, in one line if they are the same for all."""
    found = {status.branch: loaders for status in statuses if (loaders := _loaders(status))}
    if len(found) == len(statuses) > 1 and len(set(found.values())) == 1:
        return [f"every branch: {next(iter(found.values()))}"]
    return [f"{branch}: {loaders}" for branch, loaders in found.items()]


def print_loaders(receipts: Sequence[Receipt], console: Console) -> None:
    """Print one row per branch and loader, then what each loader computed with, and why one did not run or failed."""
    columns = ("Branch", "Loader", "Status", "Relative\nerror", "Top-1", "Tokens\nequal")
    table = new_table(columns, numbers=_NUMBERS, folding=_FOLDING)
    notes: dict[str, list[str]] = {}
    for receipt in receipts:
        branch = receipt.provenance.branch
        for record in receipt.provenance.loaders:
            add_row(table, branch, record.loader, _MARKS[record.status], *_measured(record))
            for note in _notes(record):
                notes.setdefault(note, []).append(branch)
    console.print(table)
    for note, branches in notes.items():
        print_line(console, note if len(branches) == len(receipts) else f"{', '.join(branches)}: {note}")


def _measured(record: LoaderRecord) -> tuple[str, str, str]:
    if record.relative_error is None or record.top1_agreement is None:
        return "", "", ""
    tokens = f"{record.tokens_equal}/{record.tokens_generated}"
    return f"{record.relative_error:.5f}", f"{record.top1_agreement:.3f}", tokens


def _notes(record: LoaderRecord) -> list[str]:
    used = f"{record.loader}: {record.dtype} on {record.device}, {record.kernel}" if record.device else ""
    reason = f"{record.loader} {record.status}: {record.reason}" if record.reason else ""
    return [note for note in (used, reason) if note]


def loader_reasons(statuses: Sequence[BranchStatus]) -> list[str]:
    """Return why loaders did not run or failed, each reason once."""
    found: dict[str, None] = {}
    for status in statuses:
        for record in status.receipt.provenance.loaders if status.receipt else ():
            if record.reason:
                found[f"{record.loader} {record.status}: {record.reason}"] = None
    return list(found)
