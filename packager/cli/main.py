"""The command line: one subcommand per stage or pair of stages; the one place that catches errors and sets exit codes.

Results go to standard output (`--format json` for machines), talk to standard error. Everything heavier than typer is
imported inside the command that needs it, so that `--help` answers at once.
"""

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from packager import __version__
from packager.cli.options import (
    DIST,
    CacheOption,
    Device,
    DeviceOption,
    DistOption,
    Format,
    FormatOption,
    GpuMemoryOption,
    QuietOption,
    RecipePath,
    YesOption,
    open_recipe,
    options_of,
    terminal_of,
)
from packager.cli.publishing import consent, publish, rollback, verify_published
from packager.errors import AuditError, LoaderError, MachineError, PackagerError

# Looking for plugins reads the metadata of every installed package: 25 of 500 ms of `plan`, and there are none to find.
os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
# Quantizing takes and frees pieces of many sizes; without this, a fifth of a GPU's memory is lost in the gaps.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
# Another server than the Hub's own does not speak its newer protocol, and the client does not ask.
if os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/") != "https://huggingface.co":
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
# The Hub client's bars are for people.
if not sys.stderr.isatty():
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

_INTERRUPTED = 130
_EPILOG = """
\b
Exit codes:
  0   done
  2   the command line or the recipe is wrong
  3   the base model cannot be read, or is not what the recipe says
  4   the calibration or evaluation text cannot be used
  5   a linear cannot be quantized
  6   a checkpoint folder cannot be written
  7   a checkpoint folder does not keep the format's contract
  8   a loader failed, or computed something else
  9   the model card cannot be rendered
  10  the publishing target refused, or a variant is not ready for it
  11  a file in the output folder was edited, or another run is under way
  12  this machine lacks something: a GPU, memory, disk space, git, a package
  130 interrupted

A first run, on any machine: packager release recipes/demo-llama.yaml
"""
# What the file system answers to a wrong --dist; a full disk is reported by whoever writes.
_REFUSALS = (PermissionError, FileExistsError, NotADirectoryError, IsADirectoryError)


class _Commands(TyperGroup):
    """Turn what a command raises into a message and an exit code."""

    def invoke(self, ctx: Any) -> Any:  # typer's releases disagree on the module of Context
        """Run the command that was asked for."""
        try:
            return super().invoke(ctx)
        except PackagerError as error:
            raise _reported(error) from error
        except _REFUSALS as error:
            if error.filename is None:
                raise
            refusal = MachineError("cannot be used", where=str(error.filename), why=error.strerror or "")
            raise _reported(refusal) from error
        except KeyboardInterrupt:
            sys.stderr.write("interrupted; what is finished is kept, run the same command to go on\n")
            raise typer.Exit(_INTERRUPTED) from None


def _reported(error: PackagerError) -> typer.Exit:
    terminal_of().error(error)
    return typer.Exit(error.exit_code)


