"""A rollback's plan and report: a list of changes and a table for people, JSON for machines."""

from dataclasses import asdict
from datetime import UTC, datetime

from rich.console import Console

from packager.cli.publish_view import STYLES, change_lines, print_warnings
from packager.cli.tables import add_row, new_table, print_line
from packager.publish.rollback import BranchRollback, RollbackPlan, RollbackReport
from packager.publish.targets import CommitRecord
from packager.system.text import printable
from packager.variant import MAIN

_RESULTS = {"restore": "put back", "sign": "signed"}


def print_rollback_plan(plan: RollbackPlan, console: Console) -> None:
    """Print every branch in the order of the rollback, and below it every file that will change."""
    print_line(console, f"To put back in {plan.where}:\n")
    width = max(len(entry.branch) for entry in plan.branches)
    for entry in plan.branches:
        _print_branch(entry, width, console)
    print_line(console, "")
    if plan.release:
        when = f"{_date(plan.release)} UTC, when main became {_named(plan.release, MAIN)}"
        print_line(console, f"the release goes back to its state of {when}")
    if plan.signs:
        print_line(console, f"the restored state is signed as release {plan.signs}")
    _print_unlisted(plan, console)
    print_warnings(plan.warnings, console)


def print_rollback_report(report: RollbackReport, console: Console) -> None:
    """Print one row per branch; after a dry run, the plan."""
    if report.dry_run:
        print_rollback_plan(report.plan, console)
        print_line(console, "dry run: nothing was written")
        return
    title = f"Put back in {report.plan.where}"
    table = new_table(("Branch", "Result", "Files of", "Commit"), title=title, folding=("Branch",))
    for outcome in report.outcomes:
        entry = outcome.plan
        action = _RESULTS.get(entry.action, entry.action)
        held = entry.to.commit[:12] if entry.to else ""
        add_row(table, printable(entry.branch), action, held, outcome.commit[:12])
    console.print(table)
    _print_unlisted(report.plan, console)
    print_warnings(report.plan.warnings, console)
    if not report.plan.changing:
        print_line(console, "nothing to do")


def _print_unlisted(plan: RollbackPlan, console: Console) -> None:
    if plan.unlisted:
        names = printable(", ".join(plan.unlisted))
        print_line(
            console,
            f"warning: {names} stays, and the restored card of main does not list it: verify-published reports "
            "card-branch-unlisted until the branch is deleted or published again",
        )


def rollback_plan_json(plan: RollbackPlan) -> dict[str, object]:
    """Return the plan as JSON values."""
    return {
        "where": plan.where,
        "release": asdict(plan.release) if plan.release else None,
        "branches": [_branch_json(entry) for entry in plan.branches],
        "unlisted": list(plan.unlisted),
        "signs": plan.signs,
        "warnings": list(plan.warnings),
    }


def rollback_report_json(report: RollbackReport) -> dict[str, object]:
    """Return the report as JSON values."""
    return {
        **rollback_plan_json(report.plan),
        "dry_run": report.dry_run,
        "branches": [
            {**_branch_json(outcome.plan), "commit": outcome.commit, "seconds": round(outcome.seconds, 3)}
            for outcome in report.outcomes
        ],
        "notes": list(report.notes),
    }


def _print_branch(entry: BranchRollback, width: int, console: Console) -> None:
    sign = "~" if entry.action in ("restore", "sign") else " "
    to = f"to {_named(entry.to, entry.branch)}, {_date(entry.to)} UTC" if entry.to else ""
    line = f"{sign} {printable(entry.branch):<{width}}  {entry.action}: {entry.reason or to}"
    print_line(console, line, STYLES[sign])
    if sign == " ":
        return
    print_line(console, f"    in place of {_named(entry.head, entry.branch)}, {_date(entry.head)} UTC")
    for mark, line in change_lines(entry.added, entry.changed, entry.removed):
        print_line(console, f"    {line}", STYLES[mark])


def _named(record: CommitRecord, branch: str) -> str:
    return f"{record.commit[:12]} ({printable(record.title.removeprefix(f'{branch}: '))})"


def _date(record: CommitRecord) -> str:
    try:
        return datetime.fromtimestamp(record.time_s, UTC).strftime("%Y-%m-%d %H:%M")
    except (OverflowError, OSError, ValueError):  # git keeps any number as a time
        return f"@{record.time_s}"


def _branch_json(entry: BranchRollback) -> dict[str, object]:
    return {key: value for key, value in asdict(entry).items() if key not in ("files", "replacing")}
