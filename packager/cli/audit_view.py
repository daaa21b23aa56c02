"""An audit's report: lines for people, JSON for machines."""

from dataclasses import asdict

from rich.console import Console

from packager.cli.tables import counted, finding_line, print_line, verdict_line
from packager.prove.audit import AuditReport, Facts, Finding
from packager.system.text import format_bytes


def print_audit(report: AuditReport, console: Console) -> None:
    """Print one line per finding, errors first, then one line with the verdict and the facts."""
    for finding in (*report.errors, *report.warnings):
        line = finding_line(finding.severity, finding.code, _where(finding), finding.message, finding.hint)
        print_line(console, line)
    facts = _facts_line(report.facts)
    print_line(console, verdict_line(errors=len(report.errors), warnings=len(report.warnings), facts=facts))


def audit_json(report: AuditReport) -> dict[str, object]:
    """Return the report as JSON values: passed, facts, and every finding with all its locations."""
    return {
        "passed": report.passed,
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