app = typer.Typer(
    name="packager",
    cls=_Commands,
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,  # plain help: half the time of boxes, and the same text at every width
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog=_EPILOG,
)


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

    A recipe names the base model, the calibration text and the variants. `plan` shows what it means, `build` quantizes,
    measures, proves and writes the cards, `publish` makes the branches. Every command can be interrupted and run again.
    """


@app.command()
def plan(recipe: RecipePath, format: FormatOption = Format.text) -> None:  # noqa: A002 - the option's name
    """Show what a recipe means: sizes, memory, disk, loaders.

    Works offline and without torch, from the base model's config.json alone. Exits with 2 if the recipe is wrong or
    cannot be built from this model; every problem is named with its place.
    """
    from packager.cli.plan_view import plan_json, print_plan
    from packager.pipeline.plan import make_plan

    terminal, recipe_file = open_recipe(recipe)
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
    gpu_memory: GpuMemoryOption = None,
    cache: CacheOption = None,
    format: FormatOption = Format.text,  # noqa: A002
    quiet: QuietOption = False,
) -> None:
    """Quantize, measure and prove every variant.

    Writes the cards, too. Publishes nothing. What is already done is not done again; a killed build goes on after its
    last finished block. Exits with 8 if a loader computed something else than the checkpoint says; one that cannot run
    here is reported and is no failure.
    """
    from packager.cli.status_view import print_status
    from packager.pipeline.flow import build as run_build
    from packager.pipeline.status import status_json

    terminal, recipe_file = open_recipe(recipe, quiet=quiet)
    options = options_of(dist, device, cache, gpu_memory)
    run_build(recipe_file, options, terminal)
    if format is Format.json:
        terminal.result(status_json(recipe_file, options))
    else:
        print_status(recipe_file, options, terminal.out)


@app.command()
def audit(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A checkpoint folder, ours or anybody's.", exists=True, file_okay=False, readable=False
        ),
    ],
    weights_only: Annotated[
        bool, typer.Option("--weights-only", help="Do not expect README.md and provenance.json.")
    ] = False,
    format: FormatOption = Format.text,  # noqa: A002
) -> None:
    """Check a GPTQ folder for what runtimes refuse.

    Needs no torch and reads headers and small tensors only, besides hashing the files that provenance.json lists.
    Exits with 0 if there is no error (warnings may be), with 7 if there is one.
    """
    from packager.cli.audit_view import print_report, report_json
    from packager.prove.audit import audit as run_audit

    terminal = terminal_of()
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
    """Let the loaders prove the built variants again.

    Their logits are compared with our own float32 forward; receipts and cards take over the new results. Exits with 0
    if every required loader passed and no other failed, else with 8; with 10 if a variant is not built.
    """
    from packager.cli.status_view import print_loaders
    from packager.pipeline.flow import reverify

    terminal, recipe_file = open_recipe(recipe)
    receipts = reverify(recipe_file, options_of(dist, device, cache), terminal)
    if format is Format.json:
        terminal.result(
            {
                receipt.provenance.branch: [record.model_dump() for record in receipt.provenance.loaders]
                for receipt in receipts
            }
        )
    else:
        print_loaders(receipts, terminal.out)
    records = [record for receipt in receipts for record in receipt.provenance.loaders]
    if any(record.status == "failed" or (record.required and record.status != "passed") for record in records):
        raise typer.Exit(LoaderError.exit_code)


@app.command()
def card(
    recipe: RecipePath,
    branch: Annotated[str, typer.Option(help="Which branch's card to print.")] = "main",
    dist: DistOption = DIST,
    format: FormatOption = Format.text,  # noqa: A002
) -> None:
    """Render the built variants' cards again and print one.

    For when the recipe's words or the templates have changed: no figure does, they come from the receipts. Exits with
    10 if a variant is not built and proven, with 11 if somebody edited a card by hand.
    """
    from packager.pipeline.flow import render

    terminal, recipe_file = open_recipe(recipe)
    text = render(recipe_file, options_of(dist, Device.cpu, None), terminal, branch=branch)
    if format is Format.json:
        terminal.result({"branch": branch, "card": text})
    else:
        terminal.write(text)


app.command()(publish)
app.command("verify-published")(verify_published)
app.command()(rollback)


@app.command()
def status(
    recipe: RecipePath,
    dist: DistOption = DIST,
    format: FormatOption = Format.text,  # noqa: A002
) -> None:
    """Show what is built, measured, proven and published.

    Changes nothing. Exits with 0 also when nothing is built; `--format json` names the stages that are missing.
    """
    from packager.cli.status_view import print_status
    from packager.pipeline.status import status_json

    terminal, recipe_file = open_recipe(recipe)
    options = options_of(dist, Device.cpu, None)
    if format is Format.json:
        terminal.result(status_json(recipe_file, options))
    else:
        print_status(recipe_file, options, terminal.out)


@app.command()
def release(
    recipes: Annotated[list[Path], typer.Argument(metavar="RECIPE", help="The recipes to build and publish.")],
    dist: DistOption = DIST,
    device: DeviceOption = Device.auto,
    gpu_memory: GpuMemoryOption = None,
    cache: CacheOption = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="A recipe that this machine cannot build is a failure.")
    ] = False,
    yes: YesOption = False,
) -> None:
    """Build and publish what this machine can build.

    It says why it cannot build the others; nothing is built before all recipes are read and planned. Exits with 0 also
    when recipes were left out; with `--strict` that is an error (12), before anything is built. A failed build or
    publish ends the run with its own code.
    """
    from packager.cli.publish_view import print_plan
    from packager.cli.status_view import print_status
    from packager.pipeline.release import release as run_release

    terminal = terminal_of()
    run_release(
        recipes,
        options_of(dist, device, cache, gpu_memory),
        terminal,
        strict=strict,
        attended=yes or sys.stdin.isatty(),
        show_plan=lambda plan: print_plan(plan, terminal.err),
        show_status=lambda recipe_file, options: print_status(recipe_file, options, terminal.out),
        consent=consent("publish", yes=yes),
    )


def main() -> None:
    """Entry point of the `packager` command."""
    app()
