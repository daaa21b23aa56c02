"""The command `fix`: a repaired copy of a checkpoint folder."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from packager.cli.options import Format, FormatOption, QuietOption, terminal_of
from packager.cli.publishing import DryRunOption
from packager.errors import AuditError

if TYPE_CHECKING:
    from rich.console import Console

    from packager.prove.repair import RepairReport


def fix_command(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="A GPTQ checkpoint folder, made by any program.",
            exists=True,
            file_okay=False,
            readable=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="NEW", help="The new folder; it must not exist.")],
    dry_run: DryRunOption = False,
    format: FormatOption = Format.text,  # noqa: A002
    quiet: QuietOption = False,
) -> None:
    """Write a copy of a checkpoint with what can be repaired.

    It repairs what is certain, because the tensors or the files themselves decide: the metadata of weights files;
    missing or wrong parameters in config.json and quantize_config.json; v2 zeros, which become v1; desc_act true over
    groups in the order of the columns, which vLLM refuses, and desc_act false over groups in act order, which it
    misreads; groups that are numbered in another order; paths of the machine that made the checkpoint; an auto_map
    without its files; biases that are zero; the names and the index of weights files.

    No weight changes: after a repair of zeros or groups, every weight of every linear is dequantized before and after,
    and compared, before the new folder gets its name. What needs a choice, another file or the base model is left, and
    listed. provenance.json is left out, because it records the old bytes. Audit the new folder with --weights-only.

    Without anything to repair, and with --dry-run, nothing is written. Exits with 0 if no error is left, with 7 if some
    are; the new folder is written all the same.
    """
    from packager.inputs.describe_in_child import description_by_transformers
    from packager.prove.repair import repair

    terminal = terminal_of(quiet=quiet)
    report = repair(folder, output, terminal.log, dry_run=dry_run, describe=description_by_transformers())
    if format is Format.json:
        terminal.result(_repair_json(report))
    else:
        print_repair(report, terminal.out, dry_run=dry_run)
    if not report.passed:
        raise typer.Exit(AuditError.exit_code)


def _repair_json(report: "RepairReport") -> dict[str, object]:
    return {
        "passed": report.passed,
        "output": None if report.output is None else str(report.output),
        "linears_compared": report.num_compared,
        "changes": [asdict(change) for change in report.changes],
        "left": [{**asdict(finding), "also": list(finding.also)} for finding in report.left],
    }


def print_repair(report: "RepairReport", console: "Console", *, dry_run: bool) -> None:
    """Print a line per change, a line per finding that is left, and what was written."""
    from rich.text import Text

    from packager.cli.tables import counted, finding_line, print_line
    from packager.system.text import printable

    for change in report.changes:
        line = Text.assemble(("changed", "green"), f"  {printable(change.where)}: {printable(change.what)}")
        print_line(console, Text.assemble(line, (f"  why: {change.why}", "dim")))
    for finding in sorted(report.left, key=lambda finding: finding.severity != "error"):
        more = f" (and {len(finding.also)} more)" if finding.also else ""
        line = finding_line(finding.severity, finding.code, f"{finding.where}{more}", finding.message, finding.hint)
        print_line(console, Text.assemble("left     ", line))
    changes, left = counted(len(report.changes), "change"), counted(len(report.left), "finding")
    if report.output is not None:
        compared = f", the weights of {counted(report.num_compared, 'linear')} compared" if report.num_compared else ""
        print_line(console, f"written  {printable(str(report.output))}: {changes}{compared}; {left} left")
    else:
        reason = "a dry run" if dry_run and report.changes else "there is nothing to repair"
        print_line(console, f"nothing was written: {reason}; {changes}, {left} left")
