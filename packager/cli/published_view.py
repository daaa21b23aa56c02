"""What was proven of a published repository, for people as a table, and for machines as JSON."""

from dataclasses import asdict

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from packager.publish.published import BranchReport, PublishedFinding, PublishedReport
from packager.receipt import LoaderRecord
from packager.system.text import format_bytes, printable

_STYLES = {"error": "bold red", "warning": "yellow"}


def print_report(report: PublishedReport, console: Console) -> None:
    """Print one row per branch with what was proven and how deep, then one line per finding, then the verdict."""
    console.print(_table(report))
    for finding in sorted(report.findings, key=lambda finding: finding.severity != "error"):
        console.print(_line(finding), soft_wrap=True)
    console.print(_verdict(report), soft_wrap=True)


def report_json(report: PublishedReport) -> dict[str, object]:
    """Return the report as values that `json` can write."""
    return {
        "where": report.where,
        "full": report.full,
        "passed": report.passed,
        "branches": [_branch_json(proof) for proof in report.branches],
        "card": {
            "rows_compared": report.card_rows,
            "findings": [asdict(finding) for finding in report.card_findings],
        },
    }


def depth(proof: BranchReport) -> str:
    """Return what was proven of a branch, and by what."""
    parts = []
    if proof.num_stated:
        parts.append(f"{_counted(proof.num_stated, 'file')}: sha256 as the repository states it")
    if proof.num_read:
        parts.append(f"{_counted(proof.num_read, 'file')}: content read")
    if proof.num_tensors:
        parts.append(f"{_counted(proof.num_tensors, 'tensor')}: {'audited' if proof.audited else 'header read'}")
    parts += [_loader(record) for record in proof.loaders]
    return "\n".join(parts) or "nothing"


def _loader(record: LoaderRecord) -> str:
    figures = ""
    if record.relative_error is not None:
        figures = f", relative error {record.relative_error:.5f}, top-1 {record.top1_agreement:.3f}"
    return f"{record.loader}: {record.status}{figures or f', {record.reason}'}"


def _branch_json(proof: BranchReport) -> dict[str, object]:
    loaders = [record.model_dump() for record in proof.loaders]
    return {**asdict(proof), "passed": proof.passed, "loaders": loaders}


def _table(report: PublishedReport) -> Table:
    table = Table(title=Text(f"Published in {report.where}"), title_justify="left", box=box.SIMPLE, pad_edge=False)
    for heading in ("Branch", "Commit"):
        table.add_column(heading, no_wrap=True)
    for heading in ("Files", "Size"):
        table.add_column(heading, no_wrap=True, justify="right")
    table.add_column("Proven", overflow="fold")
    table.add_column("Verdict", no_wrap=True)
    for proof in report.branches:
        size = format_bytes(proof.total_bytes)
        cells = (printable(proof.branch), proof.commit[:12], f"{proof.num_files:,}", size, depth(proof))
        table.add_row(*map(Text, cells), _judged(proof.passed, len(proof.findings)))
    return table


def _judged(passed: bool, num_findings: int) -> Text:
    findings = _counted(num_findings, "finding") if num_findings else ""
    if passed:
        return Text.assemble(("ok", "bold green"), f", {findings}" if findings else "")
    return Text(findings, _STYLES["error"])


def _line(finding: PublishedFinding) -> Text:
    branch = printable(finding.branch)
    place = f"{branch}: {finding.file}" if finding.file else branch
    return Text.assemble(
        (f"{finding.severity:<7}", _STYLES[finding.severity]),
        f"  {finding.rule}  {place}: {finding.message}",
        (f"  hint: {finding.hint}", "dim"),
    )


def _verdict(report: PublishedReport) -> Text:
    errors = sum(finding.severity == "error" for finding in report.findings)
    counts = f"{_counted(errors, 'error')}, {_counted(len(report.findings) - errors, 'warning')}"
    card = "not compared" if report.card_rows is None else f"{_counted(report.card_rows, 'row')} compared"
    verdict = ("passed", "bold green") if report.passed else ("failed", "bold red")
    return Text.assemble(verdict, f"  {counts}; the table of main's card: {card}")


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
