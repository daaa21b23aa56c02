"""The commands that look at or change what others see: `publish`, `verify-published`, `rollback`."""

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from packager.cli.options import (
    DIST,
    CacheOption,
    Device,
    DeviceOption,
    DistOption,
    Format,
    FormatOption,
    QuietOption,
    RecipePath,
    YesOption,
    open_recipe,
    options_of,
    terminal_of,
)
from packager.errors import AuditError, LoaderError, PublishError

if TYPE_CHECKING:
    from collections.abc import Callable

    from packager.publish.plan import PublishPlan
    from packager.publish.published import LoaderSite
    from packager.publish.rollback import RollbackPlan

RepositoryAddress = Annotated[
    str, typer.Argument(metavar="REPO", help="namespace/name on the Hub, a git remote's URL, or a published folder.")
]
BranchesOption = Annotated[
    list[str] | None, typer.Option("--branch", metavar="NAME", help="This branch only; may be repeated.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print what would change and change nothing.")]


def publish(
    recipe: RecipePath,
    dist: DistOption = DIST,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    tag: Annotated[str, typer.Option(help="Name main's commit, such as v1.0, when everything is published.")] = "",
    format: FormatOption = Format.text,  # noqa: A002
    quiet: QuietOption = False,
) -> None:
    """Bring the built variants to their branches.

    The target is compared with what was built, and the plan printed: what is created, updated and left alone, what is
    sent and what is there already. Then one commit per changed branch, main last, each read back; what is there is not
    sent again, so a run that was killed is simply run again. It builds nothing.

    The Hub's token comes from HF_TOKEN, `hf auth login` or a CI job's identity, a git remote's from PACKAGER_GIT_TOKEN.

    Exits with 10 if a variant is not ready, a required loader has not passed or the target refuses, with 11 if a built
    folder or the published files were edited, with 7 if a folder fails the audit.
    """
    from packager.cli.publish_view import print_plan, print_report, report_json
    from packager.pipeline.flow import publish as run_publish

    terminal, recipe_file = open_recipe(recipe, quiet=quiet)
    report = run_publish(
        recipe_file,
        options_of(dist, Device.cpu, None),
        terminal,
        dry_run=dry_run,
        show_plan=lambda plan: print_plan(plan, terminal.err),
        consent=consent("publish", yes=yes),
        tag=tag,
    )
    if format is Format.json:
        terminal.result(report_json(report))
    else:
        print_report(report, terminal.out)


def verify_published(
    repository: RepositoryAddress,
    branch: BranchesOption = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full", help="Download, hash and audit every file, a branch at a time, in the temporary folder (TMPDIR)."
        ),
    ] = False,
    loaders: Annotated[
        bool,
        typer.Option(
            "--loaders",
            help="Let the loaders that each record names open what was downloaded; means --full, and needs torch.",
        ),
    ] = False,
    device: DeviceOption = Device.auto,
    cache: CacheOption = None,
    dist: DistOption = DIST,
    format: FormatOption = Format.text,  # noqa: A002
    quiet: QuietOption = False,
) -> None:
    """Check a published repository against its own records.

    Needs no build, no recipe and, without --loaders, no torch. Each branch's provenance.json must be that of this
    repository and branch, and list exactly the files that are there, by size and sha256; the headers of the weights
    must be what was declared; the card of main must list every branch with its figures (not looked at if --branch names
    others only). Without --full the repository's word is taken for the sha256 of large files, of which only headers are
    read; a git-lfs server sends them whole all the same.

    With --loaders those of each record that can run here open the branch, and must compute what our own float32 forward
    of the same files does; the others are reported as not run. Exits with 0 if nothing is wrong, with 8 if a loader
    failed, with 7 if anything else is wrong, with 10 if the repository cannot be read.
    """
    from packager.cli.published_view import print_report, report_json
    from packager.publish.published import verify_published as run_verify
    from packager.publish.targets.resolve_target import resolve_target

    terminal = terminal_of(quiet=quiet)
    site = _loader_site(device, cache) if loaders else None
    target = resolve_target(repository, dist, os.environ, terminal.log)
    report = run_verify(target, terminal.log, branches=branch or (), full=full, loaders=site)
    if format is Format.json:
        terminal.result(report_json(report))
    else:
        print_report(report, terminal.out)
    if not report.passed:
        raise typer.Exit(LoaderError.exit_code if report.loader_failed else AuditError.exit_code)


def _loader_site(device: Device, cache: Path | None) -> "LoaderSite":
    from packager.model.devices import choose_device
    from packager.pipeline.build_state import require_build_extra
    from packager.publish.published import LoaderSite

    require_build_extra()
    options = options_of(DIST, device, cache)
    return LoaderSite(device=choose_device(options.device), cache=options.cache, environ=options.environ)


def rollback(
    repository: RepositoryAddress,
    branch: BranchesOption = None,
    to: Annotated[
        str,
        typer.Option(
            metavar="COMMIT", help="Go back to this commit, of the one --branch, or of main for the whole release."
        ),
    ] = "",
    again: Annotated[
        bool, typer.Option("--again", help="Go one further back from where the last rollback led.")
    ] = False,
    dry_run: DryRunOption = False,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Put back where others can see it without being asked.")
    ] = False,
    dist: DistOption = DIST,
    format: FormatOption = Format.text,  # noqa: A002
    quiet: QuietOption = False,
) -> None:
    """Put published branches back to what they held before.

    Each is put back by a new commit. With --branch, each goes back to the commit before its head. Without, the whole
    release goes back to the one before: main is published last, so every branch gets what it held when main's commit
    before its head was made, or, if a publish did not get as far as main, at main's head. Branches that were not there
    then are left alone, and so are those whose head somebody else made. Variants go first, main last; nothing is
    deleted from the history.

    What is back already is not put back twice: run a killed rollback again to finish it. Before anything changes that
    others see it asks; where nobody can answer, it needs --yes. Exits with 10 if there is nothing to go back to,
    somebody else committed meanwhile, or the target refuses.
    """
    from packager.cli.rollback_view import print_plan, print_report, report_json
    from packager.publish.rollback import RollbackRequest
    from packager.publish.rollback import rollback as run_rollback
    from packager.publish.targets.resolve_target import resolve_target

    terminal = terminal_of(quiet=quiet)
    target = resolve_target(repository, dist, os.environ, terminal.log)
    report = run_rollback(
        target,
        RollbackRequest(branches=tuple(branch or ()), to=to, further_back=again),
        terminal.log,
        dry_run=dry_run,
        show_plan=lambda plan: print_plan(plan, terminal.err),
        confirm=consent("put back", yes=yes or not target.is_public),
    )
    if format is Format.json:
        terminal.result(report_json(report))
    else:
        print_report(report, terminal.out)


def consent(what: str, *, yes: bool) -> "Callable[[PublishPlan | RollbackPlan], None]":
    """Return what asks a person before anything changes that others see; it raises if the answer is not yes.

    Args:
        what: is done to the branches, for the question.
        yes: the answer, if it is known.
    """

    def ask(plan: "PublishPlan | RollbackPlan") -> None:
        from packager.system.text import printable

        if yes:
            return
        if not sys.stdin.isatty():
            raise PublishError(
                "nothing was changed: others see this repository, and nobody is here to be asked",
                where=plan.where,
                hint="look at the plan with --dry-run, then run again with --yes",
            )
        if not typer.confirm(f"{plan.where}: {what} {printable(', '.join(plan.effects))}?", err=True):
            raise PublishError("nothing was changed: the answer was no", where=plan.where)

    return ask
