"""The commands that work on published repositories: `publish`, `verify-published`, `rollback`."""

import os
import tempfile
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from packager.cli.consent import ask_for_consent
from packager.cli.diff_view import difference_json, print_differences
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
from packager.cli.signing import (
    MinReleaseOption,
    SignKeyOption,
    TrustedKeyOption,
    UnsignedOption,
    signing_keys,
    trust_of,
)
from packager.errors import AuditError, LoaderError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from packager.pipeline.compare_published import BranchDifference
    from packager.pipeline.saved_publish import PlanFile
    from packager.prove.environments import RuntimeContext
    from packager.publish.branches import PublishReport
    from packager.system.terminal import Terminal

RepositoryAddress = Annotated[
    str,
    typer.Argument(
        metavar="REPO",
        help="namespace/name in --dist, else on the Hub; hub:namespace/name; a git URL; or a published folder.",
    ),
]
BranchesOption = Annotated[
    list[str] | None, typer.Option("--branch", metavar="NAME", help="Only this branch; may be given several times.")
]
DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print what would change, and change nothing.")]


class PublishFormat(StrEnum):
    """The format of a publish's result."""

    text = "text"
    json = "json"
    markdown = "markdown"


PublishFormatOption = Annotated[
    PublishFormat,
    typer.Option("--format", help="text for people, json for machines, markdown for a CI job's summary."),
]
TagOption = Annotated[
    str, typer.Option("--tag", help="Tag main's commit with this name, such as v1.0, at the end, with release notes.")
]
SavePlanOption = Annotated[
    Path | None, typer.Option("--save-plan", metavar="FILE", help="Save the plan of a dry run, with every digest.")
]
DiffOption = Annotated[
    bool,
    typer.Option("--diff", help="With --dry-run: why branches differ, and the changed lines of cards and configs."),
]
PlanOption = Annotated[
    Path | None, typer.Option("--plan", metavar="FILE", help="Publish exactly this saved plan, without a question.")
]


def publish_command(
    recipe: RecipePath,
    dist: DistOption = DIST,
    dry_run: DryRunOption = False,
    diff: DiffOption = False,
    yes: YesOption = False,
    tag: TagOption = "",
    save_plan: SavePlanOption = None,
    plan: PlanOption = None,
    sign_key: SignKeyOption = None,
    trusted_key: TrustedKeyOption = None,
    unsigned: UnsignedOption = False,
    format: PublishFormatOption = PublishFormat.text,  # noqa: A002
    quiet: QuietOption = False,
) -> None:
    """Publish the built variants, one branch each.

    Compares the target with the build and prints the plan: which branches are created, updated or unchanged, and how
    much is sent. Then makes one commit per changed branch, main last, and reads each commit back. The commit's message
    says what changed, by which values of the records, and the quality before and after. Files that the target
    has already are not sent again: after an interruption, run the same command again. It builds nothing.

    The token for the Hub comes from HF_TOKEN, from `hf auth login` or from the identity of a CI job, the token for a
    git remote from PACKAGER_GIT_TOKEN.

    With --sign-key, each branch gets a signed statement over its files, and main one over all branches. A key that
    replaces another needs the old public key as --trusted-key.

    --dry-run --save-plan FILE saves the plan: the digests of the recipe, of every file and of the signed statements,
    and the head of every branch. It needs no token that may write, and of the key only the public part. --plan FILE
    compares everything with that plan again, before the first write, and publishes it, or names what has changed and
    writes nothing. After an interruption, run it again.

    Exits with 10 if a variant is not ready, a required loader has not passed or the target refuses, with 11 if a built
    folder or the published files were edited, with 7 if a folder fails the audit.
    """
    from packager.cli.publish_view import print_publish_plan
    from packager.pipeline.compare_published import compare_published
    from packager.pipeline.flow import publish

    if diff and not dry_run:
        raise typer.BadParameter("--diff is for --dry-run")
    terminal, recipe_file = open_recipe(recipe, quiet=quiet)
    # First: the passphrase leaves the environment.
    keys = signing_keys(sign_key, trusted_key, unsigned=unsigned, dry_run=dry_run)
    plan_file = _plan_file(save_plan, plan, dry_run=dry_run, tag=tag)
    options = options_of(dist, Device.cpu, None)
    report = publish(
        recipe_file,
        options,
        terminal,
        dry_run=dry_run,
        show_plan=lambda plan: print_publish_plan(plan, terminal.err),
        consent=ask_for_consent("publish", assume_yes=yes),
        tag=tag,
        keys=keys,
        plan_file=plan_file,
    )
    differences = compare_published(recipe_file, options, terminal) if diff else None
    _show_report(report, differences, format, plan or save_plan, terminal)


