"""A rollback's plan and report for people, as a table, and for machines, as JSON with exact integers."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import UTC, datetime

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from packager.audit.finding import printable
from packager.publish_plan import FileChange
from packager.rollback import BranchRollback, RollbackPlan, RollbackReport
from packager.sizes import format_bytes
from packager.targets import CommitRecord

_SHOWN_FILES = 3


def print_plan(plan: RollbackPlan, console: Console) -> None:
    """Print what a rollback will do, one row per branch in the order they are put back."""
    console.print(_table(plan, {}))
    _print_release(plan, console)


def print_report(report: RollbackReport, console: Console) -> None:
    """Print what a rollback did, or would do after a dry run."""
    commits = {outcome.plan.branch: outcome.commit for outcome in report.outcomes}
    console.print(_table(report.plan, {} if report.dry_run else commits))
    _print_release(report.plan, console)
    if report.dry_run:
        console.print("dry run: nothing was written", markup=False, highlight=False)
    elif not report.plan.changing:
        console.print("nothing to do", markup=False, highlight=False)


def plan_json(plan: RollbackPlan) -> dict[str, object]:
    """Return the plan as values that `json` can write."""
    return {
        "where": plan.where,
        "release": asdict(plan.release) if plan.release else None,
        "branches": [_branch_json(entry) for entry in plan.branches],
    }


def report_json(report: RollbackReport) -> dict[str, object]:
    """Return the report as values that `json` can write."""
    return {
        **plan_json(report.plan),
        "dry_run": report.dry_run,
        "branches": [
            {**_branch_json(outcome.plan), "commit": outcome.commit, "seconds": round(outcome.seconds, 3)}
            for outcome in report.outcomes
        ],
        "notes": list(report.notes),
    }


def _table(plan: RollbackPlan, commits: dict[str, str]) -> Table:
    title = Text(f"{'Put back' if commits else 'To put back'} in {plan.where}")
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for heading in ("Branch", "Action"):
        table.add_column(heading, no_wrap=True)
    for heading in ("From (UTC)", "To (UTC)", "Changes"):
        table.add_column(heading, overflow="fold", min_width=16)  # a date
    if commits:
        table.add_column("Commit", no_wrap=True)
    for entry in plan.branches:
        commit = (commits[entry.branch][:12],) if commits else ()
        ends = (_commit(record, entry.branch) if record else "" for record in (entry.head, entry.to))
        cells = (printable(entry.branch), entry.action, *ends, _changes(entry), *commit)
        table.add_row(*map(Text, cells))
    return table


def _print_release(plan: RollbackPlan, console: Console) -> None:
    if plan.release:
        when = f"{_date(plan.release)} UTC, when main became {_named(plan.release)}"
        text = f"the release goes back to what was there on {when}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _commit(record: CommitRecord, branch: str) -> str:
    return f"{record.commit[:12]}\n{_date(record)}\n{printable(record.title.removeprefix(f'{branch}: '))}"


def _named(record: CommitRecord) -> str:
    return f"{record.commit[:12]} ({printable(record.title)})"


def _date(record: CommitRecord) -> str:
    try:
        return datetime.fromtimestamp(record.time_s, UTC).strftime("%Y-%m-%d %H:%M")
    except (OverflowError, OSError, ValueError):  # git keeps any number as a time
        return f"@{record.time_s}"


def _changes(entry: BranchRollback) -> str:
    """Return what differs, a line each, or why nothing does."""
    lines = [entry.reason] if entry.reason else []
    for title, changes in (("added", entry.added), ("changed", entry.changed), ("removed", entry.removed)):
        if changes:
            lines.append(f"{title} {_files(changes)}")
    return "\n".join(lines)


def _files(changes: Sequence[FileChange]) -> str:
    shown = ", ".join(
        f"{printable(change.name)} ({format_bytes(change.size_bytes)})" for change in changes[:_SHOWN_FILES]
    )
    more = len(changes) - _SHOWN_FILES
    total = format_bytes(sum(change.size_bytes for change in changes))
    return shown + (f" and {more} more, {total} in all" if more > 0 else "")


def _branch_json(entry: BranchRollback) -> dict[str, object]:
    return {key: value for key, value in asdict(entry).items() if key != "files"}
