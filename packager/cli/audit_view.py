"""An audit's result, for people and for programs."""

from dataclasses import asdict

from rich.console import Console
from rich.text import Text

from packager.prove.audit import AuditReport, Facts, Finding
from packager.system.text import format_bytes

_STYLES = {"error": "bold red", "warning": "yellow"}


def print_report(report: AuditReport, console: Console) -> None:
    """Print one line per finding, errors first, then one line with the verdict and the facts."""
    for finding in (*report.errors, *report.warnings):
        console.print(_line(finding), soft_wrap=True)
    console.print(_summary(report), soft_wrap=True)


def report_json(report: AuditReport) -> dict[str, object]:
    """Return the report as plain JSON values: passed, facts, findings (each with all its places)."""
    return {
        "passed": report.passed,
        "facts": asdict(report.facts),
        "findings": [{**asdict(finding), "also": list(finding.also)} for finding in report.findings],
    }


def _line(finding: Finding) -> Text:
    more = f" (and {len(finding.also)} more)" if finding.also else ""
    return Text.assemble(
        (f"{finding.severity:<7}", _STYLES[finding.severity]),
        f"  {finding.code}  {finding.where}{more}: {finding.message}",
        (f"  hint: {finding.hint}", "dim"),
    )


def _summary(report: AuditReport) -> Text:
    counts = f"{_counted(len(report.errors), 'error')}, {_counted(len(report.warnings), 'warning')}"
    verdict = ("passed", "bold green") if report.passed else ("failed", "bold red")
    return Text.assemble(verdict, f"  {counts}; {_facts_line(report.facts)}")


def _facts_line(facts: Facts) -> str:
    declared = {"group_size": facts.group_size, "desc_act": facts.desc_act, "sym": facts.sym}
    parts = [f"{'unknown' if facts.bits is None else facts.bits} bits"]
    parts += [f"{name} {'unknown' if value is None else value}" for name, value in declared.items()]
    parts.append(f"{_counted(facts.num_linears, 'quantized linear')}")
    parts.append(f"{_counted(facts.tensors_checked, 'tensor')}, {format_bytes(facts.weights_bytes)}")
    return ", ".join(parts)


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
