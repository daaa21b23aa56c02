"""A publish plan and its report for people, as a table, and for machines, as JSON with exact integers."""

from collections.abc import Sequence
from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from packager.publish import BranchOutcome, PublishReport
from packager.publish_plan import BranchPlan, FileChange, PublishPlan
from packager.sizes import format_bytes

_SHOWN_FILES = 5


def print_plan(plan: PublishPlan, console: Console) -> None:
    """Print what publishing will do, one row per branch in publishing order."""
    console.print(_table(plan, {}))
    _print_left_alone(plan, console)


def print_report(report: PublishReport, console: Console) -> None:
    """Print what publishing did, or would do after a dry run."""
    commits = {outcome.plan.branch: outcome.commit or "" for outcome in report.outcomes}
    console.print(_table(report.plan, {} if report.dry_run else commits))
    _print_left_alone(report.plan, console)
    if report.dry_run:
        console.print("dry run: nothing was written", markup=False, highlight=False)


def plan_json(plan: PublishPlan) -> dict[str, object]:
    """Return the plan as values that `json` can write."""
    return {
        "where": plan.where,
        "branches": [_branch_json(entry) for entry in plan.branches],
        "left_alone": list(plan.left_alone),
        "written_bytes": plan.written_bytes,
        "uploaded_bytes": plan.uploaded_bytes,
    }


def report_json(report: PublishReport) -> dict[str, object]:
    """Return the report as values that `json` can write."""
    return {
        **plan_json(report.plan),
        "dry_run": report.dry_run,
        "branches": [_outcome_json(outcome) for outcome in report.outcomes],
        "notes": list(report.notes),
    }


def _table(plan: PublishPlan, commits: dict[str, str]) -> Table:
    title = Text(f"{'Published' if commits else 'To publish'} in {plan.where}")
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for heading in ("Branch", "Action"):
        table.add_column(heading, no_wrap=True)
    for heading in ("Size", "To send", "There already"):
        table.add_column(heading, no_wrap=True, justify="right")
    table.add_column("Changes", overflow="fold")
    if commits:
        table.add_column("Commit", no_wrap=True)
    for entry in plan.branches:
        there = entry.total_bytes - entry.uploaded_bytes
        sizes = (format_bytes(entry.total_bytes), format_bytes(entry.uploaded_bytes), format_bytes(there))
        commit = (commits[entry.branch][:12],) if commits else ()
        table.add_row(*(Text(cell) for cell in (entry.branch, entry.action, *sizes, _changes(entry), *commit)))
    return table


def _changes(plan: BranchPlan) -> str:
    """Return what differs, a line each; of a new branch the largest files."""
    if plan.action == "create":
        return "\n".join(_lines("+", sorted(plan.added, key=lambda change: -change.size_bytes)))
    lines = [f"based on {plan.parent[:12]} by {plan.foreign_author}"] if plan.parent and plan.foreign_author else []
    for sign, changes in (("+", plan.added), ("~", plan.changed), ("-", plan.removed)):
        lines.extend(_lines(sign, changes))
    return "\n".join(lines)


def _lines(sign: str, changes: Sequence[FileChange]) -> list[str]:
    shown = [f"{sign} {change.name} {format_bytes(change.size_bytes)}" for change in changes[:_SHOWN_FILES]]
    more = changes[_SHOWN_FILES:]
    return (
        [*shown, f"{sign} {len(more)} more, {format_bytes(sum(each.size_bytes for each in more))}"] if more else shown
    )


def _print_left_alone(plan: PublishPlan, console: Console) -> None:
    if plan.left_alone:
        text = f"left alone: {', '.join(plan.left_alone)}"
        console.print(text, markup=False, highlight=False, soft_wrap=True)


def _branch_json(plan: BranchPlan) -> dict[str, object]:
    return {**asdict(plan), "written_bytes": plan.written_bytes, "uploaded_bytes": plan.uploaded_bytes}


def _outcome_json(outcome: BranchOutcome) -> dict[str, object]:
    return {**_branch_json(outcome.plan), "commit": outcome.commit, "seconds": round(outcome.seconds, 3)}
