"""A publish plan or report as Markdown, for the summary of a CI job that people read before they approve it."""

from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from packager.card.markdown import inline
from packager.publish.branches import BranchOutcome, PublishReport
from packager.publish.plan import BranchPlan
from packager.publish.saved_plan import read_plan
from packager.system.files import sha256_file
from packager.system.text import format_bytes, printable

if TYPE_CHECKING:
    from packager.pipeline.compare_published import BranchDifference

_SHOWN_LINES = 60  # of each text
_SHOWN_FILES = 200  # of each branch: GitHub refuses a summary of more than 1 MiB


def publish_report_markdown(
    report: PublishReport, plan_file: Path | None, differences: "Sequence[BranchDifference]" = ()
) -> str:
    """Return the plan of a dry run, or the result of a publish.

    Args:
        report: the result.
        plan_file: the saved plan, whose digests are shown, None if there is none.
        differences: of the build and what is published; shown with the changed lines of cards and configs.
    """
    plan = report.plan
    heading = "Publish plan for" if report.dry_run else "Published in"
    lines = [f"## {heading} {_text(plan.where)}", ""]
    lines += [
        "| branch | action | files | size | to send | present head | new head |",
        "| --- | --- | ---: | ---: | ---: | --- | --- |",
        *map(_row, report.outcomes),
        "",
    ]
    lines += [f"- {_text(line)}" for line in plan.final_steps]
    if plan.left_alone:
        lines.append(f"- left alone: {_text(', '.join(plan.left_alone))}")
    lines += [f"- **warning**: {_text(line)}" for line in plan.warnings]
    if plan_file:
        lines += _digests(plan_file)
    for entry in plan.branches:
        lines += _changes(entry)
    for each in differences:
        lines += _texts(each)
    return "\n".join(lines) + "\n"


def _row(outcome: BranchOutcome) -> str:
    plan = outcome.plan
    present = plan.parent[:12] if plan.parent else ""
    if plan.parent and plan.foreign_author:
        present += f" by {plan.foreign_author}"
    new = outcome.commit[:12] if outcome.commit and outcome.commit != plan.parent else ""
    sizes = (format_bytes(plan.total_bytes), format_bytes(plan.uploaded_bytes))
    return f"| {' | '.join(map(_text, (plan.branch, plan.action, f'{plan.num_files}', *sizes, present, new)))} |"


def _digests(plan_file: Path) -> Iterator[str]:
    """Yield what the plan file binds: its own digest, the recipe's, and the signed release."""
    saved = read_plan(plan_file)
    yield f"- sha256 of the plan: `{sha256_file(plan_file)}`"
    yield f"- recipe `{saved.subject.recipe}`, templates `{saved.subject.templates}`"
    if saved.release:
        yield f"- release {saved.release.number}, to be signed by the key `{saved.release.keyid}`"
    else:
        yield "- **not signed**"


def _changes(plan: BranchPlan) -> Iterator[str]:
    kinds = (("+", plan.added), ("~", plan.changed), ("-", plan.removed))
    changes = [(sign, change) for sign, each in kinds for change in each]
    if not changes:
        return
    counts = f"{len(plan.added)} added, {len(plan.changed)} changed, {len(plan.removed)} removed"
    yield from ("", f"<details><summary>{escape(printable(plan.branch))}: {counts}</summary>", "")
    yield from ("| | file | size |", "| --- | --- | ---: |")
    for sign, change in changes[:_SHOWN_FILES]:
        yield f"| {sign} | {_text(change.name)} | {format_bytes(change.size_bytes)} |"
    if len(changes) > _SHOWN_FILES:
        yield f"| | and {len(changes) - _SHOWN_FILES:,} more | |"
    yield from ("", "</details>")


def _texts(difference: "BranchDifference") -> Iterator[str]:
    """Yield the changed lines of a branch's texts. In an HTML block Markdown is text, and `escape` leaves no tag."""
    for name, lines in difference.texts.items():
        shown = lines[:_SHOWN_LINES]
        more = [f"... and {len(lines) - len(shown)} more lines"] if len(lines) > len(shown) else []
        yield from ("", f"<details><summary>{escape(printable(f'{difference.branch}: {name}'))}</summary>", "")
        yield from ("<pre>", *(escape(printable(line)) for line in (*shown, *more)), "</pre>", "", "</details>")


def _text(text: str) -> str:
    return inline(printable(text))
