"""The command line: one subcommand per stage or pair of stages; the one place that catches errors and sets exit codes.

Results go to standard output (`--format json` for machines), talk to standard error. Everything heavier than typer is
imported inside the command that needs it, so that `--help` answers at once.
"""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperGroup

from packager import __version__
from packager.errors import LoaderError, PackagerError

if TYPE_CHECKING:
    from packager.build_state import Options
    from packager.progress import Terminal
    from packager.recipe.file import RecipeFile

_INTERRUPTED = 130


class _Commands(TyperGroup):
    """Turn what a command raises into a message and an exit code."""

    def invoke(self, ctx: typer.Context) -> object:
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except PackagerError as error:
            _terminal().error(error)
            raise typer.Exit(error.exit_code) from error
        except KeyboardInterrupt:
            sys.stderr.write("interrupted; what is finished is kept, run the same command to go on\n")
            raise typer.Exit(_INTERRUPTED) from None


app = typer.Typer(
    name="packager",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="A first run, on any machine: packager release recipes/demo-llama.yaml",
)


class Format(StrEnum):
    """How a result is printed."""

    text = "text"
    json = "json"


class Device(StrEnum):
    """Where to compute."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe file, e.g. recipes/demo-llama.yaml.")]
FormatOption = Annotated[
    Format, typer.Option("--format", help="text for people, json for machines (on standard output).")
]
DistOption = Annotated[Path, typer.Option("--dist", help="Output folder: builds, receipts, the local target.")]
DeviceOption = Annotated[
    Device, typer.Option("--device", help="Where to compute; auto takes a CUDA GPU if there is one.")
]
CacheOption = Annotated[
    Path | None,
    typer.Option("--cache", help="Where the loaders' environments are kept.  [default: ~/.cache/gptq-packager]"),
]
QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Say nothing but results and errors.")]
DIST = Path("dist")


def _version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"packager {__version__}\n")
        raise typer.Exit


@app.callback()
def top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Turn an fp16 language model into a published repository of GPTQ variants, one branch each.

    A recipe names the base model, the calibration text and the variants. [bold]plan[/bold] shows what it means,
    [bold]build[/bold] quantizes, measures, proves and writes the cards, [bold]publish[/bold] makes the branches. Every
    command can be interrupted and run again.
    """


@app.command()
def plan(recipe: RecipePath, format: FormatOption = Format.text) -> None:  # noqa: A002 - the option's name
    """Show what a recipe means: branches, exact sizes, memory, disk, and which loaders can take each variant.

    Works offline and without torch, from the base model's config.json alone.
    """
    from packager.plan import make_plan
    from packager.plan_view import plan_json, print_plan

    terminal, recipe_file = _open(recipe)
    made = make_plan(recipe_file)
    if format is Format.json:
        terminal.result(plan_json(made))
    else:
        print_plan(made, terminal.out)


@app.command()
def build(
    recipe: RecipePath,
    dist: DistOption = DIST,
    device: DeviceOption = Device.auto,
    cache: CacheOption = None,
    format: FormatOption = Format.text,  # noqa: A002
    quiet: QuietOption = False,
) -> None:
    """Quantize every variant, measure it, let the loaders prove it, and write its card. Publishes nothing.

    What is already done is not done again; a killed build goes on after its last finished block.
    """
    from packager.pipeline import build as run_build
    from packager.status import print_status, status_json

    terminal, recipe_file = _open(recipe, quiet=quiet)
    options = _options(dist, device, cache)
    run_build(recipe_file, options, terminal)
    if format is Format.json:
        terminal.result(status_json(recipe_file, options))
    elif not quiet:
        print_status(recipe_file, options, terminal.out)


@app.command()
def audit(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A checkpoint folder, ours or anybody's.")],
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Do not expect README.md and provenance.json.")
    ] = False,
    format: FormatOption = Format.text,  # noqa: A002
) -> None:
    """Check a GPTQ folder against everything that runtimes are known to refuse; exit code 0 is a pass, 7 a fail.

    Needs no torch and reads headers and small tensors only, besides hashing the files that provenance.json lists.
    """
    from packager.audit import audit as run_audit
    from packager.audit.view import print_report, report_json
    from packager.errors import AuditError, SourceError

    terminal = _terminal()
    if not folder.is_dir():
        raise SourceError("not a folder", where=str(folder), hint="name the folder that holds config.json")
    report = run_audit(folder, complete=not weights_only)
    if format is Format.json:
        terminal.result(report_json(report))
    else:
        print_report(report, terminal.out)
    if not report.passed:
        raise typer.Exit(AuditError.exit_code)


