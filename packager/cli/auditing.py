"""The command `audit`: of a folder, or of a branch where it lies."""

import os
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from packager.cli.options import terminal_of
from packager.errors import AuditError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable

    from packager.publish.published.audited import AuditedBranch
    from packager.publish.targets.branch_address import BranchAddress


class AuditFormat(StrEnum):
    """The format of an audit's result."""

    text = "text"
    json = "json"
    sarif = "sarif"
    junit = "junit"


AuditFormatOption = Annotated[
    AuditFormat,
    typer.Option("--format", help="text for people, json for machines, sarif and junit for the pages of a CI service."),
]


def _existing_place(place: str) -> str:
    """Return a folder's path or an address of a repository; refuse any other text."""
    from packager.publish.targets.branch_address import branch_address

    path = Path(place)
    if not path.is_dir() and branch_address(place, os.environ) is None:
        raise typer.BadParameter(f"{place} is a file, not a folder" if path.exists() else f"there is no folder {place}")
    return place


def audit_command(
    place: Annotated[
        str,
        typer.Argument(
            metavar="DIR|REPO",
            callback=_existing_place,
            help="A checkpoint folder; or hub:namespace/name@BRANCH, a git URL or folder with @BRANCH, a model's page.",
        ),
    ],
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Do not require README.md and provenance.json.")
    ] = False,
    full: Annotated[
        bool,
        typer.Option("--full", help="Of a repository: download every file, in the temporary folder (TMPDIR)."),
    ] = False,
    format: AuditFormatOption = AuditFormat.text,  # noqa: A002
) -> None:
    """Check a checkpoint for everything that runtimes refuse.

    Of a folder it reads the headers of the weights and the small tensors, and hashes the files that provenance.json
    lists. A branch of packager describes its model; the tensors of any other checkpoint are compared with what
    transformers builds from its config.json, if the build extra is installed.

    A branch of a repository is audited where it lies: name it by hub:namespace/name, a git URL, or the address that a
    browser shows for a model of the Hub, with @BRANCH unless it is main; or by the repository's folder with @BRANCH. Of
    each weights file the header and a sample of the values are read, less than 2 MB together, and the last line says of
    how many linears; --full reads everything. Tokens are those of publish, and a public repository needs none.

    --format sarif is for code scanning pages such as GitHub's, --format junit for pages of test results. Exits with 0
    if there is no error (there may be warnings), with 7 if there is one, with 10 if a repository cannot be read.
    packager fix repairs what is certain.
    """
    from packager.cli.audit_formats import audit_junit, audit_sarif
    from packager.cli.audit_view import audit_json, print_audit
    from packager.inputs.describe_in_child import description_by_transformers
    from packager.prove.audit import audit
    from packager.publish.targets.branch_address import branch_address

    terminal = terminal_of()
    folder = Path(place)
    address = None if folder.is_dir() else branch_address(place, os.environ)
    remote = None
    if address is not None:
        remote = _audit_remote(address, terminal.log, full=full, complete=not weights_only)
        report = remote.report
    elif full:
        raise UsageError("--full is for repositories", where=place, hint="a folder is always read whole: leave it out")
    else:
        report = audit(folder, complete=not weights_only, describe=description_by_transformers())
    if format is AuditFormat.json:
        terminal.result(audit_json(report, remote))
    elif format is AuditFormat.sarif:
        terminal.write(audit_sarif(report, remote))
    elif format is AuditFormat.junit:
        terminal.write(audit_junit(report, place))
    else:
        print_audit(report, terminal.out, remote)
    if not report.passed:
        raise typer.Exit(AuditError.exit_code)


def _audit_remote(
    address: "BranchAddress", log: "Callable[[str], None]", *, full: bool, complete: bool
) -> "AuditedBranch":
    """Audit a branch where it lies; what git fetches goes to a folder that is removed."""
    from packager.inputs.describe_in_child import description_by_transformers
    from packager.publish.published.audited import audit_published
    from packager.publish.targets.resolve_target import resolve_target
    from packager.system.scratch import ScratchFolder

    with ScratchFolder("remote") as scratch:
        target = resolve_target(address.repository, scratch.path, os.environ, log)
        return audit_published(
            target, address.branch, log, full=full, complete=complete, describe=description_by_transformers()
        )
