"""A publish plan and its report: a list of changes and a table for people, JSON for machines."""

from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console

from packager.cli.tables import add_row, new_table, print_line
from packager.publish.branches import BranchOutcome, PublishReport
from packager.publish.plan import BranchPlan, FileChange, PublishPlan, plan_line
from packager.system.text import format_bytes, printable

_SHOWN_FILES = 12
# Colours of a line by its sign: added, changed, removed, unchanged.
STYLES = {"+": "green", "~": "yellow", "-": "red", " ": ""}
_SIGNS = {"create": "+", "update": "~", "unchanged": " "}
_DONE = {"create": "created", "update": "updated", "unchanged": "unchanged"}


def print_publish_plan(plan: PublishPlan, console: Console) -> None:
    """Print every branch in publishing order, and below it every file that will change."""
    print_line(console, f"To publish in {plan.where}:\n")
    width = max(len(entry.branch) for entry in plan.branches)
    for entry in plan.branches:
        print_line(console, _headline(entry, width), STYLES[_SIGNS[entry.action]])
        for sign, line in change_lines(entry.added, entry.changed, entry.removed):
            print_line(console, f"    {line}", STYLES[sign])
        if entry.parent and entry.foreign_author:
            print_line(console, f"    on top of {entry.parent[:12]} by {printable(entry.foreign_author)}")
    for line in plan.final_steps:
        print_line(console, f"+ {line}", STYLES["+"])
    print_line(console, "")
    _print_left_alone(plan, console)
    print_warnings(plan.warnings, console)


def print_publish_report(report: PublishReport, console: Console) -> None:
    """Print one row per published branch; after a dry run, the plan."""
    if report.dry_run:
        print_publish_plan(report.plan, console)
        print_line(console, plan_line(report.plan))
        print_line(console, "dry run: nothing was written")
        return
    title = f"Published in {report.plan.where}"
    table = new_table(("Branch", "Result", "Size", "Sent", "Commit"), title=title, numbers=("Size", "Sent"))
    for outcome in report.outcomes:
        plan, commit = outcome.plan, (outcome.commit or "")[:12]
        sizes = (format_bytes(plan.total_bytes), format_bytes(plan.uploaded_bytes))
        add_row(table, plan.branch, _DONE[plan.action], *sizes, commit)
    console.print(table)
    _print_left_alone(report.plan, console)
    print_warnings(report.plan.warnings, console)


def change_lines(
    added: Sequence[FileChange], changed: Sequence[FileChange], removed: Sequence[FileChange]
) -> Sequence[tuple[str, str]]:
    """Return (sign, line) for every file that differs; of more than 12 files, for the 12 largest and their rest."""
    signed = [(sign, change) for sign, changes in (("+", added), ("~", changed), ("-", removed)) for change in changes]
    largest = sorted(signed, key=lambda pair: -pair[1].size_bytes)[:_SHOWN_FILES]
    shown = [pair for pair in signed if pair in largest]
    width = max((len(change.name) for _, change in shown), default=0)
    lines = [
        (sign, f"{sign} {printable(change.name):<{width}}  {format_bytes(change.size_bytes):>9}")
        for sign, change in shown
    ]
    rest = [change.size_bytes for sign, change in signed if (sign, change) not in shown]
    return [*lines, (" ", f"  and {len(rest)} more, {format_bytes(sum(rest))}")] if rest else lines


def print_warnings(warnings: Sequence[str], console: Console) -> None:
    """Print one line per warning."""
    for line in warnings:
        print_line(console, f"warning: {line}", STYLES["~"])


def _headline(plan: BranchPlan, width: int) -> str:
    size = f"{plan.num_files} files, {format_bytes(plan.total_bytes)}"
    there = f", {format_bytes(plan.present_bytes)} there already" if plan.present_bytes else ""
    sending = f"; {format_bytes(plan.uploaded_bytes)} to send{there}" if plan.action != "unchanged" else ""
    return f"{_SIGNS[plan.action]} {plan.branch:<{width}}  {plan.action}: {size}{sending}"


def publish_plan_json(plan: PublishPlan) -> dict[str, object]:
    """Return the plan as JSON values."""
    return {
        "where": plan.where,
        "branches": [_branch_json(entry) for entry in plan.branches],
        "left_alone": list(plan.left_alone),
        "final_steps": list(plan.final_steps),
        "warnings": list(plan.warnings),
        "written_bytes": plan.written_bytes,
        "uploaded_bytes": plan.uploaded_bytes,
    }


def publish_report_json(report: PublishReport) -> dict[str, object]:
    """Return the report as JSON values."""
    return {
        **publish_plan_json(report.plan),
        "dry_run": report.dry_run,
        "branches": [_outcome_json(outcome) for outcome in report.outcomes],
        "notes": list(report.notes),
    }


def _print_left_alone(plan: PublishPlan, console: Console) -> None:
    if plan.left_alone:
        print_line(console, f"left alone: {printable(', '.join(plan.left_alone))}")


def _branch_json(plan: BranchPlan) -> dict[str, object]:
    return {**asdict(plan), "written_bytes": plan.written_bytes, "uploaded_bytes": plan.uploaded_bytes}


def _outcome_json(outcome: BranchOutcome) -> dict[str, object]:
    return {**_branch_json(outcome.plan), "commit": outcome.commit, "seconds": round(outcome.seconds, 3)}