@app.command()
def verify(
    recipe: RecipePath,
    dist: DistOption = DIST,
    device: DeviceOption = Device.auto,
    cache: CacheOption = None,
    format: FormatOption = Format.text,  # noqa: A002
) -> None:
    """Run the recipe's loaders again over the built variants and compare their logits with our own float32 forward.

    The receipts and cards take over the new results. The exit code is 0 only if every loader that ran passed and every
    required one ran.
    """
    from packager.pipeline import reverify
    from packager.status import print_loaders

    terminal, recipe_file = _open(recipe)
    receipts = reverify(recipe_file, _options(dist, device, cache), terminal)
    if format is Format.json:
        terminal.result(
            {
                receipt.provenance.branch: [record.model_dump() for record in receipt.provenance.loaders]
                for receipt in receipts
            }
        )
    else:
        print_loaders(receipts, terminal.out)
    if any(record.required and record.status != "passed" for r in receipts for record in r.provenance.loaders):
        raise typer.Exit(LoaderError.exit_code)


@app.command()
def card(
    recipe: RecipePath,
    branch: Annotated[str, typer.Option(help="Which branch's card to print.")] = "main",
    dist: DistOption = DIST,
    format: FormatOption = Format.text,  # noqa: A002
) -> None:
    """Render the cards again from the receipts (the recipe's words or the templates changed) and print one."""
    from packager.pipeline import render

    terminal, recipe_file = _open(recipe)
    text = render(recipe_file, _options(dist, Device.cpu, None), terminal, branch=branch)
    if format is Format.json:
        terminal.result({"branch": branch, "card": text})
    else:
        sys.stdout.write(text)


@app.command()
def publish(
    recipe: RecipePath,
    dist: DistOption = DIST,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would change and change nothing.")] = False,
    format: FormatOption = Format.text,  # noqa: A002
    quiet: QuietOption = False,
) -> None:
    """Bring the built variants to the recipe's target: one commit per changed branch, main last. Builds nothing.

    Refuses a folder that was edited after the build and a variant that a required loader has not passed.
    """
    from packager.pipeline import publish as run_publish
    from packager.publish_view import print_report, report_json

    terminal, recipe_file = _open(recipe, quiet=quiet)
    report = run_publish(recipe_file, _options(dist, Device.cpu, None), terminal, dry_run=dry_run)
    if format is Format.json:
        terminal.result(report_json(report))
    else:
        print_report(report, terminal.out)


@app.command()
def status(
    recipe: RecipePath,
    dist: DistOption = DIST,
    format: FormatOption = Format.text,  # noqa: A002
) -> None:
    """Show, per branch, what is built, measured, proven and published. Changes nothing."""
    from packager.status import print_status, status_json

    terminal, recipe_file = _open(recipe)
    options = _options(dist, Device.cpu, None)
    if format is Format.json:
        terminal.result(status_json(recipe_file, options))
    else:
        print_status(recipe_file, options, terminal.out)


@app.command()
def release(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE...", help="The recipes to build and publish.")],
    dist: DistOption = DIST,
    device: DeviceOption = Device.auto,
    cache: CacheOption = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="A recipe that this machine cannot build is a failure.")
    ] = False,
) -> None:
    """Build and publish every recipe that this machine can build, and say why it cannot build the others."""
    from packager.release import release as run_release

    run_release(recipes, _options(dist, device, cache), _terminal(), strict=strict)


def _terminal(*, quiet: bool = False) -> "Terminal":
    from packager.progress import Terminal

    return Terminal(quiet=quiet)


def _open(recipe: Path, *, quiet: bool = False) -> "tuple[Terminal, RecipeFile]":
    from packager.recipe.file import RecipeFile

    return _terminal(quiet=quiet), RecipeFile.load(recipe)


def _options(dist: Path, device: Device, cache: Path | None) -> "Options":
    from packager.build_state import Options

    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return Options(
        dist=dist,
        cache=cache or base / "gptq-packager",
        device=device.value,
        environ=dict(os.environ),
    )


def main() -> None:
    """Entry point of the `packager` command."""
    app()