def _show_report(
    report: "PublishReport",
    differences: "Sequence[BranchDifference] | None",
    format: PublishFormat,  # noqa: A002
    plan_file: Path | None,
    terminal: "Terminal",
) -> None:
    from packager.cli.publish_markdown import publish_report_markdown
    from packager.cli.publish_view import print_publish_report, publish_report_json

    if format is PublishFormat.json:
        found = {} if differences is None else {"differences": [difference_json(each) for each in differences]}
        terminal.result(publish_report_json(report) | found)
    elif format is PublishFormat.markdown:
        terminal.write(publish_report_markdown(report, plan_file, differences or ()))
    else:
        print_publish_report(report, terminal.out)
        print_differences(differences or (), terminal.out, texts=True)


def _plan_file(save: Path | None, plan: Path | None, *, dry_run: bool, tag: str) -> "PlanFile | None":
    """Return the file of the plan that is saved or published, None if there is none.

    Raises:
        PublishError: the plan cannot be read.
    """
    from packager.pipeline.saved_publish import PlanFile
    from packager.publish.saved_plan import read_plan

    if save and (plan or not dry_run):
        raise typer.BadParameter("--save-plan is for --dry-run, without --plan")
    if plan and tag:
        raise typer.BadParameter("--plan has its own tag: leave out --tag")
    if plan:
        return PlanFile(path=plan, approved=read_plan(plan))
    return PlanFile(path=save) if save else None


def verify_published_command(
    repository: RepositoryAddress,
    branch: BranchesOption = None,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="Download, hash and audit every file, branch by branch, in the temporary folder (TMPDIR).",
        ),
    ] = False,
    loaders: Annotated[
        bool,
        typer.Option(
            "--loaders",
            help="Open each branch with the loaders that its record names; implies --full and needs torch.",
        ),
    ] = False,
    device: DeviceOption = Device.auto,
    trusted_key: TrustedKeyOption = None,
    min_release: MinReleaseOption = 1,
    cache: CacheOption = None,
    dist: DistOption = DIST,
    format: FormatOption = Format.text,  # noqa: A002
    quiet: QuietOption = False,
) -> None:
    """Check a published repository against its own records.

    Needs no build, no recipe and, without --loaders, no torch. In each branch, provenance.json must be the record of
    this repository and branch, and must list exactly the files of the branch with their sizes and sha256; the headers
    of the weights must be as declared. The card of main must list every branch with its figures; the card is not
    checked if --branch names other branches only.

    Without --full, the sha256 of a large file is the one that the server states, and only the header of the file is
    downloaded (a git-lfs server sends the whole file all the same).

    With --loaders, the loaders that the record of a branch names open the branch, and their logits must be those of our
    own float32 forward pass over the same files. A loader that cannot run on this machine is reported as not run.

    With --trusted-key, one of these keys must have signed the files of each branch, and on main the list of branches.

    Exits with 0 if nothing is wrong, with 8 if a loader failed, with 7 if anything else is wrong, with 10 if the
    repository cannot be read.
    """
    from packager.cli.published_view import print_published, published_json
    from packager.publish.published import verify_published
    from packager.publish.targets.resolve_target import resolve_target

    terminal = terminal_of(quiet=quiet)
    trust = trust_of(trusted_key, min_release)
    context = _runtime_context(cache, terminal) if loaders else None
    target = resolve_target(repository, dist, os.environ, terminal.log)
    report = verify_published(
        target, terminal.log, branches=branch or (), full=full, loaders=context, device=device.value, trust=trust
    )
    if format is Format.json:
        terminal.result(published_json(report))
    else:
        print_published(report, terminal.out)
    if not report.passed:
        raise typer.Exit(LoaderError.exit_code if report.loader_failed else AuditError.exit_code)


