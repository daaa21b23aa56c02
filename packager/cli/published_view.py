"""The report on a published repository: a table and findings for people, JSON for machines."""

from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from rich.text import Text

from packager.cli.tables import add_row, counted, finding_line, fits, new_table, print_line, verdict_line
from packager.publish.published import BranchReport, PublishedFinding, PublishedReport
from packager.receipt import LoaderRecord
from packager.system.text import format_bytes, printable


def print_published(report: PublishedReport, console: Console) -> None:
    """Print one row per branch with what was checked, then one line per finding, then the verdict.

    On a terminal that is too narrow, what was checked of a branch is a line below the table.
    """
    table = _branch_table(report, proven=True)
    if fits(table, console):
        console.print(table)
    else:
        console.print(_branch_table(report, proven=False))
        for proof in report.branches:
            print_line(console, f"{printable(proof.branch)}: {'; '.join(checks_line(proof).splitlines())}")
    for finding in sorted(report.findings, key=lambda finding: finding.severity != "error"):
        print_line(
            console, finding_line(finding.severity, finding.rule, _where(finding), finding.message, finding.hint)
        )
    errors = sum(finding.severity == "error" for finding in report.findings)
    rows = "not compared" if report.card_rows is None else f"{counted(report.card_rows, 'row')} compared"
    facts = f"the table of main's card: {rows}; {_signatures(report)}{_history(report)}"
    print_line(console, verdict_line(errors=errors, warnings=len(report.findings) - errors, facts=facts))


def published_json(report: PublishedReport) -> dict[str, object]:
    """Return the report as JSON values."""
    return {
        "where": report.where,
        "full": report.full,
        "passed": report.passed,
        "branches": [_branch_json(proof) for proof in report.branches],
        "release": {
            "signatures_checked": report.signatures_checked,
            "signed": asdict(report.release) if report.release else None,
            "findings": [asdict(finding) for finding in report.release_findings],
            "history": asdict(report.history) if report.history else None,
        },
        "card": {
            "rows_compared": report.card_rows,
            "findings": [asdict(finding) for finding in report.card_findings],
        },
    }


def checks_line(proof: BranchReport) -> str:
    """Return what was checked of a branch, one check per line."""
    parts = []
    if proof.num_stated:
        parts.append(f"{counted(proof.num_stated, 'file')}: sha256 as the repository states it")
    if proof.num_read:
        parts.append(f"{counted(proof.num_read, 'file')}: content read")
    if proof.num_tensors:
        parts.append(f"{counted(proof.num_tensors, 'tensor')}: {'audited' if proof.audited else 'header read'}")
    if proof.signed:
        parts.append(f"signed by {proof.signed.keyid[:16]}")
    parts += [_loader(record) for record in proof.loaders]
    return "\n".join(parts) or "nothing"


def _signatures(report: PublishedReport) -> str:
    if not report.signatures_checked:
        return "signatures: not checked, no --trusted-key"
    if report.release is None:
        return "no valid release statement"
    return f"release {report.release.number}, signed by {report.release.keyid[:16]}"


def _history(report: PublishedReport) -> str:
    """Return how much of main's history was searched, "" if it was all of it."""
    history = report.history
    if history is None or history.searched >= history.commits:
        return ""
    return f"; earlier releases: the newest {history.searched} of {history.commits} commits of main were searched"


def _loader(record: LoaderRecord) -> str:
    figures = ""
    if record.relative_error is not None:
        figures = f", relative error {record.relative_error:.5f}, top-1 {record.top1_agreement:.3f}"
    return f"{record.loader}: {record.status}{figures or f', {record.reason}'}"


def _branch_json(proof: BranchReport) -> dict[str, object]:
    loaders = [record.model_dump() for record in proof.loaders]
    return {**asdict(proof), "passed": proof.passed, "loaders": loaders}


def _branch_table(report: PublishedReport, *, proven: bool) -> Table:
    columns = ("Branch", "Commit", "Files", "Size", *(("Proven",) if proven else ()), "Verdict")
    title = f"Published in {report.where}"
    table = new_table(columns, title=title, numbers=("Files", "Size"), folding=("Branch",))
    for proof in report.branches:
        size = format_bytes(proof.total_bytes)
        cells = [printable(proof.branch), proof.commit[:12], f"{proof.num_files:,}", size]
        cells += [checks_line(proof)] if proven else []
        add_row(table, *cells, _branch_verdict(proof.passed, len(proof.findings)))
    return table


def _branch_verdict(passed: bool, num_findings: int) -> Text:
    findings = counted(num_findings, "finding") if num_findings else ""
    if passed:
        return Text.assemble(("ok", "bold green"), f", {findings}" if findings else "")
    return Text(findings, "bold red")


def _where(finding: PublishedFinding) -> str:
    branch = printable(finding.branch)
    return f"{branch}: {finding.file}" if finding.file else branch
