"""An audit's report: lines for people, JSON for machines."""

from dataclasses import asdict

from rich.console import Console

from packager.cli.tables import counted, finding_line, print_line, verdict_line
from packager.prove.audit import AuditReport, Facts, Finding
from packager.publish.published.audited import AuditedBranch
from packager.system.text import format_bytes, printable


def print_audit(report: AuditReport, console: Console, remote: AuditedBranch | None = None) -> None:
    """Print one line per finding, errors first, then one line with the verdict and the facts.

    Args:
        report: of the audit.
        console: gets the lines.
        remote: the branch, if it was audited where it lies.
    """
    for finding in (*report.errors, *report.warnings):
        line = finding_line(finding.severity, finding.code, _where(finding), finding.message, finding.hint)
        print_line(console, line)
    facts = _facts_line(report.facts)
    if remote is not None:
        read = f"{format_bytes(remote.weights_bytes)} of them read"
        values = f"values of {report.facts.linears_read:,} linears"
        facts += f", {read}, {values}; {printable(remote.branch)} of {printable(remote.where)}, {remote.commit[:12]}"
    print_line(console, verdict_line(errors=len(report.errors), warnings=len(report.warnings), facts=facts))


def audit_json(report: AuditReport, remote: AuditedBranch | None = None) -> dict[str, object]:
    """Return the report as JSON values: passed, facts, and every finding with all its locations.

    Args:
        report: of the audit.
        remote: the branch, if it was audited where it lies; then the values name it.
    """
    elsewhere: dict[str, object] = {}
    if remote is not None:
        elsewhere = {
            "repository": remote.where,
            "branch": remote.branch,
            "commit": remote.commit,
            "weights_bytes_read": remote.weights_bytes,
        }
    return {
        "passed": report.passed,
        **elsewhere,
        "facts": asdict(report.facts),
        "findings": [{**asdict(finding), "also": list(finding.also)} for finding in report.findings],
    }


def _where(finding: Finding) -> str:
    return f"{finding.where} (and {len(finding.also)} more)" if finding.also else finding.where


def _facts_line(facts: Facts) -> str:
    declared = {"group_size": facts.group_size, "desc_act": facts.desc_act, "sym": facts.sym}
    parts = [f"{'unknown' if facts.bits is None else facts.bits} bits"]
    parts += [f"{name} {'unknown' if value is None else value}" for name, value in declared.items()]
    parts.append(counted(facts.num_linears, "quantized linear"))
    parts.append(f"{counted(facts.tensors_checked, 'tensor')}, {format_bytes(facts.weights_bytes)}")
    return ", ".join(parts)