def _runtime_context(cache: Path | None, terminal: "Terminal") -> "RuntimeContext":
    from packager.pipeline.build_extra import require_build_extra
    from packager.prove.environments import RuntimeContext

    require_build_extra()
    options = options_of(DIST, Device.auto, cache)
    scratch = Path(tempfile.gettempdir())
    return RuntimeContext(cache=options.cache, scratch=scratch, environ=options.environ, log=terminal.log)


def rollback_command(
    repository: RepositoryAddress,
    branch: BranchesOption = None,
    to: Annotated[
        str,
        typer.Option(
            metavar="COMMIT|TAG",
            help="Go back to this commit or tag: of the one --branch, or of main for the whole release.",
        ),
    ] = "",
    again: Annotated[bool, typer.Option("--again", help="Go back one step further than the last rollback.")] = False,
    dry_run: DryRunOption = False,
    yes: YesOption = False,
    sign_key: SignKeyOption = None,
    trusted_key: TrustedKeyOption = None,
    unsigned: UnsignedOption = False,
    dist: DistOption = DIST,
    format: FormatOption = Format.text,  # noqa: A002
    quiet: QuietOption = False,
) -> None:
    """Put published branches back to an earlier state.

    Makes one new commit per branch, variants first and main last; nothing is deleted from the history.

    With --branch, each named branch goes back to the commit before its head. Without --branch, the whole release goes
    back to the release before it. A release is published with main last. So every branch gets the content that it had
    when the commit before main's head was made, or, if the last publish was interrupted before main, when main's head
    was made. Branches that did not exist then are left alone, and so are branches whose head has another author.

    A signed repository needs --sign-key: the branches keep the statements that they had, and main gets a statement over
    them with the next number, so readers accept the restored state as a new release. With --unsigned the statements are
    those of the earlier release, which readers with --min-release report.

    If a rollback is killed, run the same command again: it skips the branches that are back already. It asks for
    confirmation before others can see a change; without a terminal, --yes is needed. Exits with 10 if there is nothing
    to go back to, if others commit to a branch at the same time, or if the target refuses.
    """
    from packager.cli.rollback_view import print_rollback_plan, print_rollback_report, rollback_report_json
    from packager.publish.rollback import RollbackRequest, RollbackSigner, rollback
    from packager.publish.targets.resolve_target import resolve_target
    from packager.system.scratch import ScratchFolder

    terminal = terminal_of(quiet=quiet)
    keys = signing_keys(sign_key, trusted_key, unsigned=unsigned, dry_run=dry_run)
    target = resolve_target(repository, dist, os.environ, terminal.log)
    with ScratchFolder("signed") as scratch:
        report = rollback(
            target,
            RollbackRequest(branches=tuple(branch or ()), to=to, further_back=again),
            terminal.log,
            dry_run=dry_run,
            signer=RollbackSigner(keys.signer, keys, scratch.path) if keys.signer else None,
            unsigned=unsigned,
            show_plan=lambda plan: print_rollback_plan(plan, terminal.err),
            confirm=ask_for_consent("put back", assume_yes=yes or not target.is_public),
        )
    if format is Format.json:
        terminal.result(rollback_report_json(report))
    else:
        print_rollback_report(report, terminal.out)
